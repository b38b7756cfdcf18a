"""Every declared run, quick, in order, under one folder of runs: readers find what trainers wrote."""

import ast
import re

import pytest

from shared_utils import reproduce
from shared_utils.runs import ROOT, read_json


def promised_files(script):
    """The files that a script's docstring says it writes: `Writes curves.png, comparison.csv, metrics.json.`"""
    doc = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8")))
    sentence = re.search(r"^Writes (.*?)(?:\.\s|\.$|\Z)", doc, re.MULTILINE | re.DOTALL).group(1)
    return re.findall(r"[\w*]+\.(?:png|json|csv|npz|npy|pth|gif|txt|md)\b", sentence)


def without_timings(value):
    if isinstance(value, dict):
        return {k: without_timings(v) for k, v in value.items() if k != "run" and not k.endswith("seconds")}
    return [without_timings(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="session")
def runs_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("experiment", reproduce.in_order(reproduce.experiments()))
def test_declared_runs(experiment, runs_dir):
    for other in reproduce.in_order([experiment])[:-1]:  # there already, unless this test runs alone
        if not (runs_dir / other).exists():
            reproduce.perform_all(other, runs_dir, quick=True)
    for run in reproduce.declared_runs(experiment):
        outcome = reproduce.perform(run, runs_dir, quick=True)
        assert outcome["error"] is None, (run.folder(runs_dir) / "log.txt").read_text()
        written = {path.name for path in run.folder(runs_dir).iterdir()}
        promised = promised_files(ROOT / experiment / run.script)
        assert "metrics.json" in promised
        assert {*promised, "config.json"} <= written, run
        metrics = read_json(run.folder(runs_dir) / "metrics.json")
        assert metrics["run"]["quick"]
        assert run.headline.format(**metrics)


@pytest.mark.parametrize("experiment", reproduce.experiments())
def test_the_first_run_gives_the_same_metrics_twice(experiment, runs_dir, tmp_path):
    run = reproduce.declared_runs(experiment)[0]
    if not (run.folder(runs_dir) / "metrics.json").exists():
        reproduce.perform(run, runs_dir, quick=True)
    assert reproduce.perform(run, tmp_path, quick=True)["error"] is None
    first, second = (read_json(run.folder(where) / "metrics.json") for where in (runs_dir, tmp_path))
    assert without_timings(first) == without_timings(second)
