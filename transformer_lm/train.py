"""What does a small Transformer learn from three books?

    python transformer_lm/train.py
    python transformer_lm/train.py --pack --amp --schedule cosine --warmup 100
    python transformer_lm/train.py --data runs/chars --pack --modern --optimizer muon --out runs/transformer_lm/chars
    torchrun --nproc_per_node 2 transformer_lm/train.py --pack --amp

Each position is to say which token comes next (model.py); AdamW lowers the mean cross-entropy, its gradient clipped to
a norm of 1. An update learns from `--batch-size` paragraphs, padded to the longest of them, or with `--pack` from as
many windows of the text, in which every position carries loss (batches.py). Weights decay; norms, biases and embeddings
do not. Paragraphs are never joined, while the validation's windows go on from one to the next, as packed training does.
The learning rate rises over `--warmup` updates; `--schedule cosine` then lowers it to 0 along half a cosine.
`--optimizer muon` takes orthogonal steps in the blocks' matrices, at `--muon-lr`, holds their norms (which replaces
their initial scale and their weight decay; shared_utils/muon.py), and leaves the rest to AdamW.

The loss of all validation tokens, in windows that do not overlap, is measured every `--eval-every` updates and chooses
the weights that are kept. 1 nat per token is 1.44 bits; evaluate.py turns it into bits per byte.

Writes best.pth, last.pth, loss_plot.png, samples.txt, history.csv, metrics.json.
With --resume a run that was stopped goes on from last.pth and ends with the same weights. Data: prepare_data.py.
Sources: Vaswani et al. 2017; Loshchilov and Hutter 2019 (AdamW); Jordan et al. 2024 (Muon).
Shapes: B sequences, T positions, V tokens.
"""

import argparse
import math
import time

import numpy as np
import torch
from torch import nn

from shared_utils import checkpoint
from shared_utils.cli import (
    UserError,
    add_amp,
    fraction,
    make_parser,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    run_main,
)
from shared_utils.device import autocast
from shared_utils.distributed import process_group, shard, total, wrap
from shared_utils.muon import Muon
from shared_utils.plotting import curves, new_figure, save_figure
from shared_utils.runs import Run, check_finite, start_run
from shared_utils.seeding import derived_seed, seed_everything
from transformer_lm.batches import Text, losses_of_text, total_loss
from transformer_lm.checkpoints import add_data_flag, find_data
from transformer_lm.corpus import Corpus, load
from transformer_lm.model import ATTENTION, TransformerLM
from transformer_lm.texts import printable, write_texts

SIZES = ("d_model", "n_heads", "head_dim", "n_layers", "d_ff", "context", "dropout", "attention", "tied", "modern")


def build_parser():
    """The command line."""
    quick = {"d_model": 32, "n_layers": 2, "d_ff": 48, "context": 32, "batch_size": 16, "updates": 30, "eval_every": 10}
    parser = make_parser(__doc__, dataset=None, quick={**quick, "eval_tokens": 4000, "sample_tokens": 20})
    add_data_flag(parser)
    parser.add_argument("--d-model", type=positive_int, default=256, help="the model's width")
    parser.add_argument("--n-heads", type=positive_int, default=2, help="attention heads of each layer")
    parser.add_argument("--head-dim", type=positive_int, default=32, help="width of a head")
    parser.add_argument("--n-layers", type=positive_int, default=4, help="blocks one after the other")
    parser.add_argument("--d-ff", type=positive_int, default=512, help="width between the two layers at each position")
    parser.add_argument("--context", type=positive_int, default=128, help="positions that the model sees")
    parser.add_argument("--dropout", type=fraction, default=0.1, help="part of the values set to 0 in training")
    parser.add_argument("--tied", action="store_true", help="the output weights are the embedding")
    parser.add_argument("--modern", action="store_true", help="rotary positions, RMS norms, relu², no biases")
    parser.add_argument(
        "--attention", choices=ATTENTION, default="manual", help="written out, or PyTorch's fused kernel"
    )
    parser.add_argument("--pack", action="store_true", help="windows of the text in place of padded paragraphs")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="paragraphs or windows of an update")
    parser.add_argument("--updates", type=positive_int, default=3000, help="of the weights")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw", help="of the blocks' matrices")
    parser.add_argument("--lr", type=positive_float, default=3e-4, help="AdamW's (highest) learning rate")
    parser.add_argument("--muon-lr", type=positive_float, default=0.1, help="Muon's, in units of singular values")
    parser.add_argument("--schedule", choices=("constant", "cosine"), default="constant", help="of the learning rates")
    parser.add_argument("--warmup", type=non_negative_int, default=0, help="updates in which the rate rises from 0")
    parser.add_argument("--weight-decay", type=non_negative_float, default=0.01, help="of AdamW's weight matrices")
    parser.add_argument("--eval-every", type=positive_int, default=250, help="updates between two validations")
    parser.add_argument("--eval-tokens", type=positive_int, help="validation tokens (default: all)")
    parser.add_argument("--sample-tokens", type=positive_int, default=60, help="of the text drawn at each validation")
    add_amp(parser)
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    parser.add_argument("--resume", action="store_true", help="go on from last.pth")
    return parser


