"""Texts and tables that runs write and read: any text, any CSV file, and a run's own history.csv."""

import csv

import pytest

from shared_utils import runs
from shared_utils.cli import UserError, make_parser


def test_a_text_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.txt"
    runs.write_text(path, "Fréchet\n")
    assert path.read_bytes() == "Fréchet\n".encode()
    with pytest.raises(UnicodeEncodeError):
        runs.write_text(path, "half a character: \udc80")
    assert path.read_bytes() == "Fréchet\n".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]
    with pytest.raises(UserError, match="cannot write"):
        runs.write_text(tmp_path / "missing" / "file.txt", "x")


def test_rows_become_a_table_below_a_header(tmp_path):
    rows = [{"name": "a, b", "x": 0.1, "n": 3}, {"name": "c", "x": float("inf"), "n": 4}]
    runs.write_csv(tmp_path / "table.csv", rows)
    assert (tmp_path / "table.csv").read_bytes() == b'name,x,n\r\n"a, b",0.1,3\r\nc,inf,4\r\n'
    with (tmp_path / "table.csv").open(newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["a, b", "c"]
    with pytest.raises(ValueError, match="y"):
        runs.write_csv(tmp_path / "table.csv", [{"x": 1}, {"x": 2, "y": 3}])
    assert (tmp_path / "table.csv").read_text().startswith("name")  # the file that was there stays


def test_a_training_is_found_in_the_history_by_its_columns(tmp_path):
    args = make_parser("Q?\n\n    python numpy_nn/some_script.py", dataset=None).parse_args(["--out", str(tmp_path)])
    run = runs.start_run(args)
    assert run.row(arm="none") is None
    assert run.numbers() == []
    for arm, lr in (("none", 0.1), ("none", 1e-05), ("flip", 0.1)):
        run.log(arm=arm, lr=lr, accuracy=0.5)
    assert run.row(arm="none", lr=1e-05) == {"arm": "none", "lr": "1e-05", "accuracy": "0.5"}
    assert run.row(arm="none")["lr"] == "0.1"  # the first
    assert run.row(arm="flip", lr=0.01) is None
    assert run.row(seed=0) is None  # no such column
    with pytest.raises(ValueError, match="none"):
        run.numbers()


def test_a_history_of_numbers(tmp_path):
    args = make_parser("Q?\n\n    python numpy_nn/some_script.py", dataset=None).parse_args(["--out", str(tmp_path)])
    run = runs.start_run(args)
    run.log(epoch=1, loss=0.1)
    run.log(epoch=2, loss=float("inf"))
    assert run.numbers() == [{"epoch": 1.0, "loss": 0.1}, {"epoch": 2.0, "loss": float("inf")}]
