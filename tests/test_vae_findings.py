"""What vae's training, studies and benchmark say, against made-up fits and measures whose answers are known."""

import csv
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vae import benchmark, beta_study, classifier, kl_scaling, latent_study, train
from vae.fitting import fit, new_model
from vae.model import VAE

TINY = ["--dataset", "digits", "--per-class", "20", "--val-size", "100", "--device", "cpu"]


@pytest.fixture
def titles(monkeypatch):
    """The titles of the figures that the scripts save, none of which is drawn."""
    found = []
    for module in (benchmark, beta_study, kl_scaling, latent_study, train):
        monkeypatch.setattr(module, "save_figure", lambda figure, path: found.append(figure.get_suptitle()))
    return found


@pytest.fixture
def asked(monkeypatch):
    """The images and the number of draws of every call of `elbo_terms`."""
    found, terms = [], VAE.elbo_terms

    def watched(model, x, n_samples=2):
        found.append((x, n_samples))
        return terms(model, x, n_samples)

    monkeypatch.setattr(VAE, "elbo_terms", watched)
    return found


def right_loss(reconstruction, kl):
    return (kl - reconstruction).mean()


# --- training -----------------------------------------------------------------------------------------------------


def test_a_fit_draws_as_often_as_asked_and_shuffles_anew_each_epoch(asked):
    model, rng = new_model([0], 6, 4, 2, "cpu")
    x = torch.from_numpy((np.arange(40)[:, None] >> np.arange(6)) & 1).float()  # no two alike
    fit(model, x, right_loss, epochs=2, batch_size=10, lr=1e-3, rng=rng, samples=5)
    assert {n for _, n in asked} == {5}
    first, second = (torch.cat([batch for batch, _ in asked[at : at + 4]]) for at in (0, 4))
    for epoch in (first, second):
        assert torch.equal(epoch.unique(dim=0), x.unique(dim=0))
    assert not torch.equal(first, second)
    assert not torch.equal(first, x)


def test_models_of_another_seed_start_from_other_weights():
    one, same, other = (new_model(seed, 6, 4, 2, "cpu")[0].encoder[0].weight for seed in ([0, 1], [0, 1], [0, 2]))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("schedule", ["constant", "onecycle"])
def test_the_history_has_the_means_of_the_updates_since_its_last_row(schedule, tmp_path, monkeypatch, titles, asked):
    monkeypatch.setattr(train, "VALIDATE_EVERY", 4)
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=itertools.count().__next__))  # an epoch: a second
    flags = ["--epochs", "3", "--batch-size", "50", "--samples", "3", "--schedule", schedule, "--out", str(tmp_path)]
    metrics = train.main([*TINY, *flags])
    assert sum(n == 3 for _, n in asked) == metrics["updates"] == 12
    assert metrics["training_seconds"] == 3
    with (tmp_path / "history.csv").open(encoding="utf-8") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    terms = np.load(tmp_path / "terms.npz")
    for row, first in zip(rows, (0, 4, 8), strict=True):
        assert row["train_reconstruction"] == pytest.approx(terms["reconstruction"][first : first + 4].mean(), rel=1e-5)
        assert row["train_kl"] == pytest.approx(terms["kl"][first : first + 4].mean(), rel=1e-5)
    last = rows[-1]["train_reconstruction"] - rows[-1]["train_kl"]
    assert metrics["train_elbo_last_updates"] == pytest.approx(last, rel=1e-5)
    assert ({row["lr"] for row in rows} == {3e-3}) == (schedule == "constant")
    said = f"the last training batches reach {last:.1f}, images never seen {metrics['test_elbo']:.1f}"
    assert said in titles[1]


def test_the_terms_title_names_each_term():
    figure = train.draw_terms(np.tile([-30.0, 5.0], (20, 1)), "x")
    said = "5.0 nats of KL pay for a reconstruction of -30.0: an ELBO of -35.0 on training batches"
    assert figure.get_suptitle() == f"x\n{said}"


def test_the_judge_sees_bent_images_at_a_rate_of_one_cycle(monkeypatch):
    bent, rates, step, seen = classifier.bent, [], torch.optim.AdamW.step, []
    monkeypatch.setattr(classifier, "bent", lambda x, rng: seen.append(len(x)) or bent(x, rng))

    def watched(optimizer, *given):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    x = np.zeros((220, 196))
    classifier.train_classifier(x, np.arange(220) % 3, 3, 2, "cpu", np.random.default_rng(0))
    assert seen == [50, 50, 50, 50, 20] * 2
    assert max(rates) == pytest.approx(classifier.PEAK, rel=0.1)
    assert rates[-1] < rates[0] < rates[2] / 5


# --- studies ------------------------------------------------------------------------------------------------------


def beta_row(val, elbo, active):
    return {"val_elbo": val, "elbo": elbo, "active_units": active}


def test_the_best_beta_is_chosen_on_validation_and_told_on_the_test_images():
    table = {0.5: beta_row(-36.0, -30.0, 8.0), 1.0: beta_row(-33.0, -34.0, 7.5), 4.0: beta_row(-40.0, -41.0, 2.0)}
    found = beta_study.findings({beta: [row] for beta, row in table.items()}, table, 8)
    assert (found["best_beta"], found["best_elbo"]) == (1.0, -34.0)
    assert (found["largest_beta"], found["active_units_at_the_largest_beta"]) == (4.0, 2.0)


