"""How much of the image does one unit see, and how much of that does it use?

    python numpy_nn/receptive_field.py
    python numpy_nn/receptive_field.py --architecture vgg deep

A layer with kernel k and stride s widens the receptive field r of its units and the distance j between them, both in
input pixels:

    r_l = r_{l−1} + (k_l − 1) j_{l−1},    j_l = j_{l−1} s_l,    r_0 = j_0 = 1.

Beside it the measurement: the gradient of each layer's middle unit with respect to the input, by the backward pass of
the real network, its absolute value averaged over random weights and random images. Where it is not zero is the
measured field, which must begin and end at the very pixels that the theory names. The gradient is far from uniform in
it: the effective size is the side of a square with as many pixels as hold 95.45 % of it, largest first (as much as two
deviations of a Gaussian hold in one dimension). For many layers of one kind it should grow as the root of their number
(Luo et al. 2016).

Writes receptive_field.png, receptive_field.csv, metrics.json.
Shapes: N images, C channels, H W pixels.
"""

from dataclasses import dataclass

import numpy as np

from numpy_nn.activations import ReLU
from numpy_nn.conv import AvgPool2d, Conv2d, MaxPool2d
from numpy_nn.layers import Layer
from numpy_nn.network import Sequential
from shared_utils.cli import UserError, make_parser, positive_int, run_main
from shared_utils.plotting import COLORS, new_figure, save_figure
from shared_utils.runs import start_run, write_csv
from shared_utils.seeding import seed_everything

MASS = 0.9545
MARGIN = 3  # pixels
CONV3 = ("conv", 3, 1, 1)
ARCHITECTURES = {  # (kind, kernel, stride, padding) each; a ReLU follows every convolution
    "lenet": [("conv", 5, 1, 0), ("max", 2, 2, 0), ("conv", 5, 1, 0), ("max", 2, 2, 0)],
    "three": [CONV3] * 3,
    "strided": [("conv", 3, 2, 1), ("conv", 3, 2, 1), ("conv", 3, 2, 1)],
    "overlap": [CONV3, ("avg", 3, 2, 0), CONV3, ("max", 3, 2, 0), CONV3],
    "vgg": [CONV3, CONV3, ("max", 2, 2, 0), CONV3, CONV3, ("max", 2, 2, 0), CONV3, CONV3, CONV3],
    "deep": [CONV3] * 16,
}


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, dataset=None, device=False, quick={"draws": 4, "architecture": ["lenet", "strided"]})
    parser.add_argument(
        "--architecture", nargs="+", choices=[*ARCHITECTURES, "all"], default=["all"], help="networks to look at"
    )
    parser.add_argument("--draws", type=positive_int, default=12, help="networks with random weights to average over")
    parser.add_argument("--images", type=positive_int, default=8, help="random images for each of them")
    parser.add_argument("--channels", type=positive_int, default=8, help="of every convolution")
    return parser


@dataclass(frozen=True)
class Field:
    """What a unit of a layer sees by theory, in input pixels: size, distance of units, the first unit's start."""

    size: int = 1
    jump: int = 1
    start: int = 0

    def after(self, kernel: int, stride: int, padding: int) -> "Field":
        """The field one layer on."""
        return Field(
            self.size + (kernel - 1) * self.jump,
            self.jump * stride,
            self.start - padding * self.jump,
        )

    def of_unit(self, at: int) -> tuple[int, int]:
        """First and last input row of the unit number `at`."""
        first = self.start + at * self.jump
        return first, first + self.size - 1


def theory(specs: list[tuple]) -> list[Field]:
    """The field after each layer."""
    fields = [Field()]
    for _, kernel, stride, padding in specs:
        fields.append(fields[-1].after(kernel, stride, padding))
    return fields[1:]


