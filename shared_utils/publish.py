"""Copy finished runs to `<experiment>/results/`, and rewrite the numbers in the READMEs from them.

    python -m shared_utils.publish mnist_svm_gabor
    python -m shared_utils.publish mnist_svm_gabor --only train
    python -m shared_utils.publish --tables

Copies metrics.json and the PNGs of each declared run that `runs/` holds; a quick run, and one with other flags than
the declared ones, is refused. `--tables` only rewrites the READMEs. No number in a README is typed by hand; each stands
between markers, comments that no reader sees:

    <!-- runs --> … <!-- /runs -->                        in an experiment's README: each published run, a row each
    <!-- results --> … <!-- /results -->                  in the root README: those with `first_page`
    <!-- table train errors: step | accuracy:.2% --> … <!-- /table -->    a list of rows in metrics.json, these columns
    <!-- value train {test_accuracy:.2%} --> … <!-- /value -->            a format string over metrics.json

`train` is a run's name; in the root README it is `experiment/train`.
"""

import argparse
import re
import shlex
import shutil
from pathlib import Path

from shared_utils.cli import UserError
from shared_utils.reproduce import Declared, declared_runs, experiments
from shared_utils.runs import ROOT, figures, read_json, write_text

MAX_FIGURE_BYTES = 300_000
_NAMES = ("AE", "ELBO", "F1", "FLOPs", "GFLOP", "GFLOPs", "Gabor", "K", "KL", "MB", "McNemar", "MSE", "NumPy", "PCA")
_SPELLED = {name.lower(): name for name in _NAMES}  # in the heads of columns
_SPELLED |= {"beta": "β", "delta in": "δ_in", "delta out": "δ_out", "eps": "ε", "frechet": "Fréchet", "knn": "k-NN"}
_SPELLED |= {"kneser ney": "Kneser-Ney", "lr": "learning rate", "std": "deviation", "torch": "PyTorch"}
_MARKED = re.compile(r"(<!-- (runs|results|table|value)\b(.*?) -->)(.*?)(<!-- /\2 -->)", re.DOTALL)


def publish(experiment: str, runs_dir: Path, only: list[str] | None = None) -> list[str]:
    """Copy the finished runs of `experiment` and return their names.

    Errors: `UserError`, before anything is copied, for an unknown name in `only`, a run that has not finished, a quick
    run, one with flags that are not declared, and a figure over 300 KB.
    """
    declared = {run.name: run for run in declared_runs(experiment)}
    if unknown := set(only or ()) - set(declared):
        raise UserError(f"{experiment} declares no run {', '.join(sorted(unknown))}; it has {', '.join(declared)}")
    found = {name: run.folder(runs_dir) for name, run in declared.items() if not only or name in only}
    if not only:
        found = {name: folder for name, folder in found.items() if (folder / "metrics.json").exists()}
    if not found:
        raise UserError(f"no finished run of {experiment} in {runs_dir}; `python -m shared_utils.reproduce` makes them")
    for name, folder in found.items():
        about = read_json(folder / "metrics.json")["run"]
        if about["quick"]:
            raise UserError(f"{folder} is a quick run, which is not published")
        wanted = [declared[name].command(below, quick=False) for below in (Path("runs"), runs_dir)]
        if _without_places(about["command"]) not in map(_without_places, wanted):
            raise UserError(f"{folder} was made by `{about['command']}`; declared is `{wanted[0]}`")
        for figure in figures(folder):
            if figure.stat().st_size > MAX_FIGURE_BYTES:
                raise UserError(f"{figure} has {figure.stat().st_size // 1000} KB, the limit is 300")
    for name, folder in found.items():
        target = ROOT / experiment / "results" / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for file in [folder / "metrics.json", *figures(folder)]:
            shutil.copyfile(file, target / file.name)
    return list(found)


def readmes() -> list[Path]:
    """The READMEs that carry numbers."""
    return [ROOT / "README.md", *(ROOT / name / "README.md" for name in experiments())]


