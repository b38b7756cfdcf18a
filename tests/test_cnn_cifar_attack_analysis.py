"""cnn_cifar's analysis under attack: who survives, noise, the checks for hidden gradients, what the script writes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, nn

from cnn_cifar import grad_and_attack_analysis as script
from cnn_cifar.attack_measures import (
    BATCH,
    fgsm_accuracy_again,
    logits_of_floats,
    losses,
    masking_checks,
    noise,
    survivors,
)
from cnn_cifar.attacks import fgsm
from cnn_cifar.fast_net import FastNet
from cnn_cifar.inputs import Split
from shared_utils import checkpoint
from shared_utils.embedded import shapes
from shared_utils.runs import read_json

EPS = 8 / 255
WRITTEN = (
    "grad_visuals_correct.png",
    "grad_visuals_incorrect.png",
    "attack_loss_curve.png",
    "attack_image_progression_example0.png",
    "accuracy_vs_eps.png",
    "accuracy_vs_steps.png",
    "masking_checks.png",
    "metrics.json",
)


@pytest.fixture(scope="module")
def split():
    x, y, *_ = shapes("test", n=40)
    return Split(torch.from_numpy(x), torch.from_numpy(y))


@pytest.fixture(scope="module")
def model(split):
    """A small network that is right about most of the images."""
    torch.manual_seed(0)
    network = FastNet((6, 8, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(25):
        optimizer.zero_grad()
        F.cross_entropy(network(split.x / 255), split.y).backward()
        optimizer.step()
    network.zero_grad()
    return network.eval()


@pytest.fixture(scope="module")
def checkpoint_path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("ckpt") / "net.pth"
    config = {"network": "fast_net", **model.config}
    checkpoint.save(path, model=model.state_dict(), config=config, classes=list(shapes("test", n=10)[2]), title="T")
    return path


def test_noise_moves_every_pixel_by_eps_at_random():
    x = torch.full((4, 3, 16, 16), 0.5)
    moved = noise(x, EPS, Generator().manual_seed(0)) - x
    assert torch.allclose(moved.abs(), torch.tensor(EPS))
    assert abs((moved > 0).float().mean() - 0.5) < 0.05
    assert (noise(torch.ones(1, 3, 8, 8), EPS, Generator()) <= 1).all()


def test_survivors_are_those_right_after_the_attack(model):
    x, y, *_ = shapes("test", n=BATCH + 30)  # more than one batch
    split = Split(torch.from_numpy(x), torch.from_numpy(y))
    with torch.no_grad():
        right = model(split.x / 255).argmax(1) == split.y
        other = model(1 - split.x / 255).argmax(1) == split.y
    assert torch.equal(survivors(model, split), right)
    assert torch.equal(survivors(model, split, lambda x, y: 1 - x), other)
    assert right.any()
    assert not torch.equal(right, other)


def test_losses_are_those_of_each_image(model, split):
    x = split.x / 255
    expected = torch.stack([F.cross_entropy(model(x[i : i + 1]), split.y[i : i + 1]) for i in range(len(x))])
    assert torch.allclose(losses(model, x, split.y), expected, atol=1e-5)
    assert not logits_of_floats(model, x).requires_grad


def test_fgsm_agrees_with_its_independent_twin(model, split):
    ours = survivors(model, split, lambda x, y: fgsm(model, x, y, EPS)).float().mean().item()
    assert fgsm_accuracy_again(model, split, EPS) == pytest.approx(ours)
    assert ours < survivors(model, split).float().mean().item()
    assert all(parameter.grad is None for parameter in model.parameters())


def rows_of_checks(**changed):
    """What `masking_checks` takes after model and images: all in order but for what is changed."""
    row = {"eps": 8, "noise": 0.9, "FGSM": 0.4, "PGD-20": 0.1} | changed.get("row", {})
    larger = {"eps": 16, "PGD-20": changed.get("larger", 0.105)}
    by_steps = [{"steps": i, "one start": value} for i, value in enumerate(changed.get("steps", (0.4, 0.2, 0.205)))]
    return [row, larger], 8, by_steps, changed.get("everything", 0.0)


@pytest.mark.parametrize(
    ("failing", "changed"),
    [
        (None, {}),
        (None, {"row": {"PGD-20": 0.405}, "larger": 0.3}),  # a point is chance
        (0, {"row": {"noise": 0.405}}),
        (0, {"row": {"noise": 0.3}}),
        (1, {"row": {"PGD-20": 0.5}, "larger": 0.3}),
        (2, {"steps": (0.4, 0.2, 0.22)}),
        (3, {"larger": 0.2}),
        (4, {"everything": 0.01}),
    ],
)
def test_each_check_fails_where_it_should(model, split, failing, changed):
    passes = [row["passes"] for row in masking_checks(model, split, *rows_of_checks(**changed))]
    assert passes == [i != failing for i in range(6)]


def test_a_gradient_that_is_gone_is_seen(split):
    class Blind(nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), 10) + 0 * x.flatten(1)[:, :10]

    found = masking_checks(Blind(), split, *rows_of_checks())
    assert [row["passes"] for row in found] == [True] * 5 + [False]
    assert found[-1]["measured"] == "100.0% of the images"


def test_the_script_writes_what_it_says_and_its_numbers_agree(model, checkpoint_path, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "STEPS", (1, 5))
    flags = ["--quick", "--device", "cpu", "--ckpt", str(checkpoint_path), "--out", str(tmp_path)]
    metrics = script.main([*flags, "--eps", "4", "--images", "10", "--test-images", "40", "--steps", "3"])
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == sorted(
        (*WRITTEN, "config.json")
    )
    assert read_json(tmp_path / "metrics.json") == metrics
    x, y, *_ = shapes("test")
    whole = Split(torch.from_numpy(x[:40]), torch.from_numpy(y[:40]))
    some = Split(whole.x[:10], whole.y[:10])
    accuracy = metrics["accuracy"]
    assert accuracy["clean"] == pytest.approx(survivors(model, whole).float().mean().item())
    assert accuracy["clean_of_some"] == pytest.approx(survivors(model, some).float().mean().item())
    assert accuracy["fgsm"] == accuracy["fgsm_again"]
    assert accuracy["fgsm"] == pytest.approx(fgsm_accuracy_again(model, whole, 4 / 255))
    assert [row["eps"] for row in metrics["by_eps"]] == [0.5, 1, 2, 4, 8, 16]
    for row in metrics["by_eps"]:
        expected = fgsm_accuracy_again(model, some, row["eps"] / 255)
        assert row["FGSM"] == pytest.approx(expected)
        assert row["worst case"] <= min(row["noise"], row["FGSM"], row["PGD-20"])
    clean = accuracy["clean_of_some"]
    assert metrics["strongest"] <= min(
        clean, *(min(row["one start"], row["several starts"]) for row in metrics["by_steps"])
    )
    assert metrics["strongest"] <= next(row["worst case"] for row in metrics["by_eps"] if row["eps"] == 4)
    assert all(row["several starts"] <= row["one start"] + 0.11 for row in metrics["by_steps"])
    assert (metrics["alpha"], metrics["network"]) == (pytest.approx(0.8), "fast_net")


def test_any_eps_gets_its_own_row(checkpoint_path, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "save_figure", lambda figure, path: None)
    monkeypatch.setattr(script, "STEPS", (1, 2))
    flags = ["--quick", "--device", "cpu", "--ckpt", str(checkpoint_path), "--out", str(tmp_path), "--images", "6"]
    metrics = script.main([*flags, "--eps", "3", "--restarts", "1"])
    assert [row["eps"] for row in metrics["by_eps"]] == [0.5, 1, 2, 3, 4, 8, 16]


def test_a_network_without_a_mistake_has_a_figure_that_says_so(model):
    nothing = Split(torch.zeros(0, 3, 32, 32, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
    figure = script.draw_gradients(model, nothing, list("abc"), "incorrect", "T")
    assert figure.get_suptitle() == "T: it gets none of the images wrong"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eps", "-1"], "--eps: must be a finite number above 0"),
        (["--alpha", "0"], "--alpha: must be a finite number above 0"),
        (["--steps", "0"], "--steps: must be a whole number, 1 or more"),
        (["--restarts", "0"], "--restarts"),
        (["--ckpt", "nowhere.pth"], "no checkpoint at nowhere.pth"),
    ],
)
def test_mistakes_are_one_line(fails, tmp_path, flags, message):
    assert message in fails(script, ["--quick", *flags], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_before_any_training_the_command_is_named(fails, tmp_path):
    answer = fails(script, ["--quick", "--runs-dir", str(tmp_path)], tmp_path / "out")
    assert "python cnn_cifar/fast_cifar.py --quick" in answer


def test_classes_must_be_those_of_the_network(fails, checkpoint_path, tmp_path):
    state = checkpoint.load(checkpoint_path)
    other = tmp_path / "other.pth"
    checkpoint.save(other, **{k: state[k] for k in ("model", "config", "title")}, classes=list("abcdefghij"))
    assert "knows the classes a, b" in fails(script, ["--quick", "--ckpt", str(other)], tmp_path / "out")
