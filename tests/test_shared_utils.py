"""shared_utils: command lines, seeds, devices, runs, checkpoints."""

import argparse
import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from shared_utils import checkpoint, cli, runs
from shared_utils.cli import UserError, make_parser
from shared_utils.device import autocast, pick_device
from shared_utils.seeding import seed_everything

DOC = "A question?\n\n    python numpy_nn/some_script.py --epochs 3\n\nWrites metrics.json."


def example_parser():
    parser = make_parser(DOC, quick={"epochs": 1})
    parser.add_argument("--epochs", type=cli.positive_int, default=10, help="passes over the data")
    parser.add_argument("--resume", action="store_true", help="go on")
    return parser


def example_args(tmp_path, *flags):
    return example_parser().parse_args(["--out", str(tmp_path / "run"), *flags])


# --- cli ----------------------------------------------------------------------------------------------------------


def test_quick_changes_defaults_but_a_flag_wins():
    plain = example_parser().parse_args([])
    assert (plain.epochs, plain.dataset, plain.runs_dir, plain.seed) == (10, "mnist", "runs", 0)
    quick = example_parser().parse_args(["--quick"])
    assert (quick.epochs, quick.dataset, quick.runs_dir) == (1, "digits", "runs/quick")
    given = example_parser().parse_args(["--quick", "--epochs", "7", "--dataset", "mnist", "--runs-dir", "elsewhere"])
    assert (given.epochs, given.dataset, given.runs_dir) == (7, "mnist", "elsewhere")
    assert given.command.startswith("python numpy_nn/some_script.py --quick --epochs 7")


def test_each_real_set_has_its_stand_in():
    for real, stand_in in (("cifar10", "shapes"), ("fashion", "digits"), ("books", "pydocs")):
        assert make_parser(DOC, dataset=real).parse_args(["--quick"]).dataset == stand_in
    with pytest.raises(ValueError, match="epoch"):
        make_parser(DOC, quick={"epoch": 1}).parse_args(["--quick"])


def test_a_parser_asked_with_quick_and_then_without_has_its_own_defaults_again():
    parser = example_parser()
    assert parser.parse_args(["--quick"]).epochs == 1
    assert parser.parse_args([]).epochs == 10


@pytest.mark.parametrize("flags", [["--epochs", "0"], ["--epochs", "many"], ["--seed", "-1"], ["--nonsense"]])
def test_a_wrong_value_is_one_line_and_exit_code_2(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        example_parser().parse_args(flags)
    written = capsys.readouterr()
    assert stop.value.code == 2
    assert written.err.count("\n") == 1
    assert flags[0] in written.err
    assert written.out == ""


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (cli.positive_int, ["1", "70000"], ["0", "-1", "1.5", "x", ""]),
        (cli.non_negative_int, ["0", "3"], ["-1", "0.5"]),
        (cli.at_least(2), ["2", "3"], ["1", "-2", "2.5"]),
        (cli.positive_float, ["1e-3", "2"], ["0", "-1", "nan", "inf"]),
        (cli.non_negative_float, ["0", "0.5"], ["-0.1", "nan", "inf"]),
        (cli.fraction, ["0", "0.5", "1"], ["1.01", "-0.1", "nan"]),
        (cli.share_below_1, ["0", "0.999"], ["1", "-0.1", "nan"]),
    ],
)
def test_value_types(kind, good, bad):
    for text in good:
        assert kind(text) == float(text)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="must be"):
            kind(text)


def test_help_is_the_docstring_with_defaults(capsys):
    with pytest.raises(SystemExit):
        example_parser().parse_args(["--help"])
    shown = capsys.readouterr().out
    assert "python numpy_nn/some_script.py --epochs 3" in shown
    assert "(default: 10)" in shown
    assert "(default: 0)" in shown
    assert "With --quick the defaults are: --epochs 1" in shown


