"""cnn_cifar's detector: scenes whose boxes are exact, average precision by hand, training and resuming."""

import numpy as np
import pytest
import torch
from torch import Generator

from cnn_cifar import detect_digits, scenes
from cnn_cifar.average_precision import THRESHOLDS, average_precision, by_class, hits
from cnn_cifar.detect_digits import detect, detector, mistakes, surest_mistake
from cnn_cifar.scenes import boxes_of, draw_scenes, laid
from shared_utils import checkpoint
from shared_utils.data import load_images
from shared_utils.runs import read_json

FLAGS = ["--dataset", "digits", "--scenes", 12, "--test-scenes", 6, "--epochs", 2, "--batch-size", 4, "--width", 4]
FLAGS += ["--device", "cpu"]


@pytest.fixture(scope="module")
def digits():
    found = load_images("digits", "train", "")
    return torch.from_numpy(found.x), torch.from_numpy(found.y)


def ran(out, *flags):
    return detect_digits.main([str(flag) for flag in (*FLAGS, "--out", out, *flags)])


# --- scenes -------------------------------------------------------------------------------------------------------


def test_an_image_is_laid_where_it_says():
    white = torch.ones(2, 1, 10, 10)
    place = torch.tensor([[40.0, 90.0], [90.0, 64.0]])
    layers = laid(white, place[0], place[1], torch.tensor([20.0, 40.0]), torch.zeros(2))
    expected = torch.tensor([[30, 80, 50, 100], [70, 44, 110, 84]])
    assert (boxes_of(layers) - expected).abs().max() <= 1  # an enlarged pixel fades out
    assert layers.sum((1, 2)).tolist() == pytest.approx([400, 1600], rel=0.1)


def test_an_image_is_turned_about_its_middle():
    bar = torch.zeros(1, 1, 12, 12)
    bar[..., 5:7, :] = 1  # lies flat
    where = torch.tensor([50.0]), torch.tensor([70.0]), torch.tensor([48.0])
    flat = boxes_of(laid(bar, *where, torch.tensor([0.0])))[0]
    upright = boxes_of(laid(bar, *where, torch.tensor([torch.pi / 2])))[0]
    assert flat[2] - flat[0] > 4 * (flat[3] - flat[1])
    for box, wide in ((flat, 0), (upright, 1)):
        assert (box[:2] + box[2:]).tolist() == pytest.approx([100, 140], abs=1)
        assert box[2 + wide] - box[wide] == pytest.approx(48, abs=2)
    slope = laid(bar, *where, torch.tensor([0.3]))[0]
    rows = [slope[:, x].argmax().item() for x in (40, 60)]
    assert abs(rows[1] - rows[0]) == pytest.approx(20 * np.tan(0.3), abs=2)


def test_boxes_are_tight():
    layers = torch.zeros(3, 9, 11)
    layers[0, 2:5, 3:9] = 1
    layers[1, 8, 10] = 1
    layers[2, 1, 1] = scenes.INK / 2
    assert boxes_of(layers).tolist() == [[3, 2, 9, 5], [10, 8, 11, 9], [0, 0, 0, 0]]


def test_a_scenes_boxes_are_around_its_digits(digits, monkeypatch):
    monkeypatch.setattr(scenes, "NOISE", 0.0)
    monkeypatch.setattr(scenes, "SHREDS", 1)
    monkeypatch.setattr(scenes, "SHRED", 1)  # a pixel
    x, targets = draw_scenes(*digits, 70, Generator().manual_seed(0))  # more than are drawn together
    assert x.shape == (70, 1, 128, 128)
    assert len(targets) == 70
    counts = [len(target["labels"]) for target in targets]
    assert min(counts) == 2
    assert max(counts) == 6
    for scene, target in zip(x[:, 0].float() / 255, targets, strict=True):
        outside = scene.clone()
        for left, top, right, bottom in target["boxes"].int().tolist():
            assert 0 <= left < right <= 128
            assert 0 <= top < bottom <= 128
            inside = scene[top:bottom, left:right]
            assert min(inside[0].max(), inside[-1].max(), inside[:, 0].max(), inside[:, -1].max()) > scenes.INK - 0.01
            outside[top:bottom, left:right] = 0
        assert (outside > scenes.INK).sum() < 30  # the shred


