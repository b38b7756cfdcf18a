"""shared_utils: rows, seeds, threads and checkpoints that are told apart, and a report that keeps its digits."""

import random

import numpy as np
import pytest
import torch

from shared_utils import checkpoint, device, plotting, report, runs
from shared_utils.cli import UserError, make_parser
from shared_utils.reproduce import declared_runs, experiments
from shared_utils.runs import ROOT, read_json, start_run
from shared_utils.seeding import seed_everything

DOC = "python toy/train.py"


def started(folder, *flags):
    parser = make_parser(DOC, dataset=None)
    parser.add_argument("--resume", action="store_true")
    return start_run(parser.parse_args(["--out", str(folder), *flags]))


def test_a_row_is_found_by_its_columns_not_by_its_values(tmp_path):
    run = started(tmp_path)
    run.log(labels=2, seed=1, accuracy=0.5)
    run.log(labels=1, seed=3, accuracy=0.2)
    assert run.row(labels=1, seed=2) is None
    assert run.row(seed=1)["accuracy"] == "0.5"


def test_a_new_run_drops_every_last_checkpoint_of_the_run_before(tmp_path):
    started(tmp_path).finish({})
    for name in ("last.pth", "allcnn_t_last.pth", "last.npz", "best.pth"):
        (tmp_path / name).touch()
    started(tmp_path).finish({})
    assert [path.name for path in sorted(tmp_path.glob("*.[pn]*")) if path.suffix != ".json"] == ["best.pth"]


def test_another_seed_changes_every_source_of_randomness():
    def draw(seed):
        rng = seed_everything(seed)
        return rng.random(), np.random.random(), torch.rand(1).item(), random.random()

    assert all(one != other for one, other in zip(draw(3), draw(4), strict=True))


def test_the_threads_of_before_come_back():
    before = torch.get_num_threads()
    with device.cpu_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_a_checkpoint_that_does_not_say_how_it_was_built_is_refused(tmp_path):
    checkpoint.save(tmp_path / "a.pth", config={"width": 3}, model={})
    with pytest.raises(UserError, match="has depth = None, this model has depth = 2"):
        checkpoint.load(tmp_path / "a.pth", expect={"width": 3, "depth": 2})
    checkpoint.refuse_other_data("a.pth", {"val_size": 5}, {"dataset": "digits"})  # a flag that the script has not
    with pytest.raises(UserError, match=r"a\.pth was trained with --val-size 5, not None"):
        checkpoint.refuse_other_data("a.pth", {"val_size": 5}, {"val_size": None})


def test_the_commit_of_a_run_is_the_one_it_started_with(tmp_path, monkeypatch):
    commits = iter("abcdef")
    monkeypatch.setattr(runs, "commit", lambda: next(commits))
    assert started(tmp_path).finish({})["run"]["commit"] == "a"
    assert read_json(tmp_path / "config.json")["commit"] == "a"


def test_colours_of_floats_are_not_divided_and_a_confusions_diagonal_is_white():
    _, axes = plotting.new_figure(1, 2)
    plotting.image_grid(axes[0, 0], np.full((1, 3, 2, 2), 0.5), 1)
    assert axes[0, 0].images[0].get_array()[0, 0].tolist() == [0.5, 0.5, 0.5]
    image = plotting.confusion_matrix(axes[0, 1], [[9, 1], [2, 8]], "ab", title="T")
    assert image.get_array().tolist() == [[0, 1], [2, 0]]


def test_the_report_keeps_five_digits():
    assert report._flat({"a": {"b": 0.123456}, "c": [1, 2.5]}, "") == [("a.b", "0.12346"), ("c", "1, 2.5")]


def test_a_quick_run_has_the_flags_of_the_full_one_unless_it_has_its_own():
    for experiment in experiments():
        about = {run["name"]: run for run in read_json(ROOT / experiment / "experiment.json")["runs"]}
        for run in declared_runs(experiment):
            own = about[run.name]
            assert list(run.quick_args) == own.get("quick", own.get("args", []))
