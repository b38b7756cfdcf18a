"""How fast do networks train together, how fast one after another, and what limits them?

    python nl_regression/benchmark.py
    python nl_regression/benchmark.py --groups 5 20 100 --device cuda

The same updates of the same networks (the interpolating recipe with Adam): as one EnsembleMLP by fitting.fit, in groups
of 1, 2, 5, … networks; and one after another as torch.nn layers, measured on `--alone` of them. A time is that of an
update of one network, in the fastest epoch of `--repeats` trainings; on one thread of a CPU it is processor time.
An update needs at least

    products:  2 · B · (3W − W_1) operations: forward, gradients of the weights and of all inputs but the first layer's
    traffic:   8 · 4 · P bytes: Adam reads weight, gradient and two moments and writes all but the gradient, which the
               backward pass writes

at the speed of one large product and of one large copy on this machine (in a cache the traffic is faster). That both
ways train the same networks is checked in float64, by their mean squared errors after each epoch.

Writes speed.png, history.csv, metrics.json. Source: Kingma and Ba 2015 (Adam).
Shapes: M networks, B points of a batch, F frequencies; P parameters of a network, W of them weights, W_1 in layer 1.
"""

import math
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from nl_regression.fitting import UPDATES_PER_EPOCH, epoch_batches, evaluate, fit
from nl_regression.model import EnsembleMLP
from nl_regression.recipes import RECIPES, Recipe, points_of
from nl_regression.target import target
from shared_utils.cli import at_least, make_parser, positive_int, run_main
from shared_utils.device import cpu_threads, pick_device
from shared_utils.plotting import COLORS, new_figure, save_figure
from shared_utils.runs import start_run
from shared_utils.schedules import half_cosine
from shared_utils.seeding import seed_everything

PARITY_SIZES = (20, 100, 300)  # points of the networks that are compared in float64: less than a batch, and more


def build_parser():
    """The command line."""
    quick = {"groups": [1, 4], "epochs": 2, "repeats": 1, "alone": 1, "width": 64, "parity_epochs": 2, "threads": [1]}
    parser = make_parser(__doc__, dataset=None, quick=quick)
    parser.add_argument("--groups", type=positive_int, nargs="+", default=[1, 2, 5, 10, 20], help="networks at once")
    parser.add_argument("--epochs", type=at_least(2), default=3, help=f"of {UPDATES_PER_EPOCH} updates, 2 or more")
    parser.add_argument("--repeats", type=positive_int, default=3, help="times that each is measured")
    parser.add_argument("--alone", type=positive_int, default=3, help="networks trained one after another")
    parser.add_argument("--n", type=at_least(2), default=500, help="points of each network, 2 or more")
    parser.add_argument("--width", type=positive_int, default=256, help="units of a hidden layer")
    parser.add_argument(
        "--threads", type=positive_int, nargs="+", default=[1, 2], help="on a CPU; 1 is always measured"
    )
    parser.add_argument("--parity-epochs", type=positive_int, default=5, help="after which float64 losses are compared")
    return parser


class Fourier(nn.Module):
    """cos(2πbx), sin(2πbx) at given frequencies b (F,): (B, 1) → (B, 2F)."""

    def __init__(self, frequencies: Tensor):
        super().__init__()
        self.register_buffer("frequencies", frequencies)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 1) → features (B, 2F)."""
        phase = 2 * math.pi * x * self.frequencies
        return torch.cat([phase.cos(), phase.sin()], dim=1)


def twin_of(model: EnsembleMLP, i: int) -> nn.Sequential:
    """Network i of the ensemble as torch.nn layers, with a copy of its weights."""
    layers = [Fourier(model.frequencies[i].clone())] if model.features else []
    for weight, bias in zip(model.weights, model.biases, strict=True):
        linear = nn.utils.skip_init(nn.Linear, *weight.shape[1:], device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            linear.weight.copy_(weight[i].T)
            linear.bias.copy_(bias[i, 0])
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train_alone(
    net: nn.Sequential,
    points: np.ndarray,
    rng: np.random.Generator,
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    fused: bool,
    after_epoch: Callable[[int, nn.Sequential], None],
) -> None:
    """What fitting.fit does (Adam, cosine), to one network of torch.nn layers: same batches, same rates."""
    like = next(net.parameters())
    x = torch.from_numpy(points).to(like)[:, None]  # (n, 1)
    y = torch.from_numpy(target(points)).to(like)[:, None]
    steps = torch.optim.Adam(net.parameters(), lr=lr, fused=fused)
    updates, step = epochs * UPDATES_PER_EPOCH, 0
    for epoch in range(1, epochs + 1):
        batches, _ = epoch_batches([len(points)], batch_size, [rng])  # (U, 1, B)
        for at in batches[:, 0].to(like.device):
            steps.param_groups[0]["lr"] = half_cosine(step, updates, lr)
            steps.zero_grad()
            nn.functional.mse_loss(net(x[at]), y[at]).backward()
            steps.step()
            step += 1
        after_epoch(epoch, net)


@cpu_threads(1)
def parity(recipe: Recipe, sizes: tuple[int, ...], epochs: int, seed: int) -> float:
    """The largest relative difference between the two ways' float64 losses, over networks and epochs."""
    rngs, points = zip(*(points_of(n, trial, seed) for trial, n in enumerate(sizes)), strict=True)
    model = EnsembleMLP(
        len(sizes),
        recipe.width,
        recipe.depth,
        recipe.features,
        sigma=recipe.sigma,
        rngs=rngs,
        dtype=torch.float64,
    )
    nets, same_rngs = [twin_of(model, i) for i in range(len(sizes))], deepcopy(rngs)
    how = {"epochs": epochs, "lr": recipe.lr, "batch_size": recipe.batch_size}
    together, alone = [], []

    def note(own: np.ndarray, _epoch: int, net: nn.Sequential) -> None:
        with torch.no_grad():
            found = net(torch.from_numpy(own)[:, None])[:, 0].numpy()
        alone.append(np.mean((found - target(own)) ** 2))

    fit(model, points, rngs, after_epoch=lambda _, model: together.append(evaluate(model, points)[0]), **how)
    for net, own, rng in zip(nets, points, same_rngs, strict=True):
        train_alone(net, own, rng, fused=True, after_epoch=partial(note, own), **how)
    together, alone = np.array(together).T, np.reshape(alone, (len(sizes), epochs))  # (M, epochs) both
    return float((np.abs(together - alone) / together).max())


