"""Which pixels does a network's answer rest on, and does a map of them say anything about the network?

    python cnn_cifar/saliency.py
    python cnn_cifar/saliency.py --ckpt runs/cnn_cifar/fast_cifar/best.pth --images 200

Three maps of a network that allcnn.py or fast_cifar.py trained, for the class it answers: the input gradient,
integrated gradients, Grad-CAM (attributions.py has the equations). And two tests of each map, over `--images` test
images that the network gets right:

- The layers' weights are shuffled one after the other, from the logits down. A map that explains the network should
  soon have nothing in common with the original (rank correlation 0). Shuffling changes the weights' signs, so a signed
  map loses its signs at once and may keep its magnitudes: integrated gradients are compared with and without signs.
- The pixels are replaced by the mean colour, the map's largest first; a good map makes the probability fall at once
  (deletion), and rise at once when they are put in (insertion). How fast also depends on how scattered they are: single
  pixels spoil an image sooner than patches do. So each map is compared with the same kind of map of another image, and
  the difference counts.

Writes saliency_maps.png, randomization.png, deletion_insertion.png, metrics.json.
Sources: Simonyan et al. 2014; Sundararajan et al. 2017; Selvaraju et al. 2017; Adebayo et al. 2018; Petsiuk et al.
2018.
Shapes: N images, H W pixels, K classes.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from cnn_cifar.attributions import (
    area,
    baseline_of,
    curve,
    grad_cam,
    input_gradient_map,
    integrated_gradients,
    randomized,
    rank_correlation,
)
from cnn_cifar.checkpoints import add_ckpt_flag, find_checkpoint, load_network, load_test
from cnn_cifar.fast_net import FastNet
from cnn_cifar.inputs import logits_of, pixels
from cnn_cifar.models import AllCNN
from shared_utils.cli import UserError, make_parser, positive_int, run_main
from shared_utils.device import pick_device
from shared_utils.plotting import COLORS, line_style, new_figure, save_figure
from shared_utils.runs import start_run
from shared_utils.seeding import seed_everything
from shared_utils.stats import half_width

BATCH = 100  # images at once
SHOWN = 6  # images in the figure of maps
KINDS = ("deletion", "insertion")
Maps = Callable[[nn.Module, Tensor, Tensor], Tensor]


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, dataset="cifar10", quick={"images": 6, "steps": 4, "parts": 4})
    add_ckpt_flag(parser)
    parser.add_argument("--images", type=positive_int, default=200, help="test images, of those the network gets right")
    parser.add_argument("--steps", type=positive_int, default=32, help="terms of integrated gradients' sum")
    parser.add_argument("--parts", type=positive_int, default=16, help="parts in which the pixels are taken away")
    return parser


def cam_layer(model: nn.Module) -> nn.Module:
    """The deepest layer with maps of 7×7 or 8×8 positions, before the classes' own maps."""
    if isinstance(model, AllCNN):
        return model.block8
    return model.blocks[1] if isinstance(model, FastNet) else model.resnet.layer3


def over_batches(method: Maps, model: nn.Module, x: Tensor, k: Tensor) -> Tensor:
    """The method's maps of all images: (N, H, W)."""
    return torch.cat([method(model, *part) for part in zip(x.split(BATCH), k.split(BATCH), strict=True)])


