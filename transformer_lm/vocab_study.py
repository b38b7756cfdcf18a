"""How large should the vocabulary be, at the same compute?

    python transformer_lm/vocab_study.py
    python transformer_lm/vocab_study.py --vocab-sizes 261 2048 --seeds 0 1 2 --out runs/transformer_lm/vocab_bytes

A larger vocabulary writes the text in fewer tokens, so that an update reads more of it; but the output layer costs
more, and each token is seen less often. For every size prepare_data.py learns the tokens and train.py trains the
default model (`--pack --amp --optimizer muon --schedule cosine`) with as many updates as cost the floating-point
operations of `--updates` updates at the middle of the sizes; for a token

    operations ≈ 6 · (weights of all products: blocks, output) + 12 · layers · heads · head width · context

forward and backward. Each size has the best of the learning rates `--lrs` on the validation text, on which the best
size is chosen too, and a rate that diverges is out; its bits per byte are those of the test text, the same text for
all. They are measured in windows that move on by a quarter: all see about as many tokens, which for a small vocabulary
is less of the text. Beside them stand Kneser-Ney over the same tokens, and the part of the drawn words that are words
of the training text. 261 tokens are the bytes alone.

Writes data_SIZE/ (as prepare_data.py), train_SIZE_LR_SEED/ (as train.py), vocab_study.png, history.csv, metrics.json.
With --resume a study that was stopped goes on where it was.
Sources: Sennrich et al. 2016; Chowdhery et al. 2022, appendix B (the operations).
"""

import argparse
import math
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import torch

from shared_utils.cli import UserError, add_seeds, make_parser, positive_float, positive_int, run_main
from shared_utils.data import load_text
from shared_utils.device import pick_device
from shared_utils.plotting import COLORS, new_figure, save_figure
from shared_utils.runs import Diverged, Run, start_run
from transformer_lm import prepare_data, train
from transformer_lm.baselines import share_known, words_of
from transformer_lm.batches import sliding_losses
from transformer_lm.bpe import SMALLEST
from transformer_lm.checkpoints import load_model
from transformer_lm.corpus import Corpus, Part, load
from transformer_lm.model import TransformerLM
from transformer_lm.ngram import KneserNey

NEAR = 0.005  # sizes whose bits on validation differ by less are called as good
DRAWN = (20, 100)  # texts, and tokens of each, from which known words are counted
KEPT = ("parameters", "learned_tokens", "training_seconds")  # of train.py's metrics
LOST = {"val_bits_per_byte": math.inf, "test_bits_per_byte": math.inf, "known_words": 0.0}  # at a rate that diverges


def build_parser():
    """The command line."""
    quick = {"vocab_sizes": [300, 600], "updates": 8, "batch_size": 16}
    parser = make_parser(__doc__, dataset="books", quick=quick)
    sizes = [512, 1024, 2048, 4096, 8192, 16384]
    parser.add_argument("--vocab-sizes", type=positive_int, nargs="+", default=sizes, help="261 are the bytes alone")
    add_seeds(parser, [0], "one training each per size and rate")
    parser.add_argument("--updates", type=positive_int, default=500, help="updates at the middle of the sizes")
    parser.add_argument("--batch-size", type=positive_int, default=32, help="windows of an update")
    parser.add_argument(
        "--lrs", type=positive_float, nargs="+", default=[0.003, 0.01], help="AdamW's, of embeddings and output"
    )
    parser.add_argument("--resume", action="store_true", help="go on where a stopped study was")
    return parser