def clock_of(threads: int, device: torch.device) -> Callable[[], float]:
    """Seconds since some start. One thread's are processor time: while others hold the core, it stands still."""
    if device.type == "cpu":
        return time.process_time if threads == 1 else time.perf_counter

    def waited() -> float:
        torch.zeros(1, device=device).item()  # a GPU's work is done when a value that came after it is here
        return time.perf_counter()

    return waited


class Epochs:
    """An `after_epoch` that keeps the seconds of each epoch but the first."""

    def __init__(self, clock: Callable[[], float]):
        self.clock, self.seconds, self._before = clock, [], None

    def __call__(self, epoch: int, _) -> None:
        now = self.clock()
        if epoch > 1:
            self.seconds.append(now - self._before)
        self._before = now


def time_updates(
    recipe: Recipe, n: int, group: int, alone: bool, fused: bool, seed: int, threads: int, device
) -> float:
    """Seconds of an update of one network, the least over the epochs: `group` networks together or one by one."""
    rngs, points = zip(*(points_of(n, trial, seed) for trial in range(group)), strict=True)
    model = recipe.model(rngs).to(device)
    how = {"epochs": recipe.epochs, "lr": recipe.lr, "batch_size": recipe.batch_size}
    clock, timed = clock_of(threads, device), []
    with cpu_threads(threads):
        if alone:
            for i in range(group):
                timed.append(Epochs(clock))
                train_alone(twin_of(model, i), points[i], rngs[i], fused=fused, after_epoch=timed[-1], **how)
        else:
            timed.append(Epochs(clock))
            fit(model, points, rngs, after_epoch=timed[-1], **how)
    return min(second for epochs in timed for second in epochs.seconds) / UPDATES_PER_EPOCH / (1 if alone else group)


def machine_speeds(threads: int, device: torch.device, repeats: int) -> tuple[float, float]:
    """Operations per second of one large product (2048³, float32) and bytes per second of one large copy."""
    a = torch.randn(2048, 2048, device=device)
    source = torch.zeros(2**26, device=device)  # 256 MiB: no cache holds it
    into, least = torch.empty_like(source), [math.inf, math.inf]
    clock = clock_of(threads, device)
    with cpu_threads(threads):
        for _ in range(repeats + 1):
            for index, call in enumerate((lambda: a @ a, lambda: into.copy_(source))):
                started = clock()
                call()
                least[index] = min(least[index], clock() - started)
    return 2.0 * 2048**3 / least[0], 2.0 * source.nbytes / least[1]


def work(recipe: Recipe) -> tuple[float, float]:
    """Operations of the matrix products, and bytes of Adam and gradients, in an update of one network (float32)."""
    model = EnsembleMLP(1, recipe.width, recipe.depth, recipe.features)
    entries = [weight.numel() for weight in model.weights]
    parameters = sum(p.numel() for p in model.parameters())
    return 2.0 * recipe.batch_size * (3 * sum(entries) - entries[0]), 8.0 * 4 * parameters


