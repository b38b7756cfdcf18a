"""Command lines that are the same in every experiment.

    parser = make_parser(__doc__, quick={"epochs": 1})
    parser.add_argument("--epochs", type=positive_int, default=10, help="passes over the training images")
    args = parser.parse_args(argv)

A user's mistake is one line on stderr and exit code 2; a bug keeps its traceback.
"""

import argparse
import math
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

STAND_INS = {"mnist": "digits", "fashion": "digits", "cifar10": "shapes", "books": "pydocs", "shakespeare": "pydocs"}


class UserError(ValueError):
    """A mistake of the user's (a flag, a file, a missing download). The message is one line that says what to do."""


def _checked(convert: Callable, accept: Callable, wanted: str) -> Callable[[str], int | float | str]:
    def value(text: str):
        try:
            number = convert(text)
        except ValueError:
            number = None
        if number is None or not accept(number):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
        return number

    return value


def at_least(n: int) -> Callable[[str], int]:
    """The type of a flag that takes whole numbers from n on."""
    return _checked(int, lambda v: v >= n, f"a whole number, {n} or more")


positive_int, non_negative_int = at_least(1), at_least(0)
positive_float = _checked(float, lambda v: v > 0 and math.isfinite(v), "a finite number above 0")
non_negative_float = _checked(float, lambda v: v >= 0 and math.isfinite(v), "a finite number, 0 or more")
seed_number = _checked(int, lambda v: 0 <= v < 2**32, "a whole number from 0 to 4294967295")
fraction = _checked(float, lambda v: 0 <= v <= 1, "a number from 0 to 1")
share_below_1 = _checked(float, lambda v: 0 <= v < 1, "a number from 0 to below 1")
utf8_text = _checked(lambda text: text.encode("utf-8").decode(), lambda v: True, "UTF-8 text")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class ExperimentParser(argparse.ArgumentParser):
    """argparse with one-line errors, defaults of its own for `--quick`, and a memory of the command."""

    def __init__(self, doc: str, quick: dict):
        named = re.search(r"python (\w+)/(\w+)\.py", doc)
        script = Path(sys.argv[0]).resolve()
        self.experiment, self.script = named.groups() if named else (script.parent.name, script.stem)
        self.quick = quick
        super().__init__(
            prog=f"python {self.experiment}/{self.script}.py",
            description=doc,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )

    def format_help(self) -> str:
        """The docstring, the flags, and what they become with `--quick`."""
        changes = "  ".join(_as_flag(key.replace("_", "-"), value) for key, value in self.quick.items())
        self.epilog = f"With --quick the defaults are: {changes}" if changes else None
        return super().format_help()

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        argv = [str(arg) for arg in (sys.argv[1:] if args is None else args)]
        parsed, rest = super().parse_known_args(argv, namespace)
        if getattr(parsed, "quick", False):
            if unknown := set(self.quick) - set(vars(parsed)):
                raise ValueError(f"quick defaults for flags that do not exist: {', '.join(sorted(unknown))}")
            # A value that the namespace already holds beats a default, and a flag in argv beats both.
            parsed, rest = super().parse_known_args(argv, argparse.Namespace(**self.quick))
        parsed.experiment, parsed.script = self.experiment, self.script
        made_by = [arg for arg in argv if arg != "--resume"]  # it changes how a result is reached, not which
        parsed.command = f"{self.prog} {shlex.join(made_by)}".strip()
        parsed.started = time.perf_counter()
        return parsed, rest

    @property
    def resumable(self) -> bool:
        """Whether the script has `--resume`."""
        return "--resume" in self._option_string_actions

    def error(self, message: str):
        self.exit(2, f"{self.script}.py: error: {' '.join(str(message).split())}\n")


def _as_flag(name: str, value) -> str:
    if value is False:
        return f"--no-{name}"
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, list | tuple) else value}"