def test_the_best_size_is_chosen_on_validation_and_told_on_the_test_images():
    table = {
        size: {"val_iwae": val, "val_iwae_std": std, "iwae": iwae, "active_units": active}
        for size, val, std, iwae, active in ((2, -35, 0.1, -30, 2), (8, -32.3, 0.1, -33, 8), (16, -32, 0.4, -34, 9))
    }
    found = latent_study.findings({size: [row] for size, row in table.items()}, table)
    assert (found["best_size"], found["best_iwae"]) == (16, -34)
    assert found["enough"] == 8  # 0.3 below, within the best one's deviation
    rows = {size: [{**row, "elbo": -40.0, "reconstruction": -20.0, "kl": 10.0}] for size, row in table.items()}
    said = "8 latents are as good as 16 (-34.00 nats); of 16 latents 9 are active"
    assert latent_study.draw(rows, found, 5, "x").get_suptitle() == f"x\n{said}"


@pytest.fixture
def studied(monkeypatch):
    """Studies whose models are not trained: the seeds of their models, their losses of one nat of KL and none else."""
    seeds, losses = [], []
    for module in (beta_study, latent_study, kl_scaling):

        def made(seed, *size, new=new_model):
            seeds.append(list(seed))
            return new(seed, *size)

        def fitted(model, x, loss, **settings):
            losses.append(loss(torch.zeros(40), torch.ones(40)).item())
            return 1.0

        monkeypatch.setattr(module, "new_model", made)
        monkeypatch.setattr(module, "fit", fitted)
    return seeds, losses


def by_part(value):
    """In place of a measure: the number of images, which tells the parts apart, and a value."""
    return lambda model, x, *given: {"elbo": -float(len(x)), "reconstruction": -9.0, "kl": value, "active_units": 1}


def test_the_study_of_beta_trains_with_each_and_measures_both_parts(studied, titles, monkeypatch, tmp_path):
    monkeypatch.setattr(beta_study, "measure", by_part(3.0))
    flags = ["--betas", "4", "0.5", "--seeds", "0", "1", "--seed", "6", "--z-dim", "2", "--out", str(tmp_path)]
    metrics = beta_study.main([*TINY, *flags])
    seeds, losses = studied
    assert seeds == [[6, 0], [6, 1]] * 2
    assert losses == [0.5, 0.5, 4, 4]
    assert [row["val_elbo"] for row in metrics["betas"]] == [-100, -100]  # --val-size
    assert metrics["betas"][0]["elbo"] not in (-100, -200)  # 200 images to train on


def test_the_study_of_latents_has_a_model_for_each_seed_and_both_parts(studied, titles, monkeypatch, tmp_path):
    monkeypatch.setattr(latent_study, "measure", by_part(3.0))
    monkeypatch.setattr(latent_study, "mean_iwae", lambda model, x, k: -float(len(x)))
    metrics = latent_study.main([*TINY, "--z-dims", "2", "--seeds", "3", "4", "--seed", "6", "--out", str(tmp_path)])
    assert studied[0] == [[6, 3], [6, 4]]
    row = metrics["sizes"][0]
    assert row["val_iwae"] == -100
    assert row["iwae"] == row["elbo"] not in (-100, -200)


def test_a_wrong_reductions_cost_leaves_out_the_one_that_is_a_scale(studied, titles, monkeypatch, tmp_path):
    elbos = iter([-33.0, -33.5, -36.0, -50.0, -40.0, -45.0, -55.0, -35.0])
    sizes = set()

    def measured(model, x):
        sizes.add(len(x))
        return {"elbo": next(elbos), "reconstruction": -20.0, "kl": 5.0, "active_units": 2}

    monkeypatch.setattr(kl_scaling, "measure", measured)
    metrics = kl_scaling.main([*TINY, "--out", str(tmp_path)])
    assert (metrics["elbo_right"], metrics["elbo_worst"]) == (-33, -55)
    assert (metrics["least_nats_lost"], metrics["most_nats_lost"]) == (2, 22)
    assert "reach an ELBO of -33.0 nats; the wrong ones cost 2.0 to 22.0 nats" in titles[0]
    assert len(sizes) == 1
    assert not sizes & {100, 200}  # the test images


# --- the benchmark ------------------------------------------------------------------------------------------------


def test_the_products_of_a_model_are_two_operations_a_weight_and_row():
    encoder, decoder = 196 * 128 + 128 * 16, 8 * 128 + 128 * 196
    assert benchmark.products(VAE(), 3, 5) == 2 * (3 * encoder + 5 * decoder)


def test_the_least_time_leaves_the_first_out(monkeypatch):
    seconds = iter([1.0, 9.0, 5.0, 7.0])
    monkeypatch.setattr(benchmark, "seconds_of", lambda call, device: next(seconds))
    assert benchmark.least_seconds(None, 3, None) == 5


def test_the_benchmarks_shares_are_of_one_large_product(tmp_path, titles, monkeypatch):
    monkeypatch.setattr(benchmark, "least_seconds", lambda *_: 0.5)  # seconds, whatever is timed
    metrics = benchmark.main(["--images", "20", "--device", "cpu", "--out", str(tmp_path)])
    encoder, decoder = 196 * 128 + 128 * 16, 8 * 128 + 128 * 196
    wanted = [
        2 * 2048**3,
        3 * 2 * (100 * encoder + 200 * decoder) - 2 * 100 * 196 * 128,  # the images need no gradient
        2 * 10_000 * decoder,
        2 * (20 * encoder + 20 * 5000 * decoder),
        2 * 401**2 * (2 * 128 + 128 * 196) + 2 * 20 * 401**2 * 196,
    ]
    assert [row["gflops_per_second"] for row in metrics["cases"]] == pytest.approx([n / 0.5e9 for n in wanted])
    shares = [n / wanted[0] for n in wanted]
    assert [row["share_of_one_large_product"] for row in metrics["cases"]] == pytest.approx(shares)
    assert f"{min(shares[1:]):.0%} to {max(shares[1:]):.0%} of {wanted[0] / 0.5e9:.0f} GFLOP/s" in titles[0]
