"""cnn_cifar's scripts: training, resuming, predicting, measuring; and what they say to a user's mistake."""

import re
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator, nn

from cnn_cifar import allcnn, benchmark, fast_cifar, fast_cifar_ladder, predict
from cnn_cifar.allcnn import CUTOUT, augmented, learning_rate
from cnn_cifar.checkpoints import load_network
from cnn_cifar.fast_training import INGREDIENTS, averaged_logits
from cnn_cifar.inputs import Split, load, loss_and_accuracy
from cnn_cifar.models import allcnn_t
from cnn_cifar.param_count import layer_rows
from shared_utils import checkpoint
from shared_utils.embedded import shapes
from shared_utils.runs import read_json

CPU = torch.device("cpu")
CLASSES = ("circle", "square", "star")
ALLCNN = ["--c1", 4, "--c2", 6, "--batch-size", 16, "--val-size", 12, "--epochs", 5]
FAST = ["--widths", 4, 4, 6, "--batch-size", 16, "--epochs", 3]
LADDER = ["--widths", 4, 4, 4, "--batch-size", 30, "--val-size", 12, "--epochs", 1, "--seeds", 3, 5]
LAST = {allcnn: "allcnn_t_last.pth", fast_cifar: "last.pth"}
SCRIPTS = {allcnn: ALLCNN, fast_cifar: FAST, fast_cifar_ladder: LADDER}


def save_image(x, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x.transpose(1, 2, 0)).save(path)


def ran(module, *flags):
    return module.main([str(flag) for flag in ("--device", "cpu", *flags)])


def loaded(module, pictures):
    return load(module.build_parser().parse_args(["--dataset", str(pictures), *map(str, SCRIPTS[module])]), CPU)


def rows_of(path):
    header, *rows = (line.split(",") for line in path.read_text(encoding="utf-8").splitlines())
    return [dict(zip(header, map(float, row), strict=True)) for row in rows]


@pytest.fixture(scope="module")
def runs_dir(pictures, tmp_path_factory):
    top = tmp_path_factory.mktemp("runs")
    for module in (allcnn, fast_cifar):
        ran(module, "--dataset", pictures, "--runs-dir", top, *SCRIPTS[module])
    return top / "cnn_cifar"


@pytest.fixture
def no_figures(monkeypatch):
    for module in (allcnn, fast_cifar, fast_cifar_ladder):
        monkeypatch.setattr(module, "save_figure", lambda figure, path: None)


@pytest.mark.parametrize("per_epoch", [1, 7, 351, 390])
@pytest.mark.parametrize("epochs", [5, 100, 200])
def test_the_step_schedule_falls_at_40_and_80_percent(epochs, per_epoch):
    for epoch in range(epochs):
        expected = 0.1 if 100 * epoch < 40 * epochs else 0.01 if 100 * epoch < 80 * epochs else 0.001
        for step in (epoch * per_epoch, (epoch + 1) * per_epoch - 1):  # the first and the last of the epoch
            assert learning_rate("step", step, epochs * per_epoch, 0.1) == pytest.approx(expected)


@pytest.mark.parametrize(("schedule", "top", "half"), [("cosine", 0, 100), ("onecycle", 49, 125)])
def test_the_smooth_schedules_end_at_zero(schedule, top, half):
    rates = [learning_rate(schedule, step, 200, 0.4) for step in range(201)]
    assert rates[top] == max(rates) == pytest.approx(0.4)
    assert [rates[half], rates[200]] == pytest.approx([0.2, 0], rel=0.02, abs=1e-9)
    assert rates == sorted(rates[:top]) + sorted(rates[top:], reverse=True)


def test_cutout_paints_over_a_square_of_what_is_augmented_anyway():
    x = torch.from_numpy(shapes("test", n=40)[0])
    plain, cut = (augmented(x, Generator().manual_seed(0), cutout) for cutout in (False, True))
    changed = (plain != cut).any(1).flatten(1).sum(1)
    assert changed.min() > 0
    assert 0.9 * CUTOUT**2 < changed.max() <= CUTOUT**2


