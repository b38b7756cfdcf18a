"""How many bits does the model need for a byte it has not read, and how many does it take without a network?

    python transformer_lm/evaluate.py
    python transformer_lm/evaluate.py --part val --order 6 --out runs/transformer_lm/evaluate_val

The test passages' loss in nats per token depends on how long a token is. Divided by the bytes of the normalised text it
does not:

    bits per byte = Σ_t −log₂ P(w_t | w_<t) / bytes             perplexity per word = exp(Σ_t −ln P(w_t | w_<t) / words)

Beside it, fitted to the same training text: how frequent each token is (unigram), interpolated Kneser-Ney of `--order`
tokens (ngram.py), and the compressors bz2 and xz: what the test text adds to the size of the training text. The model
sees windows of its context that do not overlap; a token late in one has more to go by (loss_by_position.png), which is
why windows that move on by `--stride` tokens are measured too: a lower number of the same model. Texts are drawn from
the model to see how many of its words are words, and how much it copies.

Writes bits_per_byte.png, loss_by_position.png, generated.txt, metrics.json. Model: train.py; data: prepare_data.py.
Sources: Kneser and Ney 1995; Chen and Goodman 1999.
Shapes: N tokens of a text, T positions of a window.
"""

import argparse
import math

import numpy as np
import torch

from shared_utils.cli import UserError, add_amp, make_parser, positive_int, run_main
from shared_utils.device import pick_device
from shared_utils.plotting import COLORS, new_figure, save_figure
from shared_utils.runs import start_run
from shared_utils.seeding import seed_everything
from transformer_lm.baselines import COMPRESSORS, compressed_bits_per_byte, longest_copy, share_known, words_of
from transformer_lm.batches import losses_of_text, sliding_losses
from transformer_lm.checkpoints import add_ckpt_flag, add_data_flag, find_checkpoint, find_data, load_model
from transformer_lm.corpus import Corpus, Part, load
from transformer_lm.model import TransformerLM
from transformer_lm.ngram import KneserNey
from transformer_lm.texts import printable, write_texts


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, dataset=None, quick={"texts": 2, "text_tokens": 30})
    add_ckpt_flag(parser)
    add_data_flag(parser)
    parser.add_argument("--part", choices=("test", "val"), default="test", help="of the data")
    parser.add_argument(
        "--stride",
        type=positive_int,
        help="tokens that a sliding window moves on by (default: a quarter of it)",
    )
    parser.add_argument("--order", type=positive_int, default=5, help="tokens of Kneser-Ney's longest n-gram")
    parser.add_argument("--texts", type=positive_int, default=20, help="drawn from the model")
    parser.add_argument("--text-tokens", type=positive_int, default=200, help="of each of them")
    add_amp(parser, "compute in bfloat16")
    return parser


