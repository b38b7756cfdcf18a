"""What ddpm's scripts do with their flags, and what their metrics, tables and titles say, against made-up measures."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddpm import benchmark, compare_vae, evaluate, features, fid_vs_steps, sampling, train_ddpm
from ddpm.diffusion import GaussianDiffusion
from ddpm.inputs import load, shades
from ddpm.unet import UNet
from shared_utils import checkpoint
from shared_utils.data import Images, load_images
from shared_utils.schedules import one_cycle
from shared_utils.seeding import derived_seed

CPU = torch.device("cpu")
GIVEN = ["--dataset", "digits", "--device", "cpu"]
TRAIN = [*GIVEN, "--val-size", 1200, "--batch-size", 64, "--channels", 32, 32, "--timesteps", 50, "--val-images", 60]


def ran(module, *flags):
    return module.main([str(flag) for flag in flags])


@pytest.fixture
def titles(monkeypatch):
    """The titles of the figures that the scripts save, none of which is drawn."""
    found = []
    for module in (benchmark, compare_vae, evaluate, fid_vs_steps, sampling, train_ddpm):
        monkeypatch.setattr(module, "save_figure", lambda figure, path: found.append(figure.get_suptitle()))
    return found


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """The flag that names a network of ten classes, untrained."""
    torch.manual_seed(0)
    model = UNet(28, 1, (32, 32), 10)
    config = {**model.config, "timesteps": 50, "schedule": "cosine", "prediction": "v"}
    config |= {"dataset": "digits", "val_size": 1200}
    path = tmp_path_factory.mktemp("model") / "ema.pth"
    checkpoint.save(path, config=config, model=model.state_dict(), title="digits")
    return ["--ckpt", path]


# --- training -------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch, titles, tmp_path):
    """A function: a training whose losses are 1, 2, 3, …; its folder, what each update was given, its pictures."""

    def train(*flags):
        seen, pictures = [], []

        def loss(diffusion, network, x, y, batch, *given):
            seen.append((batch.tolist(), torch.initial_seed()))
            return len(seen) + 0 * sum(p.sum() for p in network.parameters())

        def draw(diffusion, model, args, epoch):
            pictures.append(model.last.bias.clone())
            return draw_samples(diffusion, model, args, epoch)

        monkeypatch.setattr(train_ddpm, "update_loss", loss)
        monkeypatch.setattr(train_ddpm, "draw_samples", draw)
        monkeypatch.setattr(train_ddpm, "losses_by_level", lambda *_: torch.arange(10.0))
        monkeypatch.setattr(GaussianDiffusion, "dpm_solver_sample", lambda self, model, shape, *_: torch.zeros(shape))
        monkeypatch.setattr(train_ddpm, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
        folder = tmp_path / f"{len(titles)}"
        metrics = ran(train_ddpm, *TRAIN, *flags, "--out", folder)
        return folder, metrics, seen, pictures

    draw_samples = train_ddpm.draw_samples
    return train


def test_each_epoch_and_seed_has_an_order_and_noise_of_its_own(trained):
    orders = []
    for seed in (1, 2):
        _, metrics, seen, _ = trained("--epochs", 2, "--seed", seed)
        assert [noise for _, noise in seen] == [derived_seed(seed, update) for update in range(metrics["updates"])]
        per_epoch = metrics["updates"] // 2
        orders += [[i for batch, _ in seen[at : at + per_epoch] for i in batch] for at in (0, per_epoch)]
    assert all(len(set(order)) == len(order) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_the_history_has_each_epochs_own_mean_and_the_time_adds_up(trained):
    folder, metrics, seen, _ = trained("--epochs", 3)
    per_epoch = len(seen) // 3
    rows = [row.split(",") for row in (folder / "history.csv").read_text(encoding="utf-8").splitlines()[1:]]
    wanted = np.arange(1, len(seen) + 1).reshape(3, per_epoch).mean(1)
    assert [float(row[1]) for row in rows] == pytest.approx(wanted.tolist())
    assert metrics["train_loss"] == pytest.approx(wanted[-1])
    assert metrics["training_seconds"] == 3
    assert metrics["images"] == len(seen) * 64


def test_the_mean_weights_follow_at_their_pace_and_draw_the_pictures(trained, monkeypatch):
    decays = []

    def follow(ema, model, decay):
        decays.append(decay)
        for parameter in ema.parameters():
            parameter.data += 1

    monkeypatch.setattr(train_ddpm, "follow", follow)
    folder, _, _, pictures = trained("--epochs", 2, "--ema", 0.3, "--sample-every", 1)
    assert decays == pytest.approx([min(0.3, (1 + n) / (10 + n)) for n in range(len(decays))])
    assert decays[0] == 0.1
    mean = checkpoint.load(folder / "ema.pth")["model"]["last.bias"]
    assert torch.equal(pictures[-1], mean)
    assert not torch.equal(checkpoint.load(folder / "last.pth")["model"]["last.bias"], mean)


def test_the_training_figure_shows_each_epochs_levels_and_names_the_hardest():
    levels = np.stack([np.full(10, 5.0), np.full(10, 4.0), np.r_[3.0, 9.0, np.full(8, 1.0)]])
    rows = [{"val_loss": value} for value in (0.5, 0.4, 0.3)]
    args = SimpleNamespace(conditional=False, epochs=3, timesteps=100, prediction="eps")
    figure = train_ddpm.draw_losses(np.ones(12), levels, rows, args, "x")
    assert figure.get_suptitle() == "x\nheld-out loss 0.3000 after 3 epochs, highest around step 15"
    left, right = figure.axes
    at = {line.get_label(): line for line in (*left.lines, *right.lines)}
    assert at["held out, mean weights"].get_xdata().tolist() == [4, 8, 12]  # updates
    assert at["epoch 1"].get_ydata().tolist() == [5] * 10
    assert at["epoch 3"].get_ydata().tolist() == levels[2].tolist()
    assert at["epoch 3"].get_xdata().tolist() == [5.0 + 10 * each for each in range(10)]


def test_a_sixth_is_held_out_unless_told():
    data = load(train_ddpm.build_parser().parse_args(GIVEN))
    assert len(data.val) == (len(data.train) + len(data.val)) // 6


def test_the_judge_sees_the_images_in_a_new_order_each_epoch_at_a_rate_of_one_cycle(monkeypatch):
    orders, batches, rates, step = [], features.minibatches, [], torch.optim.AdamW.step

    def stepped(optimizer, *given):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *given)

    def watched(n, size, rng):
        orders.append(found := list(batches(n, size, rng)))
        return found

    monkeypatch.setattr(features, "minibatches", watched)
    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)
    part = load_images("digits", "train")[np.arange(60)]
    features.trained(part, 10, 2, 0, CPU, batch_size=20)
    first, second = (np.concatenate(order) for order in orders)
    assert rates == pytest.approx([one_cycle(at, 6, 5e-3) for at in range(6)])
    assert sorted(first) == sorted(second) == list(range(60))
    assert not np.array_equal(first, second)


# --- sampling -------------------------------------------------------------------------------------------------------


@pytest.fixture
def sampled(monkeypatch, titles, ckpt, tmp_path):
    """A function: sampling.py's metrics, the samples' labels, and what it asked of `draw_all` and `followed`."""

    def sample(*flags):
        asked = []

        def draw_all(diffusion, model, labels, sampler, steps, args, device, **how):
            asked.append((sampler, steps, how, torch.initial_seed()))
            return np.zeros((len(labels), 1, 28, 28), np.uint8), 3.0

        frames = np.zeros((2, sampling.FOLLOWED, 1, 28, 28), np.uint8)
        monkeypatch.setattr(sampling, "draw_all", draw_all)
        monkeypatch.setattr(sampling, "followed", lambda *_: ([49, 0], frames, frames))
        metrics = ran(sampling, *GIVEN, *ckpt, "--n", 12, *flags, "--out", tmp_path)
        return metrics, np.load(tmp_path / "samples.npz")["labels"], *asked

    return sample


def test_what_is_asked_for_is_drawn_and_told(sampled, titles):
    metrics, labels, asked = sampled("--sampler", "ddim", "--eta", 0.3, "--guidance", 2, "--steps", 7, "--seed", 5)
    assert asked == ("ddim", 7, {"eta": 0.3, "guidance": 2.0}, 5)
    assert labels.tolist() == [*range(10), 0, 1]
    assert metrics["image_steps_per_second"] == 12 * 7 * 2 / 3  # guided: with the label and without
    assert metrics["seconds_per_image"] == 0.25
    assert titles[0].startswith("digits: 7 steps of DDIM, η = 0.3, guidance 2\nthe first 12, unselected; 250 ms each")


@pytest.mark.parametrize(("sampler", "steps"), [("dpm", 20), ("ddim", 50), ("ddpm", 50)])
def test_without_guidance_no_class_is_drawn_and_steps_have_a_default(sampled, sampler, steps):
    metrics, labels, asked = sampled("--sampler", sampler, "--guidance", 0)
    assert asked[:2] == (sampler, steps)
    assert labels.tolist() == [-1] * 12
    assert metrics["image_steps_per_second"] == 12 * steps / 3


def test_the_followed_images_are_seen_under_the_guidance_asked_for(monkeypatch):
    diffusion, asked = GaussianDiffusion(50, "cosine"), []
    x0 = torch.full((sampling.FOLLOWED, 1, 8, 8), 0.5)

    def guided(model, labels, guidance):
        asked.append((labels.tolist(), guidance))

        def knows(x_t, t):
            signal, sigma = diffusion.signal_and_noise(t, x_t)
            return (x_t - signal * x0) / sigma

        return knows

    monkeypatch.setattr(sampling, "guided", guided)
    args = SimpleNamespace(label=None, guidance=2.5, amp=False)
    torch.manual_seed(0)
    moments, noisy, clean = sampling.followed(diffusion, UNet(8, channels=(32, 32), n_classes=3), args, CPU)
    assert asked == [([0, 1, 2, 0, 1], 2.5)]
    assert moments == diffusion.steps_of(sampling.MOMENTS)
    assert (np.abs(clean.astype(int) - shades(x0)) <= 1).all()
    assert noisy[0].std() > 50


def test_the_noisy_images_stand_above_what_is_seen_in_them(monkeypatch):
    grids, draw = [], sampling.image_grid
    monkeypatch.setattr(sampling, "image_grid", lambda ax, x, *a, **k: grids.append(x) or draw(ax, x, *a, **k))
    shape = (3, sampling.FOLLOWED, 1, 4, 4)
    noisy = np.arange(3 * sampling.FOLLOWED, dtype=np.uint8).repeat(16).reshape(shape)
    sampling.draw_denoising([9, 5, 0], noisy, 200 + noisy // 5)
    rows = grids[0].reshape(sampling.FOLLOWED, 2, 3, 1, 4, 4)
    for image in range(sampling.FOLLOWED):
        assert np.array_equal(rows[image, 0], noisy[:, image])
        assert np.array_equal(rows[image, 1], 200 + noisy[:, image] // 5)


def test_the_step_of_half_the_variance_is_named_for_both_schedules():
    figure = sampling.draw_noising(GaussianDiffusion(100, "cosine"), torch.zeros(1, 1, 8, 8, dtype=torch.uint8), 0)
    half = {name: (GaussianDiffusion(100, name).alpha_bars > 0.5).sum() for name in ("linear", "cosine")}
    assert 20 < half["linear"] < 35 < 45 < half["cosine"] < 55
    said = f"linear at step {half['linear']}, cosine at step {half['cosine']}, of 100"
    assert figure.get_suptitle() == f"Half of the variance is noise: {said}"
    assert [ax.get_title().split(";")[0] for ax in figure.axes] == ["linear schedule", "cosine schedule (this model's)"]


# --- measures -------------------------------------------------------------------------------------------------------


def test_samples_and_as_many_real_images_are_measured_alike():
    rng = np.random.default_rng(0)
    clouds = {"samples": rng.standard_normal((40, 3)) * 2, "real": rng.standard_normal((100, 3)) + 0.5}
    clouds["test"] = rng.standard_normal((80, 3))
    found = evaluate.distances(clouds)
    for name in ("samples", "real"):
        some = clouds[name][:40]
        assert found[f"frechet_of_{name}"] == pytest.approx(features.frechet_distance(some, clouds["test"]))
        assert found[f"precision_of_{name}"] == features.covered(some, clouds["test"], 3)
        assert found[f"recall_of_{name}"] == features.covered(clouds["test"], some, 3)
    assert found["precision_of_samples"] != found["recall_of_samples"]
    assert found["times_the_floor"] == found["frechet_of_samples"] / found["frechet_of_real"]


def test_classes_are_counted_and_both_confidences_told():
    probabilities = {"samples": np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]])}
    probabilities["test"] = np.array([[1.0, 0.0], [0.02, 0.98]])
    found = evaluate.classes(probabilities, np.array([0, 1, -1, 1]))
    assert found["class_shares"] == [0.75, 0.25]
    assert (found["smallest_share"], found["largest_share"]) == (0.25, 0.75)
    assert (found["confidence_of_samples"], found["confidence_of_test"]) == pytest.approx((0.75, 0.99))
    assert found["as_asked"] == pytest.approx(2 / 3)
    test = Images(np.zeros((4, 1)), np.array([0, 1, 1, 1]), ("0", "1"))
    data = SimpleNamespace(classes=test.classes, title="x", test=test)
    found |= {"frechet_of_samples": 2.0, "frechet_error": 0.125, "times_the_floor": 4.0}
    figure = evaluate.draw_classes(probabilities, data, found)
    said = "Fréchet distance 2.000 ± 0.125, 4.0 times real images' own;\nclasses from 25.0% to 75.0% of the samples"
    assert figure.get_suptitle() == f"x: {said}"
    assert [bar.get_height() for bar in figure.axes[0].patches] == [75, 25, 25, 75]


def test_the_memoriser_is_held_against_itself():
    at = {"network on test images": 3.0, "network on training images": 2.0}
    at |= {"memoriser on test images": 8.0, "memoriser on training images": 0.5}
    found = evaluate.generalisation(at)
    assert found == {"network_on_test_against_training": 1.5, "memoriser_on_test_against_training": 16.0}


@pytest.mark.parametrize(("near", "said"), [(1.0, "nearer to"), (3.0, "no nearer to")])
def test_samples_stand_above_their_own_neighbours(near, said, monkeypatch):
    grids, draw = [], evaluate.image_grid
    monkeypatch.setattr(evaluate, "image_grid", lambda ax, x, *a, **k: grids.append(x) or draw(ax, x, *a, **k))
    train = np.arange(20, dtype=np.uint8).repeat(16).reshape(20, 1, 4, 4)
    data = SimpleNamespace(train=SimpleNamespace(x=train), title="x")
    which, others = np.arange(12)[::-1], np.arange(12)
    far = {"samples": (np.full(12, near), which), "test": (np.full(12, 2.0), others)}
    found = {"nearest_of_samples": near, "nearest_of_test": 2.0}
    figure = evaluate.draw_nearest(100 + train[:12], far, data, found)
    assert figure.get_suptitle() == f"x: the samples are {said} the training images than test images are"
    assert np.array_equal(grids[0][:10], 100 + train[:10])
    assert np.array_equal(grids[0][10:], train[which[:10]])


def test_the_evaluation_tells_the_classifiers_accuracy_on_test_images(ckpt, titles, monkeypatch, tmp_path):
    data, samples = load(evaluate.build_parser().parse_args([*GIVEN, "--val-size", "1200"])), np.zeros((20, 1, 28, 28))
    rng = np.random.default_rng(0)

    def seen(judge, x):
        right = np.eye(10)[data.test.y] if len(x) == len(data.test) else np.full((len(x), 10), 0.1)
        return rng.standard_normal((len(x), 3)), right

    names = [f"{who} on {part} images" for who in ("network", "memoriser") for part in ("test", "training")]
    levels = {step: dict.fromkeys(names, 1.0) for step in (1, 20, 49)}
    monkeypatch.setattr(evaluate, "trained", lambda *_: None)
    monkeypatch.setattr(evaluate, "seen", seen)
    monkeypatch.setattr(evaluate, "read_samples", lambda *_: (samples, np.full(20, -1)))
    monkeypatch.setattr(evaluate, "nearest", lambda x, others: (np.ones(len(x)), np.zeros(len(x), dtype=np.int64)))
    monkeypatch.setattr(evaluate, "losses_at_levels", lambda *_: levels)
    monkeypatch.setattr(evaluate, "bits_per_dimension", lambda *_: {"sum": 3.0, "standard_error": 0.125})
    given = ["--val-size", 1200, "--samples", tmp_path / "x.npz", "--out", tmp_path / "out"]
    metrics = ran(evaluate, *GIVEN, *ckpt, *given)
    assert (metrics["accuracy"], metrics["confidence_of_test"], metrics["as_asked"]) == (1, 1, None)
    assert (metrics["bits_per_dimension"], metrics["bits_error"], metrics["middle_step"]) == (3, 0.125, 20)


# --- the study of steps and the benchmark ---------------------------------------------------------------------------


def test_every_point_starts_from_the_seed_and_has_its_own_error(ckpt, titles, monkeypatch, tmp_path):
    seeds, rng = [], np.random.default_rng(0)
    clouds = {
        name: rng.standard_normal((30, 3)) * wide for name, wide in (("test", 1.0), ("real", 1.2), ("drawn", 2.0))
    }

    def draw_all(diffusion, model, labels, *given, **how):
        seeds.append(torch.initial_seed())
        return np.zeros((30, 1)), 1.0

    data = load(fid_vs_steps.build_parser().parse_args([*GIVEN, "--val-size", "1200"]))
    names = {len(data.test): "test", 30: "real"}
    seen = lambda judge, x: (clouds["drawn" if x.ndim == 2 else names[len(x)]], None)  # noqa: E731
    monkeypatch.setattr(fid_vs_steps, "judge", lambda *_: None)
    monkeypatch.setattr(fid_vs_steps, "draw_all", draw_all)
    monkeypatch.setattr(fid_vs_steps, "seen", seen)
    flags = ["--val-size", 1200, "--n", 30, "--steps", 4, "--seed", 6, "--out", tmp_path]
    metrics = ran(fid_vs_steps, *GIVEN, *ckpt, *flags)
    assert seeds[1:] == [6] * 4  # the first warms up
    assert metrics["floor"] == features.frechet_distance(clouds["real"], clouds["test"])
    for row in metrics["points"]:
        assert row["frechet"] == features.frechet_distance(clouds["drawn"], clouds["test"])
        assert row["standard_error"] == features.frechet_error(clouds["drawn"], clouds["test"])


def test_near_is_within_15_percent_and_the_fewest_steps_are_told():
    rows = [("A", 10, 1.3), ("A", 20, 1.14), ("A", 50, 1.02), ("B", 10, 1.16), ("DDPM", 100, 1.0)]
    rows = [{"sampler": s, "steps": n, "frechet": f, "standard_error": 0.1, "seconds": 1.0} for s, n, f in rows]
    found = fid_vs_steps.findings(rows)
    assert found["near"] == {"A": "20 steps", "B": "no number of steps tried"}
    assert found["best_ratio"] == {"A": 1.02, "B": 1.16}
    title = fid_vs_steps.draw(rows, 0.5, found, 30, "x").get_suptitle()
    said = "within 15 % of that, or below: A with 20 steps; B with no number of steps tried"
    assert title == f"x: 100 steps of DDPM give 1.000\n{said}"


def test_the_benchmark_times_each_precision_and_compares_the_faster(titles, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(benchmark, "training_call", lambda network, b, amp, device: asked.append((b, amp)))
    monkeypatch.setattr(benchmark, "step_call", lambda network, b, amp, device: asked.append((b, amp)))
    seconds = iter([0.4, 0.1, 0.2, 0.05, 1.2, 0.6, 0.8, 0.3])  # ours in float32, in bfloat16, the peer's
    monkeypatch.setattr(benchmark, "least_seconds", lambda calls, repeats: {name: next(seconds) for name in calls})
    metrics = ran(benchmark, "--batch-size", 8, "--device", "cpu", "--out", tmp_path)
    assert asked == [(8, False), (8, False), (8, True), (8, True)] * 2
    speeds = [(row["images_per_second"], row["image_steps_per_second"]) for row in metrics["cases"]]
    assert speeds == [pytest.approx(each) for each in ((20, 80), (40, 160), (8 / 1.2, 8 / 0.6), (10, 8 / 0.3))]
    assert metrics["precision"] == "bfloat16"
    assert metrics["training_against_peer"] == pytest.approx(6)
    assert metrics["sampling_against_peer"] == pytest.approx(12)
    assert titles[0].endswith("6.0 times the images, 12.0 times the steps")


def test_the_first_time_does_not_count(monkeypatch):
    clock = iter([0.5, 0.5, 0.0, 3.0, 0.0, 7.0, 0.0, 4.0, 0.0, 5.0])  # a start each to warm up, then starts and ends
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert benchmark.least_seconds({"a": lambda: None, "b": lambda: None}, 2) == {"a": 3, "b": 5}