def test_a_scenes_labels_are_its_digits(digits):
    x, y = digits
    for digit in (0, 7):
        _, targets = draw_scenes(x[y == digit], y[y == digit], 5, Generator().manual_seed(0))
        assert {int(label) for target in targets for label in target["labels"]} == {digit + 1}


def test_an_image_too_dark_to_be_seen_is_not_to_be_found(digits):
    x, y = digits
    _, targets = draw_scenes(torch.cat([x[:1] // 9, x[:1]]), y[:1].repeat(2), 20, Generator().manual_seed(0))
    assert all((target["boxes"][:, 2:] > target["boxes"][:, :2]).all() for target in targets)
    assert min(len(target["labels"]) for target in targets) < 2


def test_the_same_seed_draws_the_same_scenes(digits):
    first, second, third = (draw_scenes(*digits, 3, Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1][2]["boxes"], second[1][2]["boxes"])
    assert not torch.equal(first[0], third[0])


# --- average precision ----------------------------------------------------------------------------------------


def scene(*boxes):
    """Boxes as (label, score, left, top, right, bottom)."""
    rows = torch.tensor(boxes, dtype=torch.float32).view(-1, 6)
    return {"labels": rows[:, 0].long(), "scores": rows[:, 1], "boxes": rows[:, 2:]}


def test_average_precision_by_hand():
    assert average_precision(np.array([True, True]), 2) == 1
    assert average_precision(np.array([], dtype=bool), 2) == 0
    assert average_precision(np.array([False, False]), 2) == 0
    # precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1: 1 up to 0.50 (51 recalls), then 2/3 (50)
    assert average_precision(np.array([True, False, True]), 2) == pytest.approx((51 + 50 * 2 / 3) / 101)
    # half of them are never found: 51 of the 101 recalls
    assert average_precision(np.array([True]), 2) == pytest.approx(51 / 101)
    # a precision that rises again counts for the recalls before
    assert average_precision(np.array([False, True]), 1) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="no box"):
        average_precision(np.array([True]), 0)


def test_a_box_is_hit_once_by_the_surest_and_by_its_own_class():
    truth = [scene((1, 1, 0, 0, 10, 10))]
    found = [scene((1, 0.6, 0, 0, 10, 10), (1, 0.9, 0, 0, 10, 9), (2, 0.8, 0, 0, 10, 10))]
    scores, labels, hit = hits(found, truth)
    assert scores.tolist() == pytest.approx([0.9, 0.8, 0.6])
    assert labels.tolist() == [1, 2, 1]
    assert hit[0].tolist() == [True, False, False]
    assert hit[-1].tolist() == [False, False, True]  # IoU 0.9 is below 0.95, so the other one hits


def test_the_overlap_decides_at_each_threshold():
    truth = [scene((1, 1, 0, 0, 10, 10))]
    _, _, hit = hits([scene((1, 0.5, 0, 0, 10, 7))], truth)  # IoU 0.7
    assert hit[:, 0].tolist() == [bool(threshold <= 0.7) for threshold in THRESHOLDS]


def test_the_order_is_that_of_all_scenes_together():
    truth = [scene((1, 1, 0, 0, 10, 10)), scene((1, 1, 0, 0, 10, 10)), scene()]
    found = [scene((1, 0.5, 0, 0, 10, 10)), scene((1, 0.7, 20, 20, 30, 30)), scene((1, 0.6, 0, 0, 9, 9))]
    scores, _, hit = hits(found, truth)
    assert scores.tolist() == pytest.approx([0.7, 0.6, 0.5])
    assert hit[0].tolist() == [False, False, True]
    table, true = by_class(found, truth, 3)
    assert true.tolist() == [2, 0, 0]
    assert table[0, 0] == pytest.approx(51 / 101 / 3)
    assert np.isnan(table[1:]).all()
    assert hits([scene()], [scene()])[2].shape == (10, 0)


def test_mistakes_are_counted_by_kind():
    truth = [scene((1, 1, 0, 0, 10, 10), (2, 1, 50, 50, 60, 60), (3, 1, 80, 80, 90, 90))]
    found = [
        scene((1, 0.9, 0, 0, 10, 10), (1, 0.8, 50, 50, 60, 61), (4, 0.7, 30, 30, 40, 40), (3, 0.4, 80, 80, 90, 90))
    ]
    assert mistakes(found, truth) == {"right": 1, "wrong_digit": 1, "no_digit": 1, "missed": 1}
    twice = [scene((1, 0.9, 0, 0, 10, 10), (1, 0.8, 0, 0, 10, 9), (1, 0.7, 0, 0, 10, 4))]
    assert mistakes(twice, truth) == {"right": 1, "wrong_digit": 1, "no_digit": 1, "missed": 2}
    assert mistakes(twice, [scene()]) == {"right": 0, "wrong_digit": 0, "no_digit": 3, "missed": 0}
    assert mistakes([scene()], truth) == {"right": 0, "wrong_digit": 0, "no_digit": 0, "missed": 3}
    assert surest_mistake(found[0], truth[0]) == pytest.approx(0.8)
    assert surest_mistake(scene((1, 0.9, 0, 0, 10, 10)), truth[0]) == 0
    assert surest_mistake(scene(), truth[0]) == 0


# --- the detector -------------------------------------------------------------------------------------------------


def test_the_detector_learns_a_few_scenes_by_heart(digits):
    torch.manual_seed(0)
    x, targets = draw_scenes(*digits, 4, Generator().manual_seed(0))
    network = detector(8, 10, amp=False).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(120):
        loss = sum(network(list(x / 255), targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.backbone.eval()
    found = detect(network, x, torch.device("cpu"))
    table, _ = by_class(found, targets, 10)
    assert np.nanmean(table[:, 0]) > 0.9
    assert network.training  # as it was


def test_a_stopped_training_ends_with_the_same_weights(tmp_path, stopped):
    whole = ran(tmp_path / "whole")
    stopped(1, lambda: ran(tmp_path / "other"))
    again = ran(tmp_path / "other", "--resume")
    states = [checkpoint.load(tmp_path / name / "last.pth")["model"] for name in ("whole", "other")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    histories = [(tmp_path / name / "history.csv").read_text().splitlines() for name in ("whole", "other")]
    assert len(histories[0]) == len(histories[1]) == 3
    assert again["ap50"] == whole["ap50"]


def test_the_held_out_scenes_are_of_test_digits_and_drawn_otherwise(tmp_path, monkeypatch):
    calls = []

    def seen(x, y, n, generator):
        calls.append((x, n, generator.initial_seed()))
        return draw_scenes(x, y, n, generator)

    monkeypatch.setattr(detect_digits, "draw_scenes", seen)
    ran(tmp_path, "--epochs", 1)
    (train, n, seed), (test, held_out, other) = calls
    assert (n, held_out) == (12, 6)
    assert seed != other
    assert torch.equal(train, torch.from_numpy(load_images("digits", "train", "").x))
    assert torch.equal(test, torch.from_numpy(load_images("digits", "test", "").x))


def test_the_metrics_say_what_was_measured(tmp_path):
    metrics = read_json(ran(tmp_path)["run"] and tmp_path / "metrics.json")
    assert metrics["test_scenes"] == 6
    assert metrics["test_boxes"] == sum(row["boxes"] for row in metrics["by_digit"])
    assert metrics["right"] <= metrics["test_boxes"] - metrics["missed"]
    assert 0 <= metrics["ap"] <= metrics["ap50"] <= 1


def test_mistakes_get_one_line(tmp_path, fails):
    out = tmp_path / "out"
    said = fails(detect_digits, [*FLAGS, "--batch-size", 13, "--out", out], out)
    assert "--batch-size 13: there are 12 scenes to train on" in said
    assert "must be a whole number, 1 or more" in fails(detect_digits, ["--width", 0], out)
    assert "28" in fails(detect_digits, [*FLAGS, "--dataset", "shapes", "--out", out], out)
    said = fails(detect_digits, [*FLAGS, "--lr", 1e30, "--out", tmp_path / "diverges"])
    assert "try a lower --lr" in said