@pytest.mark.parametrize(("step", "ways"), [("random_flip", 2), ("random_crop", 30), ("random_color_jitter", 50)])
def test_each_image_is_flipped_shifted_and_recoloured(step, ways, monkeypatch):
    for other in {"random_flip", "random_crop", "random_color_jitter"} - {step}:
        monkeypatch.setattr(allcnn, other, lambda x, generator: x)
    x = torch.from_numpy(shapes("test", n=1)[0]).expand(60, -1, -1, -1)
    assert len(torch.unique(augmented(x, Generator().manual_seed(0), False), dim=0)) >= ways


def test_allcnn_writes_what_its_docstring_names_and_it_agrees(runs_dir, pictures):
    out = runs_dir / "allcnn"
    named = allcnn.__doc__.split("\nWrites ")[1].split(".\nWith")[0].replace("\n", " ").split(", ")
    assert {path.name for path in out.iterdir() if path.name[0] != "."} == {*named, "config.json"}
    rows, metrics = rows_of(out / "history.csv"), read_json(out / "metrics.json")
    assert read_json(out / "training_curves.json") == {name: [row[name] for row in rows] for name in rows[0]}
    assert [row["lr"] for row in rows] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])
    best = max(rows, key=lambda row: row["val_accuracy"])
    assert (metrics["best_epoch"], metrics["val_accuracy"]) == (best["epoch"], best["val_accuracy"])
    data = loaded(allcnn, pictures)
    assert (len(data.train), len(data.val), len(data.test)) == (60, 12, 24)
    network, state = load_network(out / "allcnn_t_best.pth")
    assert (state["epoch"], network.config) == (best["epoch"], {"c1": 4, "c2": 6, "num_classes": 3})
    assert loss_and_accuracy(network, data.val)[1] == pytest.approx(best["val_accuracy"])
    assert loss_and_accuracy(network, data.test)[1] == pytest.approx(metrics["test_accuracy"])
    last, _ = load_network(out / "allcnn_t_last.pth")
    loss, accuracy = loss_and_accuracy(last, data.val)
    assert (loss, accuracy) == pytest.approx((rows[-1]["val_loss"], rows[-1]["val_accuracy"]), rel=1e-5)
    assert loss_and_accuracy(last, data.test)[1] == pytest.approx(metrics["test_accuracy_of_the_last_weights"])


def test_the_epoch_is_chosen_on_validation_images_and_its_weights_are_kept(pictures, tmp_path, monkeypatch, no_figures):
    accuracies, seen = [0.2, 0.6, 0.6, 0.1, 0.5, 0.3, 0.25], []  # of the five epochs, and of the two tests

    def judged(model, split, amp):
        seen.append((len(split), {name: value.clone() for name, value in model.state_dict().items()}))
        return 1.0, accuracies[len(seen) - 1]

    painted = []
    monkeypatch.setattr(allcnn, "augmented", lambda x, generator, cutout: painted.append(cutout) or x)
    monkeypatch.setattr(allcnn, "loss_and_accuracy", judged)
    metrics = ran(allcnn, "--dataset", pictures, "--out", tmp_path, *ALLCNN, "--cutout")
    assert painted.count(True) == 5 * 3  # each batch; those of the figure are not painted over
    assert [n for n, _ in seen] == [12] * 5 + [24] * 2  # the test images once at the end, with last and best weights
    for at, epoch in ((5, 5), (6, 2)):
        assert all(torch.equal(value, seen[epoch - 1][1][name]) for name, value in seen[at][1].items())
    assert (metrics["best_epoch"], metrics["val_accuracy"], metrics["test_accuracy"]) == (2, 0.6, 0.25)