def main(argv=None) -> dict:
    """Measure; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    run = start_run(args)
    seed_everything(args.seed)
    recipe = Recipe(**{**RECIPES["interpolating"], "epochs": args.epochs}, width=args.width)
    difference = parity(recipe, PARITY_SIZES, args.parity_epochs, args.seed)
    print(f"float64 losses: at most {difference:.1e} relative between the two ways")

    every = sorted({1, *args.threads}) if device.type == "cpu" else [1]
    rows, speeds = [], []
    for threads in every:
        flops, bandwidth = machine_speeds(threads, device, args.repeats)
        speeds.append((flops, bandwidth))
        operations, traffic = work(replace(recipe, batch_size=min(recipe.batch_size, args.n)))
        least = {"products_seconds": operations / flops, "traffic_seconds": traffic / bandwidth}
        ways = [(f"nn.Sequential, {name}", args.alone, True, f) for name, f in (("Adam", False), ("fused Adam", True))]
        ways += [(f"{group} together", group, False, True) for group in sorted(set(args.groups))]
        found = {way[0]: math.inf for way in ways}
        for _ in range(args.repeats):  # all ways by turns: what else the machine does then affects them alike
            for name, group, alone, fused in ways:
                seconds = time_updates(recipe, args.n, group, alone, fused, args.seed, threads, device)
                found[name] = min(found[name], seconds)
        looped = min(found[name] for name, _, alone, _ in ways if alone)
        for name, _, alone, _ in ways:
            seconds = found[name]
            row = {"threads": threads, "way": name, "alone": alone, "update_seconds": seconds}
            row |= {"times_as_fast_as_alone": looped / seconds, "gflops_per_second": operations / seconds / 1e9}
            row |= {"share_of_one_large_product": operations / seconds / flops}
            row |= {"share_of_the_bandwidth": traffic / seconds / bandwidth}
            row |= {"share_of_the_limit": sum(least.values()) / seconds, **least}
            rows.append(row)
            run.log(**row)
    save_figure(draw(rows, difference, device), run.path("speed.png"))
    single = [row for row in rows if row["threads"] == 1 and not row["alone"]]
    best = min(single, key=lambda row: row["update_seconds"])
    return run.finish(
        {
            "largest_relative_difference_of_losses": difference,
            "megaflops_of_an_update": operations / 1e6,
            "megabytes_of_an_update": traffic / 1e6,
            "gflops_per_second_of_one_large_product": [flops / 1e9 for flops, _ in speeds],
            "gigabytes_per_second_of_one_large_copy": [bandwidth / 1e9 for _, bandwidth in speeds],
            "threads": every,
            "best_group_on_one_thread": best["way"],
            "best_ratio_on_one_thread": best["times_as_fast_as_alone"],
            "best_share_of_the_limit": best["share_of_the_limit"],
            "cases": rows,
        }
    )


def draw(rows: list[dict], difference: float, device: torch.device):
    """Milliseconds of an update of one network, each way, over the least that its products and its traffic take."""
    every = sorted({row["threads"] for row in rows})
    figure, axes = new_figure(1, len(every), width=6 * len(every) + 1, height=4.8, sharey=True)
    for ax, threads in zip(axes[0], every, strict=True):
        own = [row for row in rows if row["threads"] == threads]
        milliseconds = np.array([row["update_seconds"] for row in own]) * 1e3
        colors = [COLORS[1] if row["alone"] else COLORS[0] for row in own]
        ax.barh(range(len(own)), milliseconds, color=colors)
        for at, row in enumerate(own):
            text = f"{milliseconds[at]:.2f} ms, {row['times_as_fast_as_alone']:.2f}×"
            ax.text(milliseconds[at], at, f" {text}", va="center", fontsize=8)
        products, traffic = (own[0][f"{name}_seconds"] * 1e3 for name in ("products", "traffic"))
        ax.axvspan(0, products, color="black", alpha=0.35, linewidth=0, label="products at a large one's speed")
        label = "+ traffic at a large copy's"
        ax.axvspan(products, products + traffic, color="black", alpha=0.15, linewidth=0, label=label)
        where = f"{threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else "GPU"
        ax.set(
            title=where,
            xlabel="milliseconds per update and network (×: against the faster loop)",
            xlim=(0, 1.35 * milliseconds.max()),
        )
        ax.grid(False, axis="y")
        ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    axes[0, 0].set_yticks(range(len(own)), [row["way"] for row in own])
    axes[0, 0].invert_yaxis()
    best = min((row for row in rows if not row["alone"]), key=lambda row: row["update_seconds"])
    figure.suptitle(
        f"Fastest together: {best['way']}, {best['times_as_fast_as_alone']:.2f} times as fast as one after another, "
        f"{best['share_of_the_limit']:.0%} of\n"
        f"what products and traffic allow (float64 losses differ by {difference:.0e})",
        fontsize=10,
    )
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