@pytest.mark.parametrize(("error", "code"), [(UserError("no such\nfile"), 2), (KeyboardInterrupt(), 130)])
def test_run_main_ends_in_one_line(error, code, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.run_main(main, example_parser)
    assert stop.value.code == code
    message = capsys.readouterr().err
    assert len(message.strip().splitlines()) == 1
    assert ("no such file" if code == 2 else "--resume") in message


def test_run_main_leaves_a_bug_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run_main(lambda: 1 / 0, example_parser)


# --- seeding, device ----------------------------------------------------------------------------------------------


def test_one_seed_for_everything():
    def draw():
        rng = seed_everything(3)
        return rng.random(), np.random.random(), torch.rand(1).item(), random.random()

    first = draw()
    assert first == draw()
    assert len(set(first)) == 4


def test_numpy_scripts_stay_free_of_torch():
    modules = [
        "checkpoint",
        "cli",
        "data",
        "embedded",
        "gradcheck",
        "plotting",
        "publish",
        "reproduce",
        "runs",
        "seeding",
        "stats",
    ]
    imports = "; ".join(f"import shared_utils.{name}" for name in modules)
    use = "shared_utils.seeding.seed_everything(0); shared_utils.embedded.digits('test')"
    code = f"import sys; {imports}; {use}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=runs.ROOT)


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cuda", "mps", "cpu")
    for absent in ["toaster", "meta"] + ([] if torch.cuda.is_available() else ["cuda"]):
        with pytest.raises(UserError, match="--device"):
            pick_device(absent)


def test_autocast_is_bfloat16_or_nothing():
    a = torch.ones(4, 4)
    with autocast(torch.device("cpu")):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(torch.device("cpu"), enabled=False):
        assert (a @ a).dtype == torch.float32


# --- runs ---------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_flags_its_history_and_its_metrics(tmp_path, capsys):
    run = runs.start_run(example_args(tmp_path, "--seed", "5"))
    run.log(epoch=1, loss=0.123456)
    run.log(epoch=2, loss=0.1)
    with pytest.raises(ValueError, match="columns"):
        run.log(step=3)
    returned = run.finish({"accuracy": np.float32(0.5), "counts": np.arange(2)})
    folder = tmp_path / "run"
    assert json.loads((folder / "config.json").read_text())["flags"]["seed"] == 5
    assert (folder / "history.csv").read_text().splitlines() == ["epoch,loss", "1,0.123456", "2,0.1"]
    assert json.loads((folder / "metrics.json").read_text()) == returned
    assert returned["accuracy"] == 0.5
    assert returned["counts"] == [0, 1]
    assert returned["run"]["quick"] is False
    assert "epoch 1  loss 0.1235" in capsys.readouterr().out


def test_nan_is_no_metric_and_leaves_no_file(tmp_path):
    run = runs.start_run(example_args(tmp_path))
    with pytest.raises(ValueError, match="JSON"):
        run.finish({"loss": math.nan})
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_a_new_run_drops_the_old_history_and_a_resumed_one_keeps_it(tmp_path):
    run = runs.start_run(example_args(tmp_path))
    for epoch in (1, 2, 3):
        run.log(epoch=epoch, loss=0.5)
    run.finish({})
    folder, history = tmp_path / "run", tmp_path / "run" / "history.csv"
    history.write_text(history.read_text() + "4,0.")  # a kill in the middle of a row
    resumed = runs.start_run(example_args(tmp_path, "--resume"))
    assert [row["epoch"] for row in resumed.history()] == ["1", "2", "3"]
    resumed.rewind(2)
    resumed.log(epoch=3, loss=0.5)
    assert history.read_text().split() == ["epoch,loss", "1,0.5", "2,0.5", "3,0.5"]
    resumed.finish({})
    for left in ("last.pth", "last.npz", ".last.123.pth"):
        (folder / left).write_text("of the first run")
    (folder / "holiday.png").write_text("the user's own")
    runs.start_run(example_args(tmp_path))
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "config.json", "holiday.png"]


def test_a_resumed_run_has_the_flags_it_was_made_with(tmp_path):
    runs.start_run(example_args(tmp_path, "--epochs", "9")).finish({})
    kept = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(UserError, match="--epochs 9, not 3"):
        runs.start_run(example_args(tmp_path, "--epochs", "3", "--resume"))
    assert (tmp_path / "run" / "metrics.json").exists()
    assert (tmp_path / "run" / "config.json").read_text() == kept
    runs.start_run(example_args(tmp_path, "--epochs", "9", "--resume", "--device", "cpu"))


@pytest.mark.parametrize("content", ["", "epo", "epoch,loss"])
def test_a_history_without_a_whole_header_is_a_new_one(tmp_path, content):
    run = runs.start_run(example_args(tmp_path))
    (tmp_path / "run" / "history.csv").write_text(content)
    run.rewind(1)
    run.log(epoch=1, loss=torch.tensor(0.25))
    assert run.history() == [{"epoch": "1", "loss": "0.25"}]


def test_a_loss_that_is_not_finite_stops_the_run():
    runs.check_finite(0.1, 1, 0.1)
    with pytest.raises(UserError, match=r"nan at step 7 with learning rate 0\.1: try a lower"):
        runs.check_finite(float("nan"), 7, 0.1)


def test_two_runs_into_one_folder_are_refused(tmp_path):
    run = runs.start_run(example_args(tmp_path))
    run.log(epoch=1)
    with pytest.raises(UserError, match="another run"):
        runs.start_run(example_args(tmp_path))
    assert (tmp_path / "run" / "history.csv").exists()
    run.finish({})
    runs.start_run(example_args(tmp_path))


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match="cannot write"):
        runs.start_run(example_args(tmp_path))
    assert (tmp_path / "run").read_text() == "a file"


