"""How large should the vocabulary be, at the same compute?

    python transformer_lm/vocab_study.py
    python transformer_lm/vocab_study.py --vocab-sizes 512 2048 8192 --seeds 0 1 2 --out runs/transformer_lm/vocab_three

A larger vocabulary writes the text in fewer tokens, so that an update reads more of it; but the output layer costs
more, and each token is seen less often. For every size prepare_data.py learns the tokens and train.py trains the
default model (`--pack --amp --optimizer muon --schedule cosine`) with as many updates as make the floating-point
operations of `--updates` updates at the middle of the sizes; for a token

    operations ≈ 6 · (weights of all products: blocks, output) + 12 · layers · heads · head width · context

forward and backward. 261 tokens are the bytes alone. Compared are bits per byte of the test text, which is the same for
all, beside Kneser-Ney over the same tokens, and the part of the drawn words that are words of the training text.

Writes data_SIZE/ (as prepare_data.py), train_SIZE_SEED/ (as train.py), vocab_study.png, history.csv, metrics.json.
With --resume a study that was stopped goes on where it was.
Sources: Sennrich et al. 2016; Kaplan et al. 2020 (the operations).
"""

import argparse
import math

import numpy as np
import torch

from shared_utils.cli import make_parser, non_negative_int, positive_float, positive_int, run_main
from shared_utils.device import pick_device
from shared_utils.plotting import COLORS, mean_std, new_figure, save_figure
from shared_utils.runs import Run, start_run
from shared_utils.stats import half_width
from transformer_lm import prepare_data, train
from transformer_lm.baselines import share_known
from transformer_lm.batches import losses_of_text
from transformer_lm.checkpoints import load_model
from transformer_lm.corpus import Corpus, load
from transformer_lm.model import TransformerLM
from transformer_lm.ngram import KneserNey

DRAWN = (20, 100)  # texts, and tokens of each, from which known words are counted


def build_parser():
    """The command line."""
    quick = {"vocab_sizes": [300, 600], "seeds": [0], "updates": 8}
    parser = make_parser(__doc__, dataset="books", quick=quick)
    sizes = [261, 512, 1024, 2048, 4096, 8192, 16384]
    parser.add_argument("--vocab-sizes", type=positive_int, nargs="+", default=sizes, help="261 are the bytes alone")
    parser.add_argument("--seeds", type=non_negative_int, nargs="+", default=[0, 1], help="one training each per size")
    parser.add_argument("--updates", type=positive_int, default=400, help="at the middle of the sizes")
    parser.add_argument("--lr", type=positive_float, default=0.002, help="AdamW's, of embeddings, output and norms")
    parser.add_argument("--resume", action="store_true", help="go on where a stopped study was")
    return parser


