"""cnn_cifar's figures and verdicts: who wins, by how much, and whether that is sure, from numbers that are known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cnn_cifar import (
    adversarial_training,
    allcnn,
    augmentation_study,
    benchmark,
    data_efficiency,
    detect_digits,
    digit_figures,
    fast_cifar,
    fast_cifar_ladder,
    predict,
    resnet_vs_plain,
    saliency,
    transfer_learning,
)
from cnn_cifar import grad_and_attack_analysis as attacks
from cnn_cifar.inputs import Data, Split
from shared_utils.stats import half_width, wilson_interval

SOME = Split(torch.zeros(500, 3, 32, 32, dtype=torch.uint8), torch.arange(500) % 3)
IMAGES = Data(SOME, SOME, SOME, ("x", "y", "z"), "T")


def title(figure):
    return figure.get_suptitle().replace("\n", " ")


def bars(ax):
    """Of each error bar its two ends along x."""
    return [collection.get_segments()[0][:, 0].tolist() for collection in ax.collections]


# --- attacks ------------------------------------------------------------------------------------------------------


def test_robustness_of_both_networks_in_their_order():
    points = [{"eps": 0.0, "accuracy": 0.9}, {"eps": 8.0, "accuracy": 0.5}]
    rows = [
        {"network": "standard", "PGD-20": 0.01, "clean": 0.95, "by_eps": points},
        {"network": "adversarial", "PGD-20": 0.4, "clean": 0.7, "by_eps": points},
    ]
    history = [
        {"network": kind, "epoch": "1", "val_accuracy": "0.6", "val_pgd10": "0.2"}
        for kind in adversarial_training.KINDS
    ]
    said = title(adversarial_training.draw_robustness(rows, history, 100, 8.0, "T"))
    assert said.endswith("1.0% → 40.0% are recognised, of all as they are 95.0% → 70.0%")


def test_the_strongest_attack_counts_over_all_images_and_fgsm_over_the_whole_test(monkeypatch):
    def survivors(network, split, attack=None):
        return torch.arange(len(split)) < len(split) - (2 if attack else 1)

    test = Split(torch.zeros(40, 1), torch.zeros(40))
    monkeypatch.setattr(adversarial_training, "survivors", survivors)
    args = SimpleNamespace(seed=0, eps=8.0, restarts=1)
    found = adversarial_training.measure(None, test, Split(test.x[:10], test.y[:10]), args)
    assert (found["clean"], found["FGSM"]) == (39 / 40, 38 / 40)
    assert (found["noise"], found["PGD-20"], found["strongest"]) == (0.8, 0.8, 0.6)  # of ten: two, then two more


def test_attacks_are_summed_up_at_the_epsilon_asked_for():
    table = [
        {"eps": 4, "noise": 0.9, "FGSM": 0.5, "PGD-20": 0.3, "worst case": 0.2},
        {"eps": 8, "noise": 0.8, "FGSM": 0.4, "PGD-20": 0.1, "worst case": 0.05},
    ]
    said = title(attacks.draw_by_eps(table, 4, 0.95, 100, "T"))
    assert said.endswith(
        "95.0% right unattacked; at ε = 4/255 noise leaves 90.0%, FGSM leaves 50.0%, PGD-20 leaves 30.0%"
    )
    steps = [{"steps": n, "one start": 1 / n, "several starts": 0.5 / n} for n in (1, 5)]
    said = title(attacks.draw_by_steps(steps, SimpleNamespace(eps=8, restarts=3), 100, "T"))
    assert said.endswith("1 step leaves 100.0%, 5 leave 20.0%, from 3 starts 10.0%")
    rise, right = np.array([[0.1, 0.3], [2.0, 4.0]]), np.array([[True, True], [False, True]])
    said = title(attacks.draw_loss_curve(rise, right, 8, 1.6, "T"))
    assert said.endswith("take the loss from 0.20 to 3.00 nats, the accuracy from 100% to 50.0%")


@pytest.mark.parametrize(("passes", "words"), [([True, True], "no sign"), ([True, False], "see which ones fail")])
def test_one_check_that_fails_is_a_sign(passes, words):
    checks = [{"check": "c", "measured": "m", "passes": passed} for passed in passes]
    assert words in title(attacks.draw_checks(checks, "T"))


# --- studies ------------------------------------------------------------------------------------------------------


def test_the_chosen_epoch_and_the_ends_of_the_curves():
    history = {"epoch": [1, 2, 3], "train_loss": [3, 2, 1], "val_loss": [3, 1, 2]}
    history |= {"train_accuracy": [0.1, 0.5, 0.9], "val_accuracy": [0.2, 0.7, 0.6]}
    figure = allcnn.draw_curves(history, {"epoch": 2, "val_accuracy": 0.7}, 0.65, "T")
    assert "90.0% of the augmented training images, 60.0% of the validation images" in title(figure)
    assert "chosen: epoch 2" in [line.get_label() for line in figure.axes[1].lines]


def arm(name, accuracies, gains, train=0.9):
    accuracy, gain = np.array(accuracies), np.array(gains)
    row = {"arm": name, "accuracies": accuracy, "accuracy": accuracy.mean(), "gap": train - accuracy.mean()}
    row |= {"gap_half_width": 0.01, "gain": gain.mean(), "gain_half_width": half_width(gain)}
    return row


def test_the_best_arm_is_said_with_what_it_gains():
    table = [
        arm("none", [0.5, 0.5], [0, 0]),
        arm("flip", [0.6, 0.61], [0.1, 0.11]),
        arm("crop", [0.55, 0.5], [0.05, 0]),
    ]
    said = title(augmentation_study.draw(table, table[1], "T"))
    assert "best: flip (60.5%, +10.5 ± 6.4 points over none)" in said
    assert "none of them is better than none" in title(augmentation_study.draw(table, table[0], "T"))


def test_only_gains_beyond_their_interval_are_shown(monkeypatch, tmp_path):
    accuracies = {
        "none": (0.5, 0.5),
        "flip": (0.6, 0.61),
        "crop": (0.6, 0.45),
        "rotation": (0.4, 0.39),
        "Cutout": (0.4, 0.55),
    }

    def trained(name, seed, data, args, run):
        value = accuracies.get(name, (0.5, 0.5))[seed]
        return {"val_accuracy": value, "train_accuracy": 0.9 + 0.05 * seed, "val_loss": 1.0, "seconds": 2.0}

    monkeypatch.setattr(augmentation_study, "load", lambda *given: IMAGES)
    monkeypatch.setattr(augmentation_study, "trained", trained)
    monkeypatch.setattr(augmentation_study, "save_figure", lambda figure, path: None)
    monkeypatch.setattr(augmentation_study, "draw_examples", lambda *given: None)
    flags = ["--quick", "--device", "cpu", "--seeds", "0", "1", "--out", str(tmp_path)]
    metrics = augmentation_study.main(flags)
    assert (metrics["gains_shown_for"], metrics["losses_shown_for"]) == ("flip", "rotation")
    assert (metrics["best"], metrics["best_accuracy"]) == ("flip", pytest.approx(0.605))
    flip = metrics["arms"][1]
    assert flip["std"] == pytest.approx(0.01 / 2**0.5)
    assert flip["gap_half_width"] == pytest.approx(half_width([0.3, 0.34]))


def test_the_fast_networks_accuracy_is_that_of_the_way_it_was_asked():
    rows = [{"seconds": 60.0, "train_loss": 1.0}, {"seconds": 120.0, "train_loss": 0.5}]
    said = title(
        fast_cifar.draw(rows, {"plain": 0.9, "mirrored": 0.95, "mirrored and shifted": 0.94}, "plain", 100, "T")
    )
    assert said == "T: 90.00% right (plain) after 2.0 minutes of training"


def test_the_largest_step_of_the_ladder():
    table = [{"what": "bare", "accuracy": 0.7, "accuracies": np.array([0.7, 0.7])}]
    for what, gain in (("a", 0.02), ("b", 0.08), ("c", 0.01)):
        table.append(
            {"what": what, "accuracy": 0.8, "accuracies": np.array([0.8, 0.8]), "gain": gain, "gain_half_width": 0.01}
        )
    assert title(fast_cifar_ladder.draw(table, "T")).endswith("the largest step: b, +8.0 ± 1.0 points")


def test_only_rungs_beyond_their_interval_are_shown(monkeypatch, tmp_path):
    names = [fast_cifar_ladder.BARE, *fast_cifar_ladder.TRAINED]
    plain = dict(zip(names, ((0.5, 0.5), (0.6, 0.61), (0.7, 0.62), (0.6, 0.52), (0.55, 0.6), (0.6, 0.58)), strict=True))

    def trained(recipe, rung, seed, data, args, run):
        value = plain[rung][seed]
        return {
            "train_loss": 1.0,
            "accuracy plain": value,
            "accuracy mirrored and shifted": value - 0.1,
            "seconds": 1.0,
        }

    monkeypatch.setattr(fast_cifar_ladder, "load", lambda *given: IMAGES)
    monkeypatch.setattr(fast_cifar_ladder, "trained", trained)
    monkeypatch.setattr(fast_cifar_ladder, "save_figure", lambda figure, path: None)
    metrics = fast_cifar_ladder.main(["--quick", "--device", "cpu", "--seeds", "0", "1", "--out", str(tmp_path)])
    assert (metrics["gains_shown_for"], metrics["losses_shown_for"]) == (names[1], f"{names[3]}, tta")


@pytest.mark.parametrize(("gain", "sure"), [(0.02, True), (-0.02, True), (0.005, False), (-0.005, False)])
def test_what_lies_within_its_interval_is_inconclusive(gain, sure):
    pair = {"a": "CNN", "b": "ViT", "gain": gain, "gain_half_width": 0.01}
    assert ("(inconclusive)" not in data_efficiency.said(pair)) == sure
    row = {"labels": 100, "frozen_gain": gain, "frozen_gain_half_width": 0.01}
    row |= {"fine-tuned_gain": 0.5, "fine-tuned_gain_half_width": 0.01}
    assert ("(inconclusive)" not in transfer_learning.said(row)) == sure


def test_an_arms_interval_is_students():
    right = {("CNN", 10): [np.array([True, True, False, False]), np.array([True, True, True, False])]}
    row = data_efficiency.row_of("CNN", 10, right, {("CNN", 10): [{"seconds": 1.0}, {"seconds": 3.0}]})
    assert (row["half_width"], row["training_seconds"]) == (half_width([0.5, 0.75]), 2)


def test_the_gradients_title_has_the_ratio_of_the_first_update_first():
    norms = np.ones((20, 3))
    trained = {(10, kind): [{"norms": norms}] for kind in resnet_vs_plain.KINDS}
    row = {"depth": 10, "residual_lr": 0.1, "plain_lr": 0.1, "first_update_ratio": 168.0, "training_ratio": 2.0}
    said = title(resnet_vs_plain.draw_gradients(row, trained, "T"))
    assert said.endswith("168 times the residual one's at the first update, 2 times in training")


def test_a_map_says_something_when_it_is_better_in_both_tests():
    areas = [
        {
            "map": name,
            "deletion_gain": a,
            "insertion_gain": b,
            "deletion_gain_half_width": 0.1,
            "insertion_gain_half_width": 0.1,
        }
        for name, a, b in (("one", 0.2, 0.2), ("two", 0.2, 0.05), ("three", -0.2, 0.2))
    ]
    curves = {(row["map"], kind): [np.zeros(3), np.zeros(3)] for row in areas for kind in saliency.KINDS}
    said = title(saliency.draw_curves(curves, areas, 2, 10, "T"))
    assert "better than another image's map: one (" in said


def test_the_part_of_the_loss_that_is_largest_at_the_end():
    first, last = (dict.fromkeys(detect_digits.PARTS, 1.0) for _ in range(2))
    history = [{"epoch": 1, **first, "loss_objectness": 9.0}, {"epoch": 2, **last, "loss_classifier": 2.0}]
    assert "“which digit?” is the largest part" in title(detect_digits.draw_training(history, "T"))


def test_predictions_are_counted_by_the_likeliest_class():
    top = [{"class": "cat", "probability": 0.6}, {"class": "dog", "probability": 0.4}]
    rows = [{"picture": "p", "top": top}] * 3
    figure = predict.draw(np.zeros((3, 3, 32, 32), np.uint8), rows, ["cat", "dog", "dog"], "T")
    assert title(figure) == "T: 1 of 3 right (blue: the true class)"


def test_the_pipelines_ratio_is_ours_over_the_loaders():
    table = [{"name": benchmark.OURS, "images_per_second": 8.0, "all": [6.0, 8.0, 12.0]}]
    table += [{"name": f"{n}", "images_per_second": float(n), "all": [float(n)] * 3} for n in (1, 2)]
    assert benchmark.ours_to_best(table) == 4


# --- digits -------------------------------------------------------------------------------------------------------


def network_row(name, accuracies, **more):
    low, high = wilson_interval(round(1000 * accuracies[0]), 1000)
    row = {"model": name, "label": name.upper(), "accuracy": np.mean(accuracies), "accuracies": accuracies}
    row |= {"low": low, "high": high, "ensemble_accuracy": None, "training_seconds": 1.0}
    return row | {"images_per_second": 2.0, "parameters": 3, **more}


@pytest.mark.parametrize(
    ("p", "words"), [(0.2, "(McNemar: p = 0.2, no difference is shown)"), (0.01, "(McNemar: p = 0.01)")]
)
def test_the_best_two_networks_and_whether_they_differ(p, words):
    rows = [network_row("a", [0.95]), network_row("b", [0.98]), network_row("c", [0.97])]
    pairs = [{"a": a, "b": b, "p": q} for a, b, q in (("a", "b", 0.5), ("a", "c", 0.6), ("b", "c", p))]
    said = title(digit_figures.draw_comparison(rows, pairs, "T"))
    assert said == f"T: B has the fewest errors, 2.00 %; next C, 3.00 % {words}"


def test_the_interval_is_that_of_the_first_training():
    row = network_row("a", [0.9, 0.98])
    figure = digit_figures.draw_comparison([row], [], "T")
    assert sorted(bars(figure.axes[0])[0]) == pytest.approx([100 * (1 - row["high"]), 100 * (1 - row["low"])])


@pytest.fixture
def three():
    x, y = torch.zeros(4, 1, 28, 28, dtype=torch.uint8), torch.tensor([0, 1, 2, 2])
    return Data(Split(x, y), None, Split(x, y), ("x", "y", "z"), "T")


def test_the_most_frequent_confusion_is_of_the_true_class(three):
    matrices = {"A": np.array([[5, 0, 0], [2, 3, 0], [0, 0, 4]]), "B": np.array([[5, 0, 1], [1, 4, 0], [0, 0, 4]])}
    assert title(digit_figures.draw_confusions(matrices, three)).endswith("most often y is taken for x, 3 times in all")


def test_the_images_that_all_networks_get_wrong_are_counted(three):
    right, wrong = np.eye(3)[[0, 1, 2, 2]], np.eye(3)[[1, 1, 0, 1]]
    found = {"A": [{"probabilities": wrong}], "B": [{"probabilities": np.eye(3)[[1, 1, 2, 2]]}]}
    assert title(digit_figures.draw_errors(found, three)).startswith("T: all 2 networks get 1 of 4 test images wrong")
    assert "the network gets 0 of 4" in title(digit_figures.draw_errors({"A": [{"probabilities": right}]}, three))


def test_attention_from_strokes_and_the_similarity_of_neighbours(three, monkeypatch):
    x = three.test.x.clone()
    x[:, :, :4] = 255  # the upper row of patches: a seventh of all
    data = Data(three.train, None, Split(x, three.test.y), three.classes, "T")
    shares = torch.zeros(4, 49)
    shares[:, :2], shares[:, 40] = 0.4, 0.2
    network = SimpleNamespace(side=7, attention_weights=lambda x: None)
    monkeypatch.setattr(digit_figures, "rollout", lambda weights: shares)
    assert "80% comes from patches with a stroke, which are 14% of all" in title(
        digit_figures.draw_attention(network, data)
    )
    near = torch.eye(49)
    monkeypatch.setattr(digit_figures, "position_similarity", lambda network: near)
    assert "mean of neighbours 0.00, of patches more than three apart 0.00" in title(
        digit_figures.draw_positions(network)
    )