def test_replacing_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write_half():
        with runs.replacing(path) as beside:
            beside.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space"):
        write_half()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_a_reader_is_told_the_command_that_makes_the_file(tmp_path):
    args = example_parser().parse_args(["--runs-dir", str(tmp_path), "--quick", "--out", "elsewhere"])
    with pytest.raises(UserError, match=f"`python numpy_nn/train_mlp.py --quick --runs-dir {tmp_path}` makes it"):
        runs.find_output(args, "train_mlp", "best.npz")
    made = tmp_path / "numpy_nn" / "train_mlp" / "best.npz"
    made.parent.mkdir(parents=True)
    made.write_bytes(b"")
    assert runs.find_output(args, "train_mlp", "best.npz") == made


def test_ranks_above_zero_write_nothing(tmp_path):
    run = runs.start_run(example_args(tmp_path), writes=False)
    run.log(epoch=1)
    run.rewind(0)
    run.finish({})
    assert not (tmp_path / "run").exists()


# --- checkpoint ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_brings_back_weights_and_every_random_state(tmp_path):
    rng = seed_everything(1)
    weights = {"w": torch.rand(3)}
    checkpoint.save(tmp_path / "last.pth", rng=rng, config={"width": 3, "dims": (4, 2)}, model=weights, epoch=2)
    expected = rng.random(), torch.rand(2).tolist(), random.random(), np.random.random()
    other = seed_everything(9)
    state = checkpoint.load(tmp_path / "last.pth", expect={"width": 3, "dims": (4, 2)})
    checkpoint.restore_random_states(state, other)
    assert (other.random(), torch.rand(2).tolist(), random.random(), np.random.random()) == expected
    assert torch.equal(state["model"]["w"], weights["w"])
    assert state["epoch"] == 2
    with pytest.raises(UserError, match="width"):
        checkpoint.load(tmp_path / "last.pth", expect={"width": 4})


def test_what_could_not_be_loaded_is_not_saved_and_the_old_file_stays(tmp_path, monkeypatch):
    path = tmp_path / "last.pth"
    checkpoint.save(path, epoch=1)
    with pytest.raises(ValueError, match="could not be loaded"):
        checkpoint.save(path, best=np.float64(0.5))

    def half(state, target):
        target.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file: No space left")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(UserError, match=r"cannot write .*No space"):
        checkpoint.save(path, epoch=2)
    assert checkpoint.load(path)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pth"]


def test_random_states_that_are_not_there(tmp_path):
    checkpoint.save(tmp_path / "a.pth", epoch=1)
    state = checkpoint.load(tmp_path / "a.pth")
    checkpoint.restore_random_states(state)
    for missing in (state, {}):
        with pytest.raises(UserError, match="no random states"):
            checkpoint.restore_random_states(missing, np.random.default_rng(0))


class _Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_bad_checkpoint_is_refused_in_one_line_and_never_executed(tmp_path):
    good = tmp_path / "good.pth"
    checkpoint.save(good, model={"w": torch.rand(1000)})
    content = good.read_bytes()
    trap = tmp_path / "trap.pth"
    torch.save({"config": {}, "x": _Malicious(tmp_path / "executed")}, trap)
    flipped = bytearray(content)
    flipped[content.index(torch.load(good)["model"]["w"].numpy().tobytes()) + 1000] ^= 1
    cases = {"cut.pth": content[: len(content) // 2], "text.pth": b"hello", "empty.pth": b"", "flip.pth": flipped}
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
    for name in [*cases, "trap.pth", "absent.pth"]:
        with pytest.raises(UserError, match=name) as error:
            checkpoint.load(tmp_path / name)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_arrays_on_disk_without_pickle(tmp_path):
    path = tmp_path / "model.npz"
    checkpoint.save_arrays(path, W=np.eye(2), kernel="rbf", degree=3)
    found = checkpoint.load_arrays(path, required=["W", "kernel"])
    assert np.array_equal(found["W"], np.eye(2))
    assert str(found["kernel"]) == "rbf"
    with pytest.raises(UserError, match="lacks b"):
        checkpoint.load_arrays(path, required=["b"])
    with pytest.raises(ValueError, match="object"):
        checkpoint.save_arrays(path, bad=np.array([{}], dtype=object))
    np.savez(tmp_path / "pickled.npz", a=np.array([{}], dtype=object))
    content = path.read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[:-40])
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "single.npy", np.eye(2))
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    for name in ("cut.npz", "text.npz", "pickled.npz", "absent.npz", "single.npz"):
        with pytest.raises(UserError, match=name):
            checkpoint.load_arrays(tmp_path / name)


def test_a_row_written_by_half_does_not_swallow_the_next_one(tmp_path):
    """A full disk or a power cut leaves the last line without its end."""
    run = runs.start_run(example_args(tmp_path))
    run.log(epoch=1, loss=0.5)
    run._lock.close()
    with run.path("history.csv").open("a", encoding="utf-8") as file:
        file.write("2,0.")
    run = runs.start_run(example_args(tmp_path, "--resume"))
    run.log(epoch=2, loss=0.25)
    assert [(row["epoch"], row["loss"]) for row in run.history()] == [("1", "0.5"), ("2", "0.25")]
