"""transformer_lm's measures: bits of bytes, books, positions, copies, and the same numbers by another way."""

import lzma
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shared_utils import checkpoint
from shared_utils.embedded import pydocs
from shared_utils.runs import read_json
from transformer_lm import evaluate, prepare_data
from transformer_lm.baselines import COMPRESSORS, compressed_bits_per_byte, longest_copy, share_known, words_of
from transformer_lm.batches import sliding_losses
from transformer_lm.corpus import Part, load
from transformer_lm.model import TransformerLM
from transformer_lm.ngram import KneserNey


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory):
    """Two texts and a model that knows nothing of them."""
    top = tmp_path_factory.mktemp("runs")
    texts = top / "texts"
    texts.mkdir()
    (texts / "one.txt").write_text(pydocs()[:40_000], encoding="utf-8")
    (texts / "two.txt").write_text(pydocs()[60_000:75_000], encoding="utf-8")
    data = top / "transformer_lm" / "prepare_data"
    prepare_data.main(["--dataset", str(texts), "--vocab-size", "300", "--out", str(data)])
    torch.manual_seed(0)
    model, corpus = TransformerLM(300, 16, 2, 8, 1, 24, 16), load(data)
    folder = top / "transformer_lm" / "train"
    folder.mkdir()
    config = {**model.config, "tokens": "bpe", "data": corpus.fingerprint}
    checkpoint.save(folder / "best.pth", config=config, model=model.state_dict(), name="texts")
    corpus.tokens.save(folder / "tokenizer.json")
    flags = ["--runs-dir", top, "--device", "cpu", "--texts", 2, "--text-tokens", 8, "--order", 3]
    evaluate.main([str(flag) for flag in flags])
    return top / "transformer_lm"


def test_bits_per_byte_are_the_sum_of_all_losses_over_all_bytes(runs_dir):
    metrics, corpus = read_json(runs_dir / "evaluate" / "metrics.json"), load(runs_dir / "prepare_data")
    part = corpus.parts["test"]
    state = checkpoint.load(runs_dir / "train" / "best.pth")
    model = TransformerLM(300, 16, 2, 8, 1, 24, 16).eval()
    model.load_state_dict(state["model"])
    total, seen = 0.0, [corpus.tokens.start, *part.ids.tolist()]
    for first in range(0, len(part.ids), 16):  # window by window
        window = torch.tensor(seen[first : first + 17])
        with torch.no_grad():
            total += F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="sum").item()
    text = corpus.tokens.decode(part.ids)
    row = metrics["ways"][0]
    assert row["bits_per_byte"] == pytest.approx(total / math.log(2) / len(text.encode()), rel=1e-5)
    assert row["perplexity"] == pytest.approx(math.exp(total / len(part.ids)), rel=1e-4)
    assert row["perplexity_per_word"] == pytest.approx(math.exp(total / len(text.split())), rel=0.02)  # at the cuts
    assert metrics["bits_per_byte"] == row["bits_per_byte"]
    assert metrics["nats_per_token"] == row["nats_per_token"]
    sliding = sliding_losses(model, torch.from_numpy(part.ids), corpus.tokens.start, metrics["stride"]).mean().item()
    assert metrics["stride"] == 4
    assert metrics["sliding_nats_per_token"] == pytest.approx(sliding, rel=1e-5)
    assert metrics["below_ngram"] == pytest.approx(1 - row["bits_per_byte"] / metrics["ways"][2]["bits_per_byte"])


def test_the_baselines_know_the_training_text_alone(runs_dir):
    metrics, corpus = read_json(runs_dir / "evaluate" / "metrics.json"), load(runs_dir / "prepare_data")
    train, part = corpus.parts["train"], corpus.parts["test"]
    ways = {row["way"]: row for row in metrics["ways"]}
    losses = KneserNey(train.ids, 300, 3, corpus.tokens.start).losses(part.ids)
    assert ways["Kneser-Ney, 3 tokens"]["nats_per_token"] == pytest.approx(losses.mean())
    known, text = (corpus.tokens.decode(each.ids).encode() for each in (train, part))
    added = len(lzma.compress(known + text, preset=9)) - len(lzma.compress(known, preset=9))
    assert ways["xz -9"]["bits_per_byte"] == pytest.approx(8 * added / len(text))
    assert ways["unigram"]["bits_per_byte"] > ways["Kneser-Ney, 3 tokens"]["bits_per_byte"]
    assert metrics["below_xz"] == pytest.approx(1 - metrics["bits_per_byte"] / ways["xz -9"]["bits_per_byte"])
    ngram = ways["Kneser-Ney, 3 tokens"]["bits_per_byte"]
    assert metrics["below_ngram"] == pytest.approx(1 - metrics["bits_per_byte"] / ngram)
    words = [words_of(each.decode()) for each in (known, text)]
    assert metrics["known_words_of_the_text"] == pytest.approx(np.mean([word in set(words[0]) for word in words[1]]))
    drawn = (runs_dir / "evaluate" / "generated.txt").read_text(encoding="utf-8").split("\n\n---\n\n")
    drawn = [words_of(each)[:-1] for each in drawn]  # the last may be cut
    assert metrics["generated_words"] == sum(map(len, drawn))
    assert metrics["known_words"] == pytest.approx(share_known([w for each in drawn for w in each], words[0]))
    assert metrics["longest_copy"] == max(len(longest_copy(each, words[0])) for each in drawn)


