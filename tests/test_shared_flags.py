"""Flags that several experiments have."""

import pytest
import torch

from shared_utils import checkpoint, cli
from shared_utils.cli import UserError, make_parser
from shared_utils.device import autocast, has_bfloat16

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


def test_a_model_of_other_data_is_refused():
    learned = {"dataset": "mnist", "val_size": 300, "per_class": None}
    for asked in ({"dataset": "mnist", "val_size": 300, "seed": 1}, {"per_class": None}, {}):
        checkpoint.refuse_other_data("best.pth", learned, asked)
    for asked, said in (
        ({"dataset": "digits"}, "--dataset mnist, not digits"),
        ({"val_size": 0}, "--val-size 300, not 0"),
    ):
        with pytest.raises(UserError, match=f"best.pth was trained with {said}"):
            checkpoint.refuse_other_data("best.pth", learned, asked)
    with pytest.raises(UserError, match="--per-class None, not 5"):
        checkpoint.refuse_other_data("best.pth", learned, {"per_class": 5})


def test_bfloat16_is_off_in_quick_runs_unless_asked_for(capsys):
    parser = make_parser(DOC)
    cli.add_amp(parser, by_machine=True)
    for given, amp in ([], None), (["--no-amp"], False), (["--quick"], False), (["--quick", "--amp"], True):
        assert parser.parse_args(given).amp == amp
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert "--no-amp" in capsys.readouterr().out.rpartition("With --quick the defaults are:")[2]
    plain = make_parser(DOC)
    cli.add_amp(plain)
    assert [plain.parse_args(given).amp for given in ([], ["--quick"], ["--amp"])] == [False, False, True]


def test_without_being_asked_autocast_computes_in_bfloat16_where_the_processor_has_it(monkeypatch):
    a = torch.ones(4, 4)
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        known = {"avx2": True, "avx512_bf16": native}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known, raising=False)
        with autocast(torch.device("cpu"), None):
            assert (a @ a).dtype == dtype
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an older PyTorch
    assert [has_bfloat16(torch.device(name)) for name in ("cpu", "mps")] == [False, False]
    for native in (True, False):  # of GPUs of before 2020, bfloat16 is emulated
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert has_bfloat16(torch.device("cuda")) == native