def compared(folder, name):
    metrics = {k: v for k, v in read_json(folder / "metrics.json").items() if k != "run" and "second" not in k}
    history = [row | {"seconds": 0} for row in rows_of(folder / "history.csv")]
    return checkpoint.load(folder / name)["model"], metrics, history


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("module", LAST)
def test_a_killed_run_ends_with_the_same_weights(module, saved, runs_dir, pictures, tmp_path, monkeypatch, no_figures):
    name, save, flags = LAST[module], checkpoint.save, ["--dataset", pictures, "--out", tmp_path, *SCRIPTS[module]]

    def killed(path, **state):
        stops = path.name == name and state["epochs"] == 2
        if saved or not stops:
            save(path, **state)
        if stops:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        ran(module, *flags)
    monkeypatch.setattr(checkpoint, "save", save)
    torch.manual_seed(5)
    ran(module, *flags, "--resume")
    (ours, *rest), (theirs, *expected) = (compared(at, name) for at in (tmp_path, runs_dir / module.__name__[10:]))
    assert rest == expected
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("module", LAST)
def test_other_flags_and_widths_are_refused_on_resuming(module, runs_dir, pictures, tmp_path, fails):
    whole, part = runs_dir / module.__name__[10:], tmp_path / "part"
    flags = ["--device", "cpu", "--dataset", pictures, *SCRIPTS[module], "--resume"]
    kept = {path.name: path.read_bytes() for path in whole.iterdir()}
    for flag, value in (("--lr", 0.3), ("--seed", 1), ("--c1", 5) if module is allcnn else ("--without", "muon")):
        assert f"the run was made with {flag} " in fails(module, [*flags, "--out", whole, flag, value])
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == kept
    part.mkdir()
    shutil.copy(whole / LAST[module], part)  # without config.json: the checkpoint itself must tell
    wider, said = (["--c2", 8], "has c2 = 6, this") if module is allcnn else (["--widths", 4, 4, 8], "has widths = [4")
    assert said in fails(module, [*flags, "--out", part, *wider])


def test_fast_cifar_writes_what_its_docstring_names_and_it_agrees(runs_dir, pictures, tmp_path, no_figures):
    out = runs_dir / "fast_cifar"
    named = fast_cifar.__doc__.split("\nWrites ")[1].split(".\nWith")[0].split(", ")
    assert {path.name for path in out.iterdir() if path.name[0] != "."} == {*named, "config.json"}
    network, _ = load_network(out / "best.pth")
    test = loaded(fast_cifar, pictures).test
    ways = averaged_logits(network, test.x, amp=True)
    metrics = read_json(out / "metrics.json")
    expected = {name: (way.argmax(1) == test.y).float().mean().item() for name, way in ways.items()}
    assert metrics["accuracies"] == pytest.approx(expected)
    assert metrics["accuracy"] == metrics["accuracies"]["mirrored and shifted"]
    assert (metrics["judged_on"], metrics["train_images"]) == ("test", 72)
    assert metrics["train_loss"] == rows_of(out / "history.csv")[-1]["train_loss"]
    flags = ["--dataset", pictures, "--out", tmp_path, *FAST, "--val-size", 12, "--without", "tta", "muon", "--no-amp"]
    metrics = ran(fast_cifar, *flags)
    assert metrics["accuracy"] == metrics["accuracies"]["plain"]
    assert (metrics["judged_on"], metrics["train_images"], metrics["without"]) == ("validation", 60, ["tta", "muon"])


