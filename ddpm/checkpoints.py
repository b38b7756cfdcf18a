"""A trained diffusion as a file: ema.pth, the mean weights and the settings they belong to."""

import argparse
import hashlib
from pathlib import Path

import torch

from ddpm.diffusion import GaussianDiffusion
from ddpm.unet import UNet
from shared_utils import checkpoint
from shared_utils.cli import UserError
from shared_utils.runs import find_output


def add_ckpt_flag(parser: argparse.ArgumentParser) -> None:
    """`--ckpt`, which `find_checkpoint` reads."""
    parser.add_argument("--ckpt", metavar="FILE", help="a trained model (default: train_ddpm.py's ema.pth)")


def find_checkpoint(args: argparse.Namespace) -> Path:
    """`--ckpt`, or train_ddpm.py's mean weights. Errors: `UserError` with the command that makes them."""
    return Path(args.ckpt) if args.ckpt else find_output(args, "train_ddpm", "ema.pth")


def load_model(
    args: argparse.Namespace, device: torch.device, val_size: int | None = None
) -> tuple[UNet, GaussianDiffusion, dict]:
    """The network in evaluation mode, the diffusion it was trained for, and the checkpoint.

    val_size: how many images the caller takes for held out. Errors: `UserError` when the file is missing, damaged, of
    another network, or trained with another `--dataset` or another number of images held out.
    """
    path = find_checkpoint(args)
    state = checkpoint.load(path, device=device)
    try:
        config = dict(state["config"])
        learned = {name: config.pop(name) for name in ("dataset", "val_size")}
        diffusion = GaussianDiffusion(*(config.pop(name) for name in ("timesteps", "schedule", "prediction")))
        model = UNet(**config)
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, ValueError, RuntimeError):  # a part is missing, or does not fit the others
        raise UserError(f"{path} holds no diffusion of ddpm") from None
    checkpoint.refuse_other_data(path, learned, {"dataset": args.dataset, "val_size": val_size or learned["val_size"]})
    return model.to(device, memory_format=torch.channels_last).eval(), diffusion, state


def fingerprint(model: UNet) -> str:
    """A hash of the weights: samples carry it to say which model drew them."""
    found = hashlib.sha256()
    for weight in model.state_dict().values():
        found.update(weight.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
