"""Where does each head look, what do positions have in common, and which tokens mean the same to the model?

    python transformer_lm/analyze_attention.py
    python transformer_lm/analyze_attention.py --text "The king is dead, long live the king"
    python transformer_lm/analyze_attention.py --neighbours " king" " said" " 1"

For each layer and head the weights with which every token of `--text` looks at itself and those before it (a row adds
up to 1). A head may look at the token before, at the first token (where it has nothing to say), or at an earlier token
like this one; metrics.json says how much of each. Positions are told apart by sines and cosines, whose products depend
on the distance alone: P_t · P_s = Σ_i cos((t − s) / 10000^(2i/d)). A token's neighbours are those whose embeddings make
the smallest angle with its own.

Writes attention.png, positions.png, neighbours.txt, metrics.json. Model: train.py.
Sources: Vaswani et al. 2017; Clark et al. 2019 (what heads look at).
Shapes: T tokens, H heads, V tokens of the vocabulary, d model width.
"""

import numpy as np
import torch
import torch.nn.functional as F

from shared_utils.cli import UserError, make_parser, positive_int, run_main, utf8_text
from shared_utils.device import pick_device
from shared_utils.plotting import new_figure, save_figure
from shared_utils.runs import start_run, write_text
from transformer_lm.checkpoints import add_ckpt_flag, find_checkpoint, load_model
from transformer_lm.model import TransformerLM, sinusoidal_positions
from transformer_lm.tokens import Tokens

TEXT = "Sherlock Holmes looked at the hound, and the hound looked at Sherlock Holmes."


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, dataset=None, quick={"text": "a list of the list"})
    add_ckpt_flag(parser)
    parser.add_argument("--text", type=utf8_text, default=TEXT, help="what the heads look at")
    words = [" he", " king", " said", " the", " not", "."]
    parser.add_argument(
        "--neighbours",
        nargs="+",
        type=utf8_text,
        default=words,
        metavar="TOKEN",
        help="tokens whose neighbours to find",
    )
    parser.add_argument("--count", type=positive_int, default=6, help="neighbours of each")
    return parser


