"""autoencoder: a grid that was killed goes on and ends with the weights of one that was not; the benchmark is fair."""

import subprocess
import sys
import time

import pytest
import torch

from shared_utils import checkpoint
from shared_utils.cli import UserError
from shared_utils.runs import ROOT, read_json

GRID = ["--dataset", "digits", "--val-size", "200", "--device", "cpu", "--enc-dims", "64,8", "--init", "he"]
GRID += ["--lr", "0.004", "0.008", "--epochs", "40", "--final-epochs", "5", "--batch-size", "32", "--seeds", "0"]


def grid(out, *flags, jobs="1"):
    command = [sys.executable, ROOT / "autoencoder" / "ae_experiments.py", *GRID, "--jobs", jobs, "--out", out, *flags]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(part) for part in command], cwd=ROOT, **quiet)


@pytest.mark.slow
def test_a_killed_grid_ends_with_the_same_weights(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert grid(whole).wait(300) == 0
    process, history = grid(cut), cut / "history.csv"
    deadline = time.monotonic() + 300
    while not (history.exists() and history.read_text().count("\n") >= 4):  # a header and three of eight combinations
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (cut / "metrics.json").exists()
    with history.open("a") as file:
        file.write("64-8,relu,he")  # what a kill may leave half written
    resumed = grid(cut, "--resume", jobs="2")  # as many at once as one likes
    assert resumed.wait(300) == 0, resumed.stderr.read()
    ours, theirs = (checkpoint.load(folder / "best.pth")["model"] for folder in (cut, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (read_json(folder / "metrics.json") for folder in (cut, whole))
    assert [row["val_recon"] for row in ours["grid"]] == [row["val_recon"] for row in theirs["grid"]]
    assert ours["test_recon"] == theirs["test_recon"]


def test_the_history_of_another_grid_is_refused(tmp_path, monkeypatch):
    from autoencoder import ae_experiments

    flags = ["--dataset", "digits", "--val-size", "200", "--jobs", "1", "--seeds", "0", "--epochs", "1"]
    flags += ["--final-epochs", "1", "--out", str(tmp_path)]
    small = {"enc_dims": ["16,4"], "activation": ["relu"], "init": ["he"], "batchnorm": ["off"], "lr": [0.01]}
    grids = ae_experiments.GRIDS
    monkeypatch.setattr(ae_experiments, "GRIDS", {**grids, "baseline": grids["baseline"] | small})
    ae_experiments.main(flags)
    changed = small | {"activation": ["gelu"]}
    monkeypatch.setattr(ae_experiments, "GRIDS", {**grids, "baseline": grids["baseline"] | changed})
    with pytest.raises(UserError, match="another grid"):
        ae_experiments.main([*flags, "--resume"])


@pytest.mark.parametrize("use_batchnorm", [False, True])
def test_the_benchmark_compares_gradients_of_the_same_network(use_batchnorm, monkeypatch):
    from autoencoder import benchmark
    from autoencoder.fitting import Recipe
    from autoencoder.layers import Linear

    recipe = Recipe((16, 8, 4), use_batchnorm=use_batchnorm)
    assert benchmark.gradient_error(recipe, 0) < 1e-12
    right = Linear.backward

    def wrong(self, dy, need_dx=True):
        dx = right(self, dy, need_dx)
        self.grads["W"] = self.grads["W"] * 1.001
        return dx

    monkeypatch.setattr(Linear, "backward", wrong)
    assert benchmark.gradient_error(recipe, 0) > 1e-5
