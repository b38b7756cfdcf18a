"""Networks that start from pretrained weights: those in a file, or torchvision's for ImageNet.

Shapes: B images, F features.
"""

import contextlib
import io
import textwrap
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights

from cnn_cifar.resnet import BasicBlock, ResNet
from shared_utils.cli import UserError
from shared_utils.data import network_timeout


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a file of tensors, or from a checkpoint's `model`. Errors: `UserError` when it is neither."""
    if not Path(path).is_file():
        raise UserError(f"no weights at {path}; --source fashion pretrains a network here, without a file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises anything from KeyError to UnpicklingError on a damaged file
        raise UserError(f"{path} is damaged or no file of weights ({type(error).__name__})") from None
    state = state.get("model", state) if isinstance(state, dict) else state
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state dict: names and tensors")
    return state


def imagenet_weights(name: str, folder: str | Path, instead: str) -> dict[str, Tensor]:
    """torchvision's ImageNet weights for its model `name`, under torchvision's file name in `folder`.

    They are downloaded when they are not there. instead: what else the user can do.
    Errors: `UserError` when they are neither there nor can be downloaded, or are damaged.
    """
    url = get_model_weights(name).IMAGENET1K_V1.url
    path = Path(folder) / Path(url).name
    if path.is_file():
        return read_weights(path)
    try:
        with network_timeout(), contextlib.redirect_stdout(io.StringIO()):  # torch says what it will try
            options = {"map_location": "cpu", "progress": False, "check_hash": True, "weights_only": True}
            return torch.hub.load_state_dict_from_url(url, str(folder), **options)
    except Exception as error:  # anything from URLError to a hash that is wrong
        missing = f"{path.name} is not in {folder} and could not be downloaded from {url} ({error})"
        raise UserError(f"{missing}; put it there, {instead}") from None


def take_weights(network: nn.Module, weights: dict[str, Tensor], refusal: str) -> None:
    """Load the state dict. Errors: `UserError`, the refusal and the first difference, when it is another network's."""
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        first = textwrap.shorten(str(error).splitlines()[1], 160, placeholder=" …")
        raise UserError(f"{refusal}: {first}") from None


def backbone(width: int, weights: dict[str, Tensor] | None, origin: str) -> ResNet:
    """A ResNet-18 without its last layer: normalised images (B, 3, H, W) → features (B, F), F = 8 width.

    weights: None for a random start. Errors: `UserError` when they are those of another network.
    """
    network = ResNet(BasicBlock, (2, 2, 2, 2), num_classes=1, cifar_stem=False, residual=True, width=width)
    network.fc = nn.Identity()
    if weights is not None:
        inner = {name: value for name, value in weights.items() if not name.startswith("fc.")}
        take_weights(network, inner, f"{origin} is no ResNet-18 of {width} channels and up")
    return network
