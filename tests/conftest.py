"""For all tests."""

import pytest
import torch

from shared_utils.cli import run_main


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