def main(argv=None) -> dict:
    """Draw the maps, test them; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    path = find_checkpoint(args)
    model, state = load_network(path, device)
    test = load_test(args, path, state)
    images, y = torch.from_numpy(test.x).to(device), torch.from_numpy(test.y).to(device)
    right = torch.nonzero(logits_of(model, images).argmax(1) == y)[:, 0]
    if min(len(right), args.images) < 2:
        raise UserError(f"needs at least two images; --images is {args.images}, and {path} gets {len(right)} right")
    right = right[: args.images]
    x, k = pixels(images[right]), y[right]
    run = start_run(args)
    seed_everything(args.seed)
    methods: dict[str, Maps] = {
        "input gradient": input_gradient_map,
        "integrated gradients": partial(integrated_gradients, steps=args.steps),
        "Grad-CAM": lambda model, x, k: grad_cam(model, x, k, cam_layer(model)),
    }
    maps = {name: over_batches(method, model, x, k) for name, method in methods.items()}
    steps, examples = randomization_test(model, x[:BATCH], k[:BATCH], methods, maps)
    curves, areas = deletion_and_insertion(model, x, k, maps, args.parts)

    about = f"{state['config']['network']} trained on {state['title']}"
    figure = draw_maps(images[right[:SHOWN]].cpu().numpy(), maps, [state["classes"][i] for i in k[:SHOWN]], about)
    save_figure(figure, run.path("saliency_maps.png"))
    original = {name: values[0].cpu().numpy() for name, values in maps.items()}
    figure = draw_randomization(steps, original, examples, len(x[:BATCH]), about)
    save_figure(figure, run.path("randomization.png"))
    save_figure(draw_curves(curves, areas, args.parts, len(x), about), run.path("deletion_insertion.png"))
    return run.finish(
        {
            "network": state["config"]["network"],
            "checkpoint": str(path),
            "images": len(x),
            "completeness_error": completeness_error(model, x[:BATCH], k[:BATCH], maps["integrated gradients"][:BATCH]),
            "randomization": steps,
            "last": steps[-1],
            "areas": areas,
        }
    )


def completeness_error(model: nn.Module, x: Tensor, k: Tensor, values: Tensor) -> float:
    """By how much the sums of maps (N, H, W) miss z_k(x) − z_k(baseline), as a fraction of its mean size."""
    with torch.no_grad():
        gap = model(x) - model(baseline_of(x))  # (N, K)
    gap = gap.gather(1, k[:, None])[:, 0]
    return ((values.sum((1, 2)) - gap).abs().mean() / gap.abs().mean()).item()


def randomization_test(
    model: nn.Module, x: Tensor, k: Tensor, methods: dict[str, Maps], maps: dict[str, Tensor]
) -> tuple[list[dict], dict[tuple[str, str], np.ndarray]]:
    """Rank correlation with the maps as trained, after each layer's shuffling, over the images x (N, 3, H, W).

    maps: as trained, (N or more, H, W) of each method, those of x first. Returns a row for each layer (None where all
    maps are empty), and (method, layer) → the first image's map (H, W).
    """
    rows, examples = [], {}
    compared = {name: values[: len(x)] for name, values in maps.items()}
    compared["|integrated gradients|"] = compared["integrated gradients"].abs()
    for name, broken in randomized(model):
        found = {method: over_batches(draw, broken, x, k) for method, draw in methods.items()}
        examples |= {(method, name): values[0].cpu().numpy() for method, values in found.items()}
        found["|integrated gradients|"] = found["integrated gradients"].abs()
        each = {method: rank_correlation(compared[method], values) for method, values in found.items()}
        empty = max(values.isnan().float().mean().item() for values in each.values())
        means = {m: None if values.isnan().all() else values.nanmean().item() for m, values in each.items()}
        rows.append({"shuffled_down_to": name, **means, "most_empty_maps": empty})
        shown = ", ".join(f"{m} {'–' if value is None else format(value, '.2f')}" for m, value in means.items())
        print(f"{name} shuffled: {shown}", flush=True)
    return rows, examples


def deletion_and_insertion(
    model: nn.Module, x: Tensor, k: Tensor, maps: dict[str, Tensor], parts: int
) -> tuple[dict[tuple[str, str], list[np.ndarray]], list[dict]]:
    """Each map's test by pixels taken away and put in, against another image's map.

    Returns (map, kind) → the two mean curves (parts + 1,), and the areas below them: a row for each map.
    """
    curves, areas = {}, []
    for name, values in maps.items():
        row = {"map": name}
        for kind in KINDS:
            pair = [tested(model, x, k, order, parts, kind) for order in (values, values.roll(1, 0))]
            curves[name, kind] = [both.mean(0).cpu().numpy() for both in pair]
            own, others = (area(both).cpu().numpy() for both in pair)
            gain = others - own if kind == "deletion" else own - others  # better is above 0 for both
            row |= {kind: own.mean(), f"{kind}_by_another": others.mean()}
            row |= {f"{kind}_gain": gain.mean(), f"{kind}_gain_half_width": half_width(gain)}
        areas.append(row)
    return curves, areas


def tested(model: nn.Module, x: Tensor, k: Tensor, order: Tensor, parts: int, kind: str) -> Tensor:
    """`curve` of all images by batches: (N, parts + 1)."""
    batches = zip(x.split(BATCH), k.split(BATCH), order.split(BATCH), strict=True)
    return torch.cat([curve(model, *part, parts, insert=kind == "insertion") for part in batches])


def draw_maps(images: np.ndarray, maps: dict[str, Tensor], names: list[str], about: str):
    """Images (n, 3, H, W) in a row, each with its maps below."""
    n = len(images)
    figure, axes = new_figure(1 + len(maps), n, width=1.35 * n + 1.2, height=1.35 * (1 + len(maps)) + 0.9)
    for column, name in enumerate(names):
        axes[0, column].imshow(images[column].transpose(1, 2, 0), interpolation="nearest")
        axes[0, column].set_title(name, fontsize=9)
        for row, (method, values) in enumerate(maps.items(), start=1):
            show_map(axes[row, column], values[column].cpu().numpy(), method)
    for ax, name in zip(axes[:, 0], ("image", *maps), strict=True):
        ax.set_ylabel(name, fontsize=9)
    for ax in axes.ravel():
        ax.set(xticks=[], yticks=[])
    figure.suptitle(
        f"{about}: three maps; deletion_insertion.png says how much they know\n"
        "(red: for the class, blue: against it; input gradient: white is much)"
    )
    return figure


def show_map(ax, values: np.ndarray, method: str) -> None:
    """A map in blue and red around white, or that of the input gradient, which has no sign, in grey."""
    top = max(np.abs(values).max(), 1e-30)
    signed = method != "input gradient"
    ax.imshow(
        values, cmap="RdBu_r" if signed else "gray", vmin=-top if signed else 0, vmax=top, interpolation="nearest"
    )


def draw_randomization(steps: list[dict], original: dict, examples: dict, n: int, about: str):
    """Rank correlation with the original map against the layers shuffled, and the first image's maps on the way."""
    forgotten = ["none", *(row["shuffled_down_to"] for row in steps)]
    some = [forgotten[i] for i in np.unique(np.linspace(1, len(forgotten) - 1, 4).round().astype(int))]
    figure = new_figure(width=11.0, height=4.8)[0]
    figure.clear()
    left, right = figure.subfigures(1, 2, width_ratios=[1.25, 1])
    ax = left.subplots()
    compared = [*original, "|integrated gradients|"]
    for index, name in enumerate(compared):
        values = [1.0, *(np.nan if row[name] is None else row[name] for row in steps)]
        ax.plot(range(len(forgotten)), values, marker="o", markersize=4, label=name, **line_style(index))
    ax.axhline(0, color="black", linewidth=0.8)
    names = [name.removesuffix(".conv") for name in forgotten]
    ax.set_xticks(range(len(forgotten)), names, rotation=60, ha="right", fontsize=8)
    ax.set(xlabel="shuffled from the logits down to", ylabel=f"rank correlation with the map before ({n} images)")
    ax.legend(loc="upper right")
    axes = right.subplots(len(original), 1 + len(some), squeeze=False)
    for row, method in enumerate(original):
        show_map(axes[row, 0], original[method], method)
        axes[row, 0].set_ylabel(method, fontsize=8)
        for column, name in enumerate(some, start=1):
            show_map(axes[row, column], examples[method, name], method)
            if not row:
                axes[row, column].set_title(name.removesuffix(".conv"), fontsize=7)
    axes[0, 0].set_title("as trained", fontsize=7)
    for one in axes.ravel():
        one.set(xticks=[], yticks=[])
    last = {name: "nothing to compare" if steps[-1][name] is None else f"{steps[-1][name]:.2f}" for name in compared}
    ends = ", ".join(f"{name} {value}" for name, value in last.items())
    figure.suptitle(f"{about}: with all layers shuffled the maps keep a correlation of\n{ends}")
    return figure


