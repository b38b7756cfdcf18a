"""autoencoder: training and what reads its checkpoints. Figures are covered by test_scripts.py."""

import csv
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from autoencoder import ae_experiments, ae_process_test, ae_run_compare, fitting
from autoencoder.fitting import Recipe, codes, fit, reconstruction_errors
from autoencoder.inputs import load_pixels, pixels
from autoencoder.trained import Trained, find_trained, load_trained, process, save_trained
from shared_utils.checkpoint import load_arrays
from shared_utils.cli import UserError
from shared_utils.runs import read_json
from shared_utils.schedules import one_cycle

DATA = ["--dataset", "digits", "--val-size", "200", "--device", "cpu"]
TINY = [*DATA, "--jobs", "1", "--seeds", "0", "--enc-dims", "16,4", "--lr", "0.01", "--epochs", "1"]
TINY += ["--final-epochs", "2", "--batch-size", "200", "--init", "he"]
PLAIN = {"init": "he", "use_batchnorm": False}
SMALL = Recipe((16, 4), **PLAIN, lr=1e-2, epochs=4, batch_size=50)


@pytest.fixture(scope="module")
def args():
    return ae_experiments.build_parser().parse_args(DATA)


@pytest.fixture(scope="module")
def data(args):
    return load_pixels(args)


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory):
    """Three variants, trained for two epochs."""
    folder = tmp_path_factory.mktemp("runs")
    for variant in ("baseline", "regularised", "denoising"):
        ae_experiments.main([*TINY, "--variant", variant, "--runs-dir", str(folder)])
    return folder


# --- fitting ------------------------------------------------------------------------------------------------------


def test_pixels_are_the_images_over_255(data):
    assert data.x_train.shape[1:] == (784,)
    assert data.x_train.dtype == torch.uint8
    assert pixels(data.x_test).max() == 1
    assert torch.equal((pixels(data.x_test) * 255).round().to(torch.uint8), data.x_test)
    assert len(data.x_val) == len(data.y_val) == 200


def test_fit_follows_the_cycle_and_sees_every_image_once_an_epoch(data, monkeypatch):
    seen = []
    x = data.x_train[:210]  # ten images are left over in each epoch
    model = SMALL.build(0, 784)
    forward = model.forward

    def watched(batch, training=False):
        if training:
            seen.append(batch.sum(1))
        return forward(batch, training)

    monkeypatch.setattr(model, "forward", watched)
    found = fit(model, SMALL, x, data.x_val, 0)
    assert [row["lr"] for row in found.rows] == [one_cycle(step, 16, 1e-2) for step in (3, 7, 11, 15)]
    assert [len(part) for part in seen] == [50] * 16
    for epoch in range(4):
        counts = torch.cat(seen[4 * epoch : 4 * epoch + 4]).unique(return_counts=True)[1]
        assert counts.max() <= pixels(x).sum(1).unique(return_counts=True)[1].max()  # none twice
    assert [row["epoch"] for row in found.rows] == [1, 2, 3, 4]
    assert found.rows[-1]["train_loss"] < found.rows[0]["train_loss"]


def test_fit_ends_with_the_weights_of_the_best_epoch(data, monkeypatch):
    errors = iter([0.5, 0.2, 0.4, 0.3, 0.6, 0.1])
    after = []

    def validated(model, x):
        after.append(weights(model))
        return torch.tensor([next(errors)])

    monkeypatch.setattr(fitting, "reconstruction_errors", validated)
    model = SMALL.build(0, 784)
    recipe = replace(SMALL, epochs=6, patience=3)
    found = fit(model, recipe, data.x_train[:100], data.x_val, 0)
    assert found.best_epoch == 2
    assert found.val_recon == pytest.approx(0.2)
    assert len(found.rows) == 5  # three epochs after the best one patience is over
    assert torch.equal(weights(model), after[1])


def weights(model):
    return torch.cat([value.flatten() for value in model.parameters().values()])


def test_the_same_seed_gives_the_same_weights_and_another_does_not(data):
    found = []
    for seed in (3, 3, 4):
        model = SMALL.build(seed, 784)
        fit(model, SMALL, data.x_train[:200], data.x_val, seed)
        found.append(weights(model))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_bfloat16_products_learn_as_well(data):
    errors = []
    for amp in (False, True):
        recipe = replace(SMALL, enc_dims=(32, 8), epochs=10, amp=amp)
        model = recipe.build(0, 784)
        errors.append(fit(model, recipe, data.x_train, data.x_val, 0).val_recon)
        assert all(value.dtype == torch.float32 for value in model.state_dict().values())
    assert errors[1] == pytest.approx(errors[0], rel=0.1)
    assert errors[1] != errors[0]