def main(argv=None) -> dict:
    """Prepare, train and measure every size; returns the metrics."""
    args = build_parser().parse_args(argv)
    run = start_run(args)
    sizes, seeds = sorted(set(args.vocab_sizes)), list(dict.fromkeys(args.seeds))
    corpora = {size: corpus_of(size, run, args) for size in sizes}
    costs = {size: operations_per_token(corpus.tokens.vocab_size, args.quick) for size, corpus in corpora.items()}
    budget = args.updates * costs[sizes[len(sizes) // 2]]
    done = {(int(row["vocab_size"]), int(row["seed"])): row for row in run.history()}
    for size, corpus in corpora.items():
        ngram = None
        for seed in seeds:
            if (size, seed) in done:
                continue
            if ngram is None:
                ngram = bits_per_byte(ngram_losses(corpus), corpus)
            trained = trained_on(size, seed, max(1, round(budget / costs[size])), run, args)
            run.log(vocab_size=size, seed=seed, **trained, **measured(size, seed, corpus, run, args), kneser_ney=ngram)
    rows = [{name: float(value) for name, value in row.items()} for row in run.history()]
    table = [summary(size, [row for row in rows if row["vocab_size"] == size], corpora[size]) for size in sizes]
    outcome = findings(table, rows)
    save_figure(draw(table, rows, outcome, corpora[sizes[0]].name), run.path("vocab_study.png"))
    return run.finish({**outcome, "operations": budget * tokens_per_update(args.quick), "seeds": seeds, "sizes": table})


def corpus_of(size: int, run: Run, args: argparse.Namespace) -> Corpus:
    """The data in a vocabulary of this size, which prepare_data.py writes beside the study."""
    folder = run.path(f"data_{size}")
    if not (folder / "metrics.json").exists() or not args.resume:
        flags = ["--dataset", args.dataset, "--data-dir", args.data_dir, "--vocab-size", size, "--out", folder]
        prepare_data.main([str(flag) for flag in flags])
    return load(folder)


def _training_flags(args: argparse.Namespace) -> list[str]:
    flags = ["--pack", "--amp", "--optimizer", "muon", "--schedule", "cosine", "--warmup", "20", "--lr", str(args.lr)]
    return [*flags, "--device", args.device, *(["--quick"] if args.quick else [])]


def _default_model(vocab_size: int, quick: bool) -> TransformerLM:
    args = train.build_parser().parse_args(["--quick"] if quick else [])
    return TransformerLM(vocab_size, **{name: getattr(args, name) for name in train.SIZES})


def operations_per_token(vocab_size: int, quick: bool) -> float:
    """Of a training's forward and backward pass, by the formula above."""
    model = _default_model(vocab_size, quick)
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    attention = model.config["n_layers"] * model.config["n_heads"] * model.config["head_dim"] * model.context
    return 6.0 * weights + 12.0 * attention


def tokens_per_update(quick: bool) -> int:
    """Of train.py's default."""
    args = train.build_parser().parse_args(["--quick"] if quick else [])
    return args.batch_size * args.context


def trained_on(size: int, seed: int, updates: int, run: Run, args: argparse.Namespace) -> dict:
    """Train (or go on, or take what is there), and what train.py measured."""
    folder = run.path(f"train_{size}_{seed}")
    flags = [*_training_flags(args), "--data", run.path(f"data_{size}"), "--out", folder, "--seed", seed]
    flags += ["--updates", updates, "--eval-every", max(1, math.ceil(updates / 4)), "--sample-tokens", 20]
    if args.resume:
        flags.append("--resume")
    metrics = train.main([str(flag) for flag in flags])
    kept = ("parameters", "learned_tokens", "training_seconds")
    return {"updates": updates, **{name: metrics[name] for name in kept}}


def measured(size: int, seed: int, corpus: Corpus, run: Run, args: argparse.Namespace) -> dict:
    """Bits per byte of the test text, and how many of the drawn words are words."""
    model, tokens, _ = load_model(run.path(f"train_{size}_{seed}") / "best.pth", pick_device(args.device))
    device = next(model.parameters()).device
    ids = torch.from_numpy(corpus.parts["test"].ids).to(device)
    losses = losses_of_text(model, ids, tokens.start).cpu().double().numpy()
    texts, length = DRAWN
    torch.manual_seed(seed)
    drawn = model.generate(torch.full((texts, 1), tokens.start, device=device), length, temperature=0.9)[:, 1:]
    words = [word for row in drawn.tolist() for word in tokens.decode(row).split()[:-1]]  # the last may be cut
    known = share_known(words, tokens.decode(corpus.parts["train"].ids).split())
    return {"bits_per_byte": bits_per_byte(losses, corpus), "known_words": known}


def ngram_losses(corpus: Corpus) -> np.ndarray:
    """Kneser-Ney's of five tokens on the test text, (N,), nats."""
    train_ids, tokens = corpus.parts["train"].ids, corpus.tokens
    return KneserNey(train_ids, tokens.vocab_size, 5, tokens.start).losses(corpus.parts["test"].ids)


def bits_per_byte(losses: np.ndarray, corpus: Corpus) -> float:
    """Of the test text, from the losses of its tokens (N,)."""
    return float(losses.sum() / math.log(2) / corpus.parts["test"].total("bytes"))


def summary(size: int, rows: list[dict], corpus: Corpus) -> dict:
    """A size's means over the seeds."""
    part = corpus.parts["train"]
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0] if name != "seed"}
    bytes_per_token = part.total("bytes") / len(part.ids)
    read = means["learned_tokens"] * bytes_per_token / part.total("bytes")
    bits = [row["bits_per_byte"] for row in rows]
    spread = {"half_width": half_width(bits)} if len(bits) > 1 else {}
    return {**means, "vocab_size": size, "bytes_per_token": bytes_per_token, "times_read": read, **spread}


def findings(table: list[dict], rows: list[dict]) -> dict:
    """The size with the fewest bits per byte, and what the largest ones cost beside it."""
    best, largest = min(table, key=lambda row: row["bits_per_byte"]), table[-1]
    by_seed = {}
    for row in rows:
        by_seed.setdefault(row["seed"], {})[row["vocab_size"]] = row["bits_per_byte"]
    return {
        "best_vocab_size": best["vocab_size"],
        "best_bits_per_byte": best["bits_per_byte"],
        "best_of_every_seed": [min(found, key=found.get) for found in by_seed.values()],
        "largest_vocab_size": largest["vocab_size"],
        "largest_above_best": largest["bits_per_byte"] / best["bits_per_byte"] - 1,
        "known_words_of_best": best["known_words"],
        "known_words_of_largest": largest["known_words"],
    }


def draw(table: list[dict], rows: list[dict], outcome: dict, name: str):
    """Bits per byte, known words, and how often the text was read, against the size."""
    figure, axes = new_figure(1, 2, width=10.4, height=4.4)
    sizes = [row["vocab_size"] for row in table]
    left, right = axes[0]
    seeds = sorted({row["seed"] for row in rows})
    values = [[row["bits_per_byte"] for row in rows if row["seed"] == seed] for seed in seeds]
    mean_std(left, sizes, np.array(values), label="transformer, mean ± std over seeds", index=0)
    left.plot(sizes, [row["kneser_ney"] for row in table], "--s", color=COLORS[1], label="Kneser-Ney, five tokens")
    left.set(ylabel="bits per byte of the test text")
    right.plot(sizes, [row["known_words"] for row in table], "-o", label="drawn words that are known")
    right.set(ylabel="part of the drawn words", ylim=(0, 1.02))
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=40, ha="right")
        ax.minorticks_off()
        ax.set_xlabel("tokens of the vocabulary")
        ax.legend()
    figure.suptitle(
        f"{name}, the same operations for each: {outcome['best_vocab_size']:,} tokens need the fewest bits, "
        f"{outcome['best_bits_per_byte']:.3f} per byte;\n{outcome['largest_vocab_size']:,} need "
        f"{outcome['largest_above_best']:.1%} more"
    )
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
