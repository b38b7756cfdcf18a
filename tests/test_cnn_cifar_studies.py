"""cnn_cifar's studies: adversarial training, residual against plain, transfer, augmentations."""

import numpy as np
import pytest
import torch
from torch import Generator, nn

from cnn_cifar import adversarial_training, augmentation_study, resnet_vs_plain, transfer_learning
from cnn_cifar.attack_measures import survivors
from cnn_cifar.attacks import input_gradient, pgd
from cnn_cifar.augmentation_study import ARMS
from cnn_cifar.checkpoints import load_network
from cnn_cifar.fast_net import FastNet
from cnn_cifar.fast_training import FastTraining, Recipe
from cnn_cifar.inputs import Split, load, loss_and_accuracy, pixels, resized, share
from cnn_cifar.models import pixel_resnet
from cnn_cifar.resnet import resnet18
from shared_utils import checkpoint
from shared_utils.runs import Run, read_json
from shared_utils.seeding import seed_everything

CPU = torch.device("cpu")
ADVERSARIAL = ["--width", 4, "--batch-size", 16, "--val-size", 12, "--epochs", 2, "--watched", 6, "--images", 6]
FAST = ["--recipe", "fast"]
DEPTHS = ["--depths", 10, 18, "--width", 4, "--batch-size", 16, "--val-size", 12, "--epochs", 1, "--seeds", 3, 5]
TRANSFER = ["--source", "digits", "--source-size", 64, "--source-epochs", 1, "--resize", 32, "--width", 4]
TRANSFER += ["--labels", 12, 30, "--epochs", 1, "--least-updates", 3, "--batch-size", 16, "--val-size", 12]
TRANSFER += ["--seeds", 3, 5]
AUGMENT = ["--resize", 32, "--width", 4, "--batch-size", 16, "--val-size", 12, "--epochs", 2, "--seeds", 3, 5]
FLAGS = {
    adversarial_training: [*ADVERSARIAL, "--restarts", 2],
    resnet_vs_plain: [*DEPTHS, "--lrs", 0.05, 0.1],
    transfer_learning: [*TRANSFER, "--lrs", 0.05, 0.1],
    augmentation_study: AUGMENT,
}


@pytest.fixture
def no_figures(monkeypatch):
    for module in FLAGS:
        monkeypatch.setattr(module, "save_figure", lambda figure, path: path.write_bytes(b""))


@pytest.fixture(scope="module")
def runs_dir(pictures, tmp_path_factory):
    top = tmp_path_factory.mktemp("runs")
    for module in FLAGS:
        ran(module, "--dataset", pictures, "--runs-dir", top)
    return top / "cnn_cifar"


def named(module):
    return module.__name__.rpartition(".")[2]


def ran(module, *flags):
    """The module's run with the flags above; later flags win."""
    return module.main([str(flag) for flag in ("--device", "cpu", *FLAGS[module], *flags)])


def parsed(module, *flags):
    return module.build_parser().parse_args([str(flag) for flag in (*FLAGS[module], *flags)])


def rows_of(path):
    header, *rows = (line.split(",") for line in path.read_text(encoding="utf-8").splitlines())
    return [{k: v for k, v in zip(header, row, strict=True) if k != "seconds"} for row in rows]


def without_seconds(value):
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if k not in ("run", "minutes") and "second" not in k}
    return [without_seconds(item) for item in value] if isinstance(value, list) else value


def stop_and_go_on(monkeypatch, stop_at, module, *flags):
    """The module's run, stopped when row `stop_at` is to be written, and then its rest."""
    calls = iter(range(100))

    def stop(self, **row):
        if next(calls) == stop_at:
            raise KeyboardInterrupt
        log(self, **row)

    log = Run.log
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", stop)
        with pytest.raises(KeyboardInterrupt):
            ran(module, *flags)
    ran(module, *flags, "--resume")


