"""cnn_cifar's maps of what an answer rests on, their tests, and what the script writes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn

from cnn_cifar import saliency
from cnn_cifar.attributions import (
    area,
    baseline_of,
    curve,
    grad_cam,
    input_gradient_map,
    integrated_gradients,
    logit_gradient,
    randomized,
    rank_correlation,
)
from cnn_cifar.fast_net import FastNet
from cnn_cifar.models import CIFAR10_MEAN, allcnn_t, pixel_resnet
from shared_utils import checkpoint
from shared_utils.data import Images
from shared_utils.embedded import shapes
from shared_utils.runs import read_json


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    network = FastNet((6, 8, 10))
    for name, values in network.named_parameters():
        if name.startswith(("head", "whiten")):
            nn.init.normal_(values)
    for _ in range(3):
        network(torch.rand(16, 3, 32, 32))
    return network.eval()


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(1)
    return torch.rand(5, 3, 32, 32), torch.tensor([0, 3, 9, 3, 7])


@pytest.fixture
def linear():
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 6)).double()


def test_the_baseline_is_what_normalisation_makes_zero(batch):
    assert torch.equal(baseline_of(batch[0])[2, :, 5, 7], torch.tensor(CIFAR10_MEAN))
    assert FastNet((2, 2, 2)).normalize(baseline_of(batch[0])).abs().max() < 1e-6


def test_a_linear_networks_maps_are_its_weights(linear):
    x, k = torch.rand(4, 3, 4, 4, dtype=torch.float64), torch.tensor([1, 5, 0, 1])
    weights = linear[1].weight[k].view(4, 3, 4, 4)
    assert torch.allclose(logit_gradient(linear, x, k), weights)
    assert torch.allclose(input_gradient_map(linear, x, k), weights.abs().amax(1))
    expected = (weights * (x - baseline_of(x))).sum(1)
    assert torch.allclose(integrated_gradients(linear, x, k, steps=3), expected, atol=1e-7)


def test_the_midpoint_rule_is_exact_where_the_gradient_is_linear():
    class Squares(nn.Module):
        def forward(self, x):
            return (x**2).sum((1, 2, 3))[:, None] * torch.tensor([1.0, -2.0], dtype=x.dtype)

    x, k = torch.rand(2, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 1])
    expected = (x**2 - baseline_of(x) ** 2).sum(1) * torch.tensor([1.0, -2.0])[:, None, None]
    assert torch.allclose(integrated_gradients(Squares(), x, k, steps=2), expected, atol=1e-6)


def test_integrated_gradients_add_up(model, batch):
    x, k = batch
    with torch.no_grad():
        gap = (model(x) - model(baseline_of(x))).gather(1, k[:, None])[:, 0]
    errors = [(integrated_gradients(model, x, k, n).sum((1, 2)) - gap).abs().max() for n in (4, 256)]
    assert errors[1] < 0.02 * gap.abs().max()
    assert errors[1] < 0.3 * errors[0]


def test_grad_cam_is_the_weighted_sum_of_the_maps():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3, stride=2, padding=1)
    network = nn.Sequential(layer, nn.Flatten(), nn.Linear(4 * 4 * 4, 5))
    x, k = torch.rand(2, 3, 8, 8), torch.tensor([4, 1])
    maps, weights = layer(x), network[2].weight[k].view(2, 4, 16).mean(2)  # ∂z_k/∂A are the weights
    expected = torch.einsum("bc,bchw->bhw", weights, maps)
    enlarged = F.interpolate(expected[:, None], size=(8, 8), mode="bilinear", align_corners=False)[:, 0]
    assert torch.allclose(grad_cam(network, x, k, layer), enlarged, atol=1e-6)
    assert not layer._forward_hooks  # none is left behind


def test_nothing_is_left_behind(model, batch):
    before = {name: values.clone() for name, values in model.state_dict().items()}
    for draw in (input_gradient_map, integrated_gradients):
        draw(model, *batch)
    grad_cam(model, *batch, model.blocks[1])
    list(randomized(model))
    assert all(torch.equal(before[name], values) for name, values in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_layers_are_forgotten_from_the_logits_down(model):
    names, changed = [], []
    for name, broken in randomized(model):
        names.append(name)
        pairs = [
            (n, m.weight, broken.get_submodule(n).weight) for n, m in model.named_modules() if hasattr(m, "weight")
        ]
        changed.append({n for n, ours, theirs in pairs if not torch.equal(ours, theirs)})
        weights = (model.get_submodule(name).weight, broken.get_submodule(name).weight)
        assert torch.equal(*(values.flatten().sort().values for values in weights))  # the same numbers elsewhere
    assert names[0] == "head"
    assert names[-1] == "whiten"
    assert len(names) == 8
    assert changed == [set(names[: i + 1]) for i in range(8)]


def test_rank_correlation_is_spearmans(batch):
    torch.manual_seed(3)
    a, b = torch.rand(4, 6, 6).round(decimals=1), torch.rand(4, 6, 6).relu()
    b[0] = -a[0]
    b[1] = a[1] ** 3
    found = rank_correlation(a, b)
    assert found.tolist() == pytest.approx([spearmanr(x.flatten(), y.flatten())[0] for x, y in zip(a, b, strict=True)])
    assert found[:2].tolist() == pytest.approx([-1, 1])
    assert rank_correlation(torch.zeros(1, 3, 3), torch.rand(1, 3, 3)).isnan().all()  # no order, no correlation


def test_curves_begin_and_end_where_they_should(model, batch):
    x, k = batch
    maps = torch.rand(5, 32, 32)
    with torch.no_grad():
        ends = [model(shown).softmax(1).gather(1, k[:, None])[:, 0] for shown in (x, baseline_of(x))]
    taken, put = (curve(model, x, k, maps, 4, insert=insert) for insert in (False, True))
    assert taken.shape == (5, 5)
    assert torch.allclose(taken[:, 0], ends[0], atol=1e-6)
    assert torch.allclose(taken[:, -1], ends[1], atol=1e-6)
    backwards = curve(model, x, k, -maps, 4, insert=True).flip(1)  # to take the first away is to put the last in
    assert torch.allclose(taken, backwards, atol=1e-6)
    assert not torch.allclose(taken, put.flip(1), atol=1e-3)


def test_the_largest_pixels_go_first():
    class Sees(nn.Module):
        def forward(self, x):
            logit = 100 * (x[:, 0, 0, 0] - CIFAR10_MEAN[0])  # one pixel decides
            return torch.stack([logit, -logit], 1)

    x, k = torch.ones(1, 3, 4, 4), torch.tensor([0])
    maps = torch.zeros(1, 4, 4)
    maps[0, 0, 0] = 1
    assert curve(Sees(), x, k, maps, 4, insert=False)[0].tolist() == pytest.approx([1, 0.5, 0.5, 0.5, 0.5])
    assert curve(Sees(), x, k, maps, 4, insert=True)[0].tolist() == pytest.approx([0.5, 1, 1, 1, 1])


def test_areas_are_those_of_trapezoids():
    assert area(torch.tensor([[1.0, 0.5, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])).tolist() == [0.5, 1.0, 0.25]


def test_pixels_that_matter_are_told_from_those_of_another_image(tmp_path, monkeypatch):
    """A network that sees one pixel, another one for each class: its gradient must win over another image's."""

    class Sees(FastNet):
        def forward(self, x):
            logits = 40 * (x[:, 0, 25, :10] - CIFAR10_MEAN[0])  # class k looks at the pixel (25, k)
            return logits + 0 * x.mean((1, 2, 3))[:, None]

    network = Sees((2, 2, 2))
    x = np.full((20, 3, 32, 32), 125, dtype=np.uint8)
    y = np.arange(20) % 10
    x[np.arange(20), 0, 25, y] = 255
    images = Images(x, y.astype(np.int64), tuple("abcdefghij"), "dots")
    state = {"classes": list("abcdefghij"), "title": "dots", "config": {"network": "sees"}}
    monkeypatch.setattr(saliency, "load_network", lambda path, device: (network.eval(), state))
    monkeypatch.setattr(saliency, "load_test", lambda *given: images)
    monkeypatch.setattr(saliency, "grad_cam", lambda model, x, k, layer: torch.rand(len(x), 32, 32))
    monkeypatch.setattr(saliency, "save_figure", lambda figure, path: None)
    flags = ["--quick", "--device", "cpu", "--ckpt", "-", "--out", str(tmp_path), "--images", "20", "--parts", "64"]
    metrics = saliency.main(flags)
    by_map = {row["map"]: row for row in metrics["areas"]}
    for name in ("input gradient", "integrated gradients"):
        for kind in ("deletion", "insertion"):
            assert by_map[name][f"{kind}_gain"] > 0.3
            own, another = by_map[name][kind], by_map[name][f"{kind}_by_another"]
            assert by_map[name][f"{kind}_gain"] == pytest.approx(abs(own - another))
            assert (own < another) is (kind == "deletion")
    for kind in ("deletion", "insertion"):
        assert abs(by_map["Grad-CAM"][f"{kind}_gain"]) < 0.2  # random here


