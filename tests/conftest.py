"""For all tests."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """PyTorch's products here are small: on one thread they do not wait for cores that others hold."""
    torch.set_num_threads(1)
