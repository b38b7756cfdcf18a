"""Every script with --resume is killed at a random moment, runs out of room, is interrupted, and goes on to the end.

The processes come from a server that has imported PyTorch already, so that a random moment falls into the work.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from shared_utils import checkpoint
from shared_utils.cli import UserError, make_parser, run_main
from shared_utils.data import load_images, load_text
from shared_utils.runs import ROOT, read_json, start_run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
SMALL = ["--dataset", "{pictures}", "--val-size", "12", "--train-size", "60", "--batch-size", "16"]
FLAGS = {  # more than --quick, where that has no checkpoint on its way
    "autoencoder/ae_experiments": [],
    "cnn_cifar/adversarial_training": [],
    "cnn_cifar/allcnn": ["--epochs", "3"],
    "cnn_cifar/augmentation_study": SMALL,
    "cnn_cifar/compare_mnist_models": ["--models", "fcnn", "cnn", "--seeds", "0", "1", "--recipe", "strong"],
    "cnn_cifar/data_efficiency": ["--sizes", "32"],
    "cnn_cifar/detect_digits": ["--epochs", "3"],
    "cnn_cifar/fast_cifar": ["--epochs", "3"],
    "cnn_cifar/fast_cifar_ladder": SMALL,
    "cnn_cifar/resnet_vs_plain": SMALL,
    "cnn_cifar/transfer_learning": [],
    "ddpm/fid_vs_steps": ["--ckpt", "{ckpt}"],
    "ddpm/train_ddpm": ["--epochs", "4"],
    "mnist_svm_gabor/learning_curve": [],
    "nl_regression/sweep": [],
    "numpy_nn/train_mnist_numpy": ["--epochs", "3"],
    "transformer_lm/train": ["--updates", "60", "--data", "{corpus}"],
    "transformer_lm/vocab_study": [],
    "vae/train": ["--epochs", "240"],
}


def inside(name, argv, words, room):
    """The script in a process of its own. words: where its stderr goes; room: bytes that a file may have."""
    import resource

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's would be ignored
    os.dup2(words.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if room:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))  # as on a full disk, a write fails
    module = importlib.import_module(name.replace("/", "."))
    run_main(lambda: module.main(argv), module.build_parser)


@pytest.fixture(scope="module")
def processes():
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload([*(name.replace("/", ".") for name in FLAGS), "tests.test_faults"])
    return found


def ended(processes, name, argv, *, after=None, by=signal.SIGKILL, room=None):
    """Run the script, send it a signal after so many seconds; returns its exit code and what it wrote to stderr."""
    reads, words = processes.Pipe(duplex=False)
    process = processes.Process(target=inside, args=(name, argv, words, room))
    process.start()
    words.close()
    if after is not None:
        process.join(after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, by)
    said = b""
    while part := os.read(reads.fileno(), 65536):
        said += part
    process.join()
    return process.exitcode, said.decode()


@pytest.fixture(scope="module")
def made(processes, pictures, tmp_path_factory):
    """What some of the scripts read: the places in their flags."""
    top = tmp_path_factory.mktemp("made")
    quick = ["--quick", "--runs-dir", str(top)]
    for name, flags in (("ddpm/train_ddpm", ["--device", "cpu"]), ("transformer_lm/prepare_data", [])):
        code, said = ended(processes, name, [*quick, *flags])
        assert code == 0, said
    corpus = str(top / "transformer_lm/prepare_data")
    return {"ckpt": str(top / "ddpm/train_ddpm/ema.pth"), "corpus": corpus, "pictures": str(pictures)}


TIMES = ("run", "minutes", "random_states")


def timeless(value):
    """Without what differs from run to run: timings, and random states that no training went through."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if "second" not in str(key) and key not in TIMES}
        return {str(key): timeless(item) for key, item in kept.items()}
    if isinstance(value, list | tuple):
        return [timeless(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def content(folder):
    """Of each file of weights, arrays or measures."""
    read = {".pth": checkpoint.load, ".npz": checkpoint.load_arrays, ".json": read_json}
    paths = [path for path in folder.iterdir() if path.suffix in read and path.name != "config.json"]
    return {path.name: json.dumps(timeless(read[path.suffix](path)), sort_keys=True) for path in paths}


def test_every_script_with_resume_is_tried():
    paths = [path for path in ROOT.glob("*/*.py") if path.parent.name not in ("tests", "shared_utils")]
    asked = [path for path in paths if 'add_argument("--resume"' in path.read_text(encoding="utf-8")]
    assert {path.relative_to(ROOT).with_suffix("").as_posix() for path in asked} == set(FLAGS)


def test_an_interrupt_that_a_library_makes_another_error_of_is_one_all_the_same(capsys):
    def main():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("invalid bounding box") from None

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(SystemExit) as stop:
        run_main(main, lambda: make_parser("python vae/train.py"))
    assert stop.value.code == 130
    assert "interrupted" in capsys.readouterr().err
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_processes(tmp_path):
    parser = make_parser("python vae/train.py", dataset=None)
    parser.add_argument("--resume", action="store_true")
    flags = ["--device", "cpu", "--out", str(tmp_path)]
    for more, seconds in (([], 100), (["--resume"], 20)):  # two that are stopped
        run = start_run(parser.parse_args([*flags, *more]))
        run.log(epoch=1, loss=0.5)
        run._lock.close()
        began = run.path("config.json").stat().st_mtime
        os.utime(run.path("history.csv"), (began, began + seconds))
    metrics = start_run(parser.parse_args([*flags, "--resume"])).finish({})
    assert 120 <= metrics["run"]["seconds"] < 125


@pytest.mark.slow
@pytest.mark.parametrize("name", FLAGS)
def test_a_run_that_meets_every_fault_ends_as_one_that_met_none(name, processes, made, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = ["--quick", *(flag.format(**made) for flag in FLAGS[name])]
    if not name.startswith("numpy_nn"):
        flags += ["--device", "cpu"]
    started = time.monotonic()
    code, said = ended(processes, name, [*flags, "--out", str(whole)])
    assert code == 0, said
    took, moments = time.monotonic() - started, [random.random(), random.random()]
    expected = content(whole)

    cut.mkdir()
    if sys.platform == "linux":
        import fcntl

        with (cut / ".lock").open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            code, said = ended(processes, name, [*flags, "--out", str(cut)])
        assert (code, said.count("\n")) == (2, 1), said
        assert "another run is writing" in said
        assert [path.name for path in cut.iterdir()] == [".lock"]
    code, said = ended(processes, name, [*flags, "--out", str(whole / "metrics.json" / "below")])
    assert (code, said.count("\n")) == (2, 1), said
    assert "cannot write" in said

    flags += ["--out", str(cut), "--resume"]
    ended(processes, name, flags, after=moments[0] * took)
    kept = [path for path in cut.glob("[!.]*") if path.suffix in (".pth", ".npz")]
    before = {path.name: path.read_bytes() for path in kept}
    code, said = ended(processes, name, flags, room=4000)
    assert (code, said.count("\n")) == (2, 1), said
    assert "cannot write" in said
    assert not [path for path in cut.glob(".*") if path.name != ".lock"]  # nothing half written
    for file, bytes_ in before.items():
        assert (cut / file).read_bytes() == bytes_, file
    code, said = ended(processes, name, flags, after=moments[1] * took, by=signal.SIGINT)
    assert code == 0 or (code == 130 and "with --resume goes on" in said), (moments, code, said)
    code, said = ended(processes, name, flags)
    assert code == 0, (moments, said)
    assert content(cut) == expected, moments


# --- files that are not what they seem ------------------------------------------------------------------------------

READERS = {
    "autoencoder/ae_process_test": ["--ckpt"],
    "autoencoder/ae_run_compare": ["--ckpt-base", "--ckpt-reg"],
    "autoencoder/ae_umap": ["--ckpt"],
    "autoencoder/ft_compare_raw_vs_ae": ["--ckpt", "--ckpt-denoising"],
    "cnn_cifar/grad_and_attack_analysis": ["--ckpt"],
    "cnn_cifar/predict": ["--ckpt"],
    "cnn_cifar/saliency": ["--ckpt"],
    "cnn_cifar/transfer_learning": ["--weights"],
    "ddpm/evaluate": ["--ckpt", "--samples"],
    "ddpm/fid_vs_steps": ["--ckpt"],
    "ddpm/sampling": ["--ckpt"],
    "mnist_svm_gabor/invariance": ["--raw", "--gabor"],
    "mnist_svm_gabor/predict": ["--model"],
    "numpy_nn/evaluate_mlp": ["--ckpt"],
    "numpy_nn/visualize_filters": ["--ckpt"],
    "transformer_lm/analyze_attention": ["--ckpt"],
    "transformer_lm/evaluate": ["--ckpt"],
    "transformer_lm/generate": ["--ckpt"],
    "vae/evaluate": ["--ckpt"],
    "vae/latent_space": ["--ckpt"],
    "vae/reconstruct": ["--ckpt"],
    "vae/sample": ["--ckpt"],
}


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["pickle", "text", "cut", "flipped"])
@pytest.mark.parametrize("name", READERS)
def test_a_checkpoint_that_is_none_is_refused_in_one_line_and_not_executed(name, fault, tmp_path, fails):
    arrays = name.startswith(("mnist_svm_gabor", "numpy_nn"))
    given, out = tmp_path / ("given.npz" if arrays else "given.pth"), tmp_path / "out"
    if fault == "pickle":
        trap = Trap(tmp_path / "executed")
        np.savez(given, w=np.array([trap], dtype=object)) if arrays else torch.save({"config": {}, "w": trap}, given)
    elif arrays:
        checkpoint.save_arrays(given, w=np.random.default_rng(0).random(1000))
    else:
        checkpoint.save(given, w=torch.rand(1000))
    about = {"hidden": [4], "activation": "relu", "inputs": 784, "classes": list("0123456789")}  # numpy_nn's
    given.with_suffix(".json").write_text(json.dumps({**about, "recipe": "plain", "n_classes": 10}))
    content = bytearray(given.read_bytes())
    content[len(content) // 2] ^= 16
    damaged = {"pickle": given.read_bytes(), "text": b"weights", "cut": given.read_bytes()[:-300], "flipped": content}
    given.write_bytes(damaged[fault])
    quick = name != "cnn_cifar/transfer_learning"  # which then has a source of its own
    flags = ["--quick"] if quick else ["--dataset", "shapes", "--val-size", 100, "--labels", 20]
    flags += [part for flag in READERS[name] for part in (flag, given)]
    said = fails(importlib.import_module(name.replace("/", ".")), [*flags, "--out", out, "--runs-dir", tmp_path], out)
    assert str(given) in said
    assert not (tmp_path / "executed").exists()


REAL = ROOT / "data"
FILES = {
    "mnist": [f"MNIST/raw/{part}" for part in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")],
    "fashion": [f"FashionMNIST/raw/{part}" for part in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")],
    "cifar10": [f"cifar-10-batches-py/{part}" for part in ("batches.meta", *(f"data_batch_{i}" for i in range(1, 6)))],
    "books": [f"texts/{part}.txt" for part in ("hound_of_the_baskervilles", "shakespeare", "war_and_peace")],
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["text", "cut", "flipped"])
@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in FILES.items() for file in files])
def test_a_damaged_data_file_is_named(name, file, fault, tmp_path):
    if not (REAL / file).exists():
        pytest.skip(f"{REAL / file} is not there")
    for path in (REAL / file).parent.iterdir():
        at = tmp_path / path.relative_to(REAL)
        at.parent.mkdir(parents=True, exist_ok=True)
        at.symlink_to(path.resolve())
    content = bytearray((REAL / file).read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"text": b"<html>not found</html>", "cut": content[: len(content) // 2], "flipped": content}
    (tmp_path / file).unlink()
    (tmp_path / file).write_bytes(damaged[fault])
    with pytest.raises(UserError, match=Path(file).name) as error:
        load_text(name, tmp_path) if name == "books" else load_images(name, "train", tmp_path)
    assert "\n" not in str(error.value)
    assert (tmp_path / file).read_bytes() == damaged[fault]  # not mended behind the reader's back
