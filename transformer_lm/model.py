"""A decoder-only Transformer: each position sees itself and those before it, and says what comes next.

    x⁰ = √d E[tokens] + P                                     P: sines and cosines of the position
    h = x + Attention(LN(x)),   x' = h + FFN(LN(h))           n_layers times ("pre-norm")
    logits = LN(x) W_out

    Attention(x) = Σ_heads softmax(Q Kᵀ / √d_h + mask) V W_o,    Q = x W_q,  K = x W_k,  V = x W_v
    FFN(x) = gelu(x W_1) W_2
    P[t, 2i] = sin(t / 10000^(2i/d)),   P[t, 2i + 1] = cos(t / 10000^(2i/d))

The heads are narrower than usual by default (2 of 32 in a model of 256). `modern=True` is what later models changed:
rotary positions in place of P, RMS normalisation, also of queries and keys, relu² in place of gelu, no biases.
`attention="manual"` writes the formula out, "sdpa" hands it to PyTorch's fused kernels, which are made for GPUs: the
same numbers.

Sources: Vaswani et al. 2017; Radford et al. 2019 (pre-norm, the residual projections' initialisation); Su et al. 2021
(rotary positions); Zhang and Sennrich 2019 (RMS); So et al. 2021 (relu²); Henry et al. 2020 (normalised queries, keys).
Shapes: B sequences, T positions, S positions seen (T, and those in the cache before them), d model width, H heads, d_h
head width, V tokens of the vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_utils.cli import UserError
from shared_utils.dropout import dropped
from shared_utils.modes import evaluating

ATTENTION = ("manual", "sdpa")


def sinusoidal_positions(context: int, width: int) -> Tensor:
    """P of the equation above: float32 (context, width). Errors: `UserError` when the width is odd."""
    if width % 2:
        raise UserError(f"sines and cosines come in pairs: the model's width must be even, got {width}")
    position = torch.arange(context, dtype=torch.float64)[:, None]
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = position * frequency  # (context, width / 2)
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1).float()  # sin, cos, sin, cos, …


def rotated(x: Tensor, position: Tensor) -> Tensor:
    """Each pair of x (B, H, T, d_h) turned by position · 10000^(−2i/d_h); position: int64 (B or 1, T).

    The product of a turned query and a turned key depends on how far apart they are, not on where.
    """
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = (position[:, None, :, None] * frequency).to(torch.float32)  # (B or 1, 1, T, d_h / 2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Cache:
    """The keys and values of every layer so far, so that the next position is computed alone."""

    def __init__(self):
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        """Positions in it."""
        return self._layers[0][0].shape[2] if self._layers else 0

    def extended(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, the new ones (B, H, T, d_h) last: (B, H, S, d_h) each, which it keeps."""
        if layer in self._layers:
            old_k, old_v = self._layers[layer]
            k, v = torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2)
        self._layers[layer] = k, v
        return k, v


