"""A run's folder: what was asked (`config.json`), what happened (`history.csv`), what came out (`metrics.json`).

run = start_run(args)
run.log(epoch=1, train_loss=0.31, val_accuracy=0.92)
return run.finish({"test_accuracy": 0.91})
"""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import numpy as np
from tqdm import tqdm

from shared_utils.cli import UserError

ROOT = Path(__file__).resolve().parent.parent
_NOT_FLAGS = ("command", "experiment", "script", "started")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to, beside `path`; rename it over `path` at the end, so that no half file is ever seen.

    Errors: `UserError` with the system's reason when it cannot be written (a full disk, no permission).
    """
    path = Path(path)
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield beside
        os.replace(beside, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if beside.exists():
            beside.unlink()


def write_json(path: str | Path, value: dict) -> None:
    """Write `value` (NumPy numbers and arrays are converted; NaN is refused with `ValueError`) in one step."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=_to_plain)
    with replacing(path) as beside:
        beside.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | Path) -> dict:
    """Read a JSON file. Errors: `UserError` that names the file when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _to_plain(value):
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no place in a JSON file")


def run_folder(args: argparse.Namespace, script: str | None = None) -> Path:
    """The folder of this script's run, or of another script's of the same experiment (`--out` is this run's alone)."""
    if script is None and args.out:
        return Path(args.out)
    return Path(args.runs_dir) / args.experiment / (script or args.script)


def find_output(args: argparse.Namespace, script: str, filename: str) -> Path:
    """A file that another script of this experiment wrote. Errors: `UserError` with the command that makes it."""
    path = run_folder(args, script) / filename
    if not path.exists():
        quick = " --quick" if args.quick else ""
        raise UserError(f"{path} is missing; `python {args.experiment}/{script}.py{quick}` makes it")
    return path


class Run:
    """One run's folder. Made by `start_run`."""

    def __init__(self, args: argparse.Namespace, folder: Path, lock, writes: bool):
        self.folder, self.writes, self._args, self._lock = folder, writes, args, lock
        self._fields: list[str] = []

    def path(self, name: str) -> Path:
        """Where this run's file `name` goes."""
        return self.folder / name

    def log(self, **row) -> None:
        """Append `row` to `history.csv` and print it as one line; every row has the same columns."""
        if not self.writes:
            return
        path = self.path("history.csv")
        new = not path.exists()
        if not self._fields:
            self._fields = list(row) if new else _columns(path)
        if list(row) != self._fields:
            raise ValueError(f"history.csv has the columns {self._fields}, this row has {list(row)}")
        try:
            with path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                if new:
                    writer.writerow(self._fields)
                writer.writerow(row.values())
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        tqdm.write("  ".join(f"{name} {_fixed(value)}" for name, value in row.items()))
        sys.stdout.flush()

    def rewind(self, column: str, last: float) -> None:
        """Drop the rows of `history.csv` beyond `column` = `last`: a resumed run writes them again."""
        path = self.path("history.csv")
        if not self.writes or not path.exists():
            return
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        at = header.index(column)
        with replacing(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *(row for row in rows if float(row[at]) <= last)])

    def finish(self, metrics: dict) -> dict:
        """Write `metrics.json`, which also says how it came about, and return its content.

        Same seed and machine: the same metrics, but for `run` and for names that end in `seconds`.
        """
        args = self._args
        dataset = getattr(args, "dataset", None)
        about = {
            "command": args.command,
            "quick": args.quick,
            **({"dataset": str(dataset)} if dataset else {}),
            "seconds": round(time.perf_counter() - args.started, 1),
            "machine": machine(str(getattr(args, "device", "cpu"))),
            "commit": commit(),
        }
        metrics = json.loads(json.dumps({**metrics, "run": about}, allow_nan=False, default=_to_plain))
        if self.writes:
            write_json(self.path("metrics.json"), metrics)
            print(f"{self.folder}: done in {about['seconds']:.1f} s", flush=True)
        if self._lock:
            self._lock.close()
        return metrics


def start_run(args: argparse.Namespace, *, writes: bool = True) -> Run:
    """Make the run's folder, write `config.json`, and drop an earlier run's history and metrics.

    With `--resume` the history is kept. `writes=False` (ranks above 0) touches nothing.
    Errors: `UserError` when the folder cannot be written, or another run is writing to it.
    """
    folder = run_folder(args)
    if not writes:
        return Run(args, folder, None, writes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from None
    flags = {key: value for key, value in vars(args).items() if key not in _NOT_FLAGS}
    about = {"command": args.command, "commit": commit(), "versions": versions()}
    write_json(
        folder / "config.json", {**about, "machine": machine(str(getattr(args, "device", "cpu"))), "flags": flags}
    )
    stale = ["metrics.json"] if getattr(args, "resume", False) else ["metrics.json", "history.csv"]
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    return Run(args, folder, lock, writes)


def versions() -> dict[str, str]:
    """Python's version and those of the packages whose numbers a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("numpy", "torch", "torchvision", "scikit-learn"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The checkout's short commit, with `-dirty` where tracked files differ from it; `unknown` outside git."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        answer = subprocess.run(git, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return answer.stdout.strip() or "unknown"


def machine(device: str = "cpu") -> str:
    """The processor's name and cores, or the GPU's name where PyTorch is loaded and `device` may be one."""
    torch = sys.modules.get("torch")
    if torch is not None and device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} cores"


def _lock(folder: Path):
    """Hold the folder until the run ends, however it ends: the system lets go of the lock with the process."""
    try:
        import fcntl
    except ImportError:  # Windows has no flock; there the guard is missing
        return None
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"another run is writing to {folder}; wait for it, or give --out another folder") from None
    return file


def _columns(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file))


def _fixed(value) -> str:
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)
