"""ddpm's training and sampling: resuming, mean weights, guidance, what is written, and mistakes."""

import numpy as np
import pytest
import torch

from ddpm import evaluate, sampling, train_ddpm
from ddpm.checkpoints import load_model
from ddpm.diffusion import GaussianDiffusion
from ddpm.inputs import load, scaled, shades
from ddpm.unet import UNet
from shared_utils import checkpoint
from shared_utils.data import load_images
from shared_utils.muon import Muon
from shared_utils.runs import read_json
from shared_utils.schedules import one_cycle

CPU = torch.device("cpu")
TRAIN = ["--dataset", "digits", "--device", "cpu", "--val-size", 1200, "--epochs", 3, "--batch-size", 64]
TRAIN += ["--channels", 32, 32, "--timesteps", 50, "--val-images", 60, "--sample-every", 2]


def ran(module, *flags):
    return module.main([str(flag) for flag in flags])


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory):
    top = tmp_path_factory.mktemp("runs")
    ran(train_ddpm, *TRAIN, "--conditional", "--prediction", "v", "--schedule", "cosine", "--runs-dir", top)
    return top


def test_images_and_shades_are_each_others_inverse():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert (scaled(x).min().item(), scaled(x).max().item()) == (-1, 1)
    assert np.array_equal(shades(scaled(x)), x.numpy())
    assert shades(torch.tensor([[-9.0, 9.0]])).tolist() == [[0, 255]]


def test_the_last_training_images_are_held_out():
    args = train_ddpm.build_parser().parse_args(["--dataset", "digits", "--val-size", "100"])
    data, images = load(args), load_images("digits", "train")
    assert np.array_equal(data.train.x, images.x[:-100])
    assert np.array_equal(data.val.y, images.y[-100:])
    assert np.array_equal(data.test.x, load_images("digits", "test").x)


def test_training_writes_mean_weights_that_know_something(runs_dir):
    folder = runs_dir / "ddpm" / "train_ddpm"
    metrics, rows = read_json(folder / "metrics.json"), (folder / "history.csv").read_text().splitlines()
    assert len(rows) == 1 + 3
    assert float(rows[3].split(",")[2]) < float(rows[1].split(",")[2]) < 2  # held-out loss
    assert np.mean(metrics["val_loss_by_level"]) == pytest.approx(metrics["val_loss"])
    assert {path.name for path in folder.glob("*.png")} == {
        "loss_plot.png",
        "samples_epoch_002.png",
        "samples_epoch_003.png",
    }
    asked = sampling.build_parser().parse_args(["--ckpt", str(folder / "ema.pth"), "--dataset", "digits"])
    model, diffusion, state = load_model(asked, CPU, val_size=1200)
    assert (diffusion.timesteps, diffusion.schedule, diffusion.prediction) == (50, "cosine", "v")
    args = train_ddpm.build_parser().parse_args([str(flag) for flag in TRAIN])
    levels = train_ddpm.losses_by_level(diffusion, model, load(args).val, 60, amp=False)
    assert levels.tolist() == pytest.approx(metrics["val_loss_by_level"], rel=1e-4)
    assert state["epoch"] == 3


def test_levels_are_means_over_tenths_of_the_steps():
    """A model that says nothing: its loss at a step is the mean square of what was asked there."""
    args = train_ddpm.build_parser().parse_args([str(flag) for flag in TRAIN])
    part, diffusion, network = load(args).val, GaussianDiffusion(50, "cosine", "v"), UNet()
    levels = train_ddpm.losses_by_level(diffusion, network, part, 500, amp=False, together=7)
    for level in range(10):
        alpha_bars = diffusion.alpha_bars[level * 5 : level * 5 + 5]
        wanted = alpha_bars.mean() + (1 - alpha_bars.mean()) * scaled(torch.from_numpy(part.x)).square().mean().item()
        assert levels[level].item() == pytest.approx(wanted, rel=0.05)


def test_the_mean_follows_the_weights():
    torch.manual_seed(0)
    mean, model = (torch.nn.Linear(3, 2) for _ in range(2))
    before = [parameter.clone() for parameter in mean.parameters()]
    train_ddpm.follow(mean, model, 0.9)
    for found, old, new in zip(mean.parameters(), before, model.parameters(), strict=True):
        torch.testing.assert_close(found, 0.9 * old + 0.1 * new)


