"""Flags that several experiments have."""

import pytest

from shared_utils import cli
from shared_utils.cli import make_parser

DOC = "A question?\n\n    python numpy_nn/some_script.py"


def test_seeds_are_given_once_each(capsys):
    parser = make_parser(DOC, quick={"seeds": [5]})
    cli.add_seeds(parser, [0, 1, 2], "one run each", least=2)
    assert (parser.parse_args([]).seeds, parser.parse_args(["--quick"]).seeds) == ([0, 1, 2], [5])
    assert parser.parse_args(["--quick", "--seeds", "3", "0"]).seeds == [3, 0]
    for given in ("1", "1 1", "0 1 0", "-1 2", "0 4294967296"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--seeds", *given.split()])
        assert "--seeds: must be" in capsys.readouterr().err