def main(argv=None) -> dict:
    """Look, draw; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    model, tokens, state = load_model(find_checkpoint(args), device)
    ids = [tokens.start, *tokens.encode(args.text).tolist()]
    if not 3 <= len(ids) <= model.context:
        raise UserError(f"--text has {len(ids) - 1} tokens; the figure needs 2 to {model.context - 1}")
    unknown = [word for word in args.neighbours if len(tokens.encode(word)) != 1]
    run = start_run(args)
    maps = model.attention_maps(torch.tensor([ids], device=device))[:, 0].cpu().numpy()  # (layers, H, T, T)
    heads = [
        {"layer": layer + 1, "head": head + 1, **looks(weights, np.array(ids))}
        for layer, of_layer in enumerate(maps)
        for head, weights in enumerate(of_layer)
    ]
    names = ["[start]", *(tokens.name(i) for i in ids[1:])]
    save_figure(draw_attention(maps, heads, names, state["name"]), run.path("attention.png"))
    if not model.modern:  # rotary positions are nowhere in the sum
        save_figure(draw_positions(model), run.path("positions.png"))
    found = {word: neighbours(model, tokens, word, args.count) for word in args.neighbours if word not in unknown}
    lines = [f"{word!r}: " + ", ".join(f"{name} {cos:.2f}" for name, cos in near) for word, near in found.items()]
    lines += [f"{word!r}: not a single token" for word in unknown]
    write_text(run.path("neighbours.txt"), "\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)
    return run.finish(
        {
            "text": args.text,
            "tokens": len(ids),
            "heads": heads,
            "most_at_the_one_before": max(head["before"] for head in heads),
            "most_at_the_start": max(head["start"] for head in heads),
            "most_at_the_same": max(head["same"] for head in heads),
            "neighbours": [
                {"token": word, "nearest": near[0][0], "cosine": near[0][1]} for word, near in found.items()
            ],
        }
    )


def looks(weights: np.ndarray, ids: np.ndarray) -> dict[str, float]:
    """How much of a head's weights (T, T) goes, on average over the tokens from the second on, to what.

    itself, before: the token before; start: the first of all; same: earlier occurrences of the same token, over the
    tokens that have one (0 where none has).
    """
    t = np.arange(1, len(ids))
    earlier = np.tril(ids[:, None] == ids[None], -1)  # (T, T)
    again = earlier.any(1)
    return {
        "itself": weights[t, t].mean(),
        "before": weights[t, t - 1].mean(),
        "start": weights[t, 0].mean(),
        "same": (weights * earlier).sum(1)[again].mean() if again.any() else 0.0,
    }


@torch.no_grad()
def neighbours(model: TransformerLM, tokens: Tokens, word: str, count: int) -> list[tuple[str, float]]:
    """The tokens nearest to a token by the angle of their embeddings, with its cosine."""
    token = int(tokens.encode(word)[0])
    cosine = F.cosine_similarity(model.embedding.weight, model.embedding.weight[token], dim=1)  # (V,)
    cosine[token] = -2  # not itself
    best = cosine.topk(min(count, len(cosine) - 1))
    return [(tokens.name(int(i)), float(value)) for value, i in zip(best.values, best.indices, strict=True)]


def draw_attention(maps: np.ndarray, heads: list[dict], names: list[str], name: str):
    """One map for each head, a column of heads for each layer."""
    layers, n_heads, t, _ = maps.shape
    side = max(2.6, 0.1 * t + 1.2)
    figure, axes = new_figure(n_heads, layers, width=side * layers + 1.0, height=side * n_heads + 1.0)
    for (head, layer), ax in np.ndenumerate(axes):
        image = ax.imshow(maps[layer, head], vmin=0, vmax=1, cmap="viridis")
        row = heads[layer * n_heads + head]
        ax.set_title(f"layer {layer + 1}, head {head + 1}: {row['before']:.0%} at the one before", fontsize=9)
        ax.set_xticks(range(t), names, rotation=90, fontsize=6)
        ax.set_yticks(range(t), names, fontsize=6)
        ax.grid(False)
    figure.supxlabel("token looked at")
    figure.supylabel("token that looks")
    figure.colorbar(image, ax=axes, shrink=0.4, label="weight (a row adds up to 1)")
    most = {what: max(heads, key=lambda row: row[what]) for what in ("before", "start", "same")}
    words = {"before": "at the one before", "start": "at the start", "same": "at the same token earlier"}
    said = (f"{words[what]} L{row['layer']}H{row['head']} ({row[what]:.0%})" for what, row in most.items())
    figure.suptitle(f"Model of {name}: who looks most\n" + ", ".join(said))
    return figure


def draw_positions(model: TransformerLM):
    """The sines of P, and the products of its rows."""
    width = model.config["d_model"]
    p = sinusoidal_positions(model.context, width).numpy()  # (T, d)
    figure, axes = new_figure(1, 2, width=9.0, height=3.8)
    left = axes[0, 0].imshow(p[:, ::2], cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    axes[0, 0].set(xlabel="pair of dimensions", ylabel="position", title="the sines of P")
    right = axes[0, 1].imshow(
        np.round(p @ p.T / (width / 2), 2), cmap="viridis", aspect="auto", interpolation="nearest"
    )
    axes[0, 1].set(xlabel="position", ylabel="position", title="P Pᵀ, 1 for the same position")
    for ax, image in zip(axes[0], (left, right), strict=True):
        ax.grid(False)
        figure.colorbar(image, ax=ax)
    near = float(p[0] @ p[1] / (width / 2))
    figure.suptitle(f"Positions are alike by how near they are: neighbours {near:.2f} of 1")
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
