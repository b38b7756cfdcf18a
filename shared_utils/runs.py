"""A run's folder: what was asked (`config.json`), what happened (`history.csv`), what came out (`metrics.json`).

run = start_run(args)
run.log(epoch=1, train_loss=0.31, val_accuracy=0.92)
return run.finish({"test_accuracy": 0.91})
"""

import argparse
import csv
import json
import math
import os
import platform
import re
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
_MAY_DIFFER = ("resume", "device", "data_dir", "out", "runs_dir", "jobs")  # on resuming
_OF_ONE_RUN = ("metrics.json", "history.csv", "*last.pth", "last.npz")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to, beside `path`; rename it over `path` at the end: no half-written file is ever seen.

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


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically. Errors: as `replacing`; `UnicodeEncodeError` for half a character."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: dict) -> None:
    """Write `value` (NumPy numbers and arrays are converted; NaN is refused with `ValueError`) atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=_to_plain) + "\n")


def write_csv(path: str | Path, rows: list[dict]) -> None:
    """Write `rows`, at least one and all with the same keys, as a table below a header, atomically."""
    with replacing(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def read_json(path: str | Path) -> dict:
    """Read a JSON file. Errors: `UserError` that names the file when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _to_plain(value):
    if hasattr(value, "tolist"):  # NumPy's and PyTorch's arrays and scalars
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no place in a JSON file")


def find_output(
    args: argparse.Namespace, script: str, filename: str, experiment: str | None = None, made_by: str | None = None
) -> Path:
    """A file that another script wrote, of this experiment or of `experiment`, below the same `--runs-dir`.

    made_by: the script and its flags, where they are not the folder's name: `train.py --variant large`.
    Errors: `UserError` with the command that makes it.
    """
    experiment = experiment or args.experiment
    path = Path(args.runs_dir) / experiment / script / filename
    if not path.exists():
        flags = " --quick" if args.quick else ""
        if args.runs_dir != ("runs/quick" if args.quick else "runs"):
            flags += f" --runs-dir {args.runs_dir}"
        raise UserError(f"{path} is missing; `python {experiment}/{made_by or f'{script}.py'}{flags}` makes it")
    return path


def figures(folder: Path) -> list[Path]:
    """The PNGs that the run in `folder` wrote, by name; what an earlier run left there is older than config.json."""
    started = (folder / "config.json").stat().st_mtime
    return [path for path in sorted(folder.glob("*.png")) if path.stat().st_mtime >= started]


class Diverged(UserError):
    """A loss that is not finite. A script that tries several learning rates catches it and goes on with the next."""


def check_finite(loss: float, step: int, lr: float, flag: str = "--lr") -> None:
    """Stop the run when its loss is not finite: `Diverged` with the step, the learning rate and what to do.

    flag: the one that sets the learning rate.
    """
    if not math.isfinite(loss):
        raise Diverged(f"the loss is {loss} at step {step} with learning rate {lr:g}: try a lower {flag}")