@pytest.mark.parametrize("network", [allcnn_t(4, 6), FastNet((6, 8, 10))], ids=["allcnn", "fast_net"])
def test_the_script_writes_what_it_says(network, tmp_path):
    torch.manual_seed(0)
    x, y, classes, _ = shapes("test", n=60)
    x, y = torch.from_numpy(x) / 255, torch.from_numpy(y)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
    name = "fast_net" if isinstance(network, FastNet) else "allcnn_t"
    config = {"network": name, **network.config}
    checkpoint.save(tmp_path / "net.pth", model=network.state_dict(), config=config, classes=list(classes), title="T")
    out = tmp_path / "out"
    metrics = saliency.main(
        ["--quick", "--device", "cpu", "--ckpt", str(tmp_path / "net.pth"), "--out", str(out), "--images", "4"]
    )
    files = {"saliency_maps.png", "randomization.png", "deletion_insertion.png", "metrics.json", "config.json"}
    assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == files
    assert read_json(out / "metrics.json") == metrics
    assert metrics["images"] == 4
    assert [row["map"] for row in metrics["areas"]] == ["input gradient", "integrated gradients", "Grad-CAM"]
    steps = metrics["randomization"]
    assert len(steps) == (8 if name == "fast_net" else 9)
    assert metrics["last"] == steps[-1]
    for row in steps:
        assert all(
            row[m] is None or -1 <= row[m] <= 1 for m in ("input gradient", "|integrated gradients|", "Grad-CAM")
        )
        assert 0 <= row["most_empty_maps"] <= 1
    assert np.isfinite(metrics["completeness_error"])