def make_parser(
    doc: str, *, dataset: str | None = "mnist", device: bool = True, quick: dict | None = None
) -> ExperimentParser:
    """A parser whose `--help` is the script's docstring, with the flags that all scripts share.

    doc: the script's `__doc__`; its line `python <experiment>/<script>.py` names the folder the run writes to.
    dataset: the default of `--dataset`; None for a script that reads no data set (then `--data-dir` goes too).
    device: False for a script that has no use for `--device`.
    quick: what the defaults become under `--quick`; a flag given on the command line still wins. The data set
        then is the embedded stand-in, and the run goes to `runs/quick`, so that it never touches a real one.
    """
    quick = {**(quick or {}), "runs_dir": "runs/quick"}
    if dataset in STAND_INS:
        quick.setdefault("dataset", STAND_INS[dataset])
    parser = ExperimentParser(doc or "", quick)
    parser.add_argument("--seed", type=seed_number, default=0, help="seed of everything random")
    if device:
        parser.add_argument(
            "--device", default="auto", help="auto (the first present of cuda, mps, cpu), or one of these"
        )
    if dataset is not None:
        texts = dataset in ("books", "shakespeare", "pydocs")
        names = (
            "books, shakespeare, pydocs (embedded) or a folder of *.txt"
            if texts
            else "mnist, fashion, cifar10, digits or shapes (embedded), or a folder with train/<class>/*.png and test/"
        )
        parser.add_argument("--dataset", default=dataset, help=names)
        parser.add_argument("--data-dir", "--data", default="data", help="where data sets are, or are downloaded to")
    parser.add_argument("--out", help="folder for this run (default: <runs-dir>/<experiment>/<script>)")
    parser.add_argument("--runs-dir", default="runs", help="folder of all runs")
    parser.add_argument("--quick", action="store_true", help="a small run on embedded data, in seconds")
    return parser


def add_seeds(parser: argparse.ArgumentParser, default: list[int], about: str, least: int = 1) -> None:
    """Add `--seeds`: at least `least`, each given once, since a seed that counts twice makes an interval too narrow."""

    class Seeds(argparse.Action):
        def __call__(self, parser, namespace, values, option_string=None):
            if len(set(values)) < max(least, len(values)):
                given = " ".join(map(str, values))
                raise argparse.ArgumentError(self, f"must be different seeds, {least} or more, got {given}")
            namespace.seeds = values

    parser.add_argument("--seeds", type=seed_number, nargs="+", action=Seeds, default=default, help=about)


def add_amp(
    parser: ExperimentParser, about: str = "compute in bfloat16, with float32 parameters", *, by_machine: bool = False
) -> None:
    """Add `--amp` and `--no-amp`, for `device.autocast`; by default it is off.

    by_machine: by default it is None, on where the machine has bfloat16; with `--quick` it is off.
    """
    about += " (default: where the machine has instructions for it)" if by_machine else ""
    default = None if by_machine else False
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, default=default, help=about)
    if by_machine:
        parser.quick["amp"] = False


def run_main(main: Callable[[], dict], build_parser: Callable[[], ExperimentParser]) -> None:
    """Run a script's `main`: a `UserError` ends with one line and exit code 2, Ctrl-C with how to go on (130)."""
    interrupted = []

    def interrupt(*_) -> None:
        interrupted.append(True)
        raise KeyboardInterrupt

    noticed = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not ignored, as in the background
    if noticed:
        signal.signal(signal.SIGINT, interrupt)
    try:
        main()
    except (Exception, KeyboardInterrupt) as error:
        if not interrupted and not isinstance(error, KeyboardInterrupt):  # a library may turn Ctrl-C into another error
            if isinstance(error, UserError):
                build_parser().error(str(error))
            raise
        parser = build_parser()
        hint = "the same command with --resume goes on from there" if parser.resumable else "run the command again"
        parser.exit(130, f"\n{parser.prog}: interrupted; what was saved is kept, {hint}\n")
    finally:
        if noticed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
