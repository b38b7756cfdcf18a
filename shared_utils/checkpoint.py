"""Checkpoints that survive a kill, and that execute nothing when they are read.

`save` and `load` are for PyTorch (`weights_only=True`: tensors, numbers, strings, lists, dicts), `save_arrays` and
`load_arrays` for NumPy (`.npz`, no pickle). Writing goes to a file beside, then renames it.
"""

import random
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from shared_utils.cli import UserError
from shared_utils.runs import replacing


def save(path: str | Path, *, rng: np.random.Generator | None = None, config: dict | None = None, **state) -> None:
    """Save `state` (say `model=model.state_dict(), optimizer=…, epoch=3`), all random states and the model's `config`.

    rng: the script's NumPy generator, so that a resumed run draws on where this one stopped.
    config: what the model was built with; `load` compares it.
    """
    import torch

    states = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    if rng is not None:
        states["numpy"] = rng.bit_generator.state
    with replacing(path) as beside:
        torch.save({**state, "config": config or {}, "random_states": states}, beside)


def load(path: str | Path, *, device="cpu", expect: dict | None = None) -> dict:
    """Read what `save` wrote, tensors on `device`.

    expect: the `config` the caller's model has. Errors: `UserError` in one line when the file is missing, damaged, no
    checkpoint of ours (a pickle that would run code is refused, not run), or of another configuration.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises anything from KeyError to UnpicklingError on a damaged file
        raise UserError(f"{path} is damaged or no checkpoint of ours ({type(error).__name__})") from None
    if not isinstance(state, dict) or "config" not in state:
        raise UserError(f"{path} is no checkpoint of ours")
    for key, wanted in (expect or {}).items():
        if state["config"].get(key) != wanted:
            raise UserError(f"{path} has {key} = {state['config'].get(key)}, this model has {key} = {wanted}")
    return state


def restore_random_states(state: dict, rng: np.random.Generator | None = None) -> None:
    """Put every random generator back to where it was when `state` (from `load`) was saved."""
    import torch

    states = state["random_states"]
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([one.cpu() for one in states["cuda"]])
    if rng is not None:
        rng.bit_generator.state = states["numpy"]


def save_arrays(path: str | Path, **arrays) -> None:
    """Save named arrays, numbers and strings as one compressed `.npz`. Errors: `ValueError` for an object array."""
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise ValueError(f"{name} is an object array, which only a pickle could hold")
    with replacing(path) as beside:
        np.savez_compressed(beside, **arrays)


def load_arrays(path: str | Path, required: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """Read an `.npz`. Errors: `UserError` when it is missing, damaged, or lacks one of the `required` names."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged or no .npz file ({type(error).__name__})") from None
    missing = [name for name in required if name not in arrays]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: it was written by something else")
    return arrays