def draw_curves(curves: dict, areas: list[dict], parts: int, n: int, about: str):
    """The class's probability against the share of pixels taken away, and put in, by each map and another image's."""
    figure, axes = new_figure(1, 2, width=11.0, height=5.0)
    share = np.linspace(0, 100, parts + 1)
    for ax, kind in zip(axes[0], KINDS, strict=True):
        for index, row in enumerate(areas):
            own, others = curves[row["map"], kind]
            gain = f"{row[f'{kind}_gain']:+.3f} ± {row[f'{kind}_gain_half_width']:.3f}"
            ax.plot(share, own, color=COLORS[index], label=f"{row['map']}: gain {gain}")
            ax.plot(share, others, color=COLORS[index], linestyle=":", label="… by another image's map")
        verb = "taken away" if kind == "deletion" else "put in"
        ax.set(xlabel=f"pixels {verb} (%), the map's largest first", ylabel="probability of the class", ylim=(0, 1.02))
        better = "a small area is good" if kind == "deletion" else "a large area is good"
        ax.set_title(f"{kind}: {better}")
        ax.legend(fontsize=8)
    says = [row["map"] for row in areas if all(row[f"{k}_gain"] > row[f"{k}_gain_half_width"] for k in KINDS)]
    finding = f"in both tests better than another image's map: {', '.join(says) or 'none'}"
    figure.suptitle(f"{about}, {n} images;\n{finding} (difference of the areas, 95 % interval)")
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