def test_muon_has_the_convolutions_within_and_adamw_the_rest():
    network = UNet(8, channels=(32, 32), n_classes=3)
    for flags, n in (([], 1), (["--optimizer", "muon", "--lr", "0.5", "--muon-lr", "0.25"], 2)):
        optimizers = train_ddpm.make_optimizers(network, train_ddpm.build_parser().parse_args(flags))
        held = [{id(p) for group in each.param_groups for p in group["params"]} for each in optimizers]
        assert len(held) == n
        assert sum(map(len, held)) == len(set.union(*held)) == len(list(network.parameters()))
    inner = {name for name, p in network.named_parameters() if id(p) in held[1]}
    assert {"first.weight", "last.weight"} & inner == set()
    assert {"smaller.weight", "down_large.conv1.weight", "attention.qkv.weight", "up_small.skip.weight"} <= inner
    assert [each.param_groups[0]["peak"] for each in optimizers] == [0.5, 0.25]


def test_both_optimizers_follow_the_cycle(tmp_path, monkeypatch):
    rates = {"AdamW": [], "Muon": []}
    for kind, found in ((torch.optim.AdamW, rates["AdamW"]), (Muon, rates["Muon"])):

        def look(self, *given, before=kind.step, found=found):
            found.append(self.param_groups[0]["lr"])
            return before(self, *given)

        monkeypatch.setattr(kind, "step", look)
    ran(train_ddpm, *TRAIN, "--epochs", 1, "--optimizer", "muon", "--lr", 0.004, "--muon-lr", 0.02, "--out", tmp_path)
    n = read_json(tmp_path / "metrics.json")["updates"]
    assert rates["AdamW"] == pytest.approx([one_cycle(i, n, 0.004, rise=0.1) for i in range(n)])
    assert rates["Muon"] == pytest.approx([one_cycle(i, n, 0.02, rise=0.1) for i in range(n)])


