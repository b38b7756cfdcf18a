"""Networks as files: what a training script writes, and what every other script reads."""

import argparse
import contextlib
from pathlib import Path

from torch import nn

from cnn_cifar.fast_net import FastNet
from cnn_cifar.inputs import SHAPE
from cnn_cifar.models import AllCNN, pixel_resnet
from shared_utils import checkpoint
from shared_utils.cli import UserError
from shared_utils.data import Images, load_images
from shared_utils.runs import find_output

NETWORKS = {"allcnn_t": AllCNN, "fast_net": FastNet, "resnet": pixel_resnet}


def add_ckpt_flag(parser: argparse.ArgumentParser) -> None:
    """`--ckpt`, which `find_checkpoint` reads."""
    parser.add_argument(
        "--ckpt", metavar="FILE", help="a trained network (default: allcnn.py's, or else fast_cifar.py's)"
    )


def find_checkpoint(args: argparse.Namespace) -> Path:
    """`--ckpt`, or allcnn.py's network, or else fast_cifar.py's.

    Errors: `UserError` with fast_cifar.py's command where there is none of them.
    """
    if args.ckpt:
        return Path(args.ckpt)
    for script, name in (("allcnn", "allcnn_t_best.pth"), ("fast_cifar", "best.pth")):
        with contextlib.suppress(UserError):
            return find_output(args, script, name)
    return find_output(args, "fast_cifar", "best.pth")


def load_network(path: str | Path, device="cpu") -> tuple[nn.Module, dict]:
    """The network of a checkpoint, in evaluation mode on `device`, and the checkpoint: `config`, `classes`, `title`.

    Errors: `UserError` when the file is missing, damaged, or holds no network of this folder.
    """
    state = checkpoint.load(path, device=device)
    try:
        config = dict(state["config"])
        network = NETWORKS[config.pop("network")](**config)
        network.load_state_dict(state["model"])
    except (KeyError, TypeError, ValueError, RuntimeError):  # a part is missing, or does not fit the others
        raise UserError(f"{path} holds no network of cnn_cifar ({', '.join(NETWORKS)})") from None
    if not {"classes", "title"} <= state.keys():
        raise UserError(f"{path} does not say which classes its network knows")
    return network.to(device).eval(), state


def load_test(args: argparse.Namespace, path: str | Path, state: dict) -> Images:
    """The test images that the flags ask for. Errors: `UserError` when the network at `path` knows other classes."""
    test = load_images(args.dataset, "test", args.data_dir, shape=SHAPE)
    if list(test.classes) != state["classes"]:
        raise UserError(f"{path} knows the classes {', '.join(state['classes'])}; --dataset {args.dataset} has others")
    return test
