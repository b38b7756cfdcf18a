"""What transformer_lm's training and measurements do with their flags, and what their metrics and titles say."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shared_utils import checkpoint
from shared_utils.embedded import pydocs
from shared_utils.plotting import new_figure
from shared_utils.runs import read_json
from transformer_lm import evaluate, generate, prepare_data, train
from transformer_lm.corpus import by_passage, load, prepare, save
from transformer_lm.model import ATTENTION, Attention, TransformerLM
from transformer_lm.ngram import KneserNey

CPU = torch.device("cpu")
TRAIN = ["--d-model", 16, "--n-layers", 2, "--d-ff", 24, "--context", 16, "--batch-size", 8, "--updates", 12]
TRAIN += ["--eval-every", 4, "--sample-tokens", 5, "--device", "cpu"]


def ran(module, *flags):
    return module.main([str(flag) for flag in flags])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of bytes to learn from, as prepare_data.py writes it."""
    folder = tmp_path_factory.mktemp("data")
    save(prepare({"docs": pydocs()[:20_000]}, "byte", 0, np.random.default_rng(0), name="docs"), folder)
    return folder


@pytest.fixture
def figures(monkeypatch):
    """The figures that the scripts save, none of which is drawn."""
    found = []
    for module in (evaluate, prepare_data, train):
        monkeypatch.setattr(module, "save_figure", lambda figure, path: found.append(figure))
    return found


# --- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_drops_weights_in_training(kind):
    torch.manual_seed(0)
    attention, x = Attention(16, 2, 6, 0.5, kind, modern=False), torch.randn(2, 7, 16)
    with torch.no_grad():
        one, other = (attention(x, None, torch.arange(7)[None], None, 0) for _ in range(2))
        assert not torch.equal(one, other)
        attention.eval()
        one, other = (attention(x, None, torch.arange(7)[None], None, 0) for _ in range(2))
        assert torch.equal(one, other)


def test_both_projections_into_the_residual_stream_start_smaller():
    torch.manual_seed(0)
    model = TransformerLM()
    for block in model.blocks:
        for projection in (block.attention.W_o, block.W_2):
            assert projection.weight.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.05)


def test_a_model_in_training_writes_and_looks_without_dropout():
    torch.manual_seed(0)
    model, x = TransformerLM(23, 16, 2, 6, 2, 20, 24, dropout=0.5), torch.randint(23, (2, 5))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    written, maps = model.eval().generate(x, 8, temperature=0), model.attention_maps(x)
    assert torch.equal(model.train().generate(x, 8, temperature=0), written)
    assert torch.equal(model.attention_maps(x), maps)


def test_what_adds_up_to_p_is_chosen_at_the_temperature_that_is_drawn_at(monkeypatch):
    model = TransformerLM(4, 8, 1, 4, 1, 8, 64)
    likely = torch.tensor([0.4, 0.3, 0.2, 0.1])
    monkeypatch.setattr(model, "forward", lambda tokens, **how: likely.log().expand(len(tokens), 1, 4))
    drawn = model.generate(torch.zeros(50, 1, dtype=torch.int64), 1, temperature=0.25, top_p=0.7)[:, 1]
    assert not drawn.any()  # at 0.25 the first alone has 0.72
    assert model.generate(torch.zeros(50, 1, dtype=torch.int64), 1, top_p=0.7)[:, 1].max() == 1


# --- the data -------------------------------------------------------------------------------------------------------


def test_a_twentieth_of_the_passages_is_held_out_for_each_part():
    text = "".join(f"{i}".ljust(4100, "x") + "\n\n" for i in range(40))  # each a passage
    parts = by_passage(text, np.random.default_rng(0))
    assert {part: len(found) for part, found in parts.items()} == {"train": 36, "val": 2, "test": 2}