def test_gradients_are_cut_to_a_norm_of_one(tmp_path, monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def look(self, *given):
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        norms.append(torch.cat(gradients).norm().item())
        return step(self, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    losses = GaussianDiffusion.losses
    monkeypatch.setattr(GaussianDiffusion, "losses", lambda *given: 1e3 * losses(*given))
    ran(train_ddpm, *TRAIN, "--epochs", 1, "--out", tmp_path)
    assert norms == pytest.approx([1.0] * len(norms), rel=1e-3)


@pytest.mark.parametrize(("stop_after", "optimizer"), [(1, "adamw"), (2, "muon")])
def test_a_stopped_training_ends_with_the_same_weights(stop_after, optimizer, tmp_path, stopped):
    flags = [*TRAIN, "--conditional", "--optimizer", optimizer]
    ran(train_ddpm, *flags, "--out", tmp_path / "whole")
    stopped(stop_after, lambda: ran(train_ddpm, *flags, "--out", tmp_path / "stopped"))
    ran(train_ddpm, *flags, "--out", tmp_path / "stopped", "--resume")
    for name in ("ema.pth", "last.pth"):
        one, other = (checkpoint.load(tmp_path / run / name)["model"] for run in ("whole", "stopped"))
        assert all(torch.equal(one[key], other[key]) for key in one)
    one, other = (read_json(tmp_path / run / "metrics.json") for run in ("whole", "stopped"))
    for metrics in (one, other):
        for key in ("run", "training_seconds"):
            del metrics[key]
    assert one == other


def test_a_part_of_the_images_goes_without_its_label(monkeypatch):
    seen = []

    def network(x_t, t, labels):
        seen.append(labels)
        return torch.zeros_like(x_t)

    args = train_ddpm.build_parser().parse_args(["--conditional", "--drop-label", "0.25"])
    x, y = torch.zeros(2000, 1, 4, 4, dtype=torch.uint8), torch.arange(2000) % 10
    torch.manual_seed(0)
    world = train_ddpm.process_group("cpu").__enter__()
    order = np.random.default_rng(0).permutation(2000)
    train_ddpm.update_loss(GaussianDiffusion(50), network, x, y, order, 12, args, world)  # no image is a 10 or 11
    labels = seen[0]
    without = labels == 12
    assert without.float().mean().item() == pytest.approx(0.25, abs=0.04)
    assert torch.equal(labels[~without], y[torch.from_numpy(order)][~without])
    train_ddpm.update_loss(GaussianDiffusion(50), network, x, y, order, None, args, world)
    assert seen[1] is None


def test_guidance_goes_from_none_through_the_label_and_beyond():
    torch.manual_seed(0)
    network = UNet(8, channels=(32, 32), n_classes=3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t, labels = torch.randn(4, 1, 8, 8), torch.tensor([1, 2, 3, 4]), torch.tensor([0, 1, 2, 0])
    with_label, without = network(x, t, labels), network(x, t)
    for w in (0.0, 1.0, 2.5):
        found = sampling.guided(network, labels, w)(x, t)
        torch.testing.assert_close(found, without + w * (with_label - without), rtol=1e-3, atol=1e-3)
    assert sampling.guided(network, None, 1.0) is network


@pytest.mark.parametrize(
    "flags", [["--sampler", "ddpm"], ["--sampler", "ddim", "--steps", 5, "--eta", 1], ["--steps", 4]]
)
def test_samples_are_written_for_others(flags, runs_dir, tmp_path):
    given = ["--dataset", "digits", "--runs-dir", runs_dir, "--device", "cpu", "--n", 13, "--batch-size", 5]
    metrics = ran(sampling, *given, *flags, "--out", tmp_path / "a")
    with np.load(tmp_path / "a" / "samples.npz", allow_pickle=False) as file:
        images, labels = file["images"], file["labels"]
    assert (images.dtype, images.shape) == (np.uint8, (13, 28, 28))
    assert labels.tolist() == [*range(10), 0, 1, 2]
    assert metrics["samples"] == 13
    assert len({image.tobytes() for image in images}) == 13
    assert {path.name for path in (tmp_path / "a").glob("*.png")} == {"ddpm_sample.png", "denoising.png", "noising.png"}
    ran(sampling, *given, *flags, "--out", tmp_path / "b")
    assert np.array_equal(np.load(tmp_path / "b" / "samples.npz")["images"], images)


def test_what_is_asked_for_reaches_the_sampler():
    """Sampler, steps, η, labels, guidance and precision, batch by batch."""
    torch.manual_seed(0)
    network, x, calls = UNet(8, channels=(32, 32), n_classes=3), torch.randn(2, 1, 8, 8), []
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    t = torch.tensor([1, 40])

    class Recorder(GaussianDiffusion):
        def recorded(self, name, model, shape, *given):
            calls.append((name, tuple(shape), *given[:-1], model(x, t).float(), torch.is_autocast_enabled("cpu")))
            return torch.zeros(shape)

        def ddpm_sample(self, *given):
            return self.recorded("ddpm", *given)

        def ddim_sample(self, *given):
            return self.recorded("ddim", *given)

        def dpm_solver_sample(self, *given):
            return self.recorded("dpm", *given)

    labels = np.array([2, 0, 1, 1])
    for sampler, steps, how, amp in (
        ("ddpm", 50, {}, False),
        ("ddim", 7, {"eta": 0.3, "guidance": 2.0}, True),
        ("dpm", 6, {"guidance": 3.0}, False),
    ):
        calls.clear()
        args = sampling.argparse.Namespace(batch_size=2, amp=amp)
        images, _ = sampling.draw_all(Recorder(50), network, labels, sampler, steps, args, CPU, **how)
        assert images.shape == (4, 1, 8, 8)
        for call, some in zip(calls, (labels[:2], labels[2:]), strict=True):
            name, shape, *given, out, in_bfloat16 = call
            assert (name, shape, in_bfloat16) == (sampler, (2, 1, 8, 8), amp)
            assert given == {"ddpm": [], "ddim": [7, 0.3], "dpm": [6]}[sampler]
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
                with_label, without = network(x, t, torch.from_numpy(some)).float(), network(x, t).float()
            wanted = without + how.get("guidance", 1) * (with_label - without)
            torch.testing.assert_close(out.detach(), wanted, rtol=0.02, atol=0.02 if amp else 1e-4)


def test_compile_and_bfloat16_reach_the_training(tmp_path, monkeypatch):
    seen = []

    def compiled(network):
        return lambda *given: seen.append(torch.is_autocast_enabled("cpu")) or network(*given)

    monkeypatch.setattr(torch, "compile", compiled)
    for flags, amp in ((["--amp"], True), ([], False)):
        seen.clear()
        metrics = ran(train_ddpm, *TRAIN, "--epochs", 1, "--compile", *flags, "--out", tmp_path / f"amp_{amp}")
        assert seen == [amp] * metrics["updates"]


def test_images_of_three_channels_go_the_whole_way(tmp_path, monkeypatch):
    given = ["--dataset", "shapes", "--device", "cpu", "--runs-dir", tmp_path]
    small = ["--epochs", 1, "--channels", 32, 32, "--timesteps", 50, "--val-images", 20]
    ran(train_ddpm, *given, *small)
    drawn, draw = [], sampling.draw_all
    monkeypatch.setattr(sampling, "draw_all", lambda *args, **how: drawn.append(draw(*args, **how)) or drawn[-1])
    ran(sampling, *given, "--n", 12, "--steps", 2)
    with np.load(tmp_path / "ddpm" / "sampling" / "samples.npz", allow_pickle=False) as file:
        images, model = file["images"], str(file["model"])
    assert images.shape == (12, 32, 32, 3)
    assert np.array_equal(np.stack([images[..., c] for c in range(3)], axis=1), drawn[0][0])
    data = load(evaluate.build_parser().parse_args(["--dataset", "shapes"]))
    found, labels = evaluate.read_samples(tmp_path / "ddpm" / "sampling" / "samples.npz", data, model)
    assert np.array_equal(found, images.transpose(0, 3, 1, 2))
    assert labels.tolist() == [-1] * 12
    metrics = ran(evaluate, *given, "--epochs", 1, "--compared", 12, "--level-images", 10, "--bound-images", 10)
    assert metrics["model"] == model


def test_one_label_is_drawn_alone(runs_dir, tmp_path):
    given = ["--dataset", "digits", "--runs-dir", runs_dir, "--device", "cpu", "--n", 4, "--steps", 2, "--label", 7]
    ran(sampling, *given, "--guidance", 2, "--out", tmp_path)
    assert np.load(tmp_path / "samples.npz")["labels"].tolist() == [7] * 4


def test_mistakes_get_one_line(runs_dir, tmp_path, fails):
    out = tmp_path / "out"
    train = [*TRAIN, "--out", out]
    for flags, said in (
        (["--timesteps", 49], "50 steps or more, got 49"),
        (["--channels", 32, 33], "multiples of 32"),
        (["--val-size", 10**6], "--val-size 1000000"),
        (["--val-size", 9], "hold out 10 or more, leave 10"),
        (["--val-images", 9], "measured at 10 levels"),
        (["--conditional", "--drop-label", 0], "--drop-label 0"),
        (["--batch-size", 10**6], "--batch-size 1000000"),
        (["--lr", 1e30], "try a lower --lr"),
    ):
        assert said in fails(train_ddpm, [*train, *flags])
    given = ["--dataset", "digits", "--runs-dir", runs_dir, "--device", "cpu", "--out", tmp_path / "s"]
    for flags, said in (
        (["--steps", 51], "--steps 51: the diffusion has 1 to 50"),
        (["--sampler", "ddpm", "--steps", 10], "DDPM takes all 50"),
        (["--sampler", "dpm", "--eta", 0.5], "is DDIM's"),
        (["--label", 10], "the classes are 0 to 9"),
        (["--ckpt", tmp_path / "none.pth"], "no checkpoint at"),
        (["--dataset", "shapes"], "was trained with --dataset digits, not shapes"),
        (["--label", 3, "--guidance", 0], "draws no class"),
    ):
        assert said in fails(sampling, [*given, *flags], tmp_path / "s")
    checkpoint.save(tmp_path / "x.pth", config={"network": "vae"}, model={})
    assert "holds no diffusion" in fails(sampling, [*given, "--ckpt", tmp_path / "x.pth"])
    plain = tmp_path / "plain"
    ran(train_ddpm, *TRAIN, "--epochs", 1, "--out", plain)
    assert "need a conditional model" in fails(sampling, [*given, "--ckpt", plain / "ema.pth", "--label", 3])
    assert "need a conditional model" in fails(sampling, [*given, "--ckpt", plain / "ema.pth", "--guidance", 3])
    made = "`python ddpm/train_ddpm.py"
    assert made in fails(sampling, ["--dataset", "digits", "--runs-dir", tmp_path / "no", "--device", "cpu"])
