"""transformer_lm's model: the formulas, who may see whom, the cache, drawing."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shared_utils.cli import UserError
from transformer_lm import model as lm
from transformer_lm.model import Cache, TransformerLM, causal, filtered, rotated, sinusoidal_positions

SMALL = {"vocab_size": 23, "d_model": 16, "n_heads": 2, "head_dim": 6, "n_layers": 3, "d_ff": 20, "context": 24}
VARIANTS = [{"modern": modern, "attention": kind} for modern in (False, True) for kind in lm.ATTENTION]


def small(seed=0, dtype=torch.float32, **changes):
    """A model whose weights are large enough for every part to matter."""
    torch.manual_seed(seed)
    model = TransformerLM(**{**SMALL, "dropout": 0.0, **changes})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def tokens(b=2, t=12, seed=1):
    return torch.randint(SMALL["vocab_size"], (b, t), generator=torch.Generator().manual_seed(seed))


# --- the equations --------------------------------------------------------------------------------------------------


def test_positions_are_the_papers():
    p = sinusoidal_positions(40, 10)
    for t in (0, 1, 7, 39):
        for i in range(5):
            angle = t / 10000 ** (2 * i / 10)
            assert p[t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert p[t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)
    with pytest.raises(UserError, match="even"):
        sinusoidal_positions(4, 5)


def test_rotary_products_depend_on_the_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 1, 8, dtype=torch.float64)

    def product(i, j):
        return (rotated(q, torch.tensor([[i]])) * rotated(k, torch.tensor([[j]]))).sum().item()

    assert product(9, 4) == pytest.approx(product(25, 20), abs=1e-6)
    for i in range(4):  # pair i is turned by t / 10000^(i / 4)
        turned = rotated(torch.eye(8)[i].view(1, 1, 1, 8), torch.tensor([[7]])).flatten()
        angle = 7 / 10000 ** (i / 4)
        assert turned[i].item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert turned[i + 4].item() == pytest.approx(math.sin(angle), abs=1e-6)
    assert product(9, 4) != pytest.approx(product(9, 3), abs=1e-3)
    assert rotated(q, torch.tensor([[17]])).norm().item() == pytest.approx(q.norm().item())
    assert torch.allclose(rotated(q, torch.tensor([[0]])), q)


def test_attention_is_the_formula_row_by_row():
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(2, 3, 5, 4, dtype=torch.float64)
    weights = lm.attention_weights(q, k, None)
    for t in range(5):
        scores = torch.stack([(q[1, 2, t] * k[1, 2, s]).sum() / 2 for s in range(t + 1)])  # √4 is 2
        wanted = torch.cat([scores.exp() / scores.exp().sum(), torch.zeros(4 - t, dtype=torch.float64)])
        assert torch.allclose(weights[1, 2, t], wanted)


@pytest.mark.parametrize("modern", [False, True])
def test_the_model_is_its_equations_written_out(modern):
    """One layer and one head of it, by hand, in float64."""
    model = small(modern=modern, n_layers=1, n_heads=1, dtype=torch.float64)
    x, block = tokens(1, 6), model.blocks[0]
    attention = block.attention

    def norm(layer, v):
        if modern:
            return v / (v.square().mean(-1, keepdim=True) + torch.finfo(v.dtype).eps).sqrt() * layer.weight
        centred = v - v.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias

    def linear(layer, v):
        return v @ layer.weight.T + (0 if layer.bias is None else layer.bias)

    h = 4 * model.embedding.weight[x[0]]  # √16, (T, d)
    if not modern:
        h = h + sinusoidal_positions(6, 16)
    n = norm(block.norm1, h)
    q, k, v = (linear(W, n) for W in (attention.W_q, attention.W_k, attention.W_v))
    if modern:
        unit = [each / (each.square().mean(-1, keepdim=True) + torch.finfo(q.dtype).eps).sqrt() for each in (q, k)]
        q, k = (rotated(each[None, None], torch.arange(6)[None])[0, 0] for each in unit)
    mixed = torch.stack([(q[t] @ k[: t + 1].T / math.sqrt(6)).softmax(0) @ v[: t + 1] for t in range(6)])
    h = h + linear(attention.W_o, mixed)
    inner = linear(block.W_1, norm(block.norm2, h))
    inner = inner.clamp(min=0) ** 2 if modern else 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
    h = h + linear(block.W_2, inner)
    wanted = norm(model.norm, h) @ model.output.weight.T
    assert torch.allclose(model(x)[0], wanted, atol=1e-6)


def test_the_default_has_as_many_parameters_as_the_formula_says():
    model = TransformerLM()
    inner, d, ff, v = 64, 256, 512, 2048
    block = 3 * (d * inner + inner) + inner * d + d + 2 * 2 * d + d * ff + ff + ff * d + d
    assert sum(p.numel() for p in model.parameters()) == 2 * v * d + 4 * block + 2 * d
    tied = TransformerLM(tied=True)
    assert sum(p.numel() for p in tied.parameters()) == v * d + 4 * block + 2 * d
    assert tied.output.weight is tied.embedding.weight
    assert model.blocks[0].W_2.weight.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.05)
    assert model.blocks[0].W_1.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("modern", [False, True])
def test_manual_and_fused_attention_give_the_same_numbers(modern):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        one, other = (small(modern=modern, attention=kind, dtype=dtype) for kind in lm.ATTENTION)
        assert torch.allclose(one(tokens()), other(tokens()), atol=tolerance)
        padding = torch.zeros(2, 12, dtype=torch.bool)
        padding[1, 7:] = True
        assert torch.allclose(one(tokens(), padding), other(tokens(), padding), atol=tolerance)


# --- who may see whom -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_token_changes_what_comes_before_it(variant):
    model, x = small(**variant), tokens()
    before = model(x)
    for t in (0, 5, 11):
        changed = x.clone()
        changed[:, t] = (changed[:, t] + 1) % SMALL["vocab_size"]
        after = model(changed)
        assert torch.equal(before[:, :t], after[:, :t])  # bit for bit
        assert not torch.allclose(before[:, t:], after[:, t:])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logit_of_a_real_token(variant, side):
    model, x = small(dtype=torch.float64, **variant), tokens(3, 8)
    alone = model(x)
    pad = torch.full((3, 5), 3)
    padded, real = (torch.cat([x, pad], 1), slice(0, 8)) if side == "right" else (torch.cat([pad, x], 1), slice(5, 13))
    mask = torch.ones(3, 13, dtype=torch.bool)
    mask[:, real] = False
    found = model(padded, mask)
    assert torch.allclose(found[:, real], alone, atol=1e-10)
    assert found.isfinite().all()
    other = padded.clone()
    other[mask] = 7
    assert torch.equal(model(other, mask)[:, real], found[:, real])


def test_each_sequence_has_padding_of_its_own():
    model, x = small(dtype=torch.float64), tokens(2, 9)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[1, 4:] = True
    found = model(x, mask)
    assert torch.allclose(found[0], model(x[:1])[0], atol=1e-10)
    assert torch.allclose(found[1, :4], model(x[1:, :4])[0], atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_maps_are_causal_and_those_of_the_model(variant):
    model, x = small(dtype=torch.float64, **variant), tokens(2, 7)
    maps = model.train().attention_maps(x)
    assert model.training
    assert maps.shape == (3, 2, 2, 7, 7)
    assert torch.allclose(maps.sum(-1), torch.ones(3, 2, 2, 7, dtype=torch.float64))
    assert not maps[..., ~causal(7, 7, x.device)].any()
    model.eval()
    caught = []
    v = model.blocks[1].attention.W_o.register_forward_hook(lambda module, given, y: caught.append(given[0]))
    model(x)
    v.remove()
    attention, inputs = model.blocks[1].attention, []
    hook = model.blocks[1].norm1.register_forward_hook(lambda module, given, y: inputs.append(y))
    model(x)
    hook.remove()
    values = attention.W_v(inputs[0]).unflatten(2, (2, 6)).transpose(1, 2)
    mixed = (maps[1] @ values).transpose(1, 2).flatten(2)
    assert torch.allclose(mixed, caught[0], atol=1e-10)


# --- learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modern", [False, True])
def test_a_batch_is_learned_by_heart(modern):
    torch.manual_seed(0)
    model = TransformerLM(**{**SMALL, "d_model": 32, "dropout": 0.0, "modern": modern})
    x = tokens(4, 13)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(120):
        loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


def test_before_training_every_token_is_about_as_likely():
    torch.manual_seed(0)
    model = TransformerLM()
    x = torch.randint(2048, (4, 64))
    loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(2048), rel=0.02)


def test_dropout_is_for_training_alone():
    model, x = small(dropout=0.5), tokens()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


# --- the cache and drawing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("parts", [[1] * 12, [5, 1, 6], [12]])
def test_the_cache_changes_no_logit(variant, parts):
    model, x, cache = small(dtype=torch.float64, **variant), tokens(), Cache()
    found = [model(part, cache=cache) for part in x.split(parts, dim=1)]
    assert len(cache) == 12
    assert torch.allclose(model(x, last_only=True), model(x)[:, -1:], atol=1e-10)
    assert torch.allclose(torch.cat(found, 1), model(x), atol=1e-10)


@pytest.mark.parametrize("modern", [False, True])
@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"temperature": 0.8, "top_k": 7}, {"top_p": 0.9}])
def test_with_and_without_the_cache_the_same_tokens_are_drawn(modern, how):
    """Past the context too, where the window slides."""
    model, x = small(dtype=torch.float64, modern=modern).train(), tokens(3, 4)
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        drawn.append(model.generate(x, 30, use_cache=use_cache, **how))
    assert torch.equal(*drawn)
    assert drawn[0].shape == (3, 34)
    assert torch.equal(drawn[0][:, :4], x)
    assert model.training
    assert len(drawn[0][:, 4:].unique()) > 2


def test_a_prompt_longer_than_the_context_is_seen_from_its_end():
    model, x = small(dtype=torch.float64), tokens(1, 40)
    found = model.generate(x, 1, temperature=0)
    assert found[0, -1] == model(x[:, -24:])[0, -1].argmax()
    assert found.shape == (1, 41)


def test_no_temperature_takes_the_likeliest_and_a_low_one_nearly():
    model, x = small(), tokens(1, 4)
    greedy = model.generate(x, 6, temperature=0)
    assert torch.equal(greedy, model.generate(x, 6, temperature=1e-4))
    assert torch.equal(greedy, model.generate(x, 6, top_k=1))
    assert torch.equal(greedy, model.generate(x, 6, top_p=1e-9))


def test_top_k_and_top_p_keep_what_they_say():
    logits = torch.tensor([[0.4, 0.1, 0.3, 0.15, 0.05], [0.05, 0.6, 0.2, 0.1, 0.05]]).log()
    kept = filtered(logits, top_k=2).isfinite()
    assert kept.tolist() == [[True, False, True, False, False], [False, True, True, False, False]]
    kept = filtered(logits, top_p=0.65).isfinite()
    assert kept.tolist() == [[True, False, True, False, False], [False, True, True, False, False]]
    assert filtered(logits, top_p=0.75).isfinite().sum(1).tolist() == [3, 2]
    assert filtered(logits, top_p=1.0).isfinite().all()
    assert filtered(logits, top_k=99).isfinite().all()
    assert torch.equal(filtered(logits), logits)
    even = torch.zeros(1, 4)  # a quarter each: two of them add up to a half
    assert filtered(even, top_p=0.5).isfinite().sum() == 2
    assert filtered(even, top_p=0.51).isfinite().sum() == 3
    both = filtered(logits, top_k=3, top_p=0.5).isfinite()  # of the three, which then are all there is: 0.47, 0.35, …
    assert both.sum(1).tolist() == [2, 1]


def test_drawing_follows_the_probabilities():
    torch.manual_seed(0)
    model = small()
    x = tokens(1, 5).expand(4000, -1)
    drawn = model.generate(x, 1, temperature=1.3)[:, -1]
    wanted = (model(x[:1])[0, -1] / 1.3).softmax(0)
    found = torch.bincount(drawn, minlength=23) / 4000
    assert (found - wanted).abs().max() < 5 * math.sqrt(0.25 / 4000)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: m(tokens(1, 25)), "25 tokens, the model's context is 24"),
        (lambda m: m.generate(tokens(1, 3)[:, :0], 2), "no token to go on from"),
        (lambda m: m.generate(tokens(1, 3), 2, temperature=-1), "the temperature is 0 or more"),
        (lambda m: m.generate(tokens(1, 3), 2, temperature=math.nan), "the temperature is 0 or more"),
        (lambda m: m.generate(tokens(1, 3), 2, top_k=0), "--top-k: at least 1"),
        (lambda m: m.generate(tokens(1, 3), 2, top_p=0.0), "--top-p: above 0"),
        (lambda m: TransformerLM(attention="flash"), "attention is one of manual, sdpa"),
        (lambda m: TransformerLM(d_model=7), "must be even"),
        (lambda m: TransformerLM(head_dim=5, modern=True), "must be even"),
    ],
)
def test_what_makes_no_sense_gets_one_line(call, said):
    with pytest.raises(UserError, match=said):
        call(small())


def test_a_cache_and_padding_do_not_go_together():
    with pytest.raises(ValueError, match="without padding"):
        small()(tokens(), torch.zeros(2, 12, dtype=torch.bool), Cache())
