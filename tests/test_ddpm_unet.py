"""ddpm's UNet: shapes, what depends on what, the time's formula, and a training that learns."""

import math

import pytest
import torch

from ddpm.diffusion import GaussianDiffusion
from ddpm.unet import Block, Norm, SelfAttention, UNet, time_embedding
from shared_utils.cli import UserError


def small(**changes):
    torch.manual_seed(0)
    network = UNet(**{"size": 12, "channels": (32, 32), **changes})
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)  # a layer of zeros hides all that comes before it
    return network.eval()


@pytest.mark.parametrize("shape", [(28, 1), (32, 3), (8, 1)])
def test_noise_has_the_shape_of_the_image(shape):
    size, channels = shape
    network = UNet(size, channels, (32, 64), n_classes=10)
    x = torch.randn(3, channels, size, size)
    out = network(x, torch.tensor([0, 5, 999]), torch.tensor([0, 9, 10]))
    assert out.shape == x.shape
    assert not out.any()  # the last convolution starts at 0


def test_the_default_is_light():
    assert sum(p.numel() for p in UNet().parameters()) < 1_500_000
    assert sum(p.numel() for p in UNet(n_classes=10).parameters()) < 1_500_000


def test_the_times_formula():
    found = time_embedding(torch.tensor([0, 3, 500]), 8)
    for row, t in zip(found, (0, 3, 500), strict=True):
        for i in range(4):
            assert row[i].item() == pytest.approx(math.sin(t / 10000 ** (i / 4)), abs=1e-4)
            assert row[4 + i].item() == pytest.approx(math.cos(t / 10000 ** (i / 4)), abs=1e-4)


def test_every_block_hears_the_time():
    block = Block(32, 32, 16)
    torch.nn.init.normal_(block.conv2.weight)
    x = torch.randn(1, 32, 4, 4)
    assert not torch.allclose(block(x, torch.zeros(1, 16)), block(x, torch.ones(1, 16)))
    network = small()
    blocks = [module for module in network.modules() if isinstance(module, Block)]
    assert len(blocks) == 6
    network(torch.randn(2, 1, 12, 12), torch.tensor([1, 2])).sum().backward()
    assert all(module.time.weight.grad.any() for module in blocks)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


def test_norms_are_computed_in_float32():
    with torch.autocast("cpu", torch.bfloat16):
        assert Norm(32)(torch.randn(2, 32, 3, 3, dtype=torch.bfloat16)).dtype == torch.float32


def test_an_image_has_its_own_time_and_label_and_no_other():
    network = small(n_classes=3)
    x, t, y = torch.randn(3, 1, 12, 12), torch.tensor([0, 40, 7]), torch.tensor([2, 0, 1])
    together = network(x, t, y)
    for i in range(3):
        alone = network(x[i : i + 1], t[i : i + 1], y[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(alone, network(x[i : i + 1], t[i : i + 1] + 1, y[i : i + 1]), atol=1e-3)
        assert not torch.allclose(alone, network(x[i : i + 1], t[i : i + 1], (y[i : i + 1] + 1) % 3), atol=1e-3)
    torch.testing.assert_close(network(x, t), network(x, t, torch.full((3,), 3)))  # no label is the label of none


def test_every_pixel_sees_every_other():
    """Attention at a quarter of the size reaches across the image."""
    network = small(size=28)
    x = torch.randn(1, 1, 28, 28, requires_grad=True)
    network(x, torch.tensor([3]))[0, 0, 0, 0].backward()
    assert x.grad[0, 0, -1, -1] != 0


def test_attention_is_the_formula():
    torch.manual_seed(0)
    layer = SelfAttention(64)
    torch.nn.init.normal_(layer.out.weight, std=0.1)
    x = torch.randn(2, 64, 3, 3)
    h = layer.norm(x).flatten(2).transpose(1, 2)  # (B, 9, 64)
    q, k, v = (h @ layer.qkv.weight[:, :, 0, 0].T + layer.qkv.bias).split(64, dim=2)
    seen = []
    for head in range(2):
        at = slice(32 * head, 32 * head + 32)
        weights = (q[..., at] @ k[..., at].transpose(1, 2) / math.sqrt(32)).softmax(2)
        seen.append(weights @ v[..., at])
    out = torch.cat(seen, 2) @ layer.out.weight[:, :, 0, 0].T + layer.out.bias
    torch.testing.assert_close(layer(x), x + out.transpose(1, 2).unflatten(2, (3, 3)), rtol=1e-4, atol=1e-4)


def test_two_images_are_learned_by_heart():
    """Samples of a network that was shown two images only are these two."""
    torch.manual_seed(0)
    diffusion, network = GaussianDiffusion(50, "cosine", "v"), UNet(8, channels=(32, 32))
    images = torch.ones(2, 1, 8, 8)
    images[0, :, :4], images[1, :, :, 4:] = -1, -1
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(200):
        loss = diffusion.loss(network, images.repeat(8, 1, 1, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = diffusion.dpm_solver_sample(network.eval(), (16, 1, 8, 8), 10)
    distances = (found[:, None] - images[None]).square().flatten(2).mean(2)  # (16, 2)
    assert distances.min(1).values.median() < 0.05
    assert set(distances.argmin(1).tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("given", "said"),
    [({"size": 30}, "multiple of 4, got 30"), ({"channels": (32, 48)}, "multiples of 32, got 32 and 48")],
)
def test_what_cannot_be_built_gets_one_line(given, said):
    with pytest.raises(UserError, match=said):
        UNet(**given)
