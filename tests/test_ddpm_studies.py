"""ddpm's evaluation, study of steps and benchmark: what is measured, on what, and what a stopped study goes on with."""

import gc

import numpy as np
import pytest
import torch

from ddpm import benchmark, evaluate, features, fid_vs_steps, sampling, train_ddpm
from ddpm.checkpoints import load_model
from ddpm.inputs import load, scaled
from shared_utils import checkpoint
from shared_utils.runs import Run

CPU = torch.device("cpu")
TRAIN = ["--dataset", "digits", "--device", "cpu", "--val-size", 1200, "--epochs", 3, "--batch-size", 64]
TRAIN += ["--channels", 32, 32, "--timesteps", 50, "--val-images", 60, "--sample-every", 2]


BOUND_OF, bits = [], evaluate.bits_per_dimension  # the images whose bound was computed


def ran(module, *flags):
    return module.main([str(flag) for flag in flags])


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory):
    top = tmp_path_factory.mktemp("runs")
    ran(train_ddpm, *TRAIN, "--conditional", "--prediction", "v", "--schedule", "cosine", "--runs-dir", top)
    return top


@pytest.fixture(scope="module")
def evaluated(runs_dir):
    given = ["--dataset", "digits", "--runs-dir", runs_dir, "--device", "cpu"]
    ran(sampling, *given, "--n", 40, "--steps", 5)
    flags = ["--val-size", 1200, "--epochs", 2, "--compared", 30, "--level-images", 15, "--bound-images", 5]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "bits_per_dimension", lambda *given: BOUND_OF.append(given[-1]) or bits(*given))
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
    assert metrics["frechet_error"] == pytest.approx(features.frechet_error(samples, test), rel=0.05)
    assert metrics["precision_of_samples"] == pytest.approx(features.covered(samples, test), abs=0.03)
    assert metrics["recall_of_samples"] == pytest.approx(features.covered(test, samples), abs=0.03)
    chosen = probabilities.argmax(1)
    assert metrics["class_shares"] == pytest.approx((np.bincount(chosen, minlength=10) / 40).tolist(), abs=0.03)
    assert metrics["as_asked"] == pytest.approx((chosen == np.arange(40) % 10).mean(), abs=0.03)
    rng = np.random.default_rng(0)
    for name, x in (("samples", images[:, None]), ("test", data.test.x)):
        distance, _ = features.nearest(x[rng.permutation(len(x))[:30]], data.train.x)
        assert metrics[f"nearest_of_{name}"] == pytest.approx(np.median(distance), rel=1e-4)
    test = scaled(torch.from_numpy(data.test.x))
    assert all((test == x).flatten(1).all(1).any() for x in BOUND_OF[0])
    assert len(BOUND_OF[0]) == 5
    bound = metrics["bound"]
    assert metrics["bits_per_dimension"] == pytest.approx(bound["prior"] + bound["steps"] + bound["last"])
    assert metrics["bits_error"] == bound["standard_error"]
    assert {path.name for path in (folder / "evaluate").glob("*.png")} == {
        "classes.png",
        "nearest.png",
        "loss_by_level.png",
    }


def test_the_networks_error_is_that_of_its_images(evaluated):
    folder, metrics = evaluated
    asked = evaluate.build_parser().parse_args(["--dataset", "digits", "--ckpt", str(folder / "train_ddpm/ema.pth")])
    asked.val_size = 1200
    data, (model, diffusion, _) = load(asked), load_model(asked, CPU)
    rng, level = np.random.default_rng(0), metrics["levels"][len(metrics["levels"]) // 2]
    assert level["step"] == metrics["middle_step"]
    t = torch.full((15,), level["step"])
    for name, part in (("training", data.train), ("test", data.test)):
        x0 = scaled(torch.from_numpy(part.x[rng.permutation(len(part))[:15]]))
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(level["step"]))
        with torch.no_grad():
            wanted = (diffusion.denoised(model, diffusion.q_sample(x0, t, noise), t) - x0).square().mean().item()
        assert level[f"network on {name} images"] == pytest.approx(wanted, rel=1e-4)
    ratio = level["network on test images"] / level["network on training images"]
    assert metrics["network_on_test_against_training"] == pytest.approx(ratio)


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
    said = "was trained with --val-size 1200, not 300"  # here the training images are not those that were learned there
    for script in (evaluate, fid_vs_steps):
        assert said in fails(script, [*given[:-1], "--val-size", 300], tmp_path / "out")


