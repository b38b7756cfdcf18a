"""What is a language model given to read, and in which pieces?

    python transformer_lm/prepare_data.py
    python transformer_lm/prepare_data.py --tokens byte --out runs/transformer_lm/bytes
    python transformer_lm/prepare_data.py --dataset shakespeare --tokens char --split tail --out runs/chars

Three books (Project Gutenberg's header and footer cut off) are cut into passages of some 4,000 characters; of each book
a twentieth of them is kept for validation and another for the test (corpus.py). `--split tail` is nanoGPT's way: the
first nine tenths of the characters to train on, the rest to validate, no test.

Tokens are pieces of words by default (`bpe`: lower case, no accents; bpe.py), bytes, or characters. They are learned
from the training passages. The figure shows how often each is used: Zipf's law says that the r-th most frequent word
occurs about 1/r as often as the first; from the rarest tokens hardly anything is learned.

Writes train.npy, train_ends.npy, val.npy, val_ends.npy, test.npy, test_ends.npy, tokenizer.json, meta.json, zipf.png,
metrics.json.
Sources: Sennrich et al. 2016; Zipf 1949; Karpathy's nanoGPT for the tail.
"""

import numpy as np

from shared_utils.cli import UserError, make_parser, positive_int, run_main
from shared_utils.data import load_text
from shared_utils.plotting import COLORS, new_figure, save_figure
from shared_utils.runs import start_run
from transformer_lm.corpus import PARTS, Corpus, prepare, save
from transformer_lm.tokens import KINDS


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, dataset="books", device=False, quick={"vocab_size": 512})
    parser.add_argument("--tokens", choices=KINDS, default="bpe", help="pieces of words, bytes or characters")
    parser.add_argument("--vocab-size", type=positive_int, default=2048, help="tokens of bpe")
    parser.add_argument("--split", choices=("passages", "tail"), default="passages", help="what is held out")
    return parser


def main(argv=None) -> dict:
    """Cut, count, write; returns the metrics."""
    args = build_parser().parse_args(argv)
    texts = load_text(args.dataset, args.data_dir)
    if empty := [title for title, text in texts.items() if not text.strip()]:
        raise UserError(f"--dataset {args.dataset}: {empty[0]} is empty")
    rng = np.random.default_rng(args.seed)
    corpus = prepare(texts, args.tokens, args.vocab_size, rng, tail=args.split == "tail", name=args.dataset)
    if corpus.tokens.vocab_size > 2**16:
        raise UserError(f"--vocab-size {args.vocab_size}: token ids are stored in 16 bits, at most 65,536 of them")
    run = start_run(args)
    save(corpus, run.folder)
    train = corpus.parts["train"]
    used = np.sort(np.bincount(train.ids, minlength=corpus.tokens.vocab_size))[::-1]
    used = used[used > 0]
    rare = int((used < 100).sum())
    figure = draw(used, corpus, rare)
    save_figure(figure, run.path("zipf.png"))
    rows = [
        {"part": name, **{what: corpus.parts[name].total(what) for what in ("tokens", "bytes", "characters", "words")}}
        for name in PARTS
    ]
    return run.finish(
        {
            "tokens": args.tokens,
            "vocab_size": corpus.tokens.vocab_size,
            "split": args.split,
            "texts": len(texts),
            "parts": rows,
            "train_tokens": len(train.ids),
            "bytes_per_token": train.total("bytes") / len(train.ids),
            "seen": len(used),
            "seen_less_than_100_times": rare,
        }
    )


def draw(used: np.ndarray, corpus: Corpus, rare: int):
    """How often each token that occurs does so in the training text, the most frequent first, and Zipf's line."""
    figure, axes = new_figure(width=7.2, height=4.4)
    ax = axes[0, 0]
    rank = np.arange(1, len(used) + 1)
    ax.loglog(rank, used, label=f"{len(used):,} of {corpus.tokens.vocab_size:,} tokens ({corpus.tokens.kind})")
    ax.loglog(rank, used[0] / rank, linestyle="--", color=COLORS[1], label="1 / rank")
    for at in np.unique(np.geomspace(1, len(used), 8).astype(int)):
        token = int(np.argsort(-np.bincount(corpus.parts["train"].ids), kind="stable")[at - 1])
        ax.annotate(corpus.tokens.name(token), (at, used[at - 1]), (3, 6), textcoords="offset points", fontsize=9)
    ax.set(xlabel="rank of the token", ylabel="occurrences in the training text")
    ax.legend()
    ids = corpus.parts["train"].ids
    share = corpus.parts["train"].total("bytes") / len(ids)
    figure.suptitle(
        f"{corpus.name}: {len(ids):,} tokens of {share:.2f} bytes to train on;\n"
        f"of the {len(used):,} different ones {rare:,} occur less than 100 times, "
        f"{corpus.tokens.vocab_size - len(used):,} of the vocabulary never"
    )
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