class Run:
    """One run's folder. Made by `start_run`."""

    def __init__(self, args: argparse.Namespace, folder: Path, lock, writes: bool):
        self.folder, self.writes, self._args, self._lock = folder, writes, args, lock
        self._commit = commit()  # as the run starts: files may change during a long one
        self._seconds_before = 0.0  # of the processes whose work this one goes on with

    def path(self, name: str) -> Path:
        """Where this run's file `name` goes."""
        return self.folder / name

    def log(self, **row) -> None:
        """Append `row` to `history.csv` and print it as one line; every row has the same columns."""
        if not self.writes:
            return
        path, row = self.path("history.csv"), {name: _scalar(value) for name, value in row.items()}
        header, _ = _read_history(path)
        if header and list(row) != header:
            raise ValueError(f"history.csv has the columns {header}, this row has {list(row)}")
        try:
            with path.open("a" if header else "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([row.values()] if header else [row, row.values()])
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        tqdm.write("  ".join(f"{name} {_fixed(value)}" for name, value in row.items()))
        sys.stdout.flush()

    def history(self) -> list[dict[str, str]]:
        """The rows of `history.csv` so far, as text; a resumed run's include those before it stopped."""
        header, rows = _read_history(self.path("history.csv"))
        return [dict(zip(header, row, strict=True)) for row in rows]

    def numbers(self) -> list[dict[str, float]]:
        """`history()` as numbers. Errors: `ValueError` when a column is not of numbers."""
        return [{name: float(value) for name, value in row.items()} for row in self.history()]

    def row(self, **key) -> dict[str, str] | None:
        """The first row of `history()` in which the columns `key` have these values, or None: say `arm="none", seed=0`.

        A resumed study thus skips the training runs that an earlier process has finished.
        """
        wanted = {name: str(value) for name, value in key.items()}
        return next((row for row in self.history() if wanted.items() <= row.items()), None)

    def rewind(self, rows: int) -> None:
        """Keep the first `rows` rows of `history.csv`: a resumed run writes those after its checkpoint again.

        A script stores `len(run.history())` in its checkpoint.
        """
        path = self.path("history.csv")
        header, found = _read_history(path)
        if self.writes and header:
            with replacing(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([header, *found[:rows]])

    def finish(self, metrics: dict) -> dict:
        """Write `metrics.json`, which also says how it came about, and return its content.

        `run` holds the command, data set, machine, commit and seconds; a resumed run's seconds are those of all its
        processes, each stopped one counted up to its last row in the history. Same seed and machine: the same metrics,
        timings aside.
        """
        args = self._args
        dataset = getattr(args, "dataset", None)
        about = {
            "command": args.command,
            "quick": args.quick,
            **({"dataset": str(dataset)} if dataset else {}),
            "seconds": round(self._seconds_before + time.perf_counter() - args.started, 1),
            "machine": machine(str(getattr(args, "device", "cpu"))),
            "commit": self._commit,
        }
        metrics = json.loads(json.dumps({**metrics, "run": about}, allow_nan=False, default=_to_plain))
        if self.writes:
            write_json(self.path("metrics.json"), metrics)
            print(f"{self.folder}: done in {about['seconds']:.1f} s", flush=True)
        if self._lock:
            self._lock.close()
        return metrics


def start_run(args: argparse.Namespace, *, writes: bool = True) -> Run:
    """Make the run's folder and write `config.json`; an earlier run's metrics, history and last checkpoint are deleted.

    With `--resume` they stay, and the flags must be those of the run that is resumed (where it runs may differ).
    `writes=False` (ranks above 0) touches nothing.
    Errors: `UserError` when the folder cannot be written, another run is writing to it, or a resumed flag differs.
    """
    folder = Path(args.out) if args.out else Path(args.runs_dir) / args.experiment / args.script
    if not writes:
        return Run(args, folder, None, writes)
    flags = {key: value for key, value in vars(args).items() if key not in _NOT_FLAGS}
    flags = json.loads(json.dumps(flags, default=_to_plain))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        known, resumes = (folder / "config.json").exists(), getattr(args, "resume", False)
        then = read_json(folder / "config.json") if known and resumes else {}
        if then:
            _refuse_other_flags(flags, then["flags"])
        lock = _lock(folder)
        if known:
            if not resumes:
                for name in _OF_ONE_RUN:
                    for left in folder.glob(name):
                        left.unlink()
            for left in folder.glob(".*.*"):  # what a killed run was writing
                if re.fullmatch(r"\..+\.\d+\.\w+", left.name):
                    left.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from None
    run = Run(args, folder, lock, writes)
    if then and run.path("history.csv").exists():
        worked = run.path("history.csv").stat().st_mtime - (folder / "config.json").stat().st_mtime
        run._seconds_before = then.get("seconds_before", 0.0) + max(0.0, worked)
    if resumes:
        run.rewind(len(run.history()))  # a half-written row would swallow the next one
    about = {"command": args.command, "commit": run._commit, "versions": versions()}
    about["machine"] = machine(str(getattr(args, "device", "cpu")))
    write_json(folder / "config.json", {**about, "seconds_before": run._seconds_before, "flags": flags})
    return run


def _refuse_other_flags(now: dict, then: dict) -> None:
    for key in sorted(set(now) | set(then)):
        if key not in _MAY_DIFFER and now.get(key) != then.get(key):
            flag = "--" + key.replace("_", "-")
            raise UserError(f"--resume: the run was made with {flag} {then.get(key)}, not {now.get(key)}")


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
    """Hold the folder until the run ends, however it ends: the system releases the lock with the process."""
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


def _read_history(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and complete rows of a history; a row that a kill left half-written is dropped."""
    if not path.exists():
        return [], []
    text = path.read_text(encoding="utf-8")
    header, *rows = list(csv.reader(text[: text.rfind("\n") + 1].splitlines())) or [[]]
    return header, [row for row in rows if len(row) == len(header)]


def _scalar(value):
    """A number out of a NumPy or PyTorch scalar; anything else as it is."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


def _fixed(value) -> str:
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)
