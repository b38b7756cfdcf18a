"""transformer_lm's study of vocabularies: the same operations for each, the measures, resuming."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from shared_utils.embedded import pydocs
from shared_utils.runs import read_json
from transformer_lm import train, vocab_study
from transformer_lm.baselines import share_known, words_of
from transformer_lm.batches import sliding_losses
from transformer_lm.checkpoints import load_model
from transformer_lm.corpus import load
from transformer_lm.model import TransformerLM
from transformer_lm.ngram import KneserNey

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "one.txt").write_text(pydocs()[:40_000], encoding="utf-8")
    return folder


def flags_of(texts, out):
    given = ["--dataset", texts, "--vocab-sizes", 400, 261, "--seeds", 0, 1, "--lrs", 0.001, 0.01, "--updates", 4]
    return [str(flag) for flag in [*given, "--device", "cpu", "--quick", "--out", out]]


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


def test_bits_per_byte_are_those_of_the_rate_that_is_best_on_validation(studied):
    out, metrics = studied
    for row in metrics["sizes"]:
        size, corpus, found = row["vocab_size"], load(out / f"data_{row['vocab_size']:.0f}"), {}
        for lr in ("0.001", "0.01"):
            for name in ("val", "test"):
                bits = []
                for seed in (0, 1):
                    model, tokens, _ = load_model(out / f"train_{size:.0f}_{lr}_{seed}" / "best.pth", CPU)
                    part = corpus.parts[name]
                    losses = sliding_losses(model, torch.from_numpy(part.ids), tokens.start, model.context // 4)
                    bits.append(losses.sum().item() / math.log(2) / len(tokens.decode(part.ids).encode()))
                found[lr, name] = sum(bits) / 2
        best = min(("0.001", "0.01"), key=lambda lr: found[lr, "val"])
        assert row["lr"] == float(best)
        assert row["test_bits_per_byte"] == pytest.approx(found[best, "test"], rel=1e-5)
        assert row["val_bits_per_byte"] == pytest.approx(found[best, "val"], rel=1e-5)
        train_ids, test = corpus.parts["train"].ids, corpus.parts["test"]
        ngram = KneserNey(train_ids, int(size), 5, corpus.tokens.start).losses(test.ids).sum()
        assert row["kneser_ney"] == pytest.approx(ngram / math.log(2) / test.total("bytes"))
        known = []
        for seed in (0, 1):
            model, tokens, _ = load_model(out / f"train_{size:.0f}_{best}_{seed}" / "best.pth", CPU)
            torch.manual_seed(0)  # --seed
            texts, length = vocab_study.DRAWN
            drawn = model.generate(torch.full((texts, 1), tokens.start), length, temperature=0.9)[:, 1:].tolist()
            words = [words_of(tokens.decode(one)) for one in drawn]
            whole = [word for each in words for word in each[: len(each) - 1]]  # the last may be cut
            known.append(share_known(whole, words_of(tokens.decode(train_ids))))
        assert row["known_words"] == pytest.approx(sum(known) / 2)
    best = min(metrics["sizes"], key=lambda row: row["val_bits_per_byte"])
    assert metrics["best_vocab_size"] == best["vocab_size"]
    last = metrics["sizes"][-1]["test_bits_per_byte"]
    assert metrics["largest_above_best"] == pytest.approx(last / best["test_bits_per_byte"] - 1)


def test_the_best_is_chosen_on_validation():
    def size(vocab, val, test):
        row = {"vocab_size": vocab, "val_bits_per_byte": val, "test_bits_per_byte": test, "lr": 0.1, "known_words": 1}
        return {**row, "times_read": 1}

    found = vocab_study.findings([size(1, 3.0, 1.0), size(2, 2.0, 2.0), size(3, 2.5, 1.8)], [0.1, 0.2])
    assert (found["best_vocab_size"], found["best_bits_per_byte"]) == (2, 2.0)
    assert found["largest_above_best"] == pytest.approx(-0.1)
    assert found["as_good_on_validation"] == "2"
    assert found["at_the_highest_rate"] == []
    found = vocab_study.findings([size(1000, 2.02, 1.0), size(2000, 2.0, 2.0), size(3000, 2.009, 1.8)], [0.1])
    assert found["as_good_on_validation"] == "2,000 and 3,000"


def test_the_largest_and_the_smallest_are_compared_with_the_best_on_the_test_text():
    table = [
        {"vocab_size": size, "val_bits_per_byte": val, "test_bits_per_byte": test, "lr": 0.1, "times_read": 1}
        | {"known_words": known, "kneser_ney": 3.0, "of_seeds": [test]}
        for size, val, test, known in ((261, 2.4, 2.6, 0.5), (2048, 2.0, 2.0, 0.8), (16384, 2.1, 2.2, 0.9))
    ]
    found = vocab_study.findings(table, [0.1, 0.01])
    assert found["smallest_above_best"] == pytest.approx(0.3)
    assert found["largest_above_best"] == pytest.approx(0.1)
    assert (found["known_words_of_best"], found["known_words_of_largest"]) == (0.8, 0.9)
    assert found["at_the_highest_rate"] == [261, 2048, 16384]
    title = vocab_study.draw(table, found, 1e12, "text").get_suptitle()
    assert title.endswith("2,048 need 2.000 bits per byte of test, 16,384 +10.0%, 261 +30.0%")


def test_each_seed_trains_by_the_recipe_of_the_docstring(texts, tmp_path, monkeypatch):
    asked = []

    def trained(argv):
        args = train.build_parser().parse_args(argv)
        asked.append((args.seed, args.lr))
        recipe = (args.pack, args.amp, args.optimizer, args.muon_lr, args.schedule, args.warmup, args.eval_every)
        assert recipe == (True, True, "muon", 0.05, "cosine", 2, 10)
        assert (args.updates, args.batch_size, args.quick) == (40, 16, True)
        return {"parameters": 7, "learned_tokens": 900, "training_seconds": 1.0}

    bits = {"val_bits_per_byte": 2.0, "test_bits_per_byte": 2.5, "known_words": 0.5}
    monkeypatch.setattr(vocab_study.train, "main", trained)
    monkeypatch.setattr(vocab_study, "measured", lambda *_: bits)
    given = ["--vocab-sizes", "400", "--updates", "40", "--seed", "5", "--seeds", "0", "2"]
    (row,) = vocab_study.main([*flags_of(texts, tmp_path), *given])["sizes"]
    assert asked == [(5, 0.001), (7, 0.001), (5, 0.01), (7, 0.01)]
    part = load(tmp_path / "data_400").parts["train"]
    assert row["bytes_per_token"] == part.total("bytes") / len(part.ids)
    assert row["times_read"] == 900 / len(part.ids)


@pytest.mark.parametrize("stop_after", [1, 5])
def test_a_stopped_study_ends_with_the_same_numbers(studied, texts, tmp_path, stopped, stop_after):
    stopped(stop_after, lambda: vocab_study.main(flags_of(texts, tmp_path)))
    metrics = vocab_study.main([*flags_of(texts, tmp_path), "--resume"])
    whole = read_json(studied[0] / "metrics.json")
    for found in (metrics, whole):
        del found["run"]
        for row in found["sizes"]:
            del row["training_seconds"]
    assert metrics == whole


def test_a_study_of_another_text_takes_nothing_from_the_one_before(studied, texts, tmp_path, stopped):
    other = tmp_path / "texts"
    other.mkdir()
    (other / "one.txt").write_text(pydocs()[50_000:90_000], encoding="utf-8")
    out = tmp_path / "out"
    vocab_study.main(flags_of(other, out))
    stopped(1, lambda: vocab_study.main(flags_of(texts, out)))
    assert vocab_study.main([*flags_of(texts, out), "--resume"])["sizes"][0]["kneser_ney"] == pytest.approx(
        read_json(studied[0] / "metrics.json")["sizes"][0]["kneser_ney"]
    )
    assert (out / "train_400_0.01_1" / "metrics.json").stat().st_mtime > (out / "config.json").stat().st_mtime


def test_a_rate_that_diverges_is_out_and_the_study_goes_on(texts, tmp_path, fails):
    given = ["--vocab-sizes", "261", "--seeds", "0", "--lrs", "1e30"]
    said = fails(vocab_study, [*flags_of(texts, tmp_path / "all"), *given])
    assert "261 tokens: the loss is not finite at any of --lrs; try lower ones" in said
    found = vocab_study.main([*flags_of(texts, tmp_path / "one"), *given, "0.01"])["sizes"][0]
    assert found["lr"] == 0.01
    assert 0 < found["test_bits_per_byte"] < 10
    lost = (tmp_path / "one" / "history.csv").read_text(encoding="utf-8").splitlines()[1]
    assert lost.startswith("261,261,1e+30,0,4,0,0,0,inf,inf,")


@pytest.mark.parametrize(
    ("typo", "said"),
    [
        (["--vocab-sizes", "400", "100"], "--vocab-sizes 100: the bytes and special tokens alone are 261"),
        (["--dataset", "boks"], "boks"),
        (["--device", "cud"], "cud"),
    ],
)
def test_a_typo_gets_one_line_and_leaves_the_study_before_as_it_was(typo, said, texts, tmp_path, fails):
    out = tmp_path / "out"
    kept = [out / "train_400_0.01_0" / "metrics.json", out / "metrics.json", out / "config.json", out / "history.csv"]
    kept[0].parent.mkdir(parents=True)
    for path in kept:
        path.write_text("earlier", encoding="utf-8")
    assert said in fails(vocab_study, [*flags_of(texts, out), *typo])
    assert [path.read_text(encoding="utf-8") for path in kept] == ["earlier"] * 4