def test_preparing_says_how_long_tokens_are_and_how_often_used(tmp_path, figures):
    (tmp_path / "texts").mkdir()
    text = "".join("é" * (300 - i) + "ab" + "\n\n" for i in range(60))
    (tmp_path / "texts" / "one.txt").write_text(text, encoding="utf-8")
    flags = ["--dataset", tmp_path / "texts", "--tokens", "byte", "--split", "tail", "--out", tmp_path / "out"]
    metrics = ran(prepare_data, *flags)
    assert metrics["bytes_per_token"] == 1
    metrics = ran(prepare_data, *flags, "--tokens", "char")
    train = load(tmp_path / "out").parts["train"]
    assert metrics["bytes_per_token"] == train.total("bytes") / len(train.ids) > 1.9
    bytes_figure = figures[0]
    said = "of the 5 different ones 2 occur less than 100 times, 252 of the vocabulary never"  # a and b
    assert said in bytes_figure.get_suptitle()
    first = bytes_figure.axes[0].texts[0]
    assert (first.get_text(), first.xy[0]) in (("\\xc3", 1), ("\\xa9", 1))  # é's two bytes


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", [False, True])
def test_an_update_lowers_the_mean_over_its_tokens_and_the_history_has_that_mean(
    amp, data, tmp_path, monkeypatch, figures
):
    sums, counts, scales, modes, validated = [], [], [], [], []
    total_loss, losses_of_text = train.total_loss, train.losses_of_text

    def watched(network, batch):
        modes.append((network.training, torch.is_autocast_enabled("cpu")))
        found = total_loss(network, batch)
        found.register_hook(lambda gradient: scales.append(gradient.item()))
        sums.append(found.item())
        counts.append(batch.count.item())
        return found

    def measured(model, ids, start, amp):
        validated.append(amp)
        return losses_of_text(model, ids, start, amp)

    monkeypatch.setattr(train, "total_loss", watched)
    monkeypatch.setattr(train, "losses_of_text", measured)
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=itertools.count().__next__))  # a second each time
    metrics = ran(train, *TRAIN, "--data", data, "--out", tmp_path, *(["--amp"] if amp else []))
    assert set(modes) == {(True, amp)}
    assert set(validated) == {amp}
    assert scales == pytest.approx([1 / count for count in counts])
    assert len(set(counts)) > 1  # paragraphs
    rows = (tmp_path / "history.csv").read_text(encoding="utf-8").splitlines()[1:]
    for first, row in zip((0, 4, 8), rows, strict=True):
        wanted = sum(sums[first : first + 4]) / sum(counts[first : first + 4])
        assert float(row.split(",")[2]) == pytest.approx(wanted, rel=1e-4)
    assert metrics["learned_tokens"] == sum(counts)
    assert metrics["training_seconds"] == 3
    assert metrics["tokens_per_second"] == pytest.approx(sum(counts) / 3)


def test_what_is_kept_and_sampled_is_the_best_on_validation(data, tmp_path, monkeypatch, figures):
    losses, drawn = iter([3.0, 1.0, 2.0]), []

    def sample(model, corpus, args):
        drawn.append(model.output.weight.clone())
        return "x"

    monkeypatch.setattr(train, "losses_of_text", lambda *_: torch.tensor([next(losses)]))
    monkeypatch.setattr(train, "sample", sample)
    metrics = ran(train, *TRAIN, "--lr", 0.01, "--data", data, "--out", tmp_path)
    assert (metrics["best_update"], metrics["val_loss"]) == (8, 1)
    best, last = (checkpoint.load(tmp_path / f"{name}.pth")["model"]["output.weight"] for name in ("best", "last"))
    assert torch.equal(best, drawn[1])
    assert not torch.equal(best, last)
    assert all(torch.equal(weight, best) for weight in drawn[3:])  # samples.txt
    assert len(drawn) == 6


def test_sizes_and_compile_reach_the_network(data, tmp_path, monkeypatch, figures):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network: compiled.append(network) or network)
    sizes = {"d_model": 24, "n_heads": 3, "head_dim": 4, "n_layers": 1, "d_ff": 20, "context": 12, "dropout": 0.3}
    flags = [text for name, value in sizes.items() for text in (f"--{name.replace('_', '-')}", value)]
    more = ["--attention", "sdpa", "--tied", "--modern", "--compile", "--updates", 1]
    ran(train, *TRAIN, *flags, *more, "--data", data, "--out", tmp_path)
    config = checkpoint.load(tmp_path / "best.pth")["config"]
    wanted = {**sizes, "attention": "sdpa", "tied": True, "modern": True}
    assert {name: config[name] for name in wanted} == wanted
    assert len(compiled) == 1


def test_weights_batches_and_dropout_follow_the_seed(data, tmp_path, monkeypatch, figures):
    seen, derived, drawn, total_loss = [], train.derived_seed, train.Text.drawn, train.total_loss
    asked = []

    def first(network, batch):
        seen.append(network.output.weight.clone())
        return total_loss(network, batch)

    def draw(*given):
        asked.append(drawn(*given))
        return asked[-1]

    monkeypatch.setattr(train, "total_loss", first)
    monkeypatch.setattr(train.Text, "drawn", draw)
    monkeypatch.setattr(train, "derived_seed", lambda *given: seen.append(given) or derived(*given))
    for seed in (3, 4):
        ran(train, *TRAIN, "--updates", 2, "--seed", seed, "--data", data, "--out", tmp_path / str(seed))
    assert [each for each in seen if isinstance(each, tuple)] == [(3, 0, 0), (3, 1, 0), (4, 0, 0), (4, 1, 0)]
    weights = [each for each in seen if isinstance(each, torch.Tensor)]
    assert not torch.equal(weights[0], weights[2])
    assert len({tuple(batch) for batch in asked}) == 4


