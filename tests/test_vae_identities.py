"""vae's scripts against what their numbers must be: sums that must agree, choices that must be the best, directions."""

import csv
import math

import numpy as np
import pytest
import torch

from shared_utils import checkpoint
from shared_utils.checkpoint import load_arrays
from shared_utils.cli import UserError, run_main
from vae import evaluate, inference_gap, latent_space, reconstruct, train
from vae.inputs import load_binary
from vae.model import VAE, load_model, mean_terms

SAME = ["--dataset", "digits", "--per-class", "20", "--val-size", "100", "--device", "cpu"]


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory):
    """A folder of runs with a model of two latents."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--z-dim", "2", "--epochs", "20", "--batch-size", "50", "--runs-dir", str(folder)]
    train.main([*SAME, *flags, "--encoder-weight-decay", "0", "--lr", "0.02", "--schedule", "constant"])
    return folder


@pytest.fixture(scope="module")
def data():
    return load_binary(train.build_parser().parse_args(SAME))


def loaded(runs_dir):
    args = evaluate.build_parser().parse_args([*SAME, "--ckpt", str(runs_dir / "vae/train/best.pth")])
    return load_model(args, torch.device("cpu"))


def test_the_best_weights_are_those_of_the_highest_validation_bound(tmp_path, monkeypatch, data):
    monkeypatch.setattr(train, "VALIDATE_EVERY", 2)
    flags = ["--epochs", "15", "--lr", "0.3", "--schedule", "constant", "--batch-size", "50", "--out", str(tmp_path)]
    metrics = train.main([*SAME, *flags])  # a learning rate so high that the last weights are not the best
    rows = list(csv.DictReader((tmp_path / "history.csv").open()))
    elbo = [float(row["val_reconstruction"]) - float(row["val_kl"]) for row in rows]
    assert metrics["val_elbo"] == pytest.approx(max(elbo))
    assert metrics["best_step"] == int(rows[int(np.argmax(elbo))]["step"]) < metrics["updates"]
    state = checkpoint.load(tmp_path / "best.pth")
    model = VAE()
    model.load_state_dict(state["model"])
    torch.manual_seed(0)
    reconstruction, kl = mean_terms(model, torch.from_numpy(data.x_test), 50)
    assert metrics["test_elbo"] == pytest.approx(reconstruction - kl, abs=0.5)
    assert metrics["test_kl"] == pytest.approx(kl, rel=1e-6)
    assert abs(metrics["test_elbo"] - metrics["test_elbo_of_the_last_weights"]) > 0.5


def test_the_test_images_do_not_reach_training(tmp_path, monkeypatch):
    flags = [*SAME, "--epochs", "3", "--batch-size", "50"]
    honest = train.main([*flags, "--out", str(tmp_path / "honest")])
    real = train.load_binary

    def blind(args):
        found = real(args)
        found.x_test[:] = 0
        return found

    monkeypatch.setattr(train, "load_binary", blind)
    blinded = train.main([*flags, "--out", str(tmp_path / "blind")])
    assert honest["val_elbo"] == blinded["val_elbo"]
    assert honest["test_elbo"] != blinded["test_elbo"]


def test_both_groups_of_parameters_follow_the_schedule(tmp_path):
    train.main([*SAME, "--epochs", "2", "--batch-size", "50", "--out", str(tmp_path)])
    groups = checkpoint.load(tmp_path / "last.pth")["optimizer"]["param_groups"]
    assert groups[0]["lr"] == groups[1]["lr"] != 3e-3


def test_a_run_stopped_before_its_first_checkpoint_begins_its_history_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "VALIDATE_EVERY", 2)
    flags = [*SAME, "--epochs", "3", "--batch-size", "50", "--out", str(tmp_path)]
    real = train.check_finite

    def stopped(loss, step, lr):
        if step == 9:
            raise KeyboardInterrupt
        real(loss, step, lr)

    monkeypatch.setattr(train, "check_finite", stopped)
    with pytest.raises(KeyboardInterrupt):
        train.main(flags)
    monkeypatch.setattr(train, "check_finite", real)
    train.main([*flags, "--resume"])
    steps = [int(row["step"]) for row in csv.DictReader((tmp_path / "history.csv").open())]
    assert steps == sorted(set(steps))


def test_evaluations_numbers_agree_with_each_other(runs_dir, tmp_path):
    flags = ["--k", "200", "--images", "60", "--mixture-sizes", "5", "--samples", "300", "--out", str(tmp_path)]
    metrics = evaluate.main([*SAME, "--runs-dir", str(runs_dir), *flags])
    table = {row["model"].split(": ")[-1]: row["test_log_likelihood"] for row in metrics["likelihoods"]}
    assert metrics["test_exact"] == table["exact"]
    assert metrics["exact_minus_iwae"] == pytest.approx(table["exact"] - table["IWAE-200"])
    assert metrics["exact_minus_elbo"] == pytest.approx(table["exact"] - table["ELBO"])
    assert metrics["gap"] == pytest.approx(table["IWAE-200"] - table["ELBO"])
    assert metrics["test_elbo"] == pytest.approx(metrics["test_reconstruction"] - metrics["test_kl"])
    assert table["ELBO"] < table["IWAE-200"] < table["exact"] + 0.05
    assert evaluate.bits_per_pixel(-196 * math.log(2)) == pytest.approx(1)
    for row in metrics["samples"]:
        shares = np.array(row["class_shares"])
        assert shares.sum() == pytest.approx(1)
        assert 1 <= row["effective_classes"] <= 10
        entropy = -sum(s * math.log(s) for s in shares if s)
        assert row["effective_classes"] == pytest.approx(math.exp(entropy))


def test_baselines_are_fitted_and_chosen_without_the_test_images(data):
    fitted = evaluate.fit_baselines(
        type("Train", (), {"x_train": data.x_train, "y_train": data.y_train}), [2, 5], np.random.default_rng(0)
    )
    assert len(fitted) == 3


def test_half_the_points_are_asked_of_the_second_quadrature(monkeypatch, runs_dir, data):
    asked = []
    monkeypatch.setattr(evaluate, "exact_log_likelihood", lambda model, x, points: asked.append(points) or x[:, 0])
    evaluate.measure(loaded(runs_dir), torch.from_numpy(data.x_test[:5]), [1, 2])
    assert asked == [evaluate.GRID_POINTS, evaluate.GRID_POINTS // 2]


def test_the_autoencoders_draws_are_ones_where_the_decoder_is_sure_of_ones(monkeypatch, runs_dir, data):
    model = loaded(runs_dir)
    with torch.no_grad():
        model.decoder[2].weight.zero_()
        model.decoder[2].bias.fill_(20.0)
    monkeypatch.setattr(evaluate, "CLASSIFIER_EPOCHS", 1)
    _, _, shown = evaluate.read_samples(model, {}, data, 20, np.random.default_rng(0), torch.device("cpu"))
    assert shown["VAE"].all()
    assert shown["VAE, cut at ½"].all()


def test_the_two_gaps_make_up_the_whole():
    nats = {"likelihood": np.array([-1.0, -2.0]), "best_elbo": np.array([-1.5, -2.1]), "elbo": np.array([-4.0, -3.0])}
    row = inference_gap.gap_row("some", nats)
    assert row["approximation_gap"] == pytest.approx(0.3)
    assert row["amortisation_gap"] == pytest.approx(1.7)
    assert row["approximation_gap"] + row["amortisation_gap"] == pytest.approx(row["log_likelihood"] - row["elbo"])


def test_reconstructions_are_ordered_by_their_bound(runs_dir, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(
        reconstruct, "save_figure", lambda figure, path: titles.extend(a.get_title() for a in figure.axes)
    )
    reconstruct.main([*SAME, "--runs-dir", str(runs_dir), "--out", str(tmp_path)])
    highest, lowest = (float(title.split(": ")[1].split(" to ")[0]) for title in titles[1:3])
    assert highest > lowest


def test_the_kl_of_all_latents_is_the_kl(runs_dir, tmp_path, data):
    metrics = latent_space.main([*SAME, "--runs-dir", str(runs_dir), "--out", str(tmp_path)])
    _, kl = mean_terms(loaded(runs_dir), torch.from_numpy(data.x_test), 1)
    assert sum(metrics["kl_of_units"]) == pytest.approx(kl, rel=1e-4)


def test_neighbours_are_looked_for_in_the_latents(runs_dir, tmp_path):
    state = checkpoint.load(runs_dir / "vae/train/best.pth")
    blind = {name: torch.zeros_like(value) for name, value in state["model"].items()}
    checkpoint.save(tmp_path / "blind.pth", config=state["config"], model=blind)
    metrics = latent_space.main([*SAME, "--ckpt", str(tmp_path / "blind.pth"), "--out", str(tmp_path / "run")])
    assert metrics["knn_accuracy"]["latents"] < 0.2 < metrics["knn_accuracy"]["pixels"]
    assert metrics["active_units"] == 0


def test_another_data_set_than_the_models_is_refused(runs_dir, capsys):
    flags = ["--runs-dir", str(runs_dir), "--dataset", "digits", "--per-class", "30", "--val-size", "100"]
    with pytest.raises(SystemExit):
        run_main(lambda: reconstruct.main(flags), reconstruct.build_parser)
    assert "--per-class 20" in capsys.readouterr().err


def test_the_test_images_come_in_a_mixed_order(data):
    counts = np.bincount(data.y_test[:100], minlength=10)
    assert counts.min() >= 7


@pytest.mark.parametrize("device", ["meta"])
def test_everything_is_made_on_the_models_device(device, monkeypatch):
    model = VAE(z_dim=2).to(device)
    monkeypatch.setattr(VAE, "_check_images", lambda self, x: None)  # it asks for a value, which meta has not
    x = torch.zeros(3, 196, device=device)
    assert all(term.device.type == device for term in model.elbo_terms(x, 2))
    assert model.iwae_bound(x, 5).device.type == device


def test_too_few_images_for_any_mixture_is_one_line_before_anything_is_written(runs_dir):
    flags = [*SAME, "--runs-dir", str(runs_dir), "--mixture-sizes", "190", "--out", str(runs_dir / "none")]
    with pytest.raises(UserError, match="--mixture-sizes"):
        evaluate.main(flags)
    assert not (runs_dir / "none").exists()


def test_terms_are_written_in_one_step(runs_dir):
    assert set(load_arrays(runs_dir / "vae/train/terms.npz")) == {"reconstruction", "kl"}
