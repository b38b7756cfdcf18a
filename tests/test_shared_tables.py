"""Tables that runs write and read: any CSV file, and a run's own history.csv."""

import csv

import pytest

from shared_utils import runs


def test_rows_become_a_table_below_a_header(tmp_path):
    rows = [{"name": "a, b", "x": 0.1, "n": 3}, {"name": "c", "x": float("inf"), "n": 4}]
    runs.write_csv(tmp_path / "table.csv", rows)
    assert (tmp_path / "table.csv").read_bytes() == b'name,x,n\r\n"a, b",0.1,3\r\nc,inf,4\r\n'
    with (tmp_path / "table.csv").open(newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["a, b", "c"]
    with pytest.raises(ValueError, match="y"):
        runs.write_csv(tmp_path / "table.csv", [{"x": 1}, {"x": 2, "y": 3}])
    assert (tmp_path / "table.csv").read_text().startswith("name")  # the file that was there stays