class Attention(nn.Module):
    """Causal self-attention with H heads of width d_h: (B, T, d) → (B, T, d)."""

    def __init__(self, d_model: int, n_heads: int, head_dim: int, dropout: float, kind: str, modern: bool):
        super().__init__()
        self.n_heads, self.head_dim, self.dropout, self.kind, self.modern = n_heads, head_dim, dropout, kind, modern
        inner, bias = n_heads * head_dim, not modern
        self.W_q, self.W_k, self.W_v = (nn.Linear(d_model, inner, bias) for _ in range(3))
        self.W_o = nn.Linear(inner, d_model, bias)

    def forward(self, x: Tensor, allowed: Tensor | None, position: Tensor, cache: Cache | None, layer: int) -> Tensor:
        """allowed: bool (B or 1, 1, T, S), True where a position may look; None means all up to itself (then T = S)."""
        q, k, v = self.projected(x, position)
        if cache is not None:
            k, v = cache.extended(layer, k, v)  # (B, H, S, d_h)
        dropout = self.dropout if self.training else 0.0
        if self.kind == "manual":
            y = dropped(attention_weights(q, k, allowed), dropout) @ v  # (B, H, T, d_h)
        else:
            y = F.scaled_dot_product_attention(q, k, v, allowed, dropout, is_causal=allowed is None)
        return self.W_o(y.transpose(1, 2).flatten(2))  # (B, T, H d_h) → (B, T, d)

    def projected(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x (B, T, d): (B, H, T, d_h) each, in the modern model turned by position."""
        projections = (self.W_q, self.W_k, self.W_v)
        q, k, v = (W(x).unflatten(2, (self.n_heads, self.head_dim)).transpose(1, 2) for W in projections)
        if self.modern:
            q, k = (rotated(F.rms_norm(each, (self.head_dim,)), position) for each in (q, k))
        return q, k, v


def attention_weights(q: Tensor, k: Tensor, allowed: Tensor | None) -> Tensor:
    """softmax(Q Kᵀ / √d_h + mask): (B, H, T, d_h), (B, H, S, d_h) → (B, H, T, S), rows add up to 1."""
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])  # (B, H, T, S)
    if allowed is None:
        allowed = causal(q.shape[2], k.shape[2], q.device)
    mask = scores.new_zeros(allowed.shape).masked_fill(~allowed, -math.inf)  # adding is faster than filling all heads
    return (scores + mask).softmax(-1)


def causal(t: int, s: int, device: torch.device) -> Tensor:
    """Where the last t of s positions may look: at themselves and back; bool (t, s)."""
    return torch.ones(t, s, dtype=torch.bool, device=device).tril(s - t)


class Block(nn.Module):
    """Attention and a feed-forward network at each position, each with a residual connection: (B, T, d) → (B, T, d)."""

    def __init__(self, attention: Attention, d_model: int, d_ff: int, dropout: float, modern: bool):
        super().__init__()
        self.attention = attention
        norm = nn.RMSNorm if modern else nn.LayerNorm
        self.norm1, self.norm2 = norm(d_model), norm(d_model)
        self.W_1, self.W_2 = nn.Linear(d_model, d_ff, not modern), nn.Linear(d_ff, d_model, not modern)
        self.dropout, self.modern = dropout, modern

    def forward(self, x: Tensor, allowed: Tensor | None, position: Tensor, cache: Cache | None, layer: int) -> Tensor:
        """See the class, and `Attention.forward`."""
        dropout = self.dropout if self.training else 0.0
        h = x + dropped(self.attention(self.norm1(x), allowed, position, cache, layer), dropout)
        inner = self.W_1(self.norm2(h))  # (B, T, d_ff)
        inner = F.relu(inner).square() if self.modern else F.gelu(inner)
        return h + dropped(self.W_2(inner), dropout)


class TransformerLM(nn.Module):
    """Tokens int64 (B, T) → logits (B, T, V) of the token that follows each.

    tied: the output weights are the embedding. Errors: `UserError` for an invalid size.
    """

    def __init__(
        self,
        vocab_size: int = 2048,
        d_model: int = 256,
        n_heads: int = 2,
        head_dim: int = 32,
        n_layers: int = 4,
        d_ff: int = 512,
        context: int = 128,
        dropout: float = 0.1,
        *,
        attention: str = "manual",
        tied: bool = False,
        modern: bool = False,
    ):
        super().__init__()
        self.config = {"vocab_size": vocab_size, "d_model": d_model, "n_heads": n_heads, "head_dim": head_dim}
        self.config |= {"n_layers": n_layers, "d_ff": d_ff, "context": context, "dropout": dropout}
        self.config |= {"attention": attention, "tied": tied, "modern": modern}
        if attention not in ATTENTION:
            raise UserError(f"attention is one of {', '.join(ATTENTION)}, got {attention}")
        if modern and head_dim % 2:
            raise UserError(f"rotary positions turn pairs: the heads' width must be even, got {head_dim}")
        self.context, self.modern = context, modern
        self.embedding = nn.Embedding(vocab_size, d_model)
        if not modern:
            self.register_buffer("positions", sinusoidal_positions(context, d_model), persistent=False)
        self.blocks = nn.ModuleList(
            Block(Attention(d_model, n_heads, head_dim, dropout, attention, modern), d_model, d_ff, dropout, modern)
            for _ in range(n_layers)
        )
        self.norm = nn.RMSNorm(d_model) if modern else nn.LayerNorm(d_model)
        self.output = nn.Linear(d_model, vocab_size, bias=False)
        self.dropout = dropout
        self._initialize(n_layers)
        if tied:
            self.output.weight = self.embedding.weight

    @torch.no_grad()
    def _initialize(self, n_layers: int) -> None:
        """N(0, 0.02²); what is added to the residual stream is smaller, as 2 n_layers such terms add up in it."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            for projection in (block.attention.W_o, block.W_2):
                projection.weight /= math.sqrt(2 * n_layers)

    def forward(
        self,
        tokens: Tensor,
        key_padding_mask: Tensor | None = None,
        cache: Cache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits (B, T, V) of tokens int64 (B, T); with last_only those of the last position alone, (B, 1, V).

        key_padding_mask: bool (B, T), True at padding, on either side; padding is never looked at, and positions are
        counted without it. cache: holds the positions before these, and then these too; it goes without padding.
        Errors: `UserError` when there are more positions than the context has; `ValueError` for padding with a cache.
        """
        x, allowed, position = self._embedded(tokens, key_padding_mask, cache)
        for layer, block in enumerate(self.blocks):
            x = block(x, allowed, position, cache, layer)
        return self.output(self.norm(x[:, -1:] if last_only else x))  # (B, T, V)

    def _embedded(self, tokens: Tensor, padding: Tensor | None, cache: Cache | None):
        """x⁰ (B, T, d), where each position may look, and which position each is (B or 1, T)."""
        past, t = (0 if cache is None else len(cache)), tokens.shape[1]
        if past + t > self.context:
            raise UserError(f"{past + t} tokens, the model's context is {self.context}")
        position = torch.arange(past, past + t, device=tokens.device)[None]  # (1, T)
        allowed = None
        if padding is not None:
            if cache is not None:
                raise ValueError("a cache goes without padding")
            position = ((~padding).cumsum(1) - 1).clamp(min=0)  # (B, T)
            own = torch.eye(t, dtype=torch.bool, device=tokens.device)  # else padding on the left would see nothing
            allowed = causal(t, t, tokens.device) & (~padding[:, None] | own)  # (B, T, T)
            allowed = allowed[:, None]  # (B, 1, T, T)
        elif past:
            allowed = causal(t, past + t, tokens.device)[None, None]
        x = math.sqrt(self.config["d_model"]) * self.embedding(tokens)  # (B, T, d)
        if not self.modern:
            x = x + self.positions[position]
        return dropped(x, self.dropout if self.training else 0.0), allowed, position

    @torch.no_grad()
    def attention_maps(self, tokens: Tensor) -> Tensor:
        """Where each position looks, in evaluation mode: (n_layers, B, H, T, T) for tokens (B, T); rows add up to 1."""
        maps = []
        with evaluating(self):
            x, allowed, position = self._embedded(tokens, None, None)
            for block in self.blocks:
                q, k, _ = block.attention.projected(block.norm1(x), position)
                maps.append(attention_weights(q, k, allowed))  # (B, H, T, T)
                x = block(x, allowed, position, None, 0)
        return torch.stack(maps)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Tokens (B, T) and max_new_tokens more, (B, T + max_new_tokens), drawn from torch's global generator.

        temperature: 0 takes the likeliest. top_k, top_p: see `filtered`. The model sees at most its context, the last
        tokens; from there on every token has another position at each step, and a cache is of no use.
        Errors: `UserError` as `filtered`; for a negative temperature; when there is no token to begin with.
        """
        if tokens.shape[1] < 1:
            raise UserError("there is no token to go on from")
        if not temperature >= 0:
            raise UserError(f"the temperature is 0 or more, got {temperature:g}")
        with evaluating(self):
            cache = Cache() if use_cache else None
            for _ in range(max_new_tokens):
                if cache is not None and tokens.shape[1] <= self.context:
                    logits = self(tokens[:, len(cache) :], cache=cache, last_only=True)[:, 0]  # (B, V)
                else:
                    logits = self(tokens[:, -self.context :], last_only=True)[:, 0]
                if temperature == 0:
                    new = logits.argmax(1, keepdim=True)  # (B, 1)
                else:
                    probability = filtered(logits.float() / temperature, top_k, top_p).softmax(1)
                    new = torch.multinomial(probability, 1)
                tokens = torch.cat([tokens, new], dim=1)
        return tokens


def filtered(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Logits (B, V) with −∞ for what is not to be drawn.

    top_k: only the k likeliest stay. top_p: of these the fewest whose probabilities add up to p or more (Holtzman et
    al. 2020). Errors: `UserError` when k is below 1, or p not above 0 and at most 1.
    """
    if top_k is not None:
        if top_k < 1:
            raise UserError(f"--top-k: at least 1, got {top_k}")
        least = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None:
        if not 0 < top_p <= 1:
            raise UserError(f"--top-p: above 0 and at most 1, got {top_p:g}")
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(1).cumsum(1).roll(1, 1)  # the probability of all that are likelier
        before[:, 0] = 0
        out = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= top_p)
        logits = logits.masked_fill(out, -math.inf)
    return logits
