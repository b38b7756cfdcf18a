"""cnn_cifar's transfer study: where pretrained weights come from, and what each way learns."""

import urllib.error

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from cnn_cifar import transfer_learning
from cnn_cifar.inputs import Split, load
from cnn_cifar.pretrained import backbone, read_weights
from cnn_cifar.resnet import resnet18
from shared_utils.runs import read_json

FLAGS = ["--resize", 32, "--width", 4, "--labels", 12, 30, "--epochs", 1, "--least-updates", 3, "--batch-size", 16]
FLAGS += ["--val-size", 12, "--seeds", 3, 5, "--lrs", 0.05, 0.1, "--device", "cpu"]
SOURCE = ["--source", "digits", "--source-size", 64, "--source-epochs", 1]


@pytest.fixture(autouse=True, scope="module")
def no_figures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer_learning, "save_figure", lambda figure, path: path.write_bytes(b""))
        yield


@pytest.fixture(scope="module")
def folder(pictures, tmp_path_factory):
    """A finished run."""
    out = tmp_path_factory.mktemp("transfer")
    transfer_learning.main([str(flag) for flag in [*FLAGS, *SOURCE, "--dataset", pictures, "--out", out]])
    return out


def parsed(*flags):
    return transfer_learning.build_parser().parse_args([str(flag) for flag in [*FLAGS, *flags]])


def history(path):
    header, *rows = (line.split(",") for line in path.read_text(encoding="utf-8").splitlines())
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_a_file_of_torchvisions_weights_gives_torchvisions_features(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(weights=None).eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    ours = backbone(64, read_weights(tmp_path / "w.pth"), "w.pth").eval()
    theirs.fc = nn.Identity()
    x = torch.rand(2, 3, 40, 40)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def test_frozen_features_do_not_depend_on_the_other_images(pictures):
    args = parsed("--dataset", pictures)
    data = load(args, torch.device("cpu"), shape=None)
    torch.manual_seed(0)
    given = backbone(4, None, "").state_dict()
    before = {name: value.clone() for name, value in given.items()}
    all_of_them = transfer_learning.features_of(data, given, args)
    assert all(torch.equal(given[name], before[name]) for name in before)  # BatchNorm's statistics too
    one = Split(data.train.x[:1], data.train.y[:1])
    alone = transfer_learning.features_of(transfer_learning.replace(data, train=one), given, args)
    assert torch.allclose(alone.train.x[0], all_of_them.train.x[0], rtol=0.02, atol=0.02)  # bfloat16
    assert all_of_them.test.x.shape == (len(data.test), 32)


def both(*folders):
    return [history(folder / "history.csv") for folder in folders]


def test_few_images_get_as_many_updates_as_are_asked_for():
    args = parsed("--epochs", 5, "--least-updates", 20, "--batch-size", 10)
    assert transfer_learning.updates_for(30, args) == 20
    assert transfer_learning.updates_for(100, args) == 50


def test_the_table_is_made_of_the_rows(folder):
    metrics, rows = read_json(folder / "metrics.json"), history(folder / "history.csv")
    for row in metrics["labels"]:
        right = {}
        for way in transfer_learning.WAYS:
            mine = [r for r in rows if (r["labels"], r["way"]) == (str(row["labels"]), way)]
            first = {float(r["lr"]): float(r["val_accuracy"]) for r in mine if r["seed"] == "3"}
            assert row[f"{way}_lr"] == max(first, key=first.get)
            right[way] = np.mean([float(r["test_accuracy"]) for r in mine if float(r["lr"]) == row[f"{way}_lr"]])
            assert row[way] == pytest.approx(right[way])
        assert row["frozen_gain"] == pytest.approx(right["frozen"] - right["scratch"])


def test_source_pth_is_a_file_of_weights(folder, pictures, tmp_path):
    flags = [*FLAGS, "--dataset", pictures, "--out", tmp_path, "--weights", folder / "source.pth"]
    metrics, pretrained = transfer_learning.main([str(flag) for flag in flags]), read_json(folder / "metrics.json")
    assert metrics["origin"] == "source.pth"
    assert [row["fine-tuned"] for row in metrics["labels"]] == [row["fine-tuned"] for row in pretrained["labels"]]


def test_another_runs_pretraining_is_not_taken_for_this_ones(folder, pictures, tmp_path, monkeypatch):
    """A new run in a folder where one has been, stopped while it pretrains, then resumed."""
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "source.pth").write_bytes((folder / "source.pth").read_bytes())
    flags = [str(flag) for flag in [*FLAGS, *SOURCE, "--source-lr", 0.01, "--dataset", pictures, "--out", tmp_path]]
    with monkeypatch.context() as patch:
        patch.setattr(transfer_learning, "fit", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            transfer_learning.main(flags)
    transfer_learning.main([*flags, "--resume"])
    first, second = (read_weights(path / "source.pth")["conv1.weight"] for path in (folder, tmp_path))
    assert not torch.equal(first, second)
    losses = [
        {(r["way"], r["labels"], r["seed"], r["lr"]): r["train_loss"] for r in found}
        for found in both(folder, tmp_path)
    ]
    for key in set(losses[0]) & set(losses[1]):
        assert (losses[0][key] == losses[1][key]) == (key[0] == "scratch")  # it alone knows nothing of the source


def test_weights_that_cannot_be_used_get_one_line(pictures, tmp_path, fails, monkeypatch):
    out, path = tmp_path / "out", tmp_path / "w.pth"
    flags = [*FLAGS, "--dataset", pictures, "--out", out]
    given = [*flags, "--weights", path]
    assert "no weights at" in fails(transfer_learning, given, out)
    path.write_text("weights")
    assert "is damaged or no file of weights" in fails(transfer_learning, given, out)
    torch.save({"run": print}, path)  # a pickle that names a function
    assert "is damaged or no file of weights" in fails(transfer_learning, given, out)
    for nothing in ({"epoch": 3}, {"model": torch.ones(2)}, {"model": [1, 2]}, {0: torch.ones(2)}, [torch.ones(2)]):
        torch.save(nothing, path)
        assert "holds no state dict" in fails(transfer_learning, given, out)
    torch.save(resnet18().state_dict(), path)
    assert "w.pth is no ResNet-18 of 4 channels and up" in fails(transfer_learning, given, out)
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), path)
    assert "w.pth is no ResNet-18" in fails(transfer_learning, given, out)

    def offline(*args, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    said = fails(transfer_learning, [*flags, "--data-dir", tmp_path], out)
    assert "https://download.pytorch.org/models/resnet18" in said
    assert "--source fashion" in said