# --- all four -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [1, 3])
@pytest.mark.parametrize("module", FLAGS, ids=named)
def test_a_stopped_run_goes_on_to_the_same_end(module, stop_at, runs_dir, pictures, tmp_path, monkeypatch, no_figures):
    """Stopped in the middle of the run: before the row is written, which is the worst moment."""
    stop_and_go_on(monkeypatch, stop_at, module, "--dataset", pictures, "--out", tmp_path)
    whole = runs_dir / named(module)
    assert without_seconds(read_json(tmp_path / "metrics.json")) == without_seconds(read_json(whole / "metrics.json"))
    assert rows_of(tmp_path / "history.csv") == rows_of(whole / "history.csv")
    for path in whole.glob("*.pth"):
        then, now = checkpoint.load(path)["model"], checkpoint.load(tmp_path / path.name)["model"]
        assert all(torch.equal(then[name], now[name]) for name in then)


@pytest.mark.parametrize("module", [resnet_vs_plain, augmentation_study], ids=named)
def test_the_seed_is_added_to_each_of_the_seeds(module, runs_dir, pictures, tmp_path, no_figures):
    ran(module, "--dataset", pictures, "--out", tmp_path, "--seed", 2, "--seeds", 1, 3)  # those above are 3 and 5
    rows = [{**row, "seed": str(int(row["seed"]) + 2)} for row in rows_of(tmp_path / "history.csv")]
    assert rows == rows_of(runs_dir / named(module) / "history.csv")


def test_the_seed_is_added_to_those_of_the_trainings_after_a_source(runs_dir, pictures, tmp_path, no_figures):
    ran(transfer_learning, "--dataset", pictures, "--out", tmp_path, "--seed", 2, "--seeds", 1, 3)
    then, now = (
        [row for row in rows_of(folder / "history.csv") if row["way"] == "scratch"]  # the source has changed too
        for folder in (runs_dir / "transfer_learning", tmp_path)
    )
    assert [{**row, "seed": str(int(row["seed"]) + 2)} for row in now] == then


@pytest.mark.parametrize(
    ("module", "flags", "said"),
    [
        *((module, "--batch-size 0", "--batch-size") for module in FLAGS),
        *((module, "--val-size 0", "--val-size: must be") for module in FLAGS),
        (adversarial_training, "--eps -1", "--eps: must be"),
        (adversarial_training, "--steps 0", "--steps: must be"),
        (adversarial_training, "--model vgg", "invalid choice"),
        (adversarial_training, "--model allcnn --recipe fast", "--recipe fast trains fast_net, not allcnn"),
        (adversarial_training, "--lr 0", "--lr: must be"),
        (resnet_vs_plain, "--depths 20", "--depths 20: the networks have 8 n + 2 layers"),
        (resnet_vs_plain, "--depths 2", "--depths 2: the networks have"),
        (resnet_vs_plain, "--seeds 1", "different seeds, 2 or more"),
        (resnet_vs_plain, "--train-size 900", "asked for 900 images"),
        (augmentation_study, "--resize 8", "--resize: must be a whole number, 32 or more"),
        (augmentation_study, "--seeds 1 1", "different seeds, 2 or more"),
        (transfer_learning, "--resize 8", "--resize: must be a whole number, 32 or more"),
        (transfer_learning, "--weights x.pth", "--weights and --source: give one of them"),
        (transfer_learning, "--labels 1", "at least two images"),
        (transfer_learning, "--batch-size 1", "at least two images"),
        (transfer_learning, "--source-size 9999", "asked for 9999 images"),
        (transfer_learning, "--labels 61", "--labels 61: there are 60 images"),
        (transfer_learning, "--source nothing", "nothing: neither a known set"),
    ],
)
def test_a_wrong_flag_gets_one_line(module, flags, said, pictures, tmp_path, fails):
    out = tmp_path / "out"
    given = ["--device", "cpu", "--dataset", pictures, "--out", out, *FLAGS[module], *flags.split()]
    assert said in fails(module, given, out)


# --- adversarial training -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = FastNet((4, 4, 6))
    nn.init.normal_(network.head.weight)
    return network


def test_the_single_step_goes_up_the_loss_from_a_noisy_place(network):
    x, y, eps = torch.rand(5, 3, 32, 32), torch.arange(5), 8 / 255
    moved = adversarial_training.moved(network, x, y, eps, 1, Generator().manual_seed(1))
    noisy = x + 2 * eps * (2 * torch.rand(x.shape, generator=Generator().manual_seed(1)) - 1)
    assert torch.allclose(moved, noisy + eps * input_gradient(network, noisy, y).sign(), atol=1e-7)
    assert 2 * eps < (moved - x).abs().max() <= 3 * eps + 1e-6
    assert all(p.grad is None for p in network.parameters())