@pytest.mark.parametrize("flags", [["--images", "0"], ["--steps", "0"], ["--parts", "x"], ["--ckpt", "nowhere.pth"]])
def test_mistakes_are_one_line(fails, tmp_path, flags):
    assert flags[0].strip("-") in fails(saliency, ["--quick", *flags], tmp_path / "out").replace("checkpoint", "ckpt")


def test_one_image_is_too_few(fails, tmp_path):
    network = FastNet((2, 2, 2))
    state = {
        "config": {"network": "fast_net", **network.config},
        "classes": list(shapes("test", n=10)[2]),
        "title": "T",
    }
    checkpoint.save(tmp_path / "net.pth", model=network.state_dict(), **state)
    flags = ["--quick", "--ckpt", tmp_path / "net.pth", "--images", 1]
    assert "needs at least two images; --images is 1" in fails(saliency, flags, tmp_path / "out")


@pytest.mark.parametrize(
    ("network", "side"), [(allcnn_t(4, 6), 8), (FastNet((4, 4, 6)), 7), (pixel_resnet(10, width=4), 8)]
)
def test_every_network_of_the_folder_has_a_layer_for_grad_cam(network, side):
    sizes = []
    saliency.cam_layer(network).register_forward_hook(lambda layer, given, maps: sizes.append(maps.shape[-2:]))
    network.eval()(torch.rand(1, 3, 32, 32))
    assert sizes == [(side, side)]
    assert len(list(saliency.randomized(network))) >= 8
