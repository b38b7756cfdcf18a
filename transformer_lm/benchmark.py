"""How fast does the model learn and write, beside PyTorch's own layers and beside the slower ways?

    python transformer_lm/benchmark.py
    python transformer_lm/benchmark.py --device cuda --repeats 20

Training, tokens that carry loss per second of an update (forward, backward, clipping, AdamW), in one process and on the
same batches: the default model against as many `nn.TransformerEncoderLayer`s of the same width, with the same
embedding, positions and output. Those layers' attention is as wide as the model (2 heads of 128), the default's is not
(2 heads of 32): with 8 heads of 32 both are the same network (a test holds their logits side by side); without
dropout, whose random numbers model.py draws in its own way, the rest of both is compared. Then in
bfloat16, and on the paragraphs of the text, padded, against its windows, packed.

Writing, milliseconds for the next token against how many are there, one text: with the keys and values of the earlier
tokens cached, and with all of them computed anew. Both choose the same tokens.

Each is measured in turn with the others, `--repeats` times; the least time counts.
Writes training_speed.png, generation_speed.png, metrics.json. Data: prepare_data.py.
Shapes: B sequences, T positions, V tokens of the vocabulary.
"""

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from shared_utils.cli import UserError, make_parser, positive_int, run_main
from shared_utils.device import autocast, pick_device
from shared_utils.plotting import COLORS, curves, new_figure, save_figure
from shared_utils.runs import start_run
from shared_utils.seeding import seed_everything
from transformer_lm.batches import Batch, Text, total_loss
from transformer_lm.checkpoints import add_data_flag, find_data
from transformer_lm.corpus import load
from transformer_lm.model import Cache, TransformerLM, sinusoidal_positions

OURS, PEER, SAME, PEER_SAME = "this model", "PyTorch's layers", "this model, 8 heads", "PyTorch's layers, 8 heads"
BARE, PEER_BARE = "the same without dropout", "PyTorch's, without dropout"
UPDATES = 3  # that are timed together
AMP, PADDED = "this model, bfloat16", "this model, padded paragraphs"


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, dataset=None, quick={"repeats": 1, "batch_size": 4, "context": 32})
    add_data_flag(parser)
    parser.add_argument("--batch-size", type=positive_int, default=64, help="windows or paragraphs of an update")
    parser.add_argument("--context", type=positive_int, default=128, help="positions, and tokens that are written")
    parser.add_argument("--repeats", type=positive_int, default=8, help="times that each is measured")
    return parser


class Peer(nn.Module):
    """The model from `nn.TransformerEncoderLayer`s: pre-norm, GELU, the same sizes but for the attention's width."""

    def __init__(self, vocab_size: int, context: int, n_heads: int, dropout: float = 0.1):
        super().__init__()
        ours = TransformerLM(vocab_size, context=context).config  # its default sizes
        self.width = ours["d_model"]
        self.embedding = nn.Embedding(vocab_size, self.width)
        self.register_buffer("positions", sinusoidal_positions(context, self.width))
        layer = nn.TransformerEncoderLayer(
            self.width, n_heads, ours["d_ff"], dropout, "gelu", batch_first=True, norm_first=True
        )
        layer.dropout = nn.Identity()  # between the two linear layers, where the model has none
        norm = nn.LayerNorm(self.width)
        self.layers = nn.TransformerEncoder(layer, ours["n_layers"], norm, enable_nested_tensor=False)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(self.width, vocab_size, bias=False)

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of tokens int64 (B, T)."""
        t = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(t, device=tokens.device)
        x = self.dropout(math.sqrt(self.width) * self.embedding(tokens) + self.positions[:t])
        return self.output(self.layers(x, mask, padding, is_causal=True))


def main(argv=None) -> dict:
    """Measure; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    corpus = load(find_data(args))
    part, tokens = corpus.parts["train"], corpus.tokens
    if len(part.ids) < args.context:
        raise UserError(f"{corpus.name} has {len(part.ids)} tokens to train on, fewer than --context {args.context}")
    run = start_run(args)
    rng = seed_everything(args.seed)
    text = Text(part, args.context, tokens.start, device)
    packed = [text.packed(text.drawn(args.batch_size, rng, pack=True)) for _ in range(UPDATES)]
    padded = [text.padded(text.drawn(args.batch_size, rng, pack=False)) for _ in range(UPDATES)]  # lengths differ
    training = time_training(tokens.vocab_size, packed, padded, args.repeats, device)
    model = TransformerLM(tokens.vocab_size, context=args.context).to(device).eval()
    writing = time_writing(model, tokens.start, args.repeats, device)
    ratios = {
        "against_peer": training[OURS] / training[PEER],
        "same_network_against_peer": training[SAME] / training[PEER_SAME],
        "without_dropout_against_peer": training[BARE] / training[PEER_BARE],
        "bfloat16_against_float32": training[AMP] / training[OURS],
        "packed_against_padded": training[OURS] / training[PADDED],
        "cache_against_none": float(writing["without"][-1] / writing["with"][-1]),
    }
    about = f"{args.batch_size} sequences of at most {args.context} tokens"
    save_figure(draw_training(training, ratios, about), run.path("training_speed.png"))
    save_figure(draw_writing(writing, ratios["cache_against_none"]), run.path("generation_speed.png"))
    return run.finish(
        {
            **ratios,
            "threads": torch.get_num_threads(),
            "padding": 1 - sum(float(each.count) for each in padded) / sum(each.tokens.numel() for each in padded),
            "training": [{"what": what, "tokens_per_second": speed} for what, speed in training.items()],
            "context": args.context,
            "token_with_cache_ms": float(writing["with"][-1]),
            "token_without_cache_ms": float(writing["without"][-1]),
        }
    )


