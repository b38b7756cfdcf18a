"""transformer_lm's benchmark: what it compares is the same, and what it says follows from what it timed."""

import numpy as np
import pytest
import torch

from shared_utils.embedded import pydocs
from shared_utils.runs import read_json
from transformer_lm import benchmark, prepare_data
from transformer_lm.benchmark import Peer
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
    assert 0 <= metrics["padding"] < 1
    assert read_json(tmp_path / "out" / "metrics.json")["context"] == 32
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"training_speed.png", "generation_speed.png"}
    assert "fewer than --context" in fails(benchmark, [*flags[:-1], "--context", 10**6])