def test_the_ladder_adds_one_ingredient_a_rung_and_goes_on(pictures, tmp_path, monkeypatch, no_figures):
    recipes, seeds, training, accuracies = [], [], fast_cifar_ladder.FastTraining, fast_cifar_ladder.accuracies

    def watched(recipe, images, classes, seed, **named):
        recipes.append(recipe)
        seeds.append((seed, torch.initial_seed()))
        return training(recipe, images, classes, seed, **named)

    def apart(network, val, amp):  # the three ways never agree by chance
        assert amp  # as it was trained
        return {way: value + len(way) + recipes[-1].sgd_lr for way, value in accuracies(network, val, amp).items()}

    monkeypatch.setattr(fast_cifar_ladder, "FastTraining", watched)
    monkeypatch.setattr(fast_cifar_ladder, "accuracies", apart)
    flags = ["--dataset", pictures, "--out", tmp_path, *LADDER, "--sgd-lrs", 1, 2, "--seed", 10, "--amp"]
    rungs, names = ran(fast_cifar_ladder, *flags)["rungs"], [name for name in INGREDIENTS if name != "tta"]
    inside = [[name for name in names if recipe.has(name)] for recipe in recipes]
    assert inside == [[], *([names[:i] for i in range(len(names) + 1)] * 2)]  # once from each seed, and the other rate
    assert [recipe.sgd_lr for recipe in recipes] == [1] + [2] * (
        len(recipes) - 1
    )  # the better one for all that follows
    n = len(names) + 1
    assert seeds == [(13, 13)] * (1 + n) + [(15, 15)] * n  # --seed and each of --seeds, of PyTorch and of the batches
    for below, rung in pairwise(rungs):
        gains = np.subtract(rung["accuracies"], below["accuracies"])
        assert [rung["accuracy"], rung["gain"]] == pytest.approx([np.mean(rung["accuracies"]), gains.mean()])
        assert rung["gain_half_width"] == pytest.approx(12.7062 * abs(gains[0] - gains[1]) / 2, rel=1e-4)  # Student's t
    lines = (tmp_path / "history.csv").read_text().splitlines(keepends=True)
    last = dict(zip(lines[0].strip().split(","), lines[-1].strip().split(","), strict=True))
    assert (last["rung"], last["seed"]) == (names[-1], "5")
    for rung, way in ((rungs[-1], "mirrored and shifted"), (rungs[-2], "plain")):
        assert rung["accuracies"][1] == float(last[f"accuracy {way}"])
    (tmp_path / "history.csv").write_text("".join(lines[:-2]))  # as after a kill
    recipes.clear()
    again = ran(fast_cifar_ladder, *flags, "--resume")["rungs"]
    assert (len(recipes), [rung["accuracies"] for rung in again]) == (2, [rung["accuracies"] for rung in rungs])


def test_a_rate_of_the_ladder_that_diverges_is_out_unless_it_is_the_only_one(pictures, tmp_path, no_figures, fails):
    flags = ["--device", "cpu", "--dataset", pictures, *LADDER, "--sgd-lrs", 1e38]
    assert "try a lower --sgd-lrs" in fails(fast_cifar_ladder, [*flags, "--out", tmp_path / "all"])
    metrics = ran(fast_cifar_ladder, *flags[2:], 0.1, "--out", tmp_path / "one")
    assert (metrics["sgd_lr"], metrics["sgd_lrs"][0]) == (0.1, {"sgd_lr": 1e38, "accuracy": 0})


def test_predictions_of_all_kinds_of_pictures(runs_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "TOP", 2)  # of three classes
    x, files = shapes("test", n=4)[0], tmp_path / "pictures"
    large = x[:3].repeat(2, axis=2).repeat(2, axis=3)
    save_image(x[0], files / "a.png")
    save_image(large[1], files / "b.PNG")
    save_image(np.pad(large[2], ((0, 0), (0, 0), (30, 30)), constant_values=128), files / "c.bmp")  # grey at its sides
    Image.fromarray(x[3, 0]).save(files / "d.png")
    opaque = np.arange(1024).reshape(32, 32) % 2 == 1
    Image.fromarray(np.dstack([*x[3], 255 * opaque.astype(np.uint8)])).save(files / "e.png")
    seen = np.stack([*x[:3], x[3, :1].repeat(3, axis=0), np.where(opaque, x[3], 255).astype(np.uint8)])
    out = tmp_path / "out"
    metrics = ran(predict, "--runs-dir", runs_dir.parent, "--out", out, files, files / "a.png")
    network, _ = load_network(runs_dir / "allcnn" / "allcnn_t_best.pth")
    p = np.exp(network(torch.from_numpy(seen).float() / 255).detach().double().numpy())
    p /= p.sum(1, keepdims=True)
    names = [row["picture"] for row in metrics["predictions"]]
    assert names == [str(files / name) for name in ("a.png", "b.PNG", "c.bmp", "d.png", "e.png", "a.png")]
    for row, expected in zip(metrics["predictions"], [*p, p[0]], strict=True):
        order = np.argsort(-expected)[:2]
        assert [one["class"] for one in row["top"]] == [CLASSES[k] for k in order]
        assert [one["probability"] for one in row["top"]] == pytest.approx(expected[order], rel=1e-4)
    assert len(np.unique(p.round(6), axis=0)) == 5
    first = [str(value) for one in metrics["predictions"][0]["top"] for value in one.values()]
    assert (out / "predictions.csv").read_text().splitlines()[1] == ",".join([names[0], *first])


