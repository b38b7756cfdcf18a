"""A trained diffusion as a file: ema.pth, the mean weights and what they belong to."""

import argparse
from pathlib import Path

import torch

from ddpm.diffusion import GaussianDiffusion
from ddpm.unet import UNet
from shared_utils import checkpoint
from shared_utils.cli import UserError
from shared_utils.runs import find_output


def find_checkpoint(args: argparse.Namespace) -> Path:
    """`--ckpt`, or train_ddpm.py's mean weights. Errors: `UserError` with the command that makes them."""
    return Path(args.ckpt) if args.ckpt else find_output(args, "train_ddpm", "ema.pth")


def load_model(path: str | Path, device: torch.device) -> tuple[UNet, GaussianDiffusion, dict]:
    """The network in evaluation mode, the diffusion it was trained for, and the checkpoint.

    Errors: `UserError` when the file is missing, damaged, or of another network.
    """
    state = checkpoint.load(path, device=device)
    try:
        config = dict(state["config"])
        diffusion = GaussianDiffusion(*(config.pop(name) for name in ("timesteps", "schedule", "prediction")))
        model = UNet(**config)
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, ValueError, RuntimeError):  # a part is missing, or does not fit the others
        raise UserError(f"{path} holds no diffusion of ddpm") from None
    return model.to(device, memory_format=torch.channels_last).eval(), diffusion, state
