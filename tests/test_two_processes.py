"""torchrun with two processes: their gradients are one process's on the same batch, of which each has its own part."""

import os
import subprocess
import sys

import numpy as np
import pytest

from shared_utils.checkpoint import load_arrays
from shared_utils.runs import ROOT

TRAINERS = {
    "cnn_cifar.allcnn": ["--batch-size", "100", "--val-size", "4600", "--epochs", "2", "--lr", "0.01"],
    "ddpm.train_ddpm": ["--epochs", "1", "--conditional", "--batch-size", "400", "--optimizer", "muon"],
    "transformer_lm.train": ["--updates", "3", "--dropout", "0", "--data", "{corpus}"],
}
# Runs a trainer, and keeps the gradients of its first update and what each batch holds. Left out is what belongs to
# each process: dropout, crops, and the statistics by which BatchNorm normalises its part (see distributed.py).
WATCHED = """
import importlib, os, sys
import numpy as np, torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

name, out, *argv = sys.argv[1:]
module = importlib.import_module(name)
parts, gradients, seen = [], {}, set()
shard = module.shard

def kept_part(batch, world):
    parts.append(shard(batch, world))
    return parts[-1]

def kept_gradients(optimizer, args, kwargs):
    for p in (p for group in optimizer.param_groups for p in group["params"]) if id(optimizer) not in seen else ():
        gradients[f"gradient_{len(gradients):03d}"] = p.grad.numpy().copy()
    seen.add(id(optimizer))

module.shard = kept_part
module.augmented = lambda x, generator, cutout: x
torch.nn.BatchNorm2d.train = lambda self, mode=True: setattr(self, "training", False) or self
torch.nn.functional.dropout = lambda x, p=0.5, training=True, inplace=False: x
register_optimizer_step_pre_hook(kept_gradients)
module.main(argv)
np.savez(f"{out}/process_{os.environ.get('RANK', 0)}.npz", parts=np.stack(parts), **gradients)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    prepare = [sys.executable, ROOT / "transformer_lm" / "prepare_data.py", "--quick", "--out", folder]
    subprocess.run(prepare, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_two_processes_have_the_gradient_of_one(name, corpus, tmp_path):
    script = tmp_path / "watched.py"
    script.write_text(WATCHED)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        env["GLOO_SOCKET_IFNAME"] = "lo"  # the host name may lead nowhere
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for at, start in (("one", []), ("two", torchrun)):
        out = tmp_path / at
        out.mkdir()
        flags = [flag.format(corpus=corpus) for flag in TRAINERS[name]]
        flags += ["--quick", "--device", "cpu", "--out", str(out / "run")]
        command = [sys.executable, *start, str(script), name, str(out), *flags]
        ended = subprocess.run(command, env=env, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count("done in") == 1  # one process writes
    one = load_arrays(tmp_path / "one" / "process_0.npz")
    first, second = (load_arrays(tmp_path / "two" / f"process_{rank}.npz") for rank in (0, 1))
    assert len(one) > 5
    for key in set(one) - {"parts"}:
        assert np.array_equal(first[key], second[key]), key
        np.testing.assert_allclose(
            first[key], one[key], atol=2e-5 * np.abs(one[key]).max() + 1e-12, rtol=0, err_msg=key
        )
    assert len(one["parts"]) > 1
    for whole, *shares in zip(one["parts"], first["parts"], second["parts"], strict=True):
        assert len(shares[0]) == len(shares[1])
        assert sorted(np.concatenate(shares)) == sorted(whole)
        assert not set(shares[0]) & set(shares[1]) or len(set(whole)) < len(whole)