def main(argv=None) -> dict:
    """Prepare, train and measure every size; returns the metrics."""
    args = build_parser().parse_args(argv)
    if (size := min(args.vocab_sizes)) < SMALLEST:
        raise UserError(f"--vocab-sizes {size}: the bytes and special tokens alone are {SMALLEST}")
    pick_device(args.device)  # before start_run, as load_text: a name that is not there takes no earlier study away
    load_text(args.dataset, args.data_dir)
    run = start_run(args)
    if not args.resume:
        for folder in [*run.folder.glob("data_*"), *run.folder.glob("train_*")]:  # an earlier study's
            shutil.rmtree(folder)
    corpora = {size: corpus_of(size, run, args) for size in sorted(set(args.vocab_sizes))}
    sizes = {size: corpus.tokens.vocab_size for size, corpus in corpora.items()}  # a short text has fewer than asked
    costs = {size: operations_per_token(real, args.quick) for size, real in sizes.items()}
    budget = args.updates * costs[list(sizes)[len(sizes) // 2]]
    table = []
    for size, corpus in corpora.items():
        updates = max(1, round(budget / costs[size]))
        for lr, seed in product(dict.fromkeys(args.lrs), args.seeds):
            if run.row(asked=size, lr=lr, seed=seed):
                continue
            folder = run.path(f"train_{size}_{lr:g}_{seed}")
            try:
                trained = trained_in(folder, updates, lr, args.seed + seed, run.path(f"data_{size}"), args)
                found = measured(folder, corpus, args.seed, args.device)
            except Diverged as error:
                print(f"{size} tokens, seed {seed}: {error}", flush=True)
                trained, found = {"updates": updates, **dict.fromkeys(KEPT, 0)}, LOST
            run.log(asked=size, vocab_size=sizes[size], lr=lr, seed=seed, **trained, **found)
        table.append(summary([row for row in run.numbers() if row["asked"] == size], corpus))
    outcome = findings(table, args.lrs)
    read = args.batch_size * _default(args.quick).context
    save_figure(draw(table, outcome, budget * read, next(iter(corpora.values())).name), run.path("vocab_study.png"))
    return run.finish({**outcome, "operations": budget * read, "seeds": args.seeds, "lrs": args.lrs, "sizes": table})


def corpus_of(size: int, run: Run, args: argparse.Namespace) -> Corpus:
    """The data in a vocabulary of this size, which prepare_data.py writes beside the study."""
    folder = run.path(f"data_{size}")
    if not (folder / "metrics.json").exists():
        flags = ["--dataset", args.dataset, "--data-dir", args.data_dir, "--vocab-size", size, "--out", folder]
        prepare_data.main([str(flag) for flag in [*flags, "--seed", args.seed]])
    return load(folder)


def _default(quick: bool) -> argparse.Namespace:
    return train.build_parser().parse_args(["--quick"] if quick else [])


def operations_per_token(vocab_size: int, quick: bool) -> float:
    """Of a training's forward and backward pass, by the formula above."""
    model = TransformerLM(vocab_size, **{name: getattr(_default(quick), name) for name in train.SIZES})
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    attention = model.config["n_layers"] * model.config["n_heads"] * model.config["head_dim"] * model.context
    return 6.0 * weights + 12.0 * attention


def trained_in(folder: Path, updates: int, lr: float, seed: int, data: Path, args: argparse.Namespace) -> dict:
    """Train (or go on, or take what is there), and what train.py measured."""
    flags = ["--pack", "--amp", "--optimizer", "muon", "--muon-lr", 0.05, "--schedule", "cosine", "--lr", lr]
    flags += ["--warmup", updates // 20, "--updates", updates, "--eval-every", max(1, math.ceil(updates / 4))]
    flags += ["--batch-size", args.batch_size, "--sample-tokens", 20, "--data", data, "--out", folder, "--seed", seed]
    flags += ["--device", args.device, *(["--quick"] if args.quick else []), *(["--resume"] if args.resume else [])]
    metrics = train.main([str(flag) for flag in flags])
    return {"updates": updates, **{name: metrics[name] for name in KEPT}}


def measured(folder: Path, corpus: Corpus, seed: int, device: str) -> dict:
    """Bits per byte of the validation and the test text, and how many of the drawn words are words."""
    model, tokens, _ = load_model(folder / "best.pth", pick_device(device))
    device, found = next(model.parameters()).device, {}
    for name in ("val", "test"):
        ids = torch.from_numpy(corpus.parts[name].ids).to(device)
        losses = sliding_losses(model, ids, tokens.start, max(1, model.context // 4))
        found[f"{name}_bits_per_byte"] = bits_per_byte(losses.cpu().double().numpy(), corpus.parts[name])
    texts, length = DRAWN
    torch.manual_seed(seed)
    drawn = model.generate(torch.full((texts, 1), tokens.start, device=device), length, temperature=0.9)[:, 1:]
    words = [word for row in drawn.tolist() for word in words_of(tokens.decode(row))[:-1]]  # the last may be cut
    return {**found, "known_words": share_known(words, words_of(tokens.decode(corpus.parts["train"].ids)))}


def bits_per_byte(losses: np.ndarray, part: Part) -> float:
    """Of a part's text, from the losses of its tokens (N,), nats."""
    return float(losses.sum() / math.log(2) / part.total("bytes"))


def summary(rows: list[dict], corpus: Corpus) -> dict:
    """A size at the rate that is best on validation: its means over the seeds, and Kneser-Ney's of five tokens.

    Errors: `UserError` when a training diverged at every rate.
    """
    lrs, tokens = {row["lr"] for row in rows}, corpus.tokens
    by_lr = {lr: [row for row in rows if row["lr"] == lr] for lr in sorted(lrs)}
    mean = {
        lr: {name: float(np.mean([row[name] for row in found])) for name in found[0] if name not in ("seed", "asked")}
        for lr, found in by_lr.items()
    }
    best = min(mean.values(), key=lambda row: row["val_bits_per_byte"])
    if not math.isfinite(best["val_bits_per_byte"]):
        raise UserError(f"{tokens.vocab_size} tokens: the loss is not finite at any of --lrs; try lower ones")
    part, test = corpus.parts["train"], corpus.parts["test"]
    ngram = KneserNey(part.ids, tokens.vocab_size, 5, tokens.start).losses(test.ids)
    return {
        **best,
        "vocab_size": tokens.vocab_size,
        "bytes_per_token": part.total("bytes") / len(part.ids),
        "times_read": best["learned_tokens"] / len(part.ids),
        "kneser_ney": bits_per_byte(ngram, test),
        "of_seeds": [row["test_bits_per_byte"] for row in by_lr[best["lr"]]],
    }


def findings(table: list[dict], lrs: list[float]) -> dict:
    """The size that is best on validation, and what the largest costs beside it on the test text."""
    best, largest = min(table, key=lambda row: row["val_bits_per_byte"]), table[-1]
    near = [row["vocab_size"] for row in table if row["val_bits_per_byte"] <= (1 + NEAR) * best["val_bits_per_byte"]]
    return {
        "as_good_on_validation": " and ".join(f"{size:,}" for size in near),
        "best_vocab_size": best["vocab_size"],
        "best_bits_per_byte": best["test_bits_per_byte"],
        "best_times_read": best["times_read"],
        "largest_vocab_size": largest["vocab_size"],
        "largest_above_best": largest["test_bits_per_byte"] / best["test_bits_per_byte"] - 1,
        "smallest_vocab_size": table[0]["vocab_size"],
        "smallest_above_best": table[0]["test_bits_per_byte"] / best["test_bits_per_byte"] - 1,
        "known_words_of_best": best["known_words"],
        "known_words_of_largest": largest["known_words"],
        "at_the_highest_rate": [row["vocab_size"] for row in table if row["lr"] == max(lrs)],
    }


def draw(table: list[dict], outcome: dict, operations: float, name: str):
    """Bits per byte, and the known words, against the size."""
    figure, axes = new_figure(1, 2, width=10.4, height=4.6)
    sizes, (left, right) = [row["vocab_size"] for row in table], axes[0]
    several = len(table[0]["of_seeds"]) > 1
    label = "transformer, mean over seeds" if several else "transformer"
    left.plot(sizes, [row["test_bits_per_byte"] for row in table], "-o", label=label)
    if several:
        dots = [(row["vocab_size"], bits) for row in table for bits in row["of_seeds"]]
        left.plot(*zip(*dots, strict=True), "k.", markersize=4, label="each seed")
    left.plot(sizes, [row["kneser_ney"] for row in table], "--s", color=COLORS[1], label="Kneser-Ney, five tokens")
    left.set(ylabel="bits per byte of the test text")
    right.plot(sizes, [100 * row["known_words"] for row in table], "-o", label="words of the training text")
    right.set(ylabel="of the drawn words (%)", ylim=(0, 102))
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes, [f"{size:,.0f}" for size in sizes], rotation=40, ha="right")
        ax.minorticks_off()
        ax.set_xlabel("tokens of the vocabulary")
        ax.legend()
    figure.suptitle(
        f"{name}, {operations:.1e} operations of training each: {outcome['as_good_on_validation']} tokens are best on "
        f"validation;\n{outcome['best_vocab_size']:,} need {outcome['best_bits_per_byte']:.3f} bits per byte of test, "
        f"{outcome['largest_vocab_size']:,} {outcome['largest_above_best']:+.1%}, {outcome['smallest_vocab_size']:,} "
        f"{outcome['smallest_above_best']:+.1%}"
    )
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
