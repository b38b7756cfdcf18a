"""ddpm's training and sampling: resuming, mean weights, two processes, guidance, what is written, and mistakes."""

import gc
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from ddpm import benchmark, evaluate, features, fid_vs_steps, sampling, train_ddpm
from ddpm.checkpoints import load_model
from ddpm.diffusion import GaussianDiffusion
from ddpm.inputs import load, scaled, shades
from ddpm.unet import UNet
from shared_utils import checkpoint
from shared_utils.data import load_images
from shared_utils.muon import Muon
from shared_utils.runs import ROOT, Run, read_json
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


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path):
    """Steps, noise and labels left out are those of the whole batch, shared out."""
    given = [*TRAIN, "--conditional", "--epochs", 1]
    ran(train_ddpm, *given, "--out", tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += [str(ROOT / "ddpm" / "train_ddpm.py"), *map(str, given), "--out", str(tmp_path / "two")]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    one, two = (checkpoint.load(tmp_path / run / "last.pth")["model"] for run in ("one", "two"))
    assert all(torch.allclose(one[key], two[key], atol=2e-3) for key in one)
    metrics = [read_json(tmp_path / run / "metrics.json")["train_loss"] for run in ("one", "two")]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-3)


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
    train_ddpm.update_loss(GaussianDiffusion(50), network, x, y, order, 12, args, world)  # none has the last two
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
        (["--val-size", 9], "10 or more are held out"),
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


@pytest.fixture(scope="module")
def evaluated(runs_dir):
    given = ["--dataset", "digits", "--runs-dir", runs_dir, "--device", "cpu"]
    ran(sampling, *given, "--n", 40, "--steps", 5)
    flags = ["--val-size", 1200, "--epochs", 2, "--compared", 30, "--level-images", 15, "--bound-images", 5]
    return runs_dir / "ddpm", ran(evaluate, *given, *flags)


def test_what_is_measured_is_measured_on_the_samples(evaluated):
    folder, metrics = evaluated
    images = np.load(folder / "sampling" / "samples.npz")["images"]
    args = evaluate.build_parser().parse_args(["--dataset", "digits", "--val-size", "1200"])
    data = load(args)
    network = features.trained(data.train, 10, 2, 0, CPU)
    (samples, probabilities), (test, _), (real, _) = (
        features.seen(network, x) for x in (images[:, None], data.test.x, data.val.x)
    )
    assert metrics["compared_images"] == 40
    assert metrics["frechet_of_samples"] == pytest.approx(features.frechet_distance(samples, test), rel=1e-3)
    assert metrics["frechet_of_real"] == pytest.approx(features.frechet_distance(real[:40], test), rel=1e-3)
    assert metrics["times_the_floor"] == pytest.approx(metrics["frechet_of_samples"] / metrics["frechet_of_real"])
    assert metrics["precision_of_samples"] == pytest.approx(features.covered(samples, test), abs=0.03)
    assert metrics["recall_of_samples"] == pytest.approx(features.covered(test, samples), abs=0.03)
    chosen = probabilities.argmax(1)
    assert metrics["class_shares"] == pytest.approx((np.bincount(chosen, minlength=10) / 40).tolist(), abs=0.03)
    assert metrics["as_asked"] == pytest.approx((chosen == np.arange(40) % 10).mean(), abs=0.03)
    assert metrics["nearest_of_test"] > 0
    bound = metrics["bound"]
    assert metrics["bits_per_dimension"] == pytest.approx(bound["prior"] + bound["steps"] + bound["last"])
    assert {path.name for path in (folder / "evaluate").glob("*.png")} == {
        "classes.png",
        "nearest.png",
        "loss_by_level.png",
    }