def main(argv=None) -> dict:
    """Measure the model and what it is held against; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    path = find_checkpoint(args)
    model, tokens, state = load_model(path, device)
    folder = find_data(args)
    corpus = load(folder)
    if state["config"]["data"] != corpus.fingerprint:
        raise UserError(f"{path} was not trained on the training text of {folder}: name its data with --data")
    train, part = corpus.parts["train"], corpus.parts[args.part]
    if not len(part.ids):
        raise UserError(f"{folder} has no {args.part} text; --part val measures the validation text")
    stride = args.stride or max(1, model.context // 4)
    if stride > model.context:
        raise UserError(f"--stride {stride}: a window has {model.context} tokens, and is to leave none out")
    run = start_run(args)
    seed_everything(args.seed)

    ids = torch.from_numpy(part.ids).to(device)
    ways = {"transformer": losses_of_text(model, ids, tokens.start, args.amp).cpu().double().numpy()}  # (N,)
    sliding = sliding_losses(model, ids, tokens.start, stride, args.amp).cpu().double().mean().item()
    ngram = f"Kneser-Ney, {args.order} tokens"
    for name, order in (("unigram", 1), (ngram, args.order)):
        ways[name] = KneserNey(train.ids, tokens.vocab_size, order, tokens.start).losses(part.ids)
    rows = [row_of(name, losses, part) for name, losses in ways.items()]
    known, text = (tokens.decode(each.ids).encode("utf-8", "surrogateescape") for each in (train, part))
    for name, compress in COMPRESSORS.items():
        rows.append({"way": name, "bits_per_byte": compressed_bits_per_byte(known, text, compress)})
    books = [
        {"book": title, **row_of("transformer", losses, part, title)}
        for title, losses in by_book(ways["transformer"], part).items()
    ]
    drawn = draw_texts(model, corpus, args)
    words = [words_of(each)[:-1] for each in drawn]  # the last may be cut
    training_words = words_of(tokens.decode(train.ids))
    copy = max((longest_copy(each, training_words) for each in words), key=len)
    write_texts(run.path("generated.txt"), drawn)
    bits = {row["way"]: row["bits_per_byte"] for row in rows}
    measured = {"val": "validation"}.get(args.part, args.part)
    about = f"{corpus.name}, {measured} text of {part.total('bytes'):,} bytes"
    save_figure(draw_bits(rows, about), run.path("bits_per_byte.png"))
    positions = by_position(ways["transformer"], model.context)
    save_figure(draw_positions(positions, ngram, ways[ngram].mean(), about), run.path("loss_by_position.png"))
    return run.finish(
        {
            "name": corpus.name,
            "part": args.part,
            "order": args.order,
            "tokens": len(part.ids),
            "bytes": part.total("bytes"),
            "ways": rows,
            "books": books,
            "nats_per_token": rows[0]["nats_per_token"],
            "context": model.context,
            "stride": stride,
            "sliding_nats_per_token": sliding,
            "parameters": sum(p.numel() for p in model.parameters()),
            "bits_per_byte": bits["transformer"],
            "below_ngram": 1 - bits["transformer"] / bits[ngram],
            "below_xz": 1 - bits["transformer"] / bits["xz -9"],
            "generated_words": sum(map(len, words)),
            "known_words": share_known([word for each in words for word in each], training_words),
            "known_words_of_the_text": share_known(words_of(tokens.decode(part.ids)), training_words),
            "longest_copy": len(copy),
            "copied": " ".join(copy),
        }
    )


def row_of(name: str, losses: np.ndarray, part: Part, book: str | None = None) -> dict:
    """A way's measures from its losses (N,), of all the part's text or of one book."""
    nats = losses.sum()
    n_bytes, words = (part.counts[book][what] if book else part.total(what) for what in ("bytes", "words"))
    return {
        "way": name,
        "nats_per_token": nats / len(losses),
        "perplexity": math.exp(nats / len(losses)),
        "nats_per_word": nats / max(1, words),
        "perplexity_per_word": math.exp(nats / words) if nats < 700 * words else None,  # a text may have no spaces
        "bits_per_byte": nats / math.log(2) / n_bytes,
    }


def by_book(losses: np.ndarray, part: Part) -> dict[str, np.ndarray]:
    """The losses (N,) of a part, book by book; books of which it has nothing are left out."""
    ends = np.cumsum([part.counts[title]["tokens"] for title in part.books])
    pieces = np.split(losses, ends[:-1])
    return {title: piece for title, piece in zip(part.books, pieces, strict=True) if len(piece)}


def by_position(losses: np.ndarray, context: int) -> np.ndarray:
    """The mean loss at each position of the windows, (T,); what is left over after the last whole one is not in it."""
    whole = max(1, len(losses) // context) * context
    return losses[:whole].reshape(-1, min(context, len(losses))).mean(0)


def draw_texts(model: TransformerLM, corpus: Corpus, args: argparse.Namespace) -> list[str]:
    """Texts that the model writes from nothing, at temperature 0.9."""
    start = torch.full((args.texts, 1), corpus.tokens.start, device=next(model.parameters()).device)
    drawn = model.generate(start, args.text_tokens, temperature=0.9)[:, 1:].tolist()
    return [printable(corpus.tokens.decode(ids)) for ids in drawn]


def draw_bits(rows: list[dict], about: str):
    """Bits per byte of every way, the least first."""
    figure, axes = new_figure(width=7.6, height=3.6)
    ordered = sorted(rows, key=lambda row: row["bits_per_byte"])
    for at, row in enumerate(ordered):
        color = COLORS[1] if row["way"] == "transformer" else COLORS[0]
        axes[0, 0].barh(at, row["bits_per_byte"], color=color)
        axes[0, 0].annotate(
            f"{row['bits_per_byte']:.3f}", (row["bits_per_byte"], at), (4, 0), textcoords="offset points", va="center"
        )
    axes[0, 0].set_yticks(range(len(ordered)), [row["way"] for row in ordered])
    axes[0, 0].invert_yaxis()
    axes[0, 0].set(xlabel="bits per byte of the normalised text")
    axes[0, 0].margins(x=0.12)
    least = ordered[0]
    figure.suptitle(f"{about}:\nthe least is {least['bits_per_byte']:.3f} bits per byte ({least['way']})")
    return figure


def draw_positions(positions: np.ndarray, ngram: str, mean: float, about: str):
    """The loss at each position of a window, and the n-gram's mean beside it."""
    figure, axes = new_figure(width=7.2, height=4.2)
    at = np.arange(1, len(positions) + 1)
    axes[0, 0].plot(at, positions, label="transformer")
    axes[0, 0].axhline(mean, color=COLORS[1], linestyle="--", label=f"{ngram}, mean")
    axes[0, 0].set(xlabel="position in the window (tokens seen)", ylabel="nats per token")
    axes[0, 0].legend()
    tail = positions[len(positions) // 2 :].mean()
    figure.suptitle(f"{about}:\n{positions[0]:.2f} nats for the first token of a window, {tail:.2f} in its second half")
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
