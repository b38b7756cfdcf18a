"""transformer_lm's benchmark: what it compares is the same, and what it says follows from what it timed."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shared_utils.embedded import pydocs
from shared_utils.runs import read_json
from shared_utils.seeding import seed_everything
from transformer_lm import benchmark, prepare_data
from transformer_lm.batches import Text
from transformer_lm.benchmark import Peer
from transformer_lm.corpus import load
from transformer_lm.model import TransformerLM

CPU = torch.device("cpu")


@torch.no_grad()
def test_with_eight_heads_pytorchs_layers_are_the_same_network():
    torch.manual_seed(0)
    ours, peer = TransformerLM(50, n_heads=8, context=16).eval(), Peer(50, 16, n_heads=8).eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    peer.embedding.weight.copy_(ours.embedding.weight)
    peer.output.weight.copy_(ours.output.weight)
    peer.layers.norm.load_state_dict(ours.norm.state_dict())
    for layer, block in zip(peer.layers.layers, ours.blocks, strict=True):
        W = block.attention
        layer.self_attn.in_proj_weight.copy_(torch.cat([W.W_q.weight, W.W_k.weight, W.W_v.weight]))
        layer.self_attn.in_proj_bias.copy_(torch.cat([W.W_q.bias, W.W_k.bias, W.W_v.bias]))
        for one, other in (
            (layer.self_attn.out_proj, W.W_o),
            (layer.linear1, block.W_1),
            (layer.linear2, block.W_2),
            (layer.norm1, block.norm1),
            (layer.norm2, block.norm2),
        ):
            one.load_state_dict(other.state_dict())
    tokens = torch.randint(50, (3, 16))
    torch.testing.assert_close(peer(tokens), ours(tokens), rtol=1e-4, atol=1e-4)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (ours, peer)]
    assert sizes[0] == sizes[1]


def test_both_networks_drop_as_many_values(monkeypatch):
    """A training pass of each, every way to drop counted."""
    counts, tokens = [], torch.randint(50, (3, 16))
    plain = torch.nn.functional.dropout

    def counted(x, p=0.5, training=True, inplace=False):
        counts[-1] += x.numel() if training and p else 0
        return plain(x, p, training, inplace)

    monkeypatch.setattr(torch.nn.functional, "dropout", counted)
    monkeypatch.setitem(benchmark.TransformerLM.forward.__globals__, "dropped", lambda x, p: counted(x, p))
    for model in (TransformerLM(50, n_heads=8, context=16), Peer(50, 16, n_heads=8)):
        for layer in getattr(model, "layers", torch.nn.Module()).modules():
            if isinstance(layer, torch.nn.MultiheadAttention):  # its fused kernel drops inside
                layer.register_forward_pre_hook(lambda *_: counts.append(counts.pop() + 3 * 8 * 16 * 16))
        counts.append(0)
        model.train()(tokens)
    assert counts[0] == counts[1] > 0


def test_the_two_ways_of_writing_are_timed_to_the_same_tokens():
    model = TransformerLM(50, 16, 2, 8, 1, 24, 12).eval()
    found = benchmark.time_writing(model, 1, 2, CPU)
    assert all(times.shape == (12,) and np.isfinite(times).all() for times in found.values())


def test_a_token_costs_the_milliseconds_that_passed(monkeypatch):
    clock = itertools.count(step=0.002)  # seconds
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=clock.__next__))
    found = benchmark.time_writing(TransformerLM(50, 16, 2, 8, 1, 24, 12).eval(), 1, 1, CPU)
    np.testing.assert_allclose([found["with"], found["without"]], np.full((2, 12), 2.0))


def test_each_way_learns_in_its_own_way_and_its_first_time_does_not_count(monkeypatch):
    made, packed, padded = [], ["packed"], ["padded"]
    packed[0] = benchmark.Batch(torch.zeros(1, 12, dtype=torch.int64), torch.zeros(1, 12, dtype=torch.int64))

    def update(model, batches, amp, device):
        made.append((model, batches, amp))
        learned = 100.0 * len(made)
        return lambda: learned

    seconds = iter([0.9] * 8 + [each for took in (2.0, 1.0) for _ in range(8) for each in (0.0, took)])
    monkeypatch.setattr(benchmark, "update", update)
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    speeds = benchmark.time_training(50, packed, padded, 2, CPU)
    assert list(speeds.values()) == [100.0 * at for at in range(1, 9)]  # tokens of its own, in a second
    ways = dict(zip(speeds, made, strict=True))
    assert [what for what, (_, _, amp) in ways.items() if amp] == [benchmark.AMP]
    assert [what for what, (_, batches, _) in ways.items() if batches is padded] == [benchmark.PADDED]
    for what, (model, *_) in ways.items():
        if isinstance(model, Peer):
            heads = {layer.self_attn.num_heads for layer in model.layers.layers}
        else:
            heads = {model.config["n_heads"]}
        assert heads == {2 if what in (benchmark.OURS, benchmark.PEER, benchmark.AMP, benchmark.PADDED) else 8}, what
        bare = what in (benchmark.BARE, benchmark.PEER_BARE)
        assert (getattr(model.dropout, "p", model.dropout) == 0) is bare, what


def test_the_speed_with_a_cache_is_that_of_the_last_token(tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text(pydocs()[:9_000], encoding="utf-8")
    flags = ["--dataset", str(tmp_path / "texts"), "--tokens", "byte", "--out", str(tmp_path / "data")]
    prepare_data.main(flags)
    names = ("OURS", "PEER", "SAME", "PEER_SAME", "BARE", "PEER_BARE", "AMP", "PADDED")
    training = {getattr(benchmark, name): 10.0 * (at + 1) for at, name in enumerate(names)}
    writing, titles = {"with": np.array([9.0, 3.0, 2.0]), "without": np.array([5.0, 6.0, 7.0])}, []
    monkeypatch.setattr(benchmark, "time_training", lambda *_: training)
    monkeypatch.setattr(benchmark, "time_writing", lambda *_: writing)
    monkeypatch.setattr(benchmark, "save_figure", lambda figure, path: titles.append(figure.get_suptitle()))
    given = ["--data", str(tmp_path / "data"), "--device", "cpu", "--quick", "--out", str(tmp_path / "out")]
    metrics = benchmark.main(given)
    assert (metrics["token_with_cache_ms"], metrics["token_without_cache_ms"]) == (2, 7)
    assert metrics["cache_against_none"] == 3.5
    assert titles[0].startswith("0.50 times PyTorch's layers, 0.75 times as the same network;")
    assert titles[0].endswith("bfloat16 7.00 times float32, packed 0.12 times padded")
    assert "After 3 tokens the next one is 3.5 times as fast" in titles[1]


def test_an_update_counts_the_tokens_that_carry_loss():
    model = TransformerLM(50, 16, 2, 8, 1, 24, 12)
    tokens = torch.randint(50, (2, 12))
    targets = tokens.clone()
    targets[0, 5:] = benchmark.total_loss.__globals__["IGNORED"]
    before = model.output.weight.clone()
    batch = benchmark.Batch(tokens, targets, targets == -100)
    assert benchmark.update(model, [batch, batch], False, CPU)() == 2 * 17
    assert not torch.equal(before, model.output.weight)


def test_the_script_writes_what_it_says(tmp_path, fails):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "one.txt").write_text(pydocs()[:30_000], encoding="utf-8")
    prepare_data.main(["--dataset", str(texts), "--vocab-size", "300", "--out", str(tmp_path / "data")])
    flags = ["--data", str(tmp_path / "data"), "--device", "cpu", "--out", str(tmp_path / "out"), "--quick"]
    metrics = benchmark.main(flags)
    speeds = {row["what"]: row["tokens_per_second"] for row in metrics["training"]}
    assert metrics["against_peer"] == pytest.approx(speeds[benchmark.OURS] / speeds[benchmark.PEER])
    assert metrics["bfloat16_against_float32"] == pytest.approx(speeds[benchmark.AMP] / speeds[benchmark.OURS])
    for ratio, one, other in (
        ("same_network_against_peer", benchmark.SAME, benchmark.PEER_SAME),
        ("without_dropout_against_peer", benchmark.BARE, benchmark.PEER_BARE),
    ):
        assert metrics[ratio] == pytest.approx(speeds[one] / speeds[other])
    assert metrics["cache_against_none"] == pytest.approx(
        metrics["token_without_cache_ms"] / metrics["token_with_cache_ms"]
    )
    assert metrics["packed_against_padded"] == pytest.approx(speeds[benchmark.OURS] / speeds[benchmark.PADDED])
    corpus, rng = load(tmp_path / "data"), seed_everything(0)
    text = Text(corpus.parts["train"], 32, corpus.tokens.start, CPU)
    for _ in range(benchmark.UPDATES):
        text.drawn(4, rng, pack=True)  # the windows come first
    padding = [text.padded(text.drawn(4, rng, pack=False)).padding.flatten() for _ in range(benchmark.UPDATES)]
    assert metrics["padding"] == pytest.approx(torch.cat(padding).float().mean().item())
    assert read_json(tmp_path / "out" / "metrics.json")["context"] == 32
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"training_speed.png", "generation_speed.png"}
    assert "fewer than --context" in fails(benchmark, [*flags[:-1], "--context", 10**6])