def test_more_steps_are_pgds_and_stay_within_eps(network):
    x, y, eps = torch.rand(5, 3, 32, 32), torch.arange(5), 8 / 255
    moved = adversarial_training.moved(network, x, y, eps, 4, Generator().manual_seed(1))
    assert torch.equal(moved, pgd(network, x, y, eps, 2.5 * eps / 4, 4, generator=Generator().manual_seed(1)))
    assert (moved - x).abs().max() <= eps + 1e-6


def test_the_twins_differ_in_the_attack_alone(pictures, tmp_path, no_figures):
    """With nothing to move by, both networks are the same to the last epoch."""
    ran(adversarial_training, "--dataset", pictures, "--out", tmp_path, "--eps", 1e-12, "--no-amp")
    standard, adversarial = (checkpoint.load(tmp_path / f"{k}_last.pth")["model"] for k in adversarial_training.KINDS)
    for name in standard:
        assert torch.allclose(standard[name].float(), adversarial[name].float(), atol=1e-3), name


def test_what_is_measured_is_what_the_saved_networks_do(runs_dir, pictures):
    folder = runs_dir / "adversarial_training"
    metrics = read_json(folder / "metrics.json")
    data = load(parsed(adversarial_training, "--dataset", pictures), CPU)
    rows = [row for row in rows_of(folder / "history.csv") if row["network"] == "adversarial"]
    best, state = load_network(folder / "adversarial_best.pth")
    assert state["epoch"] == max(range(2), key=lambda i: (float(rows[i]["val_pgd10"]), i)) + 1
    assert metrics["clean"] == share(survivors(best, data.test))
    assert metrics["networks"][1]["by_eps"][0]["accuracy"] == share(
        survivors(best, Split(data.test.x[:6], data.test.y[:6]))
    )
    last = [checkpoint.load(folder / f"{kind}_last.pth")["model"] for kind in ("standard", "adversarial")]
    assert not all(torch.equal(last[0][name], last[1][name]) for name in last[0] if name.endswith("weight"))
    for row in metrics["networks"]:
        assert row["strongest"] <= row["PGD-20"] <= row["by_eps"][0]["accuracy"]
        assert [point["eps"] for point in row["by_eps"]] == [0, 1, 2, 4, 8, 12, 16]


@pytest.mark.parametrize("model", ["allcnn", "resnet18"])
def test_the_other_networks_are_trained_and_read_again(model, pictures, tmp_path, no_figures):
    flags = ["--dataset", pictures, "--out", tmp_path, "--model", model, "--epochs", 1, "--steps", 2]
    metrics = ran(adversarial_training, *flags)
    loaded, state = load_network(tmp_path / "adversarial_best.pth")
    assert metrics["parameters"] == sum(p.numel() for p in loaded.parameters())
    assert state["classes"] == ["circle", "square", "star"]


def test_the_fast_recipe_is_that_of_fast_cifar_without_smoothed_labels(pictures, tmp_path, no_figures):
    """The standard twin is the network that FastTraining alone makes."""
    metrics = ran(adversarial_training, "--dataset", pictures, "--out", tmp_path, "--no-amp", *FAST)
    assert metrics["recipe"] == "fast"
    args = parsed(adversarial_training, "--dataset", pictures)
    recipe = Recipe(args.epochs, args.batch_size, widths=(4, 8, 16), without=("smoothing",))
    seed_everything(0)
    training = FastTraining(recipe, load(args, CPU).train, 3, 0, False)
    for epoch in range(args.epochs):
        training.epoch(epoch)
    saved = checkpoint.load(tmp_path / "standard_last.pth")["model"]
    assert all(torch.equal(saved[name], value) for name, value in training.network.state_dict().items())


def test_a_stopped_run_with_the_fast_recipe_goes_on_to_the_same_end(pictures, tmp_path, monkeypatch, no_figures):
    flags = ["--dataset", pictures, *FAST]
    whole, again = tmp_path / "whole", tmp_path / "again"
    ran(adversarial_training, *flags, "--out", whole)
    stop_and_go_on(monkeypatch, 1, adversarial_training, *flags, "--out", again)
    assert rows_of(again / "history.csv") == rows_of(whole / "history.csv")


