"""Run every experiment, and put what came out on one page.

    python -m shared_utils.reproduce --quick
    python -m shared_utils.reproduce --only mnist_svm_gabor numpy_nn
    python -m shared_utils.reproduce --resume

Each experiment folder declares its runs in `experiment.json`, in the order in which they are to be made:

    {"title": …, "question": …, "runs": [
        {"name": "train", "script": "train.py", "args": ["--epochs", "3"], "minutes": 2,
         "headline": "{test_accuracy:.2%}"}]}

`after`, beside them, names the experiments whose outputs a folder reads: they are made first, also under `--only`.
`name` is the run's folder; where it differs from the script's own name, `--out` is passed. `{runs}` in an argument is
the folder of all runs. `quick` may hold other arguments for the quick run. `first_page` puts the run into the root
README's table. `minutes` is what the full run takes on two cores, `headline` a format string over metrics.json. The
runs of a folder share a process, so that PyTorch is loaded once; a failure ends only that run. Quick runs are too small
for several threads: with `--quick` as many folders run at once as there are cores, one thread each.

`--resume` leaves out what is finished: runs whose metrics.json was made by the declared command and that did not fail
when they were last asked for. A run that was stopped goes on from its checkpoint where its script can.

Writes report.html, and each run's log.txt.
"""

import argparse
import contextlib
import importlib
import os
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

from shared_utils.cli import UserError
from shared_utils.report import write_report
from shared_utils.runs import ROOT, read_json, write_json


@dataclass(frozen=True)
class Declared:
    """One run of an experiment, as its `experiment.json` declares it."""

    experiment: str
    name: str
    script: str
    args: tuple[str, ...]
    quick_args: tuple[str, ...]
    minutes: float
    headline: str
    first_page: bool

    @property
    def module(self) -> str:
        """The script's import path."""
        return f"{self.experiment}.{Path(self.script).stem}"

    def command(self, runs_dir: Path, quick: bool) -> str:
        """The command line, as config.json and metrics.json record it."""
        return f"python {self.experiment}/{self.script} {shlex.join(self.argv(runs_dir, quick))}".strip()

    def argv(self, runs_dir: Path, quick: bool) -> list[str]:
        """The flags of this run, below `runs_dir`."""
        out = [] if self.name == Path(self.script).stem else ["--out", str(self.folder(runs_dir))]
        args = [*self.quick_args, "--quick"] if quick else self.args
        args = [arg.replace("{runs}", str(runs_dir)) for arg in args]
        usual = runs_dir == Path("runs/quick" if quick else "runs")
        return [*args, *([] if usual else ["--runs-dir", str(runs_dir)]), *out]

    def folder(self, runs_dir: Path) -> Path:
        """Where the run writes."""
        return runs_dir / self.experiment / self.name


def declared_runs(experiment: str) -> list[Declared]:
    """The runs that `<experiment>/experiment.json` declares, in order."""
    return [
        Declared(
            experiment,
            run["name"],
            run["script"],
            args=tuple(run.get("args", ())),
            quick_args=tuple(run.get("quick", run.get("args", ()))),
            minutes=run["minutes"],
            headline=run["headline"],
            first_page=run.get("first_page", False),
        )
        for run in read_json(ROOT / experiment / "experiment.json")["runs"]
    ]


def experiments() -> list[str]:
    """The folders that have an `experiment.json`."""
    return sorted(path.parent.name for path in ROOT.glob("*/experiment.json"))


def what_they_read(names: list[str]) -> dict[str, list[str]]:
    """These experiments and those whose outputs they read, each with the names of those that it reads."""
    reads, wanted = {}, list(names)
    for name in wanted:  # which grows while it is read
        reads[name] = read_json(ROOT / name / "experiment.json").get("after", [])
        wanted += [other for other in reads[name] if other not in wanted]
    return reads


def in_order(names: list[str]) -> list[str]:
    """These experiments and those whose outputs they read, each after what it reads."""
    return list(TopologicalSorter(what_they_read(names)).static_order())


def wrote(run: Declared, runs_dir: Path, quick: bool, filename: str) -> bool:
    """Whether the declared command wrote this file of the run's folder, config.json (first) or metrics.json (last)."""
    path = run.folder(runs_dir) / filename
    about = read_json(path) if path.exists() else {}
    return about.get("run", about).get("command") == run.command(runs_dir, quick)


def finished(experiment: str, runs_dir: Path, quick: bool) -> dict[str, dict]:
    """The outcomes of the runs that `--resume` leaves out."""
    file = runs_dir / experiment / "outcomes.json"
    outcomes = read_json(file) if file.exists() else {}
    runs = [run for run in declared_runs(experiment) if wrote(run, runs_dir, quick, "metrics.json")]
    found = {run.name: outcomes.get(run.name, {"seconds": 0.0, "error": None}) for run in runs}
    return {name: outcome for name, outcome in found.items() if not outcome["error"]}