def render(readme: Path) -> str:
    """The README's text with the numbers of the published metrics.json files. Errors: `UserError` names the marker."""
    home = "" if readme.parent == ROOT else readme.parent.name

    def rewrite(marked: re.Match) -> str:
        opening, kind, asked, _, closing = marked.groups()
        try:
            if kind in ("runs", "results"):
                body = f"\n{_runs_table([home] if home else experiments(), with_experiment=not home)}\n"
            elif kind == "table":
                source, columns = asked.split(":", 1)
                name, key = source.split()
                body = f"\n{_table(_metrics(home, name)[key], columns)}\n"
            else:
                name, template = asked.split(maxsplit=1)
                body = template.format(**_metrics(home, name))
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise UserError(f"{readme}: {opening} cannot be filled: {type(error).__name__}: {error}") from error
        return f"{opening}{body}{closing}"

    return _MARKED.sub(rewrite, readme.read_text(encoding="utf-8"))


def _metrics(home: str, name: str) -> dict:
    experiment, run = (home, name) if home else name.split("/")
    return read_json(ROOT / experiment / "results" / run / "metrics.json")


def _runs_table(folders: list[str], with_experiment: bool) -> str:
    rows = []
    for experiment in folders:
        for run in declared_runs(experiment):
            wanted = run.first_page or not with_experiment
            if wanted and (ROOT / experiment / "results" / run.name / "metrics.json").exists():
                rows.append(_run_row(run, with_experiment))
    head = ["measured", "command", "data", "time", "machine", "commit"]
    return _markdown(["experiment", *head] if with_experiment else head, rows)


def _run_row(run: Declared, with_experiment: bool) -> list[str]:
    metrics = _metrics(run.experiment, run.name)
    about = metrics["run"]
    minutes, seconds = divmod(round(about["seconds"]), 60)
    took = f"{minutes} min {seconds} s" if minutes else f"{about['seconds']:.1f} s"
    first = [f"[{run.experiment}]({run.experiment})"] if with_experiment else []
    measured, command = run.headline.format(**metrics), run.command(Path("runs"), quick=False)
    return [*first, measured, f"`{command}`", about.get("dataset", "–"), took, about["machine"], about["commit"]]


def _without_places(command: str) -> list[str]:
    """A command's words without those that say where its output goes."""
    words = shlex.split(command)
    places = [i for i, word in enumerate(words) if word in ("--runs-dir", "--out")]  # each with its value
    return [word for i, word in enumerate(words) if i not in places and i - 1 not in places]


def _table(rows: list[dict], columns: str) -> str:
    wanted = [column.strip().partition(":") for column in columns.split("|")]
    cells = [["–" if row[key] is None else format(row[key], spec) for key, _, spec in wanted] for row in rows]
    words = re.compile(rf"\b({'|'.join(_SPELLED)})\b")
    heads = [words.sub(lambda word: _SPELLED[word[0]], key.replace("_", " ")) for key, _, _ in wanted]
    return _markdown(heads, cells)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m shared_utils.publish", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help="folders to publish")
    parser.add_argument("--only", nargs="+", metavar="RUN", help="only these runs")
    parser.add_argument("--runs-dir", default="runs", help="folder of all runs (default: runs)")
    parser.add_argument("--tables", action="store_true", help="copy nothing, rewrite the READMEs")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Publish what is asked for and rewrite every README."""
    args = build_parser().parse_args(argv)
    if not args.experiments and not args.tables:
        raise UserError("name an experiment folder, or give --tables")
    if unknown := set(args.experiments) - set(experiments()):
        raise UserError(f"{', '.join(sorted(unknown))}: no such experiment; there are {', '.join(experiments())}")
    for experiment in args.experiments:
        for name in publish(experiment, Path(args.runs_dir), args.only):
            print(f"published {experiment}/results/{name}")
    for readme in readmes():
        text = render(readme)
        if text != readme.read_text(encoding="utf-8"):
            write_text(readme, text)
            print(f"rewrote {readme.relative_to(ROOT)}")


if __name__ == "__main__":
    try:
        main()
    except UserError as mistake:
        build_parser().exit(2, f"publish: error: {mistake}\n")