@pytest.mark.parametrize("script", ["allcnn", "fast_cifar"])
def test_without_pictures_the_first_test_images_are_judged(script, runs_dir, pictures, tmp_path):
    path = runs_dir / script / {"allcnn": "allcnn_t_best.pth", "fast_cifar": "best.pth"}[script]
    metrics = ran(predict, "--dataset", pictures, "--runs-dir", runs_dir.parent, "--out", tmp_path, "--ckpt", path)
    test, n = loaded(fast_cifar, pictures).test, predict.SHOWN
    accuracy = loss_and_accuracy(load_network(path)[0], Split(test.x[:n], test.y[:n]))[1]
    assert (metrics["pictures"], metrics["accuracy"]) == (n, pytest.approx(accuracy))


def test_the_benchmark_measures_both_pipelines(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "product_speed", lambda device, dtype, repeats: 1e12)  # seconds on a small CPU
    clock = iter(range(100))
    ticks = {"perf_counter": staticmethod(lambda: float(next(clock)))}  # each measurement takes 1 s
    monkeypatch.setattr(benchmark, "time", type("Clock", (), ticks))
    flags = ["--c1", 4, "--c2", 6, "--batch-size", 8, "--batches", 2, "--repeats", 2, "--workers", 0]
    metrics = ran(benchmark, "--dataset", pictures, "--out", tmp_path, *flags)
    for table, names in (("pipeline", 2), ("network", 4), ("end_to_end", 2)):
        assert len({row["name"] for row in metrics[table]}) == names
        assert all(row["all"] == [16, 16] and row["images_per_second"] == 16 for row in metrics[table])
    assert (metrics["pipeline_ratio"], metrics["end_to_end_ratio"]) == (1, 1)
    # The backward pass costs twice the forward one, but for the first layer, whose input needs no gradient.
    layers = [row["flops"] for row in layer_rows(allcnn_t(4, 6, 3), 32)]
    assert metrics["gflop_per_image"] * 1e9 == pytest.approx(3 * sum(layers) - layers[0])


def test_both_pipelines_give_augmented_images_with_their_labels():
    y = torch.arange(12) % 3
    grey = torch.tensor([20, 80, 200])[y].to(torch.uint8)  # jitter moves each by a fifth of its own value at most
    train = Split(grey[:, None, None, None].expand(-1, 3, 32, 32).contiguous(), y)
    loader = torch.utils.data.DataLoader(benchmark.ImageByImage(train), 4)
    ours = benchmark.batches_of_ours(train, 4, Generator().manual_seed(0))
    for source, shuffles in ((benchmark.batches_of_loader(loader, CPU), False), (ours, True)):
        for _ in range(2):  # epochs
            x, labels = (torch.cat(parts) for parts in zip(*(next(source) for _ in range(3)), strict=True))
            assert (x.shape, x.dtype) == ((12, 3, 32, 32), torch.float32)
            assert torch.equal(torch.bucketize(255 * x.mean((1, 2, 3)), torch.tensor([45.0, 130.0])), labels)
            assert torch.equal(labels.sort()[0], y.sort()[0])
            assert torch.equal(labels, y) != shuffles


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler")
def test_a_compiled_network_learns_the_same(pictures, tmp_path, no_figures):
    for at, more in (("a", []), ("b", ["--compile"])):
        ran(allcnn, "--dataset", pictures, *ALLCNN, "--epochs", 1, "--out", tmp_path / at, *more)
    losses = [rows_of(tmp_path / at / "history.csv")[0]["train_loss"] for at in "ab"]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)  # dropout draws other numbers
    assert set(checkpoint.load(tmp_path / "b" / LAST[allcnn])["model"]) == set(allcnn_t(4, 6, 3).state_dict())