def build_network(specs: list[tuple], channels: int, rng: np.random.Generator) -> tuple[Sequential, list[int]]:
    """The network, and for each spec how many layers lead up to its output."""
    layers: list[Layer] = []
    ends, width = [], 1
    for kind, kernel, stride, padding in specs:
        if kind == "conv":
            layers += [Conv2d(width, channels, kernel, stride, padding, rng=rng), ReLU()]
            width = channels
        else:
            layers.append({"max": MaxPool2d, "avg": AvgPool2d}[kind](kernel, stride))
        ends.append(len(layers))
    return Sequential(*layers), ends


def middle_units(specs: list[tuple], size: int) -> list[int]:
    """The number of the middle unit in a row of each layer's output, for an image of size × size."""
    middles = []
    for _, kernel, stride, padding in specs:
        size = (size + 2 * padding - kernel) // stride + 1
        middles.append(size // 2)
    return middles


def image_size(specs: list[tuple]) -> int:
    """The smallest image in which the middle unit of every layer has its field inside, `MARGIN` from every border.

    Without the margin the image's border, not the network, would be what the measured field ends at.
    """
    fields = theory(specs)
    size = fields[-1].size
    while True:
        spans = [field.of_unit(at) for field, at in zip(fields, middle_units(specs, size), strict=True)]
        if all(first >= MARGIN and last < size - MARGIN for first, last in spans):
            return size
        size += 1


def measure(specs: list[tuple], channels: int, draws: int, images: int, rng: np.random.Generator) -> np.ndarray:
    """Mean |∂ unit / ∂ pixel| of each layer's middle unit: (layers, H, W), each with sum 1.

    unit: a random mixture of the channels there, as the next layer would take.
    """
    size = image_size(specs)
    middles, maps = middle_units(specs, size), np.zeros((len(specs), size, size))
    for _ in range(draws):
        network, ends = build_network(specs, channels, rng)
        outputs = [rng.standard_normal((images, 1, size, size)).astype(np.float32)]
        for layer in network.layers:
            outputs.append(layer.forward(outputs[-1]))  # (N, C, H', W')
        for number, (end, at) in enumerate(zip(ends, middles, strict=True)):
            dy = np.zeros_like(outputs[end])
            dy[:, :, at, at] = rng.standard_normal(dy.shape[:2])
            dx = Sequential(*network.layers[:end]).backward(dy, need_dx=True)  # (N, 1, H, W)
            maps[number] += np.abs(dx).sum((0, 1))
    return maps / maps.sum((1, 2), keepdims=True)


def support(image: np.ndarray) -> tuple[int, int, int, int]:
    """First and last row, first and last column, in which anything is not zero."""
    rows, columns = (np.flatnonzero(image.any(axis)) for axis in (1, 0))
    return tuple(int(v) for v in (rows[0], rows[-1], columns[0], columns[-1]))


def effective_size(image: np.ndarray) -> float:
    """The side of a square with as many pixels as hold 95.45 % of the mass of `image` (sum 1), largest first."""
    mass = np.cumsum(np.sort(image.ravel())[::-1])
    return float(np.sqrt(np.searchsorted(mass, MASS) + 1))


def describe(spec: tuple) -> str:
    """One layer in short: `conv 3`, `conv 3/2` with its stride."""
    kind, kernel, stride, _ = spec
    return f"{kind} {kernel}" + (f"/{stride}" if stride > 1 else "")


def main(argv=None) -> dict:
    """Compute, measure, draw; returns the metrics."""
    args = build_parser().parse_args(argv)
    rng = seed_everything(args.seed)
    if "all" in args.architecture and len(args.architecture) > 1:
        raise UserError("--architecture all already names every architecture; give it alone")
    names = list(ARCHITECTURES) if args.architecture == ["all"] else list(dict.fromkeys(args.architecture))
    run = start_run(args)
    rows, maps = [], {}
    for name in names:
        specs = ARCHITECTURES[name]
        fields, middles = theory(specs), middle_units(specs, image_size(specs))
        maps[name] = measure(specs, args.channels, args.draws, args.images, rng)
        for depth, (spec, field, at, image) in enumerate(zip(specs, fields, middles, maps[name], strict=True), 1):
            top, bottom, left, right = support(image)
            rows.append(
                {
                    "architecture": name,
                    "depth": depth,
                    "layer": describe(spec),
                    "jump": field.jump,
                    "theoretical": field.size,
                    "measured": max(bottom - top, right - left) + 1,
                    "equal": (top, bottom) == (left, right) == field.of_unit(at),
                    "effective": effective_size(image),
                }
            )
            print("  ".join(f"{v:.1f}" if isinstance(v, float) else f"{v!s:>8}" for v in rows[-1].values()))
    write_csv(run.path("receptive_field.csv"), rows)
    save_figure(draw(rows, maps), run.path("receptive_field.png"))

    last = {row["architecture"]: row for row in rows}
    used = {name: row["effective"] / row["theoretical"] for name, row in last.items()}
    return run.finish(
        {
            "layers": len(rows),
            "equal": sum(row["equal"] for row in rows),
            "used": used,
            "least_used": min(used.values()),
            "largest_theoretical": max(row["theoretical"] for row in rows),
            **({"growth_exponent": growth(rows)} if "deep" in names else {}),
            "rows": rows,
        }
    )


def growth(rows: list[dict]) -> float:
    """The power of the depth with which the effective size of `deep` grows: the slope in log-log, from layer 4 on."""
    points = [(row["depth"], row["effective"]) for row in rows if row["architecture"] == "deep" and row["depth"] >= 4]
    depth, size = np.log(np.array(points)).T
    return float(np.polyfit(depth, size, 1)[0])


def draw(rows: list[dict], maps: dict[str, np.ndarray]):
    """Above the last layer's gradient map with both fields, below the sizes layer by layer."""
    equal, used = sum(row["equal"] for row in rows), {}
    for row in rows:
        used[row["architecture"]] = row["effective"] / row["theoretical"]
    low, high = (f"{share:.0%}" for share in (min(used.values()), max(used.values())))
    title = (
        f"The measured field is the theoretical one in {equal} of {len(rows)} layers;"
        + (" " if len(maps) > 3 else "\n")
        + f"the last units use {low if low == high else f'{low} to {high}'} of its side"
    )
    figure, axes = new_figure(2, len(maps), width=max(6.5, 2.9 * len(maps)), height=6.4, title=title)
    for column, (name, images) in enumerate(maps.items()):
        mine = [row for row in rows if row["architecture"] == name]
        image, (top, bottom, left, right) = images[-1], support(images[-1])
        ax = axes[0, column]
        shown = ax.imshow(np.where(image > 0, image / image.max(), np.nan) ** 0.5, cmap="cividis", vmin=0, vmax=1)
        ax.set_facecolor("white")
        centre = ((left + right) / 2, (top + bottom) / 2)
        sizes = ((mine[-1]["theoretical"], COLORS[1], "-"), (mine[-1]["effective"], "white", "--"))
        for side, color, dash in sizes:
            corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)]) * side / 2 + centre
            ax.plot(*corners.T, dash, color=color)
        ax.set(title=f"{name}: {len(mine)} layers", xlabel="column (pixels)")
        ax.locator_params(integer=True, nbins=5)
        ax.grid(False)
        ax = axes[1, column]
        depth = [row["depth"] for row in mine]
        ax.plot(depth, [row["theoretical"] for row in mine], "-", color=COLORS[1], label="theoretical")
        ax.plot(depth, [row["measured"] for row in mine], "o", color=COLORS[0], label="measured support")
        ax.plot(depth, [row["effective"] for row in mine], "s--", ms=4, color=COLORS[2], label="effective (95 % of it)")
        ax.set(ylim=(0, None), xlabel="layer (kind, kernel/stride)")
        ax.locator_params(axis="y", integer=True)
        step = -(-len(mine) // 9)
        ax.set_xticks(depth[::step], [row["layer"] for row in mine][::step], rotation=60, fontsize=8)
    axes[0, 0].set_ylabel("row (pixels)")
    axes[1, 0].set_ylabel("side of the field (input pixels)")
    figure.colorbar(shown, ax=axes[0, -1], label="mean |gradient|, root scale")
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