def perform(run: Declared, runs_dir: Path, quick: bool, resume: bool = False) -> dict:
    """Make one run in this process, its output in `log.txt`; returns {"seconds": …, "error": None or one line}.

    resume: go on with it where the same command was stopped, if its script can.
    """
    started, error, folder = time.perf_counter(), None, run.folder(runs_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = (folder / "log.txt").open("a" if resume else "w", encoding="utf-8", buffering=1)
    except OSError as trouble:
        return {"seconds": 0.0, "error": f"cannot write to {folder}: {trouble.strerror}"}
    with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            module, argv = importlib.import_module(run.module), run.argv(runs_dir, quick)
            if resume and module.build_parser().resumable and wrote(run, runs_dir, quick, "config.json"):
                argv.append("--resume")
            module.main(argv)
        except UserError as mistake:
            error = str(mistake)
        except SystemExit as stop:  # argparse's way out
            error = f"exit code {stop.code}" if stop.code else None
        except Exception as bug:
            error = f"{type(bug).__name__}: {bug}"
            traceback.print_exc()
        if error:
            print(error)
    return {"seconds": round(time.perf_counter() - started, 1), "error": error}


def perform_all(experiment: str, runs_dir: Path, quick: bool, resume: bool = False) -> None:
    """Make an experiment's runs in order, a line each, except those in `outcomes.json`, which is updated after each."""
    file = runs_dir / experiment / "outcomes.json"
    outcomes = read_json(file) if file.exists() else {}
    for run in declared_runs(experiment):
        name = f"{experiment}/{run.name}".ljust(44)
        if run.name in outcomes:
            print(f"{name}finished before", flush=True)
            continue
        if not quick:
            print(f"{name}about {run.minutes:g} minutes", flush=True)
        outcomes[run.name] = outcome = perform(run, runs_dir, quick, resume)
        write_json(file, outcomes)
        print(f"{name}{outcome['seconds']:7.1f} s  {outcome['error'] or 'ok'}", flush=True)


def begin(experiment: str, args: argparse.Namespace, runs_dir: Path) -> subprocess.Popen:
    """Start the process that makes the runs of one folder."""
    command = [sys.executable, "-m", "shared_utils.reproduce", "--inside", "--only", experiment]
    command += ["--runs-dir", str(runs_dir), *(["--quick"] if args.quick else [])]
    command += ["--resume"] if args.resume else []
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    threads = {"OMP_NUM_THREADS": "1"} if args.quick else {}
    return subprocess.Popen(command, env={**threads, **os.environ, "PYTHONPATH": path})


def begin_and_wait(experiments: list[str], at_once: int, start: Callable[[str], subprocess.Popen]) -> dict[str, int]:
    """Start a process for each experiment, after those of all that it reads; returns their exit statuses.

    start: begins an experiment's process. At most `at_once` of them are under way.
    """
    order, ready, under_way, ended = TopologicalSorter(what_they_read(experiments)), [], {}, {}
    order.prepare()
    try:
        while order.is_active():
            ready += order.get_ready()
            while ready and len(under_way) < at_once:
                name = ready.pop(0)
                under_way[name] = start(name)
            time.sleep(0.1)
            for name in [name for name, process in under_way.items() if process.poll() is not None]:
                ended[name] = under_way.pop(name).returncode
                order.done(name)
    finally:
        for process in under_way.values():  # after Ctrl-C, which reaches them too
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            process.kill()
    return ended


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m shared_utils.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="small runs on embedded data, into runs/quick")
    parser.add_argument(
        "--only", nargs="+", metavar="EXPERIMENT", choices=experiments(), help="these folders, and what they read"
    )
    parser.add_argument("--resume", action="store_true", help="leave out what is finished, go on with what was stopped")
    parser.add_argument("--runs-dir", help="folder of all runs (default: runs, with --quick runs/quick)")
    parser.add_argument("--report", default="runs/report.html", help="the page (default: runs/report.html)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # the child process of one folder
    return parser


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Run what is asked for; returns each failed run's outcome by `experiment/name`."""
    args = build_parser().parse_args(argv)
    runs_dir = Path(args.runs_dir or ("runs/quick" if args.quick else "runs"))
    chosen = in_order(args.only or experiments())
    if args.inside:
        perform_all(args.only[0], runs_dir, args.quick, args.resume)
        return {}
    done = {name: finished(name, runs_dir, args.quick) if args.resume else {} for name in chosen}
    left = [run for name in chosen for run in declared_runs(name) if run.name not in done[name]]
    if not args.quick:
        print(f"runs to make: {len(left)}, about {sum(run.minutes for run in left) / 60:.1f} hours on two cores")
    files = {name: runs_dir / name / "outcomes.json" for name in chosen}
    for name, file in files.items():
        if done[name]:
            write_json(file, done[name])
        else:
            file.unlink(missing_ok=True)
    at_once = (os.cpu_count() or 1) if args.quick else 1
    ended = begin_and_wait(chosen, at_once, lambda name: begin(name, args, runs_dir))
    failed = {}
    for experiment, file in files.items():
        outcomes = read_json(file) if file.exists() else {}
        for run in declared_runs(experiment):
            outcome = outcomes.get(run.name, {"error": f"not run: the process ended with {ended[experiment]}"})
            if outcome["error"]:
                failed[f"{experiment}/{run.name}"] = outcome
    write_report(Path(args.report), runs_dir, chosen)
    print(f"report: {args.report}")
    for name, outcome in failed.items():
        print(f"failed: {name}: {outcome['error']} (see {runs_dir / name / 'log.txt'})", file=sys.stderr)
    return failed


if __name__ == "__main__":
    try:
        sys.exit(1 if main() else 0)
    except UserError as mistake:
        build_parser().error(str(mistake))
    except KeyboardInterrupt:
        sys.exit(130)