def test_the_benchmark_says_what_it_timed(tmp_path):
    metrics = ran(benchmark, "--quick", "--device", "cpu", "--peer-attention", "linear", "--out", tmp_path)
    speeds = {row["what"]: row for row in metrics["cases"]}
    ours = [speeds[f"{benchmark.OURS}, {precision}"] for precision in ("float32", "bfloat16")]
    best = max(ours, key=lambda row: row["images_per_second"])
    assert best["what"].endswith(metrics["precision"])
    for key, ratio in (("images_per_second", "training"), ("image_steps_per_second", "sampling")):
        peer = speeds[f"{benchmark.PEER}, float32"]
        assert metrics[f"{ratio}_against_peer"] == pytest.approx(best[key] / peer[key])
    assert metrics["parameters"] < 1_500_000 < 2_400_000 < metrics["parameters_of_peer"] < 2_700_000
    assert (tmp_path / "speed.png").exists()


@pytest.mark.parametrize("attention", ["full", "linear"])
def test_the_peer_is_the_network_that_it_says(attention):
    """Attention in seven places, always full at 7×7, a time that is heard, images of the size that went in."""
    torch.manual_seed(0)
    peer = benchmark.PeerUNet(attention)
    for parameter in peer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([3, 700])
    out = peer(x, t)
    assert out.shape == x.shape
    out.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in peer.parameters())
    assert not torch.allclose(out, peer(x, t.flip(0)))
    where = {name: module.full for name, module in peer.named_modules() if isinstance(module, benchmark.PeerAttention)}
    assert len(where) == 7
    small = {"downs.2.2", "middle.1", "ups.0.2"}
    assert {name for name, full in where.items() if full} == (small if attention == "linear" else set(where))


def test_the_peers_attention_full_and_linear():
    torch.manual_seed(0)
    layer, x = benchmark.PeerAttention(32, full=True), torch.randn(2, 32, 5, 5)
    q, k, v = layer.qkv(layer.norm(x)).reshape(2, 3, 4, 32, 25).transpose(3, 4).unbind(1)  # (2, 4, 25, 32) each
    seen = torch.einsum("bhij,bhjc->bhci", (torch.einsum("bhic,bhjc->bhij", q, k) / 32**0.5).softmax(-1), v)
    torch.testing.assert_close(layer(x), x + layer.out(seen.reshape(2, 128, 5, 5)))
    layer.full = False
    summary = torch.einsum("bhjc,bhjd->bhcd", k.softmax(2), v)  # of all positions
    seen = torch.einsum("bhic,bhcd->bhdi", q.softmax(3) / 32**0.5, summary)
    torch.testing.assert_close(layer(x), x + layer.out(seen.reshape(2, 128, 5, 5)))


def test_every_number_of_steps_is_measured_and_a_stopped_study_goes_on(runs_dir, tmp_path, monkeypatch):
    given = ["--dataset", "digits", "--runs-dir", runs_dir, "--device", "cpu", "--val-size", 1200, "--epochs", 1]
    given += ["--steps", 4, 2, "--n", 30, "--batch-size", 20]
    whole = ran(fid_vs_steps, *given, "--out", tmp_path / "whole")
    found = [(row["sampler"], row["steps"]) for row in whole["points"]]
    solvers = ["DPM-Solver++", "DDIM", "DDIM, η = 1"]
    assert found == [*((name, steps) for name in solvers for steps in (2, 4)), ("DDPM", 50)]
    by_point = {(row["sampler"], row["steps"]): row["frechet"] for row in whole["points"]}
    assert by_point["DPM-Solver++", 2] == pytest.approx(by_point["DDIM", 2])  # a first step of first order is DDIM's
    assert len(set(by_point.values())) >= 6  # no others draw alike
    args = fid_vs_steps.build_parser().parse_args([str(flag) for flag in given])
    data, judge = load(args), features.Classifier(1, 10).eval()
    judge.load_state_dict(checkpoint.load(tmp_path / "whole" / "last.pth")["classifier"])
    test, real = (features.seen(judge, x)[0] for x in (data.test.x, data.val.x[:30]))
    assert whole["floor"] == pytest.approx(features.frechet_distance(real, test), rel=1e-4)
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
    monkeypatch.setattr(fid_vs_steps, "trained", None)  # the classifier is that of the first half
    again = ran(fid_vs_steps, *given, "--out", tmp_path / "stopped", "--resume")
    for one, other in zip(whole["points"], again["points"], strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}


def test_the_fewest_steps_near_the_best_are_found():
    rows = [("A", 10, 2.2), ("A", 50, 2.0), ("B", 10, 9.0), ("B", 20, 2.4), ("DDPM", 100, 1.99)]
    rows = [{"sampler": s, "steps": n, "frechet": value} for s, n, value in rows]
    found = fid_vs_steps.findings(rows)
    assert (found["compared_with"], found["compared"]) == ("100 steps of DDPM", 1.99)
    assert found["near"] == {"A": "10 steps", "B": "no number of steps tried"}
    assert found["ratio_of_50"] == {"A": pytest.approx(2.0 / 1.99), "B": None}
    assert found["best_ratio"] == pytest.approx({"A": 2.0 / 1.99, "B": 2.4 / 1.99})
    assert fid_vs_steps.findings(rows[:-1])["compared_with"] == "50 steps of A"
