"""Dropout with few random numbers: as PyTorch's in all that can be measured."""

import math

import pytest
import torch

from shared_utils.dropout import Dropout, dropped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_drops_as_often_as_it_says(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(333, 1001, dtype=dtype, requires_grad=True)  # no multiple of four
    y = dropped(x, p)
    assert y.dtype == dtype
    assert set(y.detach().unique().tolist()) == {0.0, (torch.ones(1, dtype=dtype) / (1 - p)).item()}
    zero = y.detach() == 0
    n = x.numel()
    assert zero.float().mean().item() == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / n))
    for shift in (1, 2, 3, 4):  # values of one random number are independent
        both = (zero.flatten()[shift:] & zero.flatten()[:-shift]).float().mean().item()
        assert both == pytest.approx(p * p, abs=5 * p / math.sqrt(n))
    assert zero.float().mean(0).std().item() == pytest.approx(math.sqrt(p * (1 - p) / 333), rel=0.2)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # the gradient goes where the value went
    assert torch.equal(dropped(x, 0.0), x)
    assert not dropped(x, 1.0).any()
    torch.manual_seed(0)
    assert torch.equal(dropped(x, p), y)


def test_values_are_dropped_one_by_one_whatever_the_layout():
    torch.manual_seed(0)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.ones(16, 32, 16, 16).contiguous(memory_format=memory_format)
        y = dropped(x, 0.5)
        assert y.is_contiguous(memory_format=memory_format)
        kept = (y > 0).float() - 0.5
        for axis in range(4):
            for by in range(1, 9):  # four values come from one draw
                assert abs((kept * kept.roll(by, axis)).mean().item()) < 0.01
    expanded = dropped(torch.ones(1, 1).expand(64, 64), 0.5)
    assert 0.4 < (expanded == 0).float().mean() < 0.6
    assert not torch.equal(expanded[0], expanded[1])
    assert 0.4 < (dropped(torch.ones(64, 64)[:, ::3], 0.5) == 0).float().mean() < 0.6


def test_the_layer_drops_in_training_alone():
    layer, x = Dropout(0.5), torch.randn(50, 70)
    torch.manual_seed(0)
    expected = dropped(x, 0.5)
    torch.manual_seed(0)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.eval()(x), x)
    for p in (1.5, -0.1):
        with pytest.raises(ValueError, match="probability"):
            Dropout(p)(x)
