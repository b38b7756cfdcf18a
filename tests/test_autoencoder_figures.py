"""autoencoder's figures, verdicts and tables: who wins and by how much, from numbers that are known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from autoencoder import (
    ae_experiments,
    ae_process_test,
    ae_run_compare,
    ae_umap,
    benchmark,
    ft_compare_raw_vs_ae,
    pca_baseline,
    train_mlp,
)
from autoencoder.fitting import Fit, Recipe, codes
from autoencoder.inputs import load_pixels, pixels
from autoencoder.pca import fit_pca
from autoencoder.trained import Trained, save_trained

DATA = ["--dataset", "digits", "--val-size", "200", "--device", "cpu"]
SMALL = Recipe((16, 4), init="he", use_batchnorm=False)


def title(figure):
    return figure.get_suptitle().replace("\n", " ")


@pytest.fixture(scope="module")
def args():
    return ae_experiments.build_parser().parse_args(DATA)


@pytest.fixture(scope="module")
def data(args):
    return load_pixels(args)


@pytest.fixture(scope="module")
def models():
    return [SMALL.build(seed, 784) for seed in (0, 1)]


# --- training and PCA ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pca", "words"), [(0.02, "50% below PCA"), (0.005, "not below PCA")])
def test_the_loss_figure_says_how_far_below_pca_the_error_is(pca, words):
    rows = [{"epoch": epoch, "train_loss": 1 / epoch, "val_recon": 1 / epoch} for epoch in (1, 2)]
    figure = ae_experiments.draw_losses(Fit(rows, 2, 0.5, 1.0), SMALL, 0.01, pca, "T")
    assert title(figure) == f"T test images are reconstructed to 0.01000: {words} with 4 numbers"


def test_the_reconstructions_say_what_is_lost_and_what_there_was(data, models, monkeypatch):
    monkeypatch.setattr(ae_experiments, "fine_share", lambda x: 0.25 if torch.equal(x, pixels(data.x_test)) else 0.75)
    said = title(ae_experiments.draw_reconstructions(models[0], data, 0.01, "T"))
    assert said.endswith("PSNR 20.0 dB wavelengths under 7 pixels hold 75% of the error's variance, 25% of the images'")


def test_the_factor_with_the_largest_spread_comes_first():
    rows = []
    for activation, batchnorm, error in (
        ("relu", "off", 1),
        ("relu", "on", 2),
        ("gelu", "off", 1.1),
        ("gelu", "on", 2.2),
    ):
        row = dict.fromkeys(ae_experiments.FACTORS, 0)
        rows.append(row | {"activation": activation, "batchnorm": batchnorm, "val_recon": float(error)})
    assert ae_experiments.spreads(ae_experiments.effects(rows)) == pytest.approx({"activation": 0.1, "batchnorm": 1.0})
    assert title(ae_experiments.draw_grid(rows, 8, "T")).endswith("by: batchnorm 100.0%; activation 10.0%")


def test_the_flags_of_the_grid_reach_every_recipe():
    flags = ["--patience", "3", "--epochs", "7", "--batch-size", "9", "--no-amp", "--latent", "5"]
    grid = ae_experiments.combinations(ae_experiments.build_parser().parse_args([*DATA, *flags]))
    assert {(one.patience, one.epochs, one.batch_size, one.amp, one.enc_dims[-1]) for one in grid} == {
        (3, 7, 9, False, 5)
    }


def row_of(k, below, ae, pca):
    return {
        "k": k,
        "below_pca": below,
        "ae_mse": 0.01,
        "pca_mse": 0.02,
        "pca_clipped_mse": 0.015,
        "ae_knn": ae,
        "pca_knn": pca,
    }


def test_errors_and_neighbours_against_pca():
    rows = [row_of(2, 0.5, 0.8, 0.7), row_of(8, -0.1, 0.88, 0.9), row_of(32, 0.25, 0.95, 0.96)]
    said = title(pca_baseline.draw_mse(rows, "T"))
    assert said.endswith("-50 % at K = 2, -25 % at K = 32")
    said = title(pca_baseline.draw_knn(rows, 0.9, 100, "T"))
    assert said.endswith("above PCA's at 1 of 3 sizes and above raw pixels' at 1 of 3")
    rows[0] |= {"pca_knn": 0.99}
    assert title(pca_baseline.draw_knn(rows, 0.9, 100, "T")).endswith("at 0 of 3 sizes and above raw pixels' at 1 of 3")


@pytest.mark.parametrize("reached", [True, False])
def test_a_linear_autoencoder_that_is_not_there_yet_is_said_so(reached, data):
    pca = fit_pca(data.x_train, 2)
    model = SimpleNamespace(layers=[None, SimpleNamespace(params={"W": torch.ones(2, 784)})])
    row = {"updates": 5, "decoder_angle": 1e-4, "encoder_angle": 1e-2, "excess": 2e-3}
    figure = pca_baseline.draw_linear(model, [row, row], {"k": 2, "reached": reached, **row}, pca, "T")
    assert ("has found" in title(figure), "has not yet found" in title(figure)) == (reached, not reached)
    assert "largest angle 1.0e-02 rad, error +0.2000 % against PCA's" in title(figure)


@pytest.mark.parametrize(
    ("row", "there"), [((5e-4, 5e-4, 5e-4), True), ((2e-3, 0, 0), False), ((0, 2e-3, 0), False), ((0, 0, 2e-3), False)]
)
def test_all_three_bars_must_be_met(row, there):
    names = ("decoder_angle", "encoder_angle", "excess")
    assert pca_baseline.reached(dict(zip(names, row, strict=True))) == there


# --- what a trained autoencoder does ------------------------------------------------------------------------------


def test_the_table_of_the_test_images(data, models, args, tmp_path, monkeypatch):
    for name in dir(ae_process_test):
        if name == "save_figure" or name.startswith("draw_"):
            monkeypatch.setattr(ae_process_test, name, lambda *given: None)
    save_trained(tmp_path / "best.pth", Trained(models[0], SMALL, 0.1), args)
    metrics = ae_process_test.main([*DATA, "--ckpt", str(tmp_path / "best.pth"), "--out", str(tmp_path / "out")])
    x = pixels(data.x_test)
    errors, z = ((models[0].forward(x) - x) ** 2).mean(1).double(), models[0].encoder.forward(x).double()
    for label, row in enumerate(metrics["by_class"]):
        own = errors[data.y_test == label]
        assert (row["images"], row["mse"]) == (len(own), pytest.approx(own.mean().item(), rel=1e-4))
    ranked = np.sort(errors.numpy())
    assert metrics["share_of_the_worst_tenth"] == pytest.approx(ranked[-36:].sum() / ranked.sum(), rel=1e-4)
    assert metrics["test_recon_median"] == pytest.approx(ranked[179], rel=1e-4)
    variances = np.linalg.eigvalsh(np.cov(z.numpy().T))
    assert metrics["effective_dimensions"] == pytest.approx(variances.sum() ** 2 / (variances**2).sum(), rel=1e-3)
    directions = [codes(models[0], part) for part in (torch.cat([data.x_train, data.x_val]), data.x_test)]
    centre = codes(models[0], data.x_train).mean(0)
    train, test = ((part - centre) / (part - centre).norm(dim=1, keepdim=True) for part in directions)
    nearest = (test @ train.T).topk(5).indices
    votes = torch.cat([data.y_train, data.y_val])[nearest].mode(1).values  # of equally frequent ones the smallest
    found = metrics["neighbours"][2]
    assert found["cosine_accuracy"] == pytest.approx((votes == data.y_test).double().mean().item(), abs=0.01)
    assert found["cosine_accuracy"] != found["accuracy"]
    assert found["low"] < found["accuracy"] < found["high"]


def test_the_largest_filters_come_first_and_the_worst_image_is_so_many_times_the_best(data):
    weights = torch.ones(784, 3) * torch.tensor([1.0, 3.0, 2.0])
    weights[0] *= torch.tensor([-1.0, 1.0, 0.0])  # tells the three apart
    shown = ae_process_test.draw_filters(weights, "T").axes[0].images[0].get_array()
    assert [shown[0, column] for column in (0, 29, 58)] == [1, 0, -1]
    errors = torch.where(torch.arange(360) % 2 == 0, 0.1, 0.4)
    figure = ae_process_test.draw_extremes(data, pixels(data.x_test), errors, "T")
    assert title(figure).endswith("4 to 4 times the error of the best")


def test_what_regularisation_changes(data, models, args, tmp_path, monkeypatch):
    drawn, flags = {}, [*DATA, "--n", "100", "--out", str(tmp_path / "out")]
    for tag, model in zip(("base", "reg"), models, strict=True):
        save_trained(tmp_path / tag, Trained(model, SMALL, 0.1), args)
        flags += [f"--ckpt-{tag}", str(tmp_path / tag)]
    monkeypatch.setattr(ae_run_compare, "umap_map", lambda z, *rest, **named: z[:, :2].numpy())
    monkeypatch.setattr(ae_run_compare, "save_figure", lambda figure, path: drawn.update({path.name: figure}))
    metrics = ae_run_compare.main(flags)
    x = pixels(data.x_test)
    base, reg = (((model.forward(x) - x) ** 2).mean(1) for model in models)
    assert metrics["images_that_regularisation_improves"] == (reg < base).double().mean().item() != 0.5
    for row, model in zip(metrics["variants"], models, strict=True):
        weights = torch.cat([w.flatten() for name, w in model.parameters().items() if name.endswith("W")])
        assert row["weight_norm"] == pytest.approx(weights.norm().item(), rel=1e-5)
        assert row["code_std"] == pytest.approx(model.encoder.forward(x).std(0).mean().item(), rel=1e-4)
    change = f"{metrics['mse_difference']:+.6f}".replace("-", "−")
    assert f"regularised − baseline: {change} ±" in title(drawn["ae_compare_mse.png"])
    middles = [np.mean(s[:, 0]) for s in drawn["ae_compare_mse.png"].axes[1].collections[0].get_segments()]
    assert middles[3] == pytest.approx(1e4 * (reg - base)[data.y_test == 3].mean().item(), rel=1e-3)
    p = max(row["knn_accuracy"] * (1 - row["knn_accuracy"]) for row in metrics["variants"])
    assert title(drawn["ae_compare_umap.png"]).endswith(f"interval of each ± {196 * (p / 360) ** 0.5:.1f} points")


def umap_row(space, start, accuracy):
    values = dict.fromkeys(ae_umap.MEASURES, accuracy)
    return ae_umap.as_row(space, start, 2, [values, values], [1.0, 1.0])


def test_the_maps_title_compares_codes_with_pixels():
    table = {("PCA-2", ""): umap_row("PCA-2", "", 0.5)}
    for space, accuracy in (("UMAP of codes", 0.9), ("UMAP of pixels", 0.8), ("UMAP of PCA-4", 0.7)):
        table |= {(space, start): umap_row(space, start, accuracy) for start in ae_umap.STARTS}
    points, y = np.random.default_rng(0).random((6, 2)), np.array([0, 0, 0, 1, 1, 1])
    maps = {(name, "spectral"): [points] for name in ("codes", "pixels", "PCA-4")}
    said = title(ae_umap.draw_maps(maps, points, y, ("a", "b"), table, "T"))
    assert "spectral start: 5-NN accuracy 90.0 ± 0.0 % against 80.0 ± 0.0 %: better" in said


# --- labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("codes_right", "said"), [(0.8, "by -10.0 points"), (0.95, "by +5.0 points")])
def test_what_codes_change_in_place_of_pixels(codes_right, said):
    found = {"raw": 0.9, "pca": 0.85, "codes": codes_right, "denoising": 0.7}
    tests = {name: {"accuracy": a, "interval": (a - 0.01, a + 0.01), "mcnemar_p": 0.03} for name, a in found.items()}
    assert said in title(ft_compare_raw_vs_ae.draw_test(tests, "T"))
    curves = {name: [[0.5, accuracy]] for name, accuracy in found.items()}
    words = title(ft_compare_raw_vs_ae.draw_validation(curves, SimpleNamespace(seeds=[0]), "T"))
    ours = f"{codes_right:.1%} on the autoencoder's codes"
    assert words.endswith(f"ends at 90.0% on raw pixels, {ours}, 70.0% on denoising ones, 85.0% on PCA's")


# --- speed --------------------------------------------------------------------------------------------------------


def test_the_benchmark_compares_turn_by_turn_and_counts_three_products(tmp_path, monkeypatch):
    seconds = {"epoch": iter([1.0, 2.0, 3.0, 2.0, 8.0, 2.0] * 2)}  # by hand, autograd, by hand, …
    monkeypatch.setattr(benchmark, "Recipe", lambda: Recipe((8, 4), use_batchnorm=False, batch_size=16))
    monkeypatch.setattr(benchmark, "save_figure", lambda figure, path: None)
    monkeypatch.setattr(
        benchmark, "seconds_of", lambda call, device: next(seconds["epoch"]) if call.__name__ == "epoch" else 0.5
    )
    flags = ["--images", "32", "--repeats", "3", "--device", "cpu", "--out", str(tmp_path)]
    row = benchmark.main(flags)["epochs"][0]
    assert (row["by_hand_seconds"], row["autograd_seconds"], row["ratio_of_seconds"]) == (3, 2, 1.5)
    weights = 2 * (784 * 8 + 8 * 4)
    operations = 2 * 32 * (3 * weights - 784 * 8)
    assert row["products_alone_seconds"] == pytest.approx(operations / (2 * 2048**3 / 0.5))


# --- small networks -----------------------------------------------------------------------------------------------


def test_the_small_networks_are_compared_at_the_rate_that_is_best_at_each_epoch(tmp_path, monkeypatch):
    trained = []

    def train(problem, use_batchnorm, init, seed, lr, args, first_layer=None):
        trained.append((use_batchnorm, init, seed, lr, first_layer))
        early, late = (1.0, 3.0) if lr == 0.1 else (2.0, 2.0)  # as errors: the higher rate is better at first
        if problem.classifies:
            early, late = -early, -late
        score = np.array([9.0, early, late])
        curves = {f"{part}_{what}": score for part in ("train", "val") for what in ("loss", "score")}
        return SimpleNamespace(first=first_layer, predict=lambda x: torch.zeros(len(x), 3)), curves

    monkeypatch.setattr(train_mlp, "train", train)
    monkeypatch.setattr(train_mlp.Problem, "measure", lambda self, network, part: (0, 7.0 if network.first else 5.0))
    monkeypatch.setattr(
        train_mlp, "signal_through_depth", lambda bn, init, depth, seed: ([2.0, 1.0, 4.0], [3.0, 1.0, 6.0])
    )
    monkeypatch.setattr(train_mlp, "draw_regions", lambda *given: None)
    monkeypatch.setattr(train_mlp, "draw_fits", lambda *given: None)
    monkeypatch.setattr(train_mlp, "save_figure", lambda figure, path: None)
    flags = ["--epochs", "2", "--seeds", "0", "1", "--lr", "0.1", "0.01", "--out", str(tmp_path)]
    name, args = "BatchNorm, He", train_mlp.build_parser().parse_args(flags)
    for draw, sign in ((train_mlp.noisy_chirp, 1), (train_mlp.spirals, -1)):
        problem = train_mlp.Problem(draw, 0, torch.device("cpu"))
        own = train_mlp.fit_variant(problem, name, [0, 1], 1, args)
        assert own.lr == 0.01
        assert own.at[1]["val_score"].tolist() == [sign * 1.0] * 2
        assert own.at[2]["val_score"].tolist() == [sign * 2.0] * 2
        assert own.score_by_lr == {"0.1": sign * 3.0, "0.01": sign * 2.0}
    trained.clear()
    metrics = train_mlp.main(flags)
    assert metrics["reg_val_mse"][name]["mean"] == 2.0
    assert (metrics["reg_test_mse"][name]["mean"], metrics["clf_test_accuracy"][name]["mean"]) == (5.0, 5.0)
    assert {key: of["mean"] for key, of in metrics["reg_test_mse_swapped"].items()} == {
        "he_with_the_first_layer_of_xavier": 7.0,
        "xavier_with_the_first_layer_of_he": 7.0,
    }
    assert [one for one in trained if one[-1]] == [
        (False, init, seed, 0.01, first) for init, first in (("he", "xavier"), ("xavier", "he")) for seed in (0, 1)
    ]
    assert (metrics["forward_ratio"][name], metrics["backward_ratio"][name]) == (2.0, 0.5)


def test_the_ratios_through_depth_stand_with_their_initialisation():
    ratios = dict.fromkeys(train_mlp.VARIANTS, 1.0) | {"no BatchNorm, He": 2.0, "no BatchNorm, Xavier": 3.0}
    signal = {name: np.ones((2, 2, 3)) for name in train_mlp.VARIANTS}
    said = title(train_mlp.draw_signal(signal, {"forward_ratio": ratios, "backward_ratio": ratios}))
    assert "outputs: × 2 with He, × 3 with Xavier; with BatchNorm × 1 and × 1" in said


def fits(**at):
    """A `Fitted` of two seeds for each variant; `at` maps epoch e… to the validation losses without and with."""
    curves = {f"{part}_{what}": np.ones((2, 4)) for part in ("train", "val") for what in ("loss", "score")}
    network = SimpleNamespace(predict=lambda x: torch.zeros(len(x), 1))

    def fitted(use_batchnorm):
        losses = {int(epoch[1:]): {"val_loss": np.full(2, pair[use_batchnorm])} for epoch, pair in at.items()}
        return train_mlp.Fitted(0.1, [network], curves, losses, {})

    return {name: fitted(use_batchnorm) for name, (use_batchnorm, _) in train_mlp.VARIANTS.items()}


def test_the_curves_title_has_the_difference_at_each_epoch():
    said = title(train_mlp.draw_curves(fits(e1=(1.0, 1.25), e3=(1.0, 1.75)), "loss", "y", "T", digits=2))
    assert "epoch 1: BatchNorm − none +0.25" in said
    assert "epoch 3: BatchNorm − none +0.75" in said


def test_the_swapped_first_layers_are_named_by_what_they_were_swapped_in():
    problem = train_mlp.Problem(train_mlp.noisy_chirp, 0, torch.device("cpu"))
    test = {name: np.ones(2) for name in train_mlp.VARIANTS}
    figure = train_mlp.draw_fits(problem, fits(), test, {"he": [1.0, 1.0], "xavier": [4.0, 4.0]})
    assert "He with Xavier's 1.00 ± 0.00, Xavier with He's 4.00 ± 0.00" in title(figure)
