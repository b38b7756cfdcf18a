"""For all tests."""

import gc

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from shared_utils import checkpoint
from shared_utils.cli import run_main
from shared_utils.embedded import shapes


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """PyTorch's products here are small: on one thread they do not wait for cores that others hold."""
    torch.set_num_threads(1)


@pytest.fixture
def fails(capsys):
    """A function: the one line that a script ends with on a mistake of the user's; exit code 2; `out` not written."""

    def ended(module, flags, out=None):
        with pytest.raises(SystemExit) as stop:
            run_main(lambda: module.main([str(flag) for flag in flags]), module.build_parser)
        assert stop.value.code == 2
        written = capsys.readouterr()
        assert len(written.err.strip().splitlines()) == 1, written.err
        assert out is None or not out.exists()
        return written.err

    return ended


@pytest.fixture
def stopped(monkeypatch):
    """A function: runs a call, which is stopped as by Ctrl-C as soon as it has saved its n-th last.pth."""

    def stop(n, call):
        save, saved = checkpoint.save, []

        def interrupted(path, **state):
            save(path, **state)
            saved.append(path.name)
            if saved.count("last.pth") == n:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save", interrupted)
            with pytest.raises(KeyboardInterrupt):
                call()
        gc.collect()  # the stopped run's frames, which hold its locks as its process would

    return stop


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 32×32 pictures of three classes: 72 for training and 24 for the test."""
    top, classes = tmp_path_factory.mktemp("pictures"), ("circle", "square", "star")
    for split, n in (("train", 240), ("test", 80)):
        x, y, *_ = shapes(split, n=n)
        for i in np.flatnonzero(y < 3):
            path = top / split / classes[y[i]] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(x[i].transpose(1, 2, 0)).save(path)
    return top


@pytest.fixture
def weights_of():
    """A function: a state dict of the shapes of torchvision's model `name`, drawn from a seed.

    Its linear layers are one number seen many times, so that a file of it stays small.
    """

    def drawn(name, **options):
        torch.manual_seed(0)
        with torch.device("meta"):
            state = getattr(torchvision.models, name)(**options).state_dict()
        return {
            key: 0.05 * torch.randn(value.shape)
            if key.startswith("features")
            else torch.full((1,), 0.01).expand(value.shape)
            for key, value in state.items()
        }

    return drawn