def update(model: nn.Module, batches: list[Batch], amp: bool, device: torch.device) -> Callable[[], float]:
    """An update on each of the batches as a call: train.py's, returns the tokens that carried loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def call() -> float:
        learned = torch.zeros((), device=device)
        for batch in batches:
            with autocast(device, amp):
                loss = total_loss(model, batch) / batch.count
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            learned += batch.count
        return learned.item()  # waits for a GPU

    return call


def time_training(
    vocab_size: int, packed: list[Batch], padded: list[Batch], repeats: int, device: torch.device
) -> dict[str, float]:
    """Tokens that carry loss per second, of each way; the least seconds of `repeats`, after one to warm up."""
    context = packed[0].tokens.shape[1]
    ways = {
        OURS: (TransformerLM(vocab_size, context=context), packed, False),
        PEER: (Peer(vocab_size, context, n_heads=2), packed, False),
        SAME: (TransformerLM(vocab_size, context=context, n_heads=8), packed, False),
        PEER_SAME: (Peer(vocab_size, context, n_heads=8), packed, False),
        BARE: (TransformerLM(vocab_size, context=context, n_heads=8, dropout=0.0), packed, False),
        PEER_BARE: (Peer(vocab_size, context, n_heads=8, dropout=0.0), packed, False),
        AMP: (TransformerLM(vocab_size, context=context), packed, True),
        PADDED: (TransformerLM(vocab_size, context=context), padded, False),
    }
    calls = {what: update(model.to(device).train(), *how, device) for what, (model, *how) in ways.items()}
    least, learned = dict.fromkeys(calls, math.inf), {}
    for repeat in range(repeats + 1):
        for what, call in calls.items():
            started = time.perf_counter()
            learned[what] = call()
            if repeat:
                least[what] = min(least[what], time.perf_counter() - started)
    return {what: learned[what] / least[what] for what in calls}


@torch.inference_mode()
def time_writing(model: TransformerLM, start: int, repeats: int, device: torch.device) -> dict[str, np.ndarray]:
    """Milliseconds for the token after 1, 2, …, context are there, with the cache and without: (context,) each.

    Errors: `AssertionError` when the two ways do not choose the same tokens.
    """
    least = {way: np.full(model.context, math.inf) for way in ("with", "without")}
    for _ in range(repeats):
        chosen = {}
        for way, milliseconds in least.items():
            tokens, cache = torch.full((1, 1), start, device=device), Cache()
            for at in range(model.context):
                started = time.perf_counter()
                seen, kept = (tokens[:, -1:], cache) if way == "with" else (tokens, None)
                logits = model(seen, cache=kept, last_only=True)
                new = int(logits[0, -1].argmax())  # waits for a GPU
                milliseconds[at] = min(milliseconds[at], 1e3 * (time.perf_counter() - started))
                tokens = torch.cat([tokens, tokens.new_tensor([[new]])], dim=1)
            chosen[way] = tokens
        assert torch.equal(chosen["with"], chosen["without"])
    return least


def draw_training(training: dict[str, float], ratios: dict[str, float], about: str):
    """A bar of tokens per second for each way."""
    figure, axes = new_figure(width=8.4, height=4.0)
    for at, (what, speed) in enumerate(training.items()):
        axes[0, 0].barh(at, speed, color=COLORS[0 if "PyTorch" in what else 1])
        axes[0, 0].annotate(f"{speed:,.0f}", (speed, at), (4, 0), textcoords="offset points", va="center")
    axes[0, 0].set_yticks(range(len(training)), list(training))
    axes[0, 0].invert_yaxis()
    axes[0, 0].margins(x=0.14)
    axes[0, 0].set(xlabel=f"tokens that carry loss per second of training ({about})")
    figure.suptitle(
        f"{ratios['against_peer']:.2f} times PyTorch's layers, {ratios['same_network_against_peer']:.2f} times as the "
        f"same network;\nbfloat16 {ratios['bfloat16_against_float32']:.2f} times float32, packed "
        f"{ratios['packed_against_padded']:.2f} times padded"
    )
    return figure


def draw_writing(writing: dict[str, np.ndarray], ratio: float):
    """Milliseconds for the next token against how many are there."""
    figure, axes = new_figure(width=7.2, height=4.2)
    at = np.arange(1, len(writing["with"]) + 1)
    curves(
        axes[0, 0],
        {f"{way} the cache": (at, milliseconds) for way, milliseconds in writing.items()},
        xlabel="tokens that are there",
        ylabel="milliseconds for the next one",
    )
    axes[0, 0].set_ylim(bottom=0)
    figure.suptitle(f"After {len(at)} tokens the next one is {ratio:.1f} times as fast with the keys and values kept")
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