def test_a_loss_that_is_not_finite_names_its_step(data):
    losses = torch.tensor([0.1, 0.2, math.nan, math.inf])
    with pytest.raises(UserError, match="at step 13 "):
        fitting.check_epoch(losses, 14, 0.1)
    fitting.check_epoch(losses[:2], 2, 0.1)
    recipe = replace(SMALL, activation="linear", optimizer="sgd", lr=1e6)
    with pytest.raises(UserError, match=r"the loss is .* with learning rate"):
        fit(recipe.build(0, 784), recipe, data.x_train, data.x_val, 0)


@pytest.mark.parametrize(
    "changed",
    [
        {"activation": "relu"},
        {"init": "xavier"},
        {"use_batchnorm": True},
        {"optimizer": "sgd"},
        {"lr": 2e-2},
        {"weight_decay": 0.5},
        {"noise": 0.5},
        {"code_noise": 0.5},
        {"epochs": 2},
        {"batch_size": 25},
        {"amp": True},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_everything_in_a_recipe_counts(changed, data):
    found = []
    for recipe in (SMALL, replace(SMALL, **changed)):
        model = recipe.build(0, 784)
        fit(model, recipe, data.x_train[:100], data.x_val, 0)
        found.append(codes(model, data.x_test[:5]))
    assert not torch.equal(*found)


def test_noise_is_for_training_alone_and_spoils_the_input_not_the_target(data, monkeypatch):
    recipe = replace(SMALL, noise=0.5, code_noise=0.5, epochs=1)
    model = recipe.build(0, 784)
    x = pixels(data.x_test[:50])
    assert torch.equal(model.forward(x), model.forward(x))
    assert not torch.equal(model.forward(x, training=True), model.forward(x, training=True))
    targets, loss = [], model.loss
    monkeypatch.setattr(model, "loss", lambda output, target: (targets.append(target), loss(output, target))[1])
    fit(model, recipe, data.x_train[:50], data.x_val, 0)
    torch.testing.assert_close(targets[0].sum(), pixels(data.x_train[:50]).sum())


def test_codes_with_noise_have_variance_one(data):
    recipe = replace(SMALL, code_noise=0.2, epochs=20)
    model = recipe.build(0, 784)
    fit(model, recipe, data.x_train, data.x_val, 0)
    torch.testing.assert_close(codes(model, data.x_train).std(0), torch.ones(recipe.enc_dims[-1]), rtol=0.2, atol=0.05)


def test_errors_and_codes_are_those_of_evaluation(data):
    model = Recipe((16, 4), use_batchnorm=True).build(0, 784)
    x = pixels(data.x_test)
    expected = ((model.forward(x) - x) ** 2).mean(1)
    torch.testing.assert_close(reconstruction_errors(model, data.x_test), expected)
    torch.testing.assert_close(codes(model, data.x_test), model.encoder.forward(x))


# --- ae_experiments -----------------------------------------------------------------------------------------------


def test_the_grid_is_every_combination_and_keeps_the_best(runs_dir):
    folder = runs_dir / "autoencoder" / "ae_experiments"
    metrics = read_json(folder / "metrics.json")
    with (folder / "grid.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert metrics["combinations"] == len(rows) == 4  # relu and gelu, with and without BatchNorm
    assert len({(row["activation"], row["batchnorm"]) for row in rows}) == 4
    errors = [float(row["val_recon"]) for row in rows]
    assert errors == sorted(errors)
    assert rows[0]["activation"] in metrics["best"]
    assert ("no BatchNorm" in metrics["best"]) == (rows[0]["batchnorm"] == "off")
    assert metrics["test_rmse"] == pytest.approx(math.sqrt(metrics["test_recon"]))
    assert metrics["test_psnr"] == pytest.approx(-10 * math.log10(metrics["test_recon"]))
    assert metrics["below_pca"] == pytest.approx(1 - metrics["test_recon"] / metrics["pca_test_recon"])


def test_the_checkpoint_is_the_model_that_was_measured(runs_dir, args, data):
    folder = runs_dir / "autoencoder" / "ae_experiments"
    metrics = read_json(folder / "metrics.json")
    trained = load_trained(folder / "best.pth", args, 784)
    assert reconstruction_errors(trained.model, data.x_test).mean().item() == pytest.approx(metrics["test_recon"])
    assert reconstruction_errors(trained.model, data.x_val).mean().item() == pytest.approx(metrics["val_recon"])
    assert str(trained.recipe) == metrics["best"]


def test_the_variants_have_their_own_folders_and_their_own_penalty(runs_dir, args):
    args.runs_dir = str(runs_dir)
    for variant, decays, noisy in (("baseline", False, False), ("regularised", True, False), ("denoising", None, True)):
        trained = load_trained(find_trained(args, variant), args, 784)
        recipe, config = trained.recipe, trained.model.config
        assert decays is None or (recipe.weight_decay > 0) == decays
        assert (recipe.noise > 0) == (recipe.code_noise > 0) == noisy
        assert (config["noise"], config["code_noise"]) == (recipe.noise, recipe.code_noise)


def test_a_resumed_grid_trains_only_what_is_missing(tmp_path, monkeypatch):
    flags = [*TINY, "--runs-dir", str(tmp_path)]
    whole = ae_experiments.main(flags)
    history = tmp_path / "autoencoder" / "ae_experiments" / "history.csv"
    lines = history.read_text().splitlines(keepends=True)
    history.write_text("".join(lines[:3]))  # as after a kill in the third combination
    trained, train = [], ae_experiments.train
    monkeypatch.setattr(ae_experiments, "train", lambda *given: (trained.append(given[3]), train(*given))[1])
    resumed = ae_experiments.main([*flags, "--resume"])
    assert len(trained) == 2 + 1  # two combinations and the best for longer
    for key in ("best", "val_recon", "test_recon"):
        assert resumed[key] == whole[key]
    assert [row["val_recon"] for row in resumed["grid"]] == pytest.approx([row["val_recon"] for row in whole["grid"]])


def test_a_combination_that_diverges_does_not_stop_the_others(tmp_path):
    flags = [*DATA, "--jobs", "1", "--seeds", "0", "--enc-dims", "16,4", "--epochs", "2", "--final-epochs", "2"]
    flags += [
        "--activation",
        "linear",
        "--batchnorm",
        "off",
        "--init",
        "he",
        "--optimizer",
        "sgd",
        "--batch-size",
        "50",
    ]
    metrics = ae_experiments.main([*flags, "--lr", "1e6", "0.001", "--out", str(tmp_path / "a")])
    assert "sgd 0.001" in metrics["best"]
    assert metrics["grid"][0]["val_recon"] is None
    with pytest.raises(UserError, match="diverged"):
        ae_experiments.main([*flags, "--lr", "1e6", "--out", str(tmp_path / "b")])


def test_a_bug_in_one_combination_is_not_booked_as_diverged(monkeypatch):
    def bug(model, recipe, x_train, x_val, seed):
        raise UserError("not a rate")

    monkeypatch.setattr(ae_experiments, "fit", bug)
    recipe, x = Recipe((4,)), np.zeros((3, 6), np.uint8)
    with pytest.raises(UserError, match="not a rate"):
        ae_experiments.train(x, x, torch.device("cpu"), recipe, 0)


def test_effects_compare_combinations_that_differ_in_one_factor():
    rows = []
    for activation, batchnorm, error in (("relu", "off", 1), ("relu", "on", 4), ("gelu", "off", 2), ("gelu", "on", 8)):
        row = dict.fromkeys(ae_experiments.FACTORS, 0)
        rows.append(row | {"activation": activation, "batchnorm": batchnorm, "val_recon": float(error)})
    found = ae_experiments.effects(rows)
    assert set(found) == {"activation", "batchnorm"}
    assert found["activation"] == pytest.approx({"relu": 2, "gelu": 4})
    assert found["batchnorm"] == pytest.approx({"off": math.sqrt(2), "on": math.sqrt(32)})
    rows[3]["val_recon"] = math.inf
    assert ae_experiments.effects(rows)["activation"] == pytest.approx({"relu": 1, "gelu": 2})


def test_fine_share_tells_stripes_from_slopes():
    column = torch.arange(28.0)
    stripes = torch.sin(2 * math.pi * column / 4).expand(28, 28).reshape(1, -1)
    waves = torch.sin(2 * math.pi * column / 14).expand(28, 28).reshape(1, -1)
    assert ae_experiments.fine_share(stripes + 3) == pytest.approx(1, abs=1e-5)  # the mean does not count
    assert ae_experiments.fine_share(waves) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--latent", "785"], "K = 785"),
        (["--batch-size", "1", "--batchnorm", "on"], "batches of one"),
        (["--enc-dims", "16,,4"], "--enc-dims"),
        (["--enc-dims", "0,4"], "--enc-dims"),
        (["--noise", "-1"], "--noise"),
        (["--seeds"], "--seeds"),
        (["--batch-size", "1", "--batchnorm", "off", "--code-noise", "0.1"], "batches of one"),
        (["--val-size", "100000"], "hold out"),
        (["--variant", "huge"], "--variant"),
    ],
)
def test_a_users_mistake_is_one_line(flags, said, fails, tmp_path):
    out = tmp_path / "out"
    assert said in fails(ae_experiments, [*DATA, *flags, "--out", out], out)


# --- what reads the checkpoint ------------------------------------------------------------------------------------


def test_process_stores_codes_reconstructions_and_errors_in_order(runs_dir, args, data):
    ae_process_test.main([*DATA, "--runs-dir", str(runs_dir)])
    found = load_arrays(runs_dir / "autoencoder" / "ae_process_test" / "ae_fashion_test_processed.npz")
    model = load_trained(runs_dir / "autoencoder" / "ae_experiments" / "best.pth", args, 784).model
    x = pixels(data.x_test)
    assert set(found) == {"Z", "Yhat", "mse", "y", "dataset"}
    assert str(found["dataset"]) == "digits"
    np.testing.assert_array_equal(found["y"], data.y_test)
    np.testing.assert_allclose(found["Z"], model.encoder.forward(x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["Yhat"], model.forward(x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["mse"], ((found["Yhat"] - x.numpy()) ** 2).mean(1), rtol=1e-4)
    assert found["Z"].shape == (len(x), 4)
    assert 0 <= found["Yhat"].min() <= found["Yhat"].max() <= 1


def test_half_energy_counts_the_pixels_that_matter():
    weights = torch.zeros(784, 3)
    weights[5, 0] = 2.0  # one pixel alone
    weights[:, 1] = 1.0  # all alike: half of them
    weights[:4, 2] = torch.tensor([3.0, -3.0, 3.0, 3.0])
    assert ae_process_test.half_energy(weights[:, :1]) == 1
    assert ae_process_test.half_energy(weights[:, 1:2]) == 392
    assert ae_process_test.half_energy(weights) == 2  # the median of 1, 392 and 2


def test_compare_says_which_variant_has_less_error(runs_dir, tmp_path, data, monkeypatch):
    monkeypatch.setattr(ae_run_compare, "umap_map", lambda z, *rest, **named: z[:, :2].numpy())  # compiles for 15 s
    metrics = ae_run_compare.main([*DATA, "--runs-dir", str(runs_dir), "--n", "100"])
    base, reg = metrics["variants"]
    assert metrics["mse_difference"] == pytest.approx(reg["test_recon"] - base["test_recon"], abs=1e-7)
    both = runs_dir / "autoencoder" / "ae_experiments" / "best.pth"
    flags = ["--ckpt-base", str(both), "--ckpt-reg", str(both), "--n", "100", "--out", str(tmp_path / "same")]
    same = ae_run_compare.main([*DATA, *flags])
    assert same["mse_difference"] == 0
    assert same["images_that_regularisation_improves"] == 0
    for tag in ("base", "reg"):
        found = load_arrays(tmp_path / "same" / f"ae_fashion_test_processed_{tag}.npz", ["Z", "Yhat", "mse", "y"])
        assert len(found["Z"]) == len(data.y_test)


def test_a_checkpoint_of_other_dimensions_or_data_is_refused(runs_dir, tmp_path, args, fails, data):
    model = Recipe((8, 3)).build(0, 196)
    other = tmp_path / "small.pth"
    save_trained(other, Trained(model, Recipe((8, 3)), 0.1), args)
    out = tmp_path / "out"
    flags = [*DATA, "--ckpt", other, "--out", out]
    assert "196 pixels" in fails(ae_process_test, flags, out)
    ckpt = runs_dir / "autoencoder" / "ae_experiments" / "best.pth"
    said = fails(ae_process_test, [*DATA, "--val-size", "100", "--ckpt", ckpt, "--out", out], out)
    assert "--val-size 200" in said
    other.write_bytes(ckpt.read_bytes()[:1000])
    assert "damaged" in fails(ae_process_test, flags, out)
    torch.save({"config": {}, "model": {}}, other)
    assert "no checkpoint of autoencoder" in fails(ae_process_test, flags, out)
    empty = ["--runs-dir", tmp_path / "none"]
    assert "ae_experiments.py" in fails(ae_process_test, [*DATA, *empty], out)
    assert "--variant regularised" in fails(ae_run_compare, [*DATA, *empty, "--ckpt-base", ckpt], out)
    assert "--n 5000" in fails(ae_run_compare, [*DATA, "--runs-dir", runs_dir, "--n", "5000", "--out", out], out)


def test_process_is_what_the_model_says(data):
    model = SMALL.build(0, 784)
    found = process(model, data.x_test, data.y_test, "digits")
    np.testing.assert_allclose(found["mse"], reconstruction_errors(model, data.x_test))