def test_the_training_title_is_in_minutes():
    rows = [{"update": at, "train_loss": 3.0, "val_loss": 2.5, "seconds": 45.0 * at} for at in (1, 2)]
    title = train.draw(rows, {"update": 2, "val_loss": 2.5}, 1.25, "x").get_suptitle()
    assert title == "x:\n2.500 nats per token of validation, 1.250 bits per byte, after 1.5 minutes"


# --- evaluating and writing -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_of(data):
    """A small model of the bytes, untrained: the flags that name it and its data."""
    torch.manual_seed(0)
    model, corpus = TransformerLM(257, 16, 2, 8, 1, 24, 16), load(data)
    config = {**model.config, "tokens": "byte", "data": corpus.fingerprint}
    checkpoint.save(data / "best.pth", config=config, model=model.state_dict(), name="docs")
    return ["--ckpt", data / "best.pth", "--device", "cpu"]


def test_an_evaluation_measures_the_part_the_order_and_the_precision_asked_for(
    data, model_of, tmp_path, monkeypatch, figures
):
    asked, means, losses = [], [], evaluate.losses_of_text
    monkeypatch.setattr(
        evaluate, "losses_of_text", lambda model, ids, *given: asked.append(given[1:]) or losses(model, ids, *given)
    )
    monkeypatch.setattr(
        evaluate, "draw_positions", lambda at, ngram, mean, about: means.append((ngram, mean)) or new_figure()[0]
    )
    flags = ["--data", data, "--part", "val", "--order", 2, "--texts", 3, "--text-tokens", 4, "--amp"]
    metrics = ran(evaluate, *model_of, *flags, "--out", tmp_path)
    corpus = load(data)
    train_ids, val = corpus.parts["train"].ids, corpus.parts["val"]
    assert asked == [(True,)]
    assert (metrics["part"], metrics["tokens"], metrics["bytes"]) == ("val", len(val.ids), val.total("bytes"))
    two = KneserNey(train_ids, 257, 2, corpus.tokens.start).losses(val.ids).mean()
    ways = {row["way"]: row for row in metrics["ways"]}
    assert ways["Kneser-Ney, 2 tokens"]["nats_per_token"] == pytest.approx(two)
    one = KneserNey(train_ids, 257, 1, corpus.tokens.start).losses(val.ids).mean()
    assert ways["unigram"]["nats_per_token"] == pytest.approx(one)
    assert means == [("Kneser-Ney, 2 tokens", pytest.approx(two))]
    assert metrics["parameters"] == sum(p.numel() for p in TransformerLM(257, 16, 2, 8, 1, 24, 16).parameters())
    assert len((tmp_path / "generated.txt").read_text(encoding="utf-8").split("\n\n---\n\n")) == 3
    least = min(ways, key=lambda way: ways[way]["bits_per_byte"])
    assert f"the least is {ways[least]['bits_per_byte']:.3f} bits per byte ({least})" in figures[0].get_suptitle()
    assert {label.get_text() for label in figures[0].axes[0].get_yticklabels()} == set(ways)


def test_the_positions_title_is_of_the_first_and_the_second_half():
    title = evaluate.draw_positions(np.array([9.0, 5.0, 3.0, 2.0]), "n", 4.0, "x").get_suptitle()
    assert title == "x:\n9.00 nats for the first token of a window, 2.50 in its second half"


def test_what_is_asked_for_reaches_the_drawing(model_of, tmp_path, monkeypatch):
    asked, draw = [], TransformerLM.generate

    def watched(model, tokens, *given, **how):
        asked.append((tuple(tokens.shape), *given, how))
        return draw(model, tokens, *given, **how)

    monkeypatch.setattr(TransformerLM, "generate", watched)
    flags = ["--prompt", "abc", "de", "--n", 2, "--max-new-tokens", 7, "--no-cache"]
    flags += ["--temperature", 0.5, "--top-k", 9, "--top-p", 0.8]
    metrics = ran(generate, *model_of, *flags, "--out", tmp_path / "0")
    given = (7, 0.5, 9, 0.8, {"use_cache": False})
    assert asked == [((2, 4), *given), ((2, 3), *given)]
    assert (metrics["texts"], metrics["tokens"]) == (4, 28)
    ran(generate, *model_of, *flags, "--seed", 1, "--out", tmp_path / "1")
    one, other = ((tmp_path / seed / "generated.txt").read_bytes() for seed in "01")
    assert one != other
    assert read_json(tmp_path / "0" / "metrics.json")["temperature"] == 0.5
