"""vae's three studies and what they share: the losses they train with, what they count, what a wrong flag gets.

Their figures are covered by test_scripts.py, the model by test_vae.py.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shared_utils.cli import UserError
from shared_utils.runs import read_json
from vae import beta_study, fitting, kl_scaling, latent_study
from vae.fitting import active_units, fit, measure, model_pictures, new_model, shown_images
from vae.model import VAE

TINY = ["--dataset", "digits", "--per-class", "20", "--val-size", "100", "--device", "cpu"]
TINY += ["--epochs", "2", "--batch-size", "40", "--hidden", "8"]
B, D, LATENTS = 5, 12, 3
# Each reduction's code, run on bce (B, D) and kl (B, d) of single pixels and latents.
AS_WRITTEN = {
    "bce.sum(1).mean() + kl.sum(1).mean()": lambda bce, kl: bce.sum(1).mean() + kl.sum(1).mean(),
    "bce.sum() + kl.sum()": lambda bce, kl: bce.sum() + kl.sum(),
    "bce.sum(1).mean() + 2 * kl.sum(1).mean()": lambda bce, kl: bce.sum(1).mean() + 2 * kl.sum(1).mean(),
    "bce.mean() + kl.sum(1).mean()": lambda bce, kl: bce.mean() + kl.sum(1).mean(),
    "bce.sum(1).mean() + kl.mean()": lambda bce, kl: bce.sum(1).mean() + kl.mean(),
    "bce.mean() + kl.mean()": lambda bce, kl: bce.mean() + kl.mean(),
    "bce.mean() + kl.sum()": lambda bce, kl: bce.mean() + kl.sum(),
    "bce.sum() + kl.mean()": lambda bce, kl: bce.sum() + kl.mean(),
}
REDUCTIONS = {reduction.code: reduction for reduction in kl_scaling.reductions(B, D, LATENTS)}


def right_loss(reconstruction, kl):
    return (kl - reconstruction).mean()


def binary(n, pixels, seed=0):
    return (torch.rand(n, pixels, generator=torch.Generator().manual_seed(seed)) < 0.4).float()


@pytest.fixture
def small():
    """A model in float64 with its batch of images."""
    model, _ = new_model([0], D, 7, LATENTS, "cpu")
    return model.double(), binary(B, D).double()


def terms_of_parts(model, x):
    """bce (B, D) of each pixel and kl (B, d) of each latent, with the noise that follows torch.manual_seed(0)."""
    torch.manual_seed(0)
    mu, log_var = model.encode(x)
    logits = model.decode(model.reparameterize(mu, log_var, 2))  # (S, B, D)
    bce = F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").mean(0)
    normal = torch.distributions.Normal
    return bce, torch.distributions.kl_divergence(normal(mu, (log_var / 2).exp()), normal(0.0, 1.0))


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients])


# --- reductions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", AS_WRITTEN)
def test_a_reduction_is_what_its_code_says_and_a_beta_in_disguise(code, small):
    model, x = small
    reduction = REDUCTIONS[code]
    parameters = list(model.parameters())
    bce, kl = terms_of_parts(model, x)
    written = AS_WRITTEN[code](bce, kl)
    torch.manual_seed(0)
    assert reduction.loss(*model.elbo_terms(x)).item() == pytest.approx(written.item(), rel=1e-12)

    gradient = torch.autograd.grad(written, parameters, retain_graph=True)
    weighted = torch.autograd.grad((reduction.beta * kl.sum(1) + bce.sum(1)).mean(), parameters)
    a, n = flat(gradient), flat(weighted)
    assert a @ n / (a.norm() * n.norm()) == pytest.approx(1, abs=1e-10)
    # A cosine hardly sees a wrong β where the KL's gradient outweighs the other; each array of the decoder does.
    for one, other in zip(gradient, weighted, strict=True):
        torch.testing.assert_close(one, reduction.scale * other, rtol=1e-9, atol=1e-12 * float(a.abs().max()))
    assert kl_scaling.gradient_error(model, x, reduction) < 1e-12


def test_every_reduction_is_checked_and_a_wrong_beta_or_scale_shows(small):
    assert list(REDUCTIONS) == [r.code for r in kl_scaling.reductions(B, D, LATENTS)]
    assert set(REDUCTIONS) == set(AS_WRITTEN)
    model, x = small
    for reduction in REDUCTIONS.values():
        for change in ({"beta": 1.01 * reduction.beta}, {"scale": 1.01 * reduction.scale}):
            wrong = kl_scaling.Reduction(**{**vars(reduction), **change})
            assert kl_scaling.gradient_error(model, x, wrong) > 1e-5, (reduction.code, change)


def test_the_betas_of_the_issue():
    betas = {r.code: r.beta for r in kl_scaling.reductions(100, 196, 8)}
    assert betas["bce.mean() + kl.sum(1).mean()"] == 196
    assert betas["bce.mean() + kl.mean()"] == 24.5
    assert betas["bce.mean() + kl.sum()"] == 19600
    assert betas["bce.sum() + kl.mean()"] == 1 / 800


# --- fitting ------------------------------------------------------------------------------------------------------


def test_fit_sees_every_image_once_an_epoch_and_lowers_the_loss(monkeypatch):
    steps, sizes = [], []
    monkeypatch.setattr(fitting, "one_cycle", lambda *given: (steps.append(given), 0.01)[1])

    def loss(reconstruction, kl):
        sizes.append(len(kl))
        return right_loss(reconstruction, kl)

    x = torch.cat([binary(10, D).roll(1, 1)] * 5)
    model, rng = new_model([0], D, 8, 2, "cpu")
    before = measure(model, x)["elbo"]
    assert fit(model, x, loss, epochs=40, batch_size=20, lr=0.3, rng=rng) > 0
    assert sizes == [20, 20, 10] * 40
    assert steps == [(step, 120, 0.3) for step in range(120)]
    assert measure(model, x)["elbo"] > before + 1


def test_models_of_one_seed_share_weights_batches_and_noise():
    x, losses = binary(40, D), {}
    for name, seed, scale in (("one", [0, 1], 1), ("scaled", [0, 1], 1e3), ("other", [0, 2], 1)):
        model, rng = new_model(seed, D, 8, 2, "cpu")
        seen = losses[name] = []

        def loss(reconstruction, kl, seen=seen, scale=scale):
            seen.append(right_loss(reconstruction, kl).item())
            return scale * right_loss(reconstruction, kl)

        fit(model, x, loss, epochs=3, batch_size=10, lr=0.01, rng=rng)
    assert losses["one"] == pytest.approx(losses["scaled"], rel=1e-4)  # Adam divides the scale out
    assert losses["one"][0] == losses["scaled"][0]
    assert losses["one"][0] != losses["other"][0]


def test_a_loss_that_is_not_finite_stops_the_fit():
    model, rng = new_model([0], D, 8, 2, "cpu")
    with pytest.raises(UserError, match="step 0 with learning rate"):
        fit(model, binary(4, D), lambda r, kl: kl.sum() * torch.nan, epochs=1, batch_size=2, lr=1e-3, rng=rng)
    with torch.no_grad():
        model.encoder[2].bias.fill_(torch.nan)
    with pytest.raises(UserError, match="lower --lr"):
        measure(model, binary(4, D))


def hand_made(z_dim):
    """A model of 2 pixels whose encoder is one linear layer without tanh, all weights and biases 0."""
    model = VAE(2, 2, z_dim)
    model.encoder = torch.nn.Linear(2, 2 * z_dim)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    return model


def test_a_latent_whose_mean_does_not_vary_is_not_active():
    model = hand_made(4)
    with torch.no_grad():
        model.encoder.bias[1] = 3.0  # the same mean for all images: dead, whatever its size
        model.encoder.weight[2, 0] = 0.19  # variance 0.19² / 4 = 0.0090
        model.encoder.weight[3, 0] = 0.21  # variance 0.0110
        model.encoder.weight[4:, 1] = 5.0  # log-variances vary: they do not count
    x = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]]).repeat(600, 1)  # more than are encoded at once
    assert active_units(model, x).tolist() == [False, False, False, True]
    assert active_units(model, x, threshold=0.005).tolist() == [False, False, True, True]
    assert active_units(model, x.sort(0)[0]).tolist() == [False, False, False, True]  # each part alone is constant
    assert active_units(model, x[:1]).tolist() == [False] * 4
    assert measure(model, x)["active_units"] == 1


def test_measure_gives_the_summed_terms():
    model = hand_made(2)
    with torch.no_grad():
        model.encoder.bias[:] = torch.tensor([1.0, 2.0, 0.0, 0.0])  # KL = (1² + 2²) / 2
        model.decoder[2].bias[:] = torch.tensor([0.0, math.log(3)])  # p = 1/2, 3/4
    found = measure(model, torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    expected = (math.log(0.5 * 0.75) + math.log(0.5 * 0.25)) / 2
    assert found["kl"] == pytest.approx(2.5)
    assert found["reconstruction"] == pytest.approx(expected)
    assert found["elbo"] == pytest.approx(expected - 2.5)


def test_pictures_are_of_the_first_image_of_each_class():
    x, y = binary(6, 196), np.array([2, 0, 2, 0, 1, 1])
    chosen, row = shown_images(x, y)  # fewer images than a row has places
    assert torch.equal(chosen, x[[1, 4, 0]])
    assert row.shape == (8 + 1 + 3, 14, 14)
    model, _ = new_model([0], 196, 8, 2, "cpu")
    drawn = model_pictures(model, chosen, 0)
    assert drawn.shape == row.shape
    assert np.isnan(drawn[8]).all()
    decoded = torch.sigmoid(model.decode(model.encode(chosen)[0])).detach().reshape(3, 14, 14)
    np.testing.assert_allclose(drawn[9:], decoded, rtol=1e-5)
    assert ((drawn[:8] > 0) & (drawn[:8] < 1)).all()
    assert np.array_equal(model_pictures(model, chosen, 0)[:8], drawn[:8])


# --- findings -----------------------------------------------------------------------------------------------------


def measured(elbo, active, **more):
    return {"elbo": elbo, "val_elbo": elbo, "active_units": active, **more}


def beta_findings(found):
    return beta_study.findings(found, {beta: fitting.summary(rows) for beta, rows in found.items()}, 8)


def test_the_posterior_has_collapsed_where_no_seed_has_an_active_latent():
    found = {
        0.5: [measured(-36, 8), measured(-35, 8)],
        1.0: [measured(-33, 8), measured(-34, 7)],
        3.0: [measured(-40, 0), measured(-40, 0)],  # an accident: above it latents are active
        4.0: [measured(-41, 0), measured(-42, 1)],
        7.0: [measured(-49, 0), measured(-49, 0)],
        10.0: [measured(-49, 0), measured(-49, 0)],
    }
    outcome = beta_findings(found)
    assert (outcome["best_beta"], outcome["best_elbo"]) == (1.0, -33.5)
    assert outcome["first_beta_with_an_unused_latent"] == 1.0
    assert outcome["collapsed_from_beta"] == 7.0
    assert beta_study.ending(outcome) == "no latent is active at β = 7 and above"
    outcome = beta_findings({beta: found[beta] for beta in (0.5, 4.0)})
    assert outcome["collapsed_from_beta"] is None
    assert beta_study.ending(outcome) == "at β = 4 0.5 latents are active"
    outcome = beta_findings({0.5: found[0.5]})
    assert outcome["first_beta_with_an_unused_latent"] is None


def test_enough_latents_are_as_good_as_the_best_within_the_seeds_spread():
    values = {2: (-39.0, -39.0), 8: (-32.1, -32.3), 16: (-31.9, -32.1), 32: (-31.8, -32.0), 64: (-33.0, -33.0)}
    active = {2: 2, 8: 8, 16: 13, 32: 14, 64: 15}
    found = {size: [measured(v - 0.5, active[size], iwae=v, val_iwae=v) for v in pair] for size, pair in values.items()}
    table = {size: fitting.summary(rows) for size, rows in found.items()}
    assert table[8]["iwae"] == pytest.approx(-32.2)
    assert table[8]["iwae_std"] == pytest.approx(0.02**0.5)
    outcome = latent_study.findings(found, table)
    assert outcome["best_size"] == 32
    assert outcome["enough"] == 16  # 0.1 below; 8 latents are 0.3 below, with a deviation of 0.14
    assert outcome["first_size_with_an_unused_latent"] == 16
    assert (outcome["largest_size"], outcome["active_units_of_the_largest_size"]) == (64, 15)


def test_the_tighter_bound_is_a_mean_over_images():
    model = hand_made(2)  # posterior = prior and a decoder that ignores z: both bounds are log p(x) itself
    with torch.no_grad():
        model.decoder[2].bias[:] = torch.tensor([1.0, -2.0])
    x = binary(150, 2)  # parts of 100 and 50
    log_p = (x * torch.tensor([1.0, -2.0]) - F.softplus(torch.tensor([1.0, -2.0]))).sum(1)
    assert latent_study.mean_iwae(model, x, 7) == pytest.approx(log_p.double().mean().item(), abs=1e-6)


# --- scripts ------------------------------------------------------------------------------------------------------


def numbers(value):
    if isinstance(value, dict):
        return [n for key, item in value.items() if key != "run" for n in numbers(item)]
    if isinstance(value, list):
        return [n for item in value for n in numbers(item)]
    return [value] if isinstance(value, int | float) else []


def without_timings(value):
    if isinstance(value, dict):
        return {k: without_timings(v) for k, v in value.items() if k != "run" and not k.endswith("seconds")}
    return [without_timings(item) for item in value] if isinstance(value, list) else value


def run(module, flags, folder):
    """The metrics of `module`, which are finite and those in the file."""
    metrics = module.main([*TINY, *flags, "--out", str(folder)])
    assert numbers(metrics)
    assert all(math.isfinite(n) for n in numbers(metrics))
    assert read_json(folder / "metrics.json") == metrics
    return metrics


def test_kl_scaling(tmp_path):
    metrics = run(kl_scaling, ["--z-dim", "3"], tmp_path)
    rows = {row["name"]: row for row in metrics["reductions"]}
    assert len(rows) == len(AS_WRITTEN)
    assert metrics["largest_gradient_error"] < 1e-12
    assert rows["both: mean"]["beta"] == pytest.approx(196 / 3)
    assert rows["all summed"]["scale"] == 40
    assert rows["all summed"]["elbo"] == pytest.approx(rows["right"]["elbo"], abs=0.05)
    assert metrics["most_nats_lost"] == pytest.approx(rows["right"]["elbo"] - metrics["elbo_worst"])


def test_beta_study(tmp_path):
    flags = ["--betas", "5", "0.1", "5", "--seeds", "1", "0", "--z-dim", "2"]
    metrics = run(beta_study, flags, tmp_path / "first")
    assert without_timings(run(beta_study, flags, tmp_path / "second")) == without_timings(metrics)
    assert metrics["seeds"] == [1, 0]  # each seed and β once
    low, high = metrics["betas"]
    assert (low["beta"], high["beta"]) == (0.1, 5)
    assert low["kl"] > high["kl"]
    assert low["elbo_std"] > 0  # the two seeds are two models
    assert low["elbo"] == pytest.approx(low["reconstruction"] - low["kl"])  # the bound, not the loss


def test_latent_study(tmp_path):
    flags = ["--z-dims", "4", "1", "4", "--seeds", "0", "--k", "5"]
    metrics = run(latent_study, flags, tmp_path)
    assert [row["z_dim"] for row in metrics["sizes"]] == [1, 4]
    assert metrics["sizes"][0]["elbo"] != metrics["sizes"][1]["elbo"]
    assert all(row["active_units"] <= row["z_dim"] for row in metrics["sizes"])
    assert all(row["iwae"] > row["elbo"] for row in metrics["sizes"])


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        (beta_study, ["--betas", "1", "-1"], "finite number above 0"),
        (beta_study, ["--betas", "inf"], "finite number above 0"),
        (beta_study, ["--seeds", "-1"], "from 0 to"),
        (latent_study, ["--z-dims", "0"], "1 or more"),
        (latent_study, ["--k", "0"], "1 or more"),
        (kl_scaling, ["--z-dim", "2.5"], "1 or more"),
        (kl_scaling, ["--batch-size", "0"], "1 or more"),
        (kl_scaling, ["--dataset", "imagenet"], "neither a known set"),
    ],
)
def test_wrong_flags(module, flags, message, fails, tmp_path):
    out = tmp_path / "out"
    assert message in fails(module, [*flags, "--out", out])
    assert not out.exists()


@pytest.mark.parametrize("module", [kl_scaling, beta_study, latent_study])
def test_a_rate_that_is_far_too_high_ends_in_one_line(module, fails, tmp_path):
    assert "try a lower --lr" in fails(module, [*TINY, "--lr", 1e6, "--out", tmp_path / "out"])
