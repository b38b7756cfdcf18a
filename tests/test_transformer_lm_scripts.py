"""transformer_lm's scripts: preparing, training, resuming, writing; and what they say to a user's mistake."""

import io
import math
import shutil
import sys

import numpy as np
import pytest
import torch

from shared_utils import checkpoint
from shared_utils.embedded import pydocs
from shared_utils.runs import read_json
from transformer_lm import generate, prepare_data, train
from transformer_lm.batches import losses_of_text, total_loss
from transformer_lm.checkpoints import load_model
from transformer_lm.corpus import load

CPU = torch.device("cpu")
TRAIN = ["--d-model", 16, "--n-layers", 2, "--d-ff", 24, "--context", 16, "--batch-size", 8, "--updates", 12]
TRAIN += ["--eval-every", 4, "--sample-tokens", 5, "--device", "cpu", "--lr", 0.01]


def ran(module, *flags):
    return module.main([str(flag) for flag in flags])


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "one.txt").write_text(pydocs()[:30_000], encoding="utf-8")
    (folder / "two.txt").write_text(pydocs()[50_000:62_000], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def runs_dir(texts, tmp_path_factory):
    top = tmp_path_factory.mktemp("runs")
    ran(prepare_data, "--dataset", texts, "--vocab-size", 300, "--runs-dir", top)
    ran(train, *TRAIN, "--runs-dir", top)
    return top


def test_preparing_writes_what_is_read(runs_dir, texts):
    folder = runs_dir / "transformer_lm" / "prepare_data"
    corpus, metrics = load(folder), read_json(folder / "metrics.json")
    assert corpus.tokens.vocab_size == metrics["vocab_size"] == 300
    counted = {row["part"]: row for row in metrics["parts"]}
    whole = sum(len(corpus.tokens.normalize(path.read_text(encoding="utf-8"))) for path in texts.glob("*.txt"))
    assert sum(row["characters"] for row in counted.values()) == pytest.approx(whole, abs=4)  # ends are stripped
    assert metrics["train_tokens"] == counted["train"]["tokens"] == len(corpus.parts["train"].ids)
    used = np.bincount(corpus.parts["train"].ids, minlength=300)
    assert metrics["seen"] == len(set(corpus.parts["train"].ids.tolist())) < 300
    assert metrics["seen_less_than_100_times"] == ((used > 0) & (used < 100)).sum()


@pytest.mark.parametrize("kind", ["byte", "char"])
def test_the_other_tokens_and_the_tail(kind, texts, tmp_path):
    flags = ["--dataset", texts, "--tokens", kind, "--split", "tail", "--out", tmp_path]
    metrics = ran(prepare_data, *flags)
    corpus = load(tmp_path)
    text = (texts / "one.txt").read_text(encoding="utf-8").strip() + "\n"
    assert corpus.tokens.decode(corpus.parts["train"].book("one")) == text[: int(0.9 * len(text))]
    assert [row["tokens"] for row in metrics["parts"]][2] == 0


def test_training_lowers_the_loss_and_keeps_the_best(runs_dir):
    folder = runs_dir / "transformer_lm"
    metrics, corpus = read_json(folder / "train" / "metrics.json"), load(folder / "prepare_data")
    rows = (folder / "train" / "history.csv").read_text(encoding="utf-8").splitlines()
    assert [row.split(",")[0] for row in rows] == ["update", "4", "8", "12"]
    model, tokens, state = load_model(folder / "train" / "best.pth", CPU)
    val = torch.from_numpy(corpus.parts["val"].ids)
    loss = losses_of_text(model, val, tokens.start).mean().item()
    assert metrics["val_loss"] == pytest.approx(loss, rel=1e-4) == pytest.approx(state["val_loss"], rel=1e-4)
    assert loss < math.log(300)
    bits = loss * len(val) / math.log(2) / corpus.parts["val"].total("bytes")
    assert metrics["val_bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    assert (folder / "train" / "samples.txt").stat().st_size > 0


@pytest.mark.parametrize(
    "flags", [[], ["--pack", "--schedule", "cosine", "--warmup", 3, "--modern", "--tied", "--optimizer", "muon"]]
)
@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_stopped_training_ends_with_the_same_weights(flags, stop_after, runs_dir, tmp_path, stopped):
    given = [*TRAIN, *flags, "--data", runs_dir / "transformer_lm" / "prepare_data"]
    ran(train, *given, "--out", tmp_path / "whole")
    stopped(stop_after, lambda: ran(train, *given, "--out", tmp_path / "stopped"))
    ran(train, *given, "--out", tmp_path / "stopped", "--resume")
    for name in ("best.pth", "last.pth"):
        one, other = (checkpoint.load(tmp_path / run / name)["model"] for run in ("whole", "stopped"))
        assert all(torch.equal(one[key], other[key]) for key in one)
    one, other = (read_json(tmp_path / run / "metrics.json") for run in ("whole", "stopped"))
    for metrics in (one, other):
        for key in ("run", "training_seconds", "tokens_per_second"):
            del metrics[key]
    assert one == other


def test_the_rate_rises_and_falls():
    args = train.build_parser().parse_args(["--schedule", "cosine", "--warmup", "10", "--updates", "110"])
    rates = [train.share_of_rate(args, update) for update in range(110)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1
    assert rates[60] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.001
    args.schedule, args.warmup = "constant", 0
    assert {train.share_of_rate(args, update) for update in range(110)} == {1.0}


def test_both_optimizers_follow_the_schedule(runs_dir, tmp_path, monkeypatch):
    rates = {}
    for kind in (torch.optim.AdamW, train.Muon):
        rates[kind] = seen = []

        def watched(self, *given, step=kind.step, seen=seen):
            seen.append([group["lr"] for group in self.param_groups])
            return step(self, *given)

        monkeypatch.setattr(kind, "step", watched)
    flags = [*TRAIN, "--schedule", "cosine", "--warmup", 3, "--optimizer", "muon", "--muon-lr", 0.2, "--out", tmp_path]
    ran(train, *flags, "--data", runs_dir / "transformer_lm" / "prepare_data")
    args = train.build_parser().parse_args([str(flag) for flag in flags])
    shares = [train.share_of_rate(args, update) for update in range(12)]
    assert rates[torch.optim.AdamW] == [[pytest.approx(0.01 * share)] * 2 for share in shares]
    assert rates[train.Muon] == [[pytest.approx(0.2 * share)] for share in shares]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [False, True])
def test_matrices_decay_and_nothing_else_and_muon_has_those_of_the_blocks(tied, optimizer):
    model = train.TransformerLM(50, 16, 2, 8, 2, 24, 16, tied=tied)
    flags = ["--weight-decay", "0.3", "--optimizer", optimizer, "--lr", "0.002", "--muon-lr", "0.2"]
    adamw, *others = train.make_optimizers(model, train.build_parser().parse_args(flags))
    decays, rest = adamw.param_groups
    assert (decays["weight_decay"], rest["weight_decay"], rest["peak"]) == (0.3, 0.0, 0.002)
    assert len(decays["params"]) == (not tied) + (0 if others else 2 * 6)
    assert all(p.ndim == 2 for p in decays["params"])
    assert any(p is model.embedding.weight for p in rest["params"])
    hidden = others[0].param_groups[0]["params"] if optimizer == "muon" else []
    assert {id(p) for p in hidden} == ({id(p) for p in model.blocks.parameters() if p.ndim == 2} if hidden else set())
    assert [type(each).__name__ for each in others] == (["Muon"] if optimizer == "muon" else [])
    assert all(each.param_groups[0]["peak"] == 0.2 for each in others)
    assert len(decays["params"]) + len(rest["params"]) + len(hidden) == len(list(model.parameters()))


def test_what_is_written_goes_on_from_the_prompt(runs_dir, tmp_path):
    flags = ["--runs-dir", runs_dir, "--max-new-tokens", 9, "--device", "cpu", "--prompt", "The Statement", ""]
    metrics = ran(generate, *flags, "--n", 2, "--out", tmp_path / "a")
    texts = (tmp_path / "a" / "generated.txt").read_text(encoding="utf-8").split("\n\n---\n\n")
    assert len(texts) == metrics["texts"] == 4
    assert all(text.startswith("the statement") for text in texts[:2])
    assert texts[0] != texts[1]
    ran(generate, *flags, "--n", 2, "--no-cache", "--out", tmp_path / "b")
    assert (tmp_path / "b" / "generated.txt").read_bytes() == (tmp_path / "a" / "generated.txt").read_bytes()


def test_a_long_prompt_is_seen_from_its_end_and_that_is_said(runs_dir, tmp_path, capsys):
    flags = ["--runs-dir", runs_dir, "--max-new-tokens", 3, "--device", "cpu", "--out", tmp_path]
    ran(generate, *flags, "--prompt", "a long prompt " * 30)
    assert "the model sees the last 16" in capsys.readouterr().err


def test_a_conversation_ends_with_an_empty_line_or_the_end(runs_dir, tmp_path, monkeypatch, capsys):
    flags = [
        "--runs-dir",
        runs_dir,
        "--max-new-tokens",
        3,
        "--device",
        "cpu",
        "--out",
        tmp_path / "no",
        "--interactive",
    ]
    for said in ("The docs\n\n", "The docs\n"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(said))
        assert ran(generate, *flags) == {}
        assert "the docs" in capsys.readouterr().out
    assert not (tmp_path / "no").exists()


def test_a_mistake_gets_one_line(runs_dir, texts, tmp_path, fails):
    out = tmp_path / "out"
    folder = runs_dir / "transformer_lm"
    short = tmp_path / "short"
    short.mkdir()
    (short / "x.txt").write_text("", encoding="utf-8")
    assert "is empty" in fails(prepare_data, ["--dataset", short, "--out", out], out)
    (short / "x.txt").write_text("word", encoding="utf-8")
    assert "no passages" in fails(prepare_data, ["--dataset", short, "--out", out], out)
    (short / "x.txt").write_bytes(b"\xff\xfe\x81")
    assert "x.txt" in fails(prepare_data, ["--dataset", short, "--out", out], out)
    assert "--vocab-size 100" in fails(prepare_data, ["--dataset", texts, "--vocab-size", 100, "--out", out], out)
    given = [*TRAIN, "--out", out, "--data", folder / "prepare_data"]
    assert "fewer than --context 9999" in fails(train, [*given, "--context", 9999], out)
    assert "must be even" in fails(train, [*given, "--d-model", 15], out)
    assert "must be even" in fails(train, [*given, "--modern", "--head-dim", 3], out)
    made = r"`python transformer_lm/prepare_data.py --runs-dir"
    assert made in fails(train, [*TRAIN, "--runs-dir", tmp_path / "none", "--out", out])
    assert "cannot read" in fails(train, [*TRAIN, "--data", tmp_path, "--out", out])
    write = ["--runs-dir", runs_dir, "--out", tmp_path / "w", "--device", "cpu"]
    for flags, said in (
        (["--top-k", 0], "--top-k: must be"),
        (["--top-p", 1.5], "--top-p 1.5"),
        (["--temperature", -1], "--temperature: must be"),
        (["--prompt", "half a \udcff"], "must be UTF-8 text"),  # what Python makes of other bytes
        (["--ckpt", tmp_path / "none.pth"], "no checkpoint at"),
    ):
        assert said in fails(generate, [*write, *flags], tmp_path / "w")
    bad = tmp_path / "bad"
    shutil.copytree(folder / "prepare_data", bad)
    (bad / "meta.json").write_text('{"name": "x"}', encoding="utf-8")
    assert "is not what prepare_data.py writes" in fails(train, [*TRAIN, "--data", bad, "--out", out])
    shutil.copy(folder / "prepare_data" / "meta.json", bad / "meta.json")
    np.save(bad / "train_ends.npy", np.array([3, 5]))
    assert "does not fit" in fails(train, [*TRAIN, "--data", bad, "--out", out])


def test_a_checkpoint_with_another_tokenizer_is_refused(runs_dir, tmp_path, fails):
    best = runs_dir / "transformer_lm" / "train" / "best.pth"
    (tmp_path / "best.pth").write_bytes(best.read_bytes())
    flags = ["--ckpt", tmp_path / "best.pth", "--device", "cpu", "--out", tmp_path / "out"]
    assert "no tokenizer at" in fails(generate, flags)
    (tmp_path / "tokenizer.json").write_text('{"kind": "byte"}', encoding="utf-8")
    assert "was trained with 300 bpe tokens; tokenizer.json beside it has 257 byte" in fails(generate, flags)
    checkpoint.save(tmp_path / "best.pth", config={"network": "vae"}, model={})
    assert "holds no language model" in fails(generate, flags)


def test_a_run_goes_on_with_its_own_data_alone(runs_dir, texts, tmp_path, fails):
    data, flags = tmp_path / "data", [*TRAIN, "--data", tmp_path / "data", "--out", tmp_path / "run"]
    ran(prepare_data, "--dataset", texts, "--vocab-size", 300, "--out", data)
    ran(train, *flags)
    ran(prepare_data, "--dataset", texts, "--vocab-size", 300, "--out", data, "--seed", 1)
    assert "has data = " in fails(train, [*flags, "--resume"])


def test_steps_are_cut_to_a_norm_of_one(runs_dir, tmp_path, monkeypatch):
    """An update's gradient is made large by a loss of a thousand times its size; Adam alone would not notice."""
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def watched(parameters, largest):
        parameters = list(parameters)
        before = clip(parameters, largest)
        norms.append((before.item(), torch.stack([p.grad.norm() for p in parameters]).norm().item()))
        return before

    monkeypatch.setattr(train, "total_loss", lambda *given: 1000 * total_loss(*given))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    ran(train, *TRAIN, "--data", runs_dir / "transformer_lm" / "prepare_data", "--out", tmp_path, "--updates", 2)
    assert len(norms) == 2
    assert all(before > 100 and after == pytest.approx(1, rel=1e-3) for before, after in norms)


@pytest.mark.slow
def test_a_compiled_network_learns_the_same(runs_dir, tmp_path):
    given = [*TRAIN, "--dropout", 0, "--data", runs_dir / "transformer_lm" / "prepare_data", "--updates", 4]
    plain, compiled = (ran(train, *given, *more, "--out", tmp_path / str(len(more))) for more in ([], ["--compile"]))
    assert compiled["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-4)
    assert compiled["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-4)


def test_validation_may_be_a_part_of_the_text(runs_dir, tmp_path):
    data = runs_dir / "transformer_lm" / "prepare_data"
    metrics = ran(train, *TRAIN, "--data", data, "--out", tmp_path, "--eval-tokens", 50)
    corpus = load(data)
    text = corpus.tokens.decode(corpus.parts["val"].ids[:50])
    bits = metrics["val_loss"] * 50 / math.log(2) / len(text.encode())
    assert metrics["val_bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def test_a_rate_too_high_stops_the_run(runs_dir, tmp_path, fails):
    flags = [*TRAIN, "--lr", 1e30, "--data", runs_dir / "transformer_lm" / "prepare_data", "--out", tmp_path]
    assert "try a lower --lr" in fails(train, flags)