def test_a_memoriser_is_best_on_training_images_alone(evaluated):
    """At little noise it knows which training image it was, and nothing about others."""
    levels = evaluated[1]["levels"]
    little = levels[len(levels) // 3]
    assert little["memoriser on training images"] < 1e-3 < little["memoriser on test images"]
    assert little["memoriser on training images"] < little["network on training images"]


def test_what_are_no_samples_gets_one_line(runs_dir, evaluated, tmp_path, fails):
    given = ["--dataset", "digits", "--runs-dir", runs_dir, "--device", "cpu", "--val-size", 1200]
    given += ["--out", tmp_path / "out", "--samples"]
    np.savez(tmp_path / "few.npz", images=np.zeros((3, 28, 28), np.uint8), labels=np.zeros(3), model="x")
    np.savez(tmp_path / "small.npz", images=np.zeros((30, 14, 14), np.uint8), labels=np.zeros(30), model="x")
    np.savez(tmp_path / "foreign.npz", images=np.zeros((30, 28, 28), np.uint8), labels=np.zeros(30), model="x")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    for name, said in (
        ("few", "draw 10 or more"),
        ("small", "not images like"),
        ("other", "lacks images, labels, model"),
        ("foreign", "drawn by another model"),
        ("none", "no such file"),
    ):
        assert said in fails(evaluate, [*given, tmp_path / f"{name}.npz"], tmp_path / "out")
    said = "was trained with --val-size 1200, not 300"  # the images held out here were learned there
    for script in (evaluate, fid_vs_steps):
        assert said in fails(script, [*given[:-1], "--val-size", 300], tmp_path / "out")


def test_the_benchmark_says_what_it_timed(tmp_path):
    metrics = ran(benchmark, "--quick", "--device", "cpu", "--out", tmp_path)
    speeds = {row["what"]: row for row in metrics["cases"]}
    ours, peer = speeds[f"{benchmark.OURS}, bfloat16"], speeds[f"{benchmark.PEER}, float32"]
    for key, ratio in (("images_per_second", "training"), ("image_steps_per_second", "sampling")):
        assert metrics[f"{ratio}_against_peer"] == pytest.approx(ours[key] / peer[key])
    assert metrics["parameters"] < 1_500_000 < 2_400_000 < metrics["parameters_of_peer"] < 2_700_000
    assert (tmp_path / "speed.png").exists()


def test_every_number_of_steps_is_measured_and_a_stopped_study_goes_on(runs_dir, tmp_path, monkeypatch):
    given = ["--dataset", "digits", "--runs-dir", runs_dir, "--device", "cpu", "--val-size", 1200, "--epochs", 1]
    given += ["--steps", 4, 2, "--n", 30, "--batch-size", 20]
    whole = ran(fid_vs_steps, *given, "--out", tmp_path / "whole")
    found = [(row["sampler"], row["steps"]) for row in whole["points"]]
    assert found == [("dpm", 2), ("dpm", 4), ("ddim", 2), ("ddim", 4), ("ddpm", 50)]
    assert all(row["times_the_floor"] == pytest.approx(row["frechet"] / whole["floor"]) for row in whole["points"])
    log, rows = Run.log, []

    def stop(run, **row):
        log(run, **row)
        rows.append(row)
        if len(rows) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", stop)
        with pytest.raises(KeyboardInterrupt):
            ran(fid_vs_steps, *given, "--out", tmp_path / "stopped")
    gc.collect()
    again = ran(fid_vs_steps, *given, "--out", tmp_path / "stopped", "--resume")
    for one, other in zip(whole["points"], again["points"], strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}


def test_the_fewest_steps_near_the_best_are_found():
    rows = [("dpm", 10, 2.2), ("dpm", 20, 2.0), ("ddim", 10, 9.0), ("ddim", 20, 2.4), ("ddpm", 100, 1.99)]
    found = fid_vs_steps.findings([{"sampler": s, "steps": n, "frechet": value} for s, n, value in rows])
    assert (found["best_sampler"], found["best"]) == ("ddpm", 1.99)
    assert (found["dpm_steps_near_the_best"], found["ddim_steps_near_the_best"]) == (10, None)
