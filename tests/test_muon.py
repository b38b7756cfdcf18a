"""Muon's step against its equation, and its polynomial against the singular values."""

import numpy as np
import pytest
import torch
from torch import nn

from shared_utils import muon
from shared_utils.muon import Muon, orthogonalize

BFLOAT16 = 0.05  # of values near 1: some roundings to 8 bits


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize(("m", "n"), [(12, 12), (8, 40), (40, 8)])
def test_orthogonalize_keeps_the_vectors_and_changes_the_values_as_published(m, n, steps):
    values, rng = np.geomspace(3.0, 0.2, min(m, n)), np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((side, len(values))))[0] for side in (m, n))
    matrix, u, v = (torch.from_numpy(one).float() for one in (u * values @ v.T, u, v))
    found = orthogonalize(matrix, steps)
    assert (found.dtype, found.shape) == (matrix.dtype, matrix.shape)
    expected = values / np.linalg.norm(values)
    for _ in range(steps):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5  # Jordan et al. 2024
    middle = u.T @ found @ v  # diagonal if the singular vectors are still the same
    torch.testing.assert_close(middle, torch.from_numpy(np.diag(expected)).float(), rtol=0, atol=BFLOAT16)
    if steps == 3:
        assert torch.equal(found, orthogonalize(matrix))  # the default
    if steps == 5:  # about U Vᵀ, all of whose singular values are 1
        torch.testing.assert_close(middle, torch.eye(len(values)), rtol=0, atol=0.35)
        torch.testing.assert_close(found, u @ v.T, rtol=0, atol=0.3)


def test_orthogonalize_takes_each_matrix_of_a_batch_for_itself():
    rng = np.random.default_rng(1)
    batch = torch.from_numpy(rng.standard_normal((2, 3, 6, 4)) * np.array([1, 50, 0.01])[:, None, None]).float()
    batch[0, 0], batch[1, 0] = 0, 1000 * batch[1, 1]
    found = orthogonalize(batch)
    for i, j in np.ndindex(2, 3):
        torch.testing.assert_close(found[i, j], orthogonalize(batch[i, j]), rtol=0, atol=BFLOAT16)
    torch.testing.assert_close(found[1, 0], found[1, 1], rtol=0, atol=BFLOAT16)  # it knows no scale
    assert not found[0, 0].any()


def exactly(matrix):
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u @ vh).to(matrix.dtype)


@pytest.mark.parametrize("hold_norm", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_follows_its_equation_and_goes_on_from_its_state(layout, hold_norm, monkeypatch):
    monkeypatch.setattr(muon, "orthogonalize", exactly)
    rng, momentum = np.random.default_rng(0), np.zeros((6, 36))
    weight = nn.Parameter(torch.from_numpy(rng.standard_normal((6, 4, 3, 3))).float().to(memory_format=layout))
    bystander, w = nn.Parameter(torch.ones(3, 3)), weight.detach().double().numpy().reshape(6, 36)
    optimizer = Muon([weight, bystander], lr=0.3, momentum=0.8, hold_norm=hold_norm)
    for step in range(5):
        g = rng.standard_normal((6, 36))
        weight.grad = torch.from_numpy(g.reshape(6, 4, 3, 3)).float()
        optimizer.step()
        momentum = 0.8 * momentum + g
        u, _, vh = np.linalg.svd(g + 0.8 * momentum, full_matrices=False)
        w = (np.sqrt(6) * w / np.linalg.norm(w) if hold_norm else w) - 0.3 * u @ vh
        np.testing.assert_allclose(weight.detach().reshape(6, 36), w, rtol=0, atol=1e-5)
        if step == 2:
            state, optimizer = optimizer.state_dict(), Muon([weight, bystander], lr=9, momentum=0.1)
            optimizer.load_state_dict(state)
    assert torch.equal(bystander, torch.ones(3, 3))