def test_the_sizes_that_the_issue_names():
    count = {model: adversarial_training.network_config(model, None, 10) for model in ("allcnn", "resnet18")}
    built = {name: adversarial_training.NETWORKS[c.pop("network")](**c) for name, c in count.items()}
    assert sum(p.numel() for p in built["allcnn"].parameters()) == 1_372_254
    assert sum(p.numel() for p in built["resnet18"].parameters()) == 11_173_962


# --- residual against plain -----------------------------------------------------------------------------------------


def test_a_pixel_resnet_is_normalisation_and_a_resnet():
    torch.manual_seed(0)
    network, x = pixel_resnet(10).eval(), torch.rand(2, 3, 32, 32)
    inner = resnet18(10, cifar_stem=True).eval()
    inner.load_state_dict(network.resnet.state_dict())
    assert torch.equal(network(x), inner(network.normalize(x)))
    assert pixel_resnet(7, width=8)(x).shape == (2, 7)
    assert pixel_resnet(7, width=8, cifar_stem=False).resnet.conv1.weight.shape == (8, 3, 7, 7)


@pytest.mark.parametrize("depth", [10, 18, 34])
@pytest.mark.parametrize("residual", [True, False])
def test_every_layer_of_the_depth_is_watched_from_the_image_on(depth, residual):
    network = pixel_resnet(10, (depth - 2) // 8, width=2, residual=residual)
    weights = resnet_vs_plain.convolutions(network)
    assert len(weights) + 1 == depth  # and the linear layer
    assert weights[0] is network.resnet.conv1.weight
    assert weights[1] is network.resnet.layer1[0].conv1.weight
    assert weights[-1] is network.resnet.layer4[-1].conv2.weight
    assert all(p.shape[-1] == 3 for p in weights)  # no shortcut's 1×1


def test_the_norms_are_those_of_the_losses_gradients(pictures):
    args = parsed(resnet_vs_plain, "--dataset", pictures, "--batch-size", 60, "--amp")
    data = load(args, CPU)
    _, norms, losses = resnet_vs_plain.fit(10, "plain", 0.1, 3, data, args)
    assert norms.shape == (1, 9)
    torch.manual_seed(3)
    network = pixel_resnet(3, 1, 4, residual=False).to(memory_format=torch.channels_last).train()
    generator = Generator().manual_seed(3)
    order = np.random.default_rng(3).permutation(60)
    x = resnet_vs_plain.random_crop(resnet_vs_plain.random_flip(data.train.x[order], generator), generator)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(pixels(x))
    loss = nn.functional.cross_entropy(logits.float(), data.train.y[order])
    loss.backward()
    assert losses[0] == pytest.approx(loss.item(), rel=1e-4)
    wanted = [w.grad.square().sum().sqrt().item() for w in resnet_vs_plain.convolutions(network)]
    assert norms[0] == pytest.approx(np.array(wanted), rel=1e-3)


def test_the_better_rate_is_taken_and_compared_seed_by_seed(runs_dir):
    folder = runs_dir / "resnet_vs_plain"
    metrics, rows = read_json(folder / "metrics.json"), rows_of(folder / "history.csv")
    for row in metrics["depths"]:
        means = {}
        for kind in resnet_vs_plain.KINDS:
            mine = [r for r in rows if (r["depth"], r["kind"]) == (str(row["depth"]), kind)]
            first = {float(r["lr"]): float(r["val_accuracy"]) for r in mine if r["seed"] == "3"}
            assert row[f"{kind}_lr"] == max(first, key=first.get)
            means[kind] = [float(r["test_accuracy"]) for r in mine if float(r["lr"]) == row[f"{kind}_lr"]]
            assert len(means[kind]) == 2
        assert row["difference"] == pytest.approx(np.mean(means["plain"]) - np.mean(means["residual"]))


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        ([-0.2, -0.21, -0.19], "worse by 20.0"),
        ([0.2, 0.21, 0.19], "better by 20.0"),
        ([-0.2, 0.1, 0.0], "no difference"),
    ],
)
def test_what_a_difference_shows(difference, words):
    assert words in resnet_vs_plain.said(difference)


