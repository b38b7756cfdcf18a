"""The patch-embedding network once more, in PyTorch: the twin of train_numpy_vs_torch.py and benchmark.py.

Shapes: N images, K classes.
"""

import numpy as np
import torch

from numpy_nn.embedding import DIM, PATCH
from numpy_nn.network import Sequential


class ChannelsLast(torch.nn.Module):
    """(N, C, H, W) → (N, H, W, C): the order in which our patch embedding gives its numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1)


def torch_twin(network: Sequential) -> torch.nn.Sequential:
    """The same network in PyTorch, with copies of the same weights."""
    embedding, _, _, linear = network.layers
    dtype = torch.float64 if embedding.params["W"].dtype == np.float64 else torch.float32
    twin = torch.nn.Sequential(
        torch.nn.Conv2d(1, DIM, PATCH, stride=PATCH),
        torch.nn.ReLU(),
        ChannelsLast(),
        torch.nn.Flatten(),
        torch.nn.Linear(*linear.params["W"].shape),
    ).to(dtype)
    with torch.no_grad():
        twin[0].weight.copy_(torch.from_numpy(embedding.params["W"].T.reshape(DIM, 1, PATCH, PATCH)))
        twin[0].bias.copy_(torch.from_numpy(embedding.params["b"]))
        twin[4].weight.copy_(torch.from_numpy(linear.params["W"].T))
        twin[4].bias.copy_(torch.from_numpy(linear.params["b"]))
    return twin