@pytest.mark.parametrize(
    ("module", "flags", "said"),
    [
        *((module, f"{flag} 0", flag) for module in SCRIPTS for flag in ("--batch-size", "--epochs")),
        (allcnn, "--val-size 0", "--val-size: must be"),
        (allcnn, "--batch-size 61", "--batch-size 61: there are 60 images"),
        (fast_cifar, "--batch-size 73", "--batch-size 73: there are 72 images"),
        (fast_cifar, "--without salt", "invalid choice: 'salt'"),
        (fast_cifar_ladder, "--seeds 3", "different seeds, 2 or more"),
        (fast_cifar_ladder, "--seeds 3 3", "different seeds, 2 or more, got 3 3"),
        (fast_cifar_ladder, "--val-size 0", "--val-size: must be"),
    ],
)
def test_a_wrong_flag_gets_one_line(module, flags, said, pictures, tmp_path, fails):
    out = tmp_path / "out"
    given = ["--device", "cpu", "--dataset", pictures, "--out", out, *SCRIPTS.get(module, []), *flags.split()]
    assert said in fails(module, given, out)


@pytest.mark.parametrize("module", [*SCRIPTS, benchmark, predict], ids=lambda module: module.__name__[10:])
@pytest.mark.parametrize("case", ["empty", "one class", "cuda"])
def test_data_or_a_device_that_is_not_there_gets_one_line(case, module, runs_dir, pictures, tmp_path, fails):
    out, data = tmp_path / "out", tmp_path / "data"
    flags = ["--runs-dir", runs_dir.parent] if module is predict else SCRIPTS.get(module, [])
    device, said = "cpu", f"--dataset {data}: needs train/<class>/*.png"
    (data / "train").mkdir(parents=True)
    if case == "one class":
        said += " and test/<class>/*.png; train/ has 1 class folder(s)"
        for split in ("train", "test"):
            save_image(np.zeros((3, 32, 32), np.uint8), data / split / "cat" / "0.png")
    elif case == "cuda":
        if torch.cuda.is_available():
            pytest.skip("there is a GPU here")
        device, data, said = "cuda", pictures, "--device cuda: PyTorch finds no such device"
    assert said in fails(module, ["--device", device, "--dataset", data, "--out", out, *flags], out)


def test_what_predict_cannot_read_gets_one_line(runs_dir, pictures, tmp_path, fails):
    out, picture = tmp_path / "out", next((pictures / "test" / CLASSES[0]).glob("*.png"))
    ready, ckpt = ["--runs-dir", runs_dir.parent, "--out", out], tmp_path / "n.pth"
    text = tmp_path / "empty" / "notes.txt"
    text.parent.mkdir()
    text.write_text("no image")
    said = fails(predict, ["--runs-dir", tmp_path, "--out", out, picture], out)
    assert re.search(r"`python cnn_cifar/\w+\.py --runs-dir .*` makes it", said)
    assert "no checkpoint at" in fails(predict, [*ready, "--ckpt", ckpt, picture], out)
    ckpt.write_bytes((runs_dir / "fast_cifar" / "best.pth").read_bytes()[:-200])
    assert "damaged" in fails(predict, [*ready, "--ckpt", ckpt, picture], out)
    checkpoint.save(ckpt, config={"network": "vae"}, model=nn.Linear(2, 2).state_dict())
    assert "holds no network of cnn_cifar" in fails(predict, [*ready, "--ckpt", ckpt, picture], out)
    assert f"{text}: it is no image" in fails(predict, [*ready, picture, text], out)
    assert f"{text.parent} has no image" in fails(predict, [*ready, text.parent], out)
    assert "x.png: no such file" in fails(predict, [*ready, tmp_path / "x.png"], out)
    assert "--dataset shapes has others" in fails(predict, [*ready, "--dataset", "shapes"], out)


@pytest.mark.parametrize("module", LAST)
def test_a_loss_that_is_not_finite_stops_the_run(module, pictures, tmp_path, fails):
    flags = ["--device", "cpu", "--dataset", pictures, "--out", tmp_path, *SCRIPTS[module], "--lr", "1e38"]
    assert "at step" in fails(module, flags)
    assert not list(tmp_path.glob("*.pth"))
