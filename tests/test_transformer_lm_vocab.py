"""transformer_lm's study of vocabularies: the same operations for each, the measures, resuming."""

import gc
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from shared_utils import checkpoint
from shared_utils.embedded import pydocs
from shared_utils.runs import read_json
from transformer_lm import train, vocab_study
from transformer_lm.batches import losses_of_text
from transformer_lm.checkpoints import load_model
from transformer_lm.corpus import load
from transformer_lm.model import TransformerLM

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "one.txt").write_text(pydocs()[:40_000], encoding="utf-8")
    return folder


def flags_of(texts, out):
    given = ["--dataset", texts, "--vocab-sizes", 400, 261, "--seeds", 0, 1, "--updates", 4, "--device", "cpu"]
    return [str(flag) for flag in [*given, "--quick", "--out", out]]


@pytest.fixture(scope="module")
def studied(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    return out, vocab_study.main(flags_of(texts, out))


def test_operations_are_those_of_a_counted_forward_pass():
    """PyTorch's own counter of products: a backward pass takes twice the forward."""
    counter = FlopCounterMode(display=False)
    model = TransformerLM(2048, attention="manual", dropout=0.0)
    with counter, torch.no_grad():
        model(torch.zeros(2, model.context, dtype=torch.int64))
    assert vocab_study.operations_per_token(2048, False) == 3 * counter.get_total_flops() / (2 * model.context)


def test_every_size_gets_the_same_operations(studied):
    out, metrics = studied
    assert [row["vocab_size"] for row in metrics["sizes"]] == [261, 400]
    costs = [vocab_study.operations_per_token(row["vocab_size"], True) for row in metrics["sizes"]]
    assert metrics["sizes"][1]["updates"] == 4
    assert metrics["sizes"][0]["updates"] == round(4 * costs[1] / costs[0])
    assert metrics["operations"] == 4 * costs[1] * 16 * 32
    for row in metrics["sizes"]:
        assert row["learned_tokens"] == row["updates"] * 16 * 32
        corpus = load(out / f"data_{row['vocab_size']}")
        assert row["times_read"] == pytest.approx(row["learned_tokens"] / len(corpus.parts["train"].ids))


def test_bits_per_byte_are_those_of_the_kept_weights_on_the_same_text(studied):
    out, metrics = studied
    found = {size: [] for size in (261, 400)}
    for size, bits in found.items():
        corpus = load(out / f"data_{size}")
        for seed in (0, 1):
            model, tokens, _ = load_model(out / f"train_{size}_{seed}" / "best.pth", CPU)
            losses = losses_of_text(model, torch.from_numpy(corpus.parts["test"].ids), tokens.start)
            text = tokens.decode(corpus.parts["test"].ids)
            bits.append(losses.sum().item() / math.log(2) / len(text.encode()))
    for row in metrics["sizes"]:
        assert row["bits_per_byte"] == pytest.approx(sum(found[row["vocab_size"]]) / 2, rel=1e-5)
    best = min(metrics["sizes"], key=lambda row: row["bits_per_byte"])
    assert metrics["best_vocab_size"] == best["vocab_size"]
    last = metrics["sizes"][-1]["bits_per_byte"]
    assert metrics["largest_above_best"] == pytest.approx(last / best["bits_per_byte"] - 1)


@pytest.mark.parametrize("stop_after", [1, 5])
def test_a_stopped_study_ends_with_the_same_numbers(studied, texts, tmp_path, monkeypatch, stop_after):
    save, calls = checkpoint.save, iter(range(10**6))

    def stop(path, **state):
        save(path, **state)
        if path.name == "last.pth" and next(calls) == stop_after - 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            vocab_study.main(flags_of(texts, tmp_path))
    gc.collect()  # the stopped run's frames, which hold its locks as its process would
    metrics = vocab_study.main([*flags_of(texts, tmp_path), "--resume"])
    whole = read_json(studied[0] / "metrics.json")
    for found in (metrics, whole):
        del found["run"]
        for row in found["sizes"]:
            del row["training_seconds"]
    assert metrics == whole


def test_a_vocabulary_below_the_bytes_gets_one_line(texts, tmp_path, fails):
    given = [*flags_of(texts, tmp_path / "out"), "--vocab-sizes", "100"]
    assert "--vocab-size 100" in fails(vocab_study, given)


def test_the_default_sizes_are_trains():
    args = train.build_parser().parse_args([])
    assert vocab_study.tokens_per_update(False) == args.batch_size * args.context == 64 * 128