def main(argv=None) -> dict:
    """Train, choose on validation; returns the metrics."""
    args = build_parser().parse_args(argv)
    corpus = load(find_data(args))
    with process_group(args.device) as world:
        return train(args, corpus, world)


def share_of_rate(args: argparse.Namespace, update: int) -> float:
    """The fraction of its highest learning rate that an update, counted from 0, takes: 0 … 1."""
    if update < args.warmup:
        return (update + 1) / args.warmup
    if args.schedule == "constant":
        return 1.0
    done = (update - args.warmup) / max(1, args.updates - args.warmup)  # 0 … 1
    return (1 + math.cos(math.pi * done)) / 2


def make_optimizers(model: TransformerLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon if it has the blocks' matrices. A group's "peak" is its highest rate.

    AdamW's decay is of linear layers' weight matrices; tied weights are an embedding's, and do not decay.
    """
    linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    hidden = [p for p in model.blocks.parameters() if p.ndim == 2] if args.optimizer == "muon" else []
    of_muon = {id(p) for p in hidden}
    decays = {id(p) for p in linear} - {id(model.embedding.weight)}
    rest = [p for p in model.parameters() if id(p) not in of_muon]
    groups = [
        {"params": [p for p in rest if (id(p) in decays) == decay], "weight_decay": args.weight_decay * decay}
        for decay in (True, False)
    ]
    adamw = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    optimizers = [adamw, Muon(hidden, args.muon_lr, momentum=0.9)] if hidden else [adamw]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def train(args: argparse.Namespace, corpus: Corpus, world) -> dict:
    """What `main` does, in one process of `world`."""
    device, tokens = world.device, corpus.tokens
    world.check(args.batch_size)
    for name in ("train", "val"):
        if len(corpus.parts[name].ids) < args.context:
            n = len(corpus.parts[name].ids)
            raise UserError(f"{corpus.name} has {n} tokens in {name}, fewer than --context {args.context}")
    text = Text(corpus.parts["train"], args.context, tokens.start, device)
    val = torch.from_numpy(corpus.parts["val"].ids[: args.eval_tokens]).to(device)
    seed_everything(args.seed)
    model = TransformerLM(tokens.vocab_size, **{name: getattr(args, name) for name in SIZES}).to(device)
    run = start_run(args, writes=world.is_main)
    config = {**model.config, "tokens": tokens.kind, "data": corpus.fingerprint}
    ddp = wrap(model, world)
    network = torch.compile(ddp) if args.compile else ddp  # what is trained; `model` holds its weights
    optimizers = make_optimizers(model, args)
    first, best, seconds, learned = 0, {"val_loss": math.inf}, 0.0, 0.0

    if args.resume and run.path("last.pth").exists():
        state = checkpoint.load(run.path("last.pth"), expect=config)
        if state["processes"] != world.size:
            raise UserError(f"--resume: the run had {state['processes']} process(es), now there are {world.size}")
        model.load_state_dict(state["model"])
        for optimizer, of_one in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(of_one)
        first, best, seconds, learned = (state[name] for name in ("updates", "best", "seconds", "learned"))
    run.rewind(-(-first // args.eval_every))

    started, loss_sum, count_sum = time.perf_counter(), torch.zeros((), device=device), torch.zeros((), device=device)
    for update in range(first, args.updates):
        # What is random in an update follows from seed, update and, for dropout, process: resuming needs no states.
        rng = np.random.default_rng([args.seed, update])
        torch.manual_seed(derived_seed(args.seed, update, world.rank))
        chosen = shard(text.drawn(args.batch_size, rng, args.pack), world)
        batch = text.packed(chosen) if args.pack else text.padded(chosen)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * share_of_rate(args, update)
        network.train()
        with autocast(device, args.amp):
            summed = total_loss(network, batch)
        count = total(batch.count, world)  # of all processes: their gradients' mean is then that of the whole batch
        model.zero_grad()
        (summed * world.size / count).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        loss_sum += summed.detach()
        count_sum += count
        done = update + 1
        if done % args.eval_every and done < args.updates:
            continue
        train_loss = (total(loss_sum, world) / count_sum).item()
        lr = args.lr * share_of_rate(args, update)
        flag = "--lr or --muon-lr" if args.optimizer == "muon" else "--lr"
        check_finite(train_loss, done, lr, flag)
        learned += count_sum.item()
        seconds += time.perf_counter() - started
        val_loss = losses_of_text(model, val, tokens.start, args.amp).mean().item()
        check_finite(val_loss, done, lr, flag)  # the last update may be the one too many
        row = {"update": done, "lr": lr, "train_loss": train_loss, "val_loss": val_loss}
        run.log(**row, tokens=learned, seconds=round(seconds, 1))
        if world.is_main:
            about = {"config": config, "name": corpus.name}
            if val_loss < best["val_loss"]:
                best = {"val_loss": val_loss, "update": done}
                checkpoint.save(run.path("best.pth"), model=model.state_dict(), **about, **best)
                corpus.tokens.save(run.path("tokenizer.json"))
            state = {"model": model.state_dict(), "optimizers": [each.state_dict() for each in optimizers]}
            state |= {"updates": done, "best": best, "seconds": seconds, "learned": learned, "processes": world.size}
            checkpoint.save(run.path("last.pth"), **about, **state)
            print(f"    {sample(model, corpus, args)!r}", flush=True)
        started, loss_sum, count_sum = time.perf_counter(), torch.zeros_like(loss_sum), torch.zeros_like(count_sum)

    if not world.is_main:
        return {}
    return finish(args, corpus, model, run, best, seconds, learned)


def sample(model: TransformerLM, corpus: Corpus, args: argparse.Namespace) -> str:
    """Text that the model writes from nothing, at temperature 0.8."""
    start = torch.tensor([[corpus.tokens.start]], device=next(model.parameters()).device)
    return corpus.tokens.decode(model.generate(start, args.sample_tokens, temperature=0.8)[0, 1:].tolist())


def finish(
    args: argparse.Namespace, corpus: Corpus, model: TransformerLM, run: Run, best: dict, seconds: float, learned: float
) -> dict:
    """The figure, texts of the best weights, and the metrics."""
    device = next(model.parameters()).device
    model.load_state_dict(checkpoint.load(run.path("best.pth"), device=device)["model"])
    torch.manual_seed(args.seed)
    write_texts(run.path("samples.txt"), [printable(sample(model, corpus, args)) for _ in range(3)])
    rows = run.numbers()
    val = corpus.parts["val"]
    size = sum(p.numel() for p in model.parameters())
    ids = val.ids[: args.eval_tokens]
    whole = len(ids) == len(val.ids)
    n_bytes = val.total("bytes") if whole else len(corpus.tokens.decode(ids).encode("utf-8", "surrogateescape"))
    bits = best["val_loss"] * len(ids) / n_bytes / math.log(2)
    about = f"{corpus.name} in {corpus.tokens.kind} tokens, {size:,} parameters"
    save_figure(draw(rows, best, bits, about), run.path("loss_plot.png"))
    return run.finish(
        {
            "name": corpus.name,
            "tokens": corpus.tokens.kind,
            "parameters": size,
            "updates": args.updates,
            "best_update": best["update"],
            "val_loss": best["val_loss"],
            "val_bits_per_byte": bits,
            "train_loss": rows[-1]["train_loss"],
            "learned_tokens": learned,
            "training_seconds": seconds,
            "tokens_per_second": learned / seconds,
        }
    )


def draw(rows: list[dict[str, float]], best: dict, bits: float, about: str):
    """Training and validation loss by update, and what is kept."""
    figure, axes = new_figure(width=7.2, height=4.4)
    update = [row["update"] for row in rows]
    series = {"training (with dropout)": "train_loss", "validation": "val_loss"}
    curves(
        axes[0, 0],
        {name: (update, [row[key] for row in rows]) for name, key in series.items()},
        xlabel="update",
        ylabel="cross-entropy (nats per token)",
    )
    axes[0, 0].plot(best["update"], best["val_loss"], "k^", label=f"kept: update {best['update']}")
    axes[0, 0].legend()
    figure.suptitle(
        f"{about}:\n{best['val_loss']:.3f} nats per token of validation, {bits:.3f} bits per byte, "
        f"after {rows[-1]['seconds'] / 60:.1f} minutes"
    )
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
