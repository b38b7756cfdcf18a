"""A trained autoencoder's file: what `ae_experiments.py` writes and the other scripts read."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autoencoder.fitting import Recipe, codes
from autoencoder.inputs import pixels
from autoencoder.models import PART, Autoencoder
from shared_utils import checkpoint
from shared_utils.cli import UserError
from shared_utils.runs import find_output

VARIANTS = {"baseline": "ae_experiments", "regularised": "ae_experiments_regularised"}
VARIANTS |= {"denoising": "ae_experiments_denoising"}  # variant → the folder its run writes to


@dataclass(frozen=True)
class Trained:
    """An autoencoder with its recipe, and its mean squared error on the validation images."""

    model: Autoencoder
    recipe: Recipe
    val_recon: float


def save_trained(path: Path, trained: Trained, args) -> None:
    """Write the model with its recipe and the flags `--dataset` and `--val-size` that it was trained with."""
    data = {"dataset": args.dataset, "val_size": args.val_size}
    state = {"model": trained.model.state_dict(), "recipe": trained.recipe.as_dict(), "val_recon": trained.val_recon}
    checkpoint.save(path, config=trained.model.config, data=data, **state)


def find_trained(args, variant: str = "baseline") -> Path:
    """The default checkpoint of `ae_experiments.py --variant …`; if it is missing, `UserError` with that command."""
    return find_output(args, VARIANTS[variant], "best.pth", made_by=f"ae_experiments.py --variant {variant}")


def load_trained(path: str | Path, args, in_features: int, device: torch.device | str = "cpu") -> Trained:
    """Read what `save_trained` wrote, for images of `in_features` pixels.

    Errors: `UserError` in one line when the file is missing or damaged, when it was trained on other images than
    `--dataset` and `--val-size` name (what it was trained on would pass for unseen), or takes other dimensions.
    """
    state = checkpoint.load(path, device=device)
    if not {"model", "recipe", "data", "val_recon"} <= state.keys() or "enc_dims" not in state["config"]:
        raise UserError(f"{path} is no checkpoint of autoencoder/ae_experiments.py")
    checkpoint.refuse_other_data(path, state["data"], vars(args))
    if state["config"]["in_features"] != in_features:
        raise UserError(f"{path} takes {state['config']['in_features']} pixels, these images have {in_features}")
    if state["recipe"].keys() != Recipe().as_dict().keys():
        raise UserError(f"{path} was written by another version of ae_experiments.py; train again")
    recipe = Recipe(**{**state["recipe"], "enc_dims": tuple(state["recipe"]["enc_dims"])})
    model = recipe.build(0, in_features).to(device)
    if model.config != state["config"]:
        raise UserError(f"{path} is damaged: its recipe builds another network than its weights are of")
    model.load_state_dict(state["model"], source=path)
    return Trained(model, recipe, state["val_recon"])


@torch.no_grad()
def process(model: Autoencoder, x: Tensor, y: Tensor, dataset: str) -> dict[str, np.ndarray | str]:
    """What is stored of the images x, uint8 (N, D), and their labels y (N,).

    {"Z": codes (N, K), "Yhat": reconstructions (N, D), "mse": (N,), "y": (N,), "dataset"}; in x's order.
    """
    z = codes(model, x)  # (N, K)
    output = model.decode(z)  # (N, D)
    parts = zip(output.split(PART), x.split(PART), strict=True)
    mse = torch.cat([(part - pixels(target)).square_().mean(1) for part, target in parts])  # (N,)
    arrays = {"Z": z, "Yhat": output, "mse": mse, "y": y}
    return {**{name: value.cpu().numpy() for name, value in arrays.items()}, "dataset": dataset}