@pytest.mark.parametrize("module", [resnet_vs_plain, transfer_learning], ids=named)
def test_a_rate_that_diverges_is_a_result_unless_it_is_the_best(module, pictures, tmp_path, no_figures, fails):
    flags = ["--dataset", pictures, "--out", tmp_path, "--lrs"]
    ran(module, *flags, 0.05, 1e38)
    rows = [row for row in rows_of(tmp_path / "history.csv") if row["lr"] == "1e+38"]
    lost = [row for row in rows if row["train_loss"] == "nan"]
    assert lost
    assert all(float(row["val_accuracy"]) == 0 and row["seed"] == "3" for row in lost)
    assert "try a lower --lrs" in fails(module, ["--device", "cpu", *FLAGS[module], *flags, 1e38])


def test_smoothing_is_a_mean_over_neighbours():
    values = np.random.default_rng(0).random(200)
    smoothed = resnet_vs_plain.smooth(values, 0.05)  # five to either side
    assert smoothed[100] == pytest.approx(values[95:106].mean())
    assert smoothed[0] == pytest.approx(values[:6].mean())
    assert resnet_vs_plain.smooth(values[:3]) == pytest.approx(values[:3])


# --- augmentations --------------------------------------------------------------------------------------------------


def test_an_arm_does_what_its_name_says():
    x = torch.randint(256, (6, 3, 32, 32), generator=Generator().manual_seed(0), dtype=torch.uint8)
    changed = {arm: augmentation_study.augmented(x, arm, Generator().manual_seed(1)) for arm in ARMS}
    assert torch.equal(changed["none"], x)
    assert torch.equal(changed["Mixup"], x)  # mixed later, as floats
    for arm in set(ARMS) - {"none", "Mixup"}:
        assert not torch.equal(changed[arm], x), arm
    assert len(ARMS["all seven"]) == 7
    assert all(arm in ARMS["all seven"] for arm in ARMS if len(ARMS[arm]) == 1)


def test_mixups_loss_is_mixed_like_its_images(pictures, monkeypatch):
    """With λ = 0 all is the partner's: the first loss is that of the plain images in another order."""
    args = parsed(augmentation_study, "--dataset", pictures, "--epochs", 1, "--batch-size", 60)
    data = load(args, CPU)
    plain = augmentation_study.fit("none", 3, data, args)[1]

    class Never:
        def beta(self, a, b, n):
            return np.zeros(n)

    rng = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed=None: Never() if isinstance(seed, list) else rng(seed))
    assert augmentation_study.fit("Mixup", 3, data, args)[1] == pytest.approx(plain, rel=1e-3)


def test_the_table_of_arms_is_made_of_the_rows(runs_dir):
    folder = runs_dir / "augmentation_study"
    metrics, rows = read_json(folder / "metrics.json"), rows_of(folder / "history.csv")
    assert [row["arm"] for row in metrics["arms"]] == list(ARMS)
    none = np.array([float(r["val_accuracy"]) for r in rows if r["arm"] == "none"])
    for row in metrics["arms"]:
        mine = [r for r in rows if r["arm"] == row["arm"]]
        val, train = (np.array([float(r[c]) for r in mine]) for c in ("val_accuracy", "train_accuracy"))
        assert len(mine) == 2
        assert row["gain"] == pytest.approx((val - none).mean())
        assert row["gap"] == pytest.approx((train - val).mean())


def test_resizing():
    x = torch.rand(3, 3, 32, 32)
    assert resized(x, 32) is x
    assert resized(x, 64).shape == (3, 3, 64, 64)
    assert torch.allclose(resized(torch.full((1, 3, 28, 28), 0.4), 96), torch.tensor(0.4))
    lines = torch.zeros(1, 3, 64, 64)
    lines[:, :, 5::8] = 1.0  # one row in eight: shrunk to 8×8 each pixel is a mean over them
    assert torch.allclose(resized(lines, 8)[:, :, 2:-2], torch.tensor(1 / 8), atol=0.03)


def test_what_is_measured_is_the_accuracy_on_images_as_they_are():
    torch.manual_seed(0)
    network, args = pixel_resnet(3, 1, 4), parsed(augmentation_study, "--amp")
    split = Split((255 * torch.rand(3, 3, 32, 32)).byte(), torch.tensor([0, 1, 2]))
    assert augmentation_study.measure(network, split, args) == pytest.approx(loss_and_accuracy(network, split, True))
