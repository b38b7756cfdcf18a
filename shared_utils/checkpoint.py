"""Checkpoints that survive a kill, and that execute no code when they are read.

`save` and `load` are for PyTorch (`weights_only=True`: tensors, numbers, strings, lists, dicts), `save_arrays` and
`load_arrays` for NumPy (`.npz`, no pickle). A file is written under another name, then renamed.
"""

import random
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from shared_utils.cli import UserError
from shared_utils.runs import replacing


def save(path: str | Path, *, rng: np.random.Generator | None = None, config: dict | None = None, **state) -> None:
    """Save `state` (say `model=model.state_dict(), optimizer=…, epoch=3`), all random states and the model's `config`.

    rng: the script's NumPy generator, so that a resumed run goes on drawing where this one stopped.
    config: what the model was built with; `load` compares it.
    Errors: `UserError` when it cannot be written; `ValueError` when `load` would refuse it (a NumPy number in `state`:
    give `float(x)`).
    """
    import torch

    states = {"python": random.getstate(), "torch": torch.get_rng_state()}
    name, keys, *rest = np.random.get_state()
    states["numpy_legacy"] = [name, keys.tolist(), *rest]
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    if rng is not None:
        states["numpy"] = rng.bit_generator.state
    with replacing(path) as beside:
        try:
            torch.save({**state, "config": _plain(config or {}), "random_states": states}, beside)
        except RuntimeError as error:  # how torch reports a full disk
            raise OSError(str(error).splitlines()[0]) from error
        try:
            torch.load(beside, map_location="cpu", weights_only=True)
        except Exception as error:  # UnpicklingError, of a kind that torch does not name
            raise ValueError(f"the state holds something that could not be loaded again: {error}") from None


def load(path: str | Path, *, device="cpu", expect: dict | None = None) -> dict:
    """Read what `save` wrote, tensors on `device`.

    expect: the `config` the caller's model has. Errors: `UserError` in one line when the file is missing, damaged (its
    checksums are tested), no checkpoint of ours (a pickle that would run code is refused), or of another configuration.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        if zipfile.ZipFile(path).testzip() is not None:
            raise zipfile.BadZipFile
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises anything from KeyError to UnpicklingError on a damaged file
        raise UserError(f"{path} is damaged or no checkpoint of ours ({type(error).__name__})") from None
    if not isinstance(state, dict) or "config" not in state:
        raise UserError(f"{path} is no checkpoint of ours")
    for key, wanted in _plain(expect or {}).items():
        if state["config"].get(key) != wanted:
            raise UserError(f"{path} has {key} = {state['config'].get(key)}, this model has {key} = {wanted}")
    return state


def refuse_other_data(path: str | Path, learned: dict, asked: dict) -> None:
    """`UserError` where a flag in `asked` (name → value) is not the one that the model in `path` `learned` with."""
    for name, value in learned.items():
        if asked.get(name, value) != value:
            raise UserError(f"{path} was trained with --{name.replace('_', '-')} {value}, not {asked[name]}")


def restore_random_states(state: dict, rng: np.random.Generator | None = None) -> None:
    """Put every random generator back to where it was when `state` (from `load`) was saved.

    Errors: `UserError` when `state` holds no states, or none for `rng`.
    """
    import torch

    states = state.get("random_states", {})
    if "torch" not in states or (rng is not None and "numpy" not in states):
        raise UserError("the checkpoint holds no random states to go on from")
    random.setstate(states["python"])
    name, keys, *rest = states["numpy_legacy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([one.cpu() for one in states["cuda"]])
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"].cpu())
    if rng is not None:
        rng.bit_generator.state = states["numpy"]


def _plain(value):
    """`value` with its tuples as lists and its paths as text, so that a stored configuration compares equal."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


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
    except Exception as error:  # NumPy and zipfile raise anything from TypeError to RuntimeError on a damaged file
        raise UserError(f"{path} is damaged or no .npz file ({type(error).__name__})") from None
    missing = [name for name in required if name not in arrays]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: it was written by something else")
    return arrays