def test_books_add_up_to_the_whole(runs_dir):
    metrics, corpus = read_json(runs_dir / "evaluate" / "metrics.json"), load(runs_dir / "prepare_data")
    counts = corpus.parts["test"].counts
    assert [book["book"] for book in metrics["books"]] == ["one", "two"]
    total = sum(book["nats_per_token"] * counts[book["book"]]["tokens"] for book in metrics["books"])
    assert total / metrics["tokens"] == pytest.approx(metrics["ways"][0]["nats_per_token"])
    bits = sum(book["bits_per_byte"] * counts[book["book"]]["bytes"] for book in metrics["books"])
    assert bits / metrics["bytes"] == pytest.approx(metrics["bits_per_byte"])


def test_positions_are_means_over_windows():
    losses = np.arange(22.0)
    assert evaluate.by_position(losses, 5).tolist() == [7.5, 8.5, 9.5, 10.5, 11.5]
    assert evaluate.by_position(losses[:3], 5).tolist() == [0, 1, 2]


def test_a_text_that_is_known_costs_nearly_nothing():
    text = bytes(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8))
    for name, compress in COMPRESSORS.items():
        assert 8 < compressed_bits_per_byte(b"", text, compress) < 9, name  # noise, and what the format adds
        assert compressed_bits_per_byte(text, text, compress) < 8
    assert compressed_bits_per_byte(text, text, COMPRESSORS["xz -9"]) < 0.2


@pytest.mark.parametrize("seed", range(20))
def test_the_longest_copy_is_found(seed):
    rng = np.random.default_rng(seed)
    known, text = ([str(w) for w in rng.integers(0, 6, n)] for n in (80, 30))
    n = int(rng.integers(5, 12))
    text[7 : 7 + n] = known[40 : 40 + n]
    found = longest_copy(text, known)

    def occurs(run, words):
        return any(words[i : i + len(run)] == run for i in range(len(words) - len(run) + 1))

    assert len(found) >= n
    assert occurs(found, text)
    assert occurs(found, known)
    longer = (text[i : i + len(found) + 1] for i in range(len(text) - len(found)))
    assert not any(occurs(run, known) for run in longer)


def test_copies_and_words_at_the_edges():
    assert longest_copy([], ["a"]) == longest_copy(["b"], ["a"]) == longest_copy(["a"], []) == []
    assert longest_copy(["a", "b"], ["a", "b"]) == ["a", "b"]
    assert share_known(["a", "b", "a", "c"], ["a", "c"]) == 0.75
    assert share_known([], ["a"]) == 0
    assert words_of("“Don’t,” said prince?—ANDREW; it's 1812. 'No' _yes_") == [
        "don’t",
        "said",
        "prince",
        "andrew",
        "it's",
        "1812",
        "no",
        "yes",
    ]


def test_a_text_without_spaces_has_no_perplexity_per_word():
    part = Part(np.arange(9), np.array([9]), {"x": (0, 1)}, {"x": {"bytes": 9, "words": 1, "tokens": 9}})
    row = evaluate.row_of("transformer", np.full(9, 100.0), part)
    assert (row["nats_per_word"], row["perplexity_per_word"]) == (900.0, None)
    part.counts["x"]["words"] = 0
    assert evaluate.row_of("transformer", np.full(9, 1.0), part)["perplexity_per_word"] is None


def test_mistakes_get_one_line(runs_dir, tmp_path, fails):
    flags = ["--runs-dir", runs_dir.parent, "--device", "cpu", "--out", tmp_path / "out"]
    data = tmp_path / "data"
    prepare_data.main(["--dataset", str(runs_dir.parent / "texts"), "--tokens", "byte", "--out", str(data)])
    assert "was not trained on the training text" in fails(evaluate, [*flags, "--data", data], tmp_path / "out")
    other = tmp_path / "other"
    given = ["--dataset", str(runs_dir.parent / "texts"), "--vocab-size", "300", "--seed", "1", "--out", str(other)]
    prepare_data.main(given)  # the test passages of another seed are among those that the model was trained on
    assert "was not trained on the training text" in fails(evaluate, [*flags, "--data", other], tmp_path / "out")
    assert "--stride 17" in fails(evaluate, [*flags, "--stride", 17], tmp_path / "out")
    tail = tmp_path / "tail"
    given = ["--dataset", str(runs_dir.parent / "texts"), "--vocab-size", "300", "--split", "tail"]
    prepare_data.main([*given, "--out", str(tail)])
    state, corpus = checkpoint.load(runs_dir / "train" / "best.pth"), load(tail)
    config = {**state["config"], "vocab_size": corpus.tokens.vocab_size, "data": corpus.fingerprint}
    checkpoint.save(tail / "best.pth", config=config, model=state["model"], name="texts")
    flags += ["--ckpt", tail / "best.pth"]
    assert "has no test text; --part val" in fails(evaluate, [*flags, "--data", tail], tmp_path / "out")
    none = ["--runs-dir", tmp_path / "none", "--device", "cpu"]
    assert "`python transformer_lm/train.py --runs-dir" in fails(evaluate, none)
