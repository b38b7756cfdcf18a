"""Where a trained model and its data are: best.pth, beside it its tokenizer.json; the folder of prepare_data.py."""

import argparse
from pathlib import Path

import torch

from shared_utils import checkpoint
from shared_utils.cli import UserError
from shared_utils.runs import find_output
from transformer_lm.model import TransformerLM
from transformer_lm.tokens import Tokens, load_tokens


def add_ckpt_flag(parser: argparse.ArgumentParser) -> None:
    """`--ckpt`, which `find_checkpoint` reads."""
    parser.add_argument("--ckpt", metavar="FILE", help="a trained model (default: train.py's best.pth)")


def find_checkpoint(args: argparse.Namespace) -> Path:
    """`--ckpt`, or train.py's best weights. Errors: `UserError` with the command that makes them."""
    return Path(args.ckpt) if args.ckpt else find_output(args, "train", "best.pth")


def add_data_flag(parser: argparse.ArgumentParser) -> None:
    """`--data`, which `find_data` reads."""
    about = "the texts as prepare_data.py wrote them, not the folder of all data sets (default: prepare_data.py's)"
    parser.add_argument("--data", metavar="FOLDER", help=about)


def find_data(args: argparse.Namespace) -> Path:
    """The folder in `--data`, or prepare_data.py's. Errors: `UserError` with the command that makes it."""
    return Path(args.data) if args.data else find_output(args, "prepare_data", "meta.json").parent


def load_model(path: str | Path, device: torch.device) -> tuple[TransformerLM, Tokens, dict]:
    """The model of a checkpoint in evaluation mode, its tokens, and the checkpoint.

    Errors: `UserError` when the file is missing, damaged or no language model, or the tokenizer is not its own.
    """
    path = Path(path)
    state = checkpoint.load(path, device=device)
    try:
        config = dict(state["config"])
        kind = config.pop("tokens")
        del config["data"]
        model = TransformerLM(**config)
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, ValueError, RuntimeError):  # a part is missing, or does not fit the others
        raise UserError(f"{path} holds no language model of transformer_lm") from None
    tokens = load_tokens(path.with_name("tokenizer.json"))
    if (tokens.kind, tokens.vocab_size) != (kind, config["vocab_size"]):
        raise UserError(
            f"{path} was trained with {config['vocab_size']} {kind} tokens; tokenizer.json beside it has "
            f"{tokens.vocab_size} {tokens.kind} tokens"
        )
    return model.to(device).eval(), tokens, state
