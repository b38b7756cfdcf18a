"""Where does a network keep its parameters, and where does it spend its arithmetic?

    python cnn_cifar/param_count.py --model resnet18
    python cnn_cifar/param_count.py --model allcnn

A convolution of kernel k×k from C_in to C_out channels has k² C_in C_out weights and uses each at every one of its H×W
output positions:

    FLOPs = 2 · k² C_in C_out · H W      (a multiply-add counts as 2; a linear layer has k = H = W = 1).

So few weights at many positions can cost as much arithmetic as many weights at few. What BatchNorm, biases, ReLU
and pooling add is left out, as is usual; forward hooks read the sizes in a forward pass without data (on PyTorch's
meta device). The table also says how many of each layer's parameters get weight decay (`get_param_groups`).
metrics.json has the total beside that of torchvision's model, where there is one.

Writes param_count.csv, params.png, metrics.json.
Source: He et al. 2016, table 1 (which gives multiply-adds).
Shapes: C channels, H W pixels.
"""

import math

import torch
from matplotlib.ticker import EngFormatter
from torch import Tensor, nn

from cnn_cifar.models import allcnn_t, get_param_groups
from cnn_cifar.resnet import RESNETS
from shared_utils.cli import UserError, make_parser, positive_int, run_main
from shared_utils.plotting import COLORS, new_figure, save_figure
from shared_utils.runs import start_run, write_csv

GROUPS = ("convolution_weights", "linear_weights", "biases", "batchnorm")
STEM = ("conv1", "bn1")
SHORT = EngFormatter(places=2)  # 8393728 → 8.39 M


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, dataset=None, device=False, quick={})
    parser.add_argument("--model", choices=[*RESNETS, "allcnn"], default="resnet18", help="the network")
    parser.add_argument("--cifar-stem", action="store_true", help="3×3 stem of stride 1, no pooling, 10 classes")
    parser.add_argument("--plain", action="store_true", help="without the shortcuts")
    parser.add_argument(
        "--image-size", type=positive_int, help="side of the input (default: 224; 32 for allcnn and --cifar-stem)"
    )
    return parser


def build_model(name: str, cifar_stem: bool, plain: bool) -> nn.Module:
    """The network on the meta device. Errors: `UserError` when All-CNN is given a ResNet's flags."""
    if name == "allcnn" and (cifar_stem or plain):
        raise UserError("--cifar-stem and --plain are variants of a ResNet; allcnn has neither")
    with torch.device("meta"):
        if name == "allcnn":
            return allcnn_t()
        return RESNETS[name](num_classes=10 if cifar_stem else 1000, cifar_stem=cifar_stem, residual=not plain)


def group_of(module: nn.Module, parameter: str) -> str:
    """Which of `GROUPS` the parameter of this name of `module` belongs to."""
    if isinstance(module, nn.BatchNorm2d):
        return "batchnorm"
    if parameter == "bias":
        return "biases"
    return "linear_weights" if isinstance(module, nn.Linear) else "convolution_weights"


def layer_flops(module: nn.Module, output: Tensor) -> int:
    """FLOPs of a convolution or linear layer for one image; output: (1, C, H, W) or (1, C). 0 for another layer."""
    if not isinstance(module, nn.Conv2d | nn.Linear):
        return 0
    return 2 * module.weight[0].numel() * output[0].numel()  # each output value sums k² C_in / groups products


def layer_rows(model: nn.Module, image_size: int) -> list[dict]:
    """One row for each layer that has parameters, in the order of the forward pass of one image."""
    decaying = {id(p) for p in get_param_groups(model)[0]["params"]}
    rows = []

    def hook(name: str):
        def record(module: nn.Module, _, output: Tensor) -> None:
            counts = dict.fromkeys(GROUPS, 0)
            for parameter, values in module.named_parameters(recurse=False):
                counts[group_of(module, parameter)] += values.numel()
            decayed = sum(p.numel() for p in module.parameters(recurse=False) if id(p) in decaying)
            rows.append(
                {
                    "layer": name,
                    "stage": "stem" if name in STEM else name.split(".")[0],
                    "kind": type(module).__name__,
                    "output": "×".join(map(str, output.shape[1:])),
                    "positions": math.prod(output.shape[2:]),
                    "parameters": sum(counts.values()),
                    **counts,
                    "decayed": decayed,
                    "not_decayed": sum(counts.values()) - decayed,
                    "flops": layer_flops(module, output),
                }
            )

        return record

    layers = [(name, module) for name, module in model.named_modules() if list(module.parameters(recurse=False))]
    handles = [module.register_forward_hook(hook(name)) for name, module in layers]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, image_size, image_size, device=next(model.parameters()).device))
    for handle in handles:
        handle.remove()
    return rows


def total(rows: list[dict], column: str) -> int:
    """The sum of one column."""
    return sum(row[column] for row in rows)


def by_stage(rows: list[dict]) -> list[dict]:
    """Parameters and FLOPs of each stage, in numbers and as shares of the whole."""
    stages = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        mine = [row for row in rows if row["stage"] == stage]
        stages.append({"stage": stage, "output": mine[-1]["output"]})
        for column in ("parameters", "flops"):
            stages[-1][column] = total(mine, column)
            stages[-1][f"{column}_share"] = total(mine, column) / total(rows, column)
    return stages


def smallest_maps(rows: list[dict]) -> dict:
    """The layers with the fewest positions, linear ones aside: H×W, their shares of parameters and FLOPs."""
    fewest = min(row["positions"] for row in rows if row["kind"] != "Linear")
    mine = [row for row in rows if row["positions"] == fewest and row["kind"] != "Linear"]
    shares = {f"{column}_share": total(mine, column) / total(rows, column) for column in ("parameters", "flops")}
    return {"size": mine[0]["output"].split("×", 1)[1], **shares}


def torchvision_parameters(name: str) -> int:
    """How many parameters torchvision's model of this name has."""
    from torchvision.models import get_model  # takes seconds to import

    with torch.device("meta"):
        return sum(p.numel() for p in get_model(name).parameters())


def main(argv=None) -> dict:
    """Count, print, draw; returns the metrics."""
    args = build_parser().parse_args(argv)
    model = build_model(args.model, args.cifar_stem, args.plain)
    size = args.image_size or (32 if args.model == "allcnn" or args.cifar_stem else 224)
    run = start_run(args)
    rows = layer_rows(model, size)
    stages = by_stage(rows)
    write_csv(run.path("param_count.csv"), rows)
    print_table(rows)
    title = args.model.replace("resnet", "ResNet-").replace("allcnn", "All-CNN")
    title += (", CIFAR stem" if args.cifar_stem else "") + (", without shortcuts" if args.plain else "")
    smallest = smallest_maps(rows)
    parameters, flops = (f"{smallest[f'{column}_share']:.0%}" for column in ("parameters", "flops"))
    heading = (
        f"{title} at {size}×{size}:\nlayers with maps of {smallest['size']} hold {parameters} of "
        f"{total(rows, 'parameters'):,} parameters, do {flops} of {SHORT(total(rows, 'flops'))}FLOPs"
    )
    save_figure(draw(heading, stages), run.path("params.png"))

    standard = args.model in RESNETS and not (args.cifar_stem or args.plain)
    metrics = {
        "model": title,
        "image_size": size,
        "parameters": total(rows, "parameters"),
        **({"torchvision_parameters": torchvision_parameters(args.model)} if standard else {}),
        "groups": {group: total(rows, group) for group in GROUPS},
        "decayed": total(rows, "decayed"),
        "not_decayed": total(rows, "not_decayed"),
        "flops": total(rows, "flops"),
        "gigaflops": total(rows, "flops") / 1e9,
        "smallest_maps": smallest,
        "stages": stages,
    }
    return run.finish(metrics)


def print_table(rows: list[dict]) -> None:
    """One line for each layer, and the totals: overall, by group, by decay."""
    print(f"{'layer':<26}{'kind':<13}{'output':<13}{'parameters':>12}{'decayed':>12}{'not decayed':>13}{'FLOPs':>16}")
    columns = {"parameters": 12, "decayed": 12, "not_decayed": 13, "flops": 16}
    for row in rows:
        numbers = "".join(f"{row[column]:>{width},}" for column, width in columns.items())
        print(f"{row['layer']:<26}{row['kind']:<13}{row['output']:<13}{numbers}")
    print(f"{'total':<52}" + "".join(f"{total(rows, column):>{width},}" for column, width in columns.items()))
    print(", ".join(f"{group.replace('_', ' ')} {total(rows, group):,}" for group in GROUPS))


def draw(heading: str, stages: list[dict]):
    """For each stage two bars: its share of the parameters and of the FLOPs."""
    figure, axes = new_figure(width=7.6, height=1.4 + 0.55 * len(stages), title=heading)
    ax = axes[0, 0]
    for index, (column, label) in enumerate((("parameters", "parameters"), ("flops", "FLOPs for one image"))):
        places = [row + 0.4 * index for row in range(len(stages))]
        shares = [100 * stage[f"{column}_share"] for stage in stages]
        bars = ax.barh(places, shares, 0.38, color=COLORS[index], label=label)
        texts = [f"{SHORT(stage[column])} · {share:.1f} %" for stage, share in zip(stages, shares, strict=True)]
        ax.bar_label(bars, texts, padding=3, fontsize=8)
    ax.set_yticks([row + 0.2 for row in range(len(stages))], [f"{s['stage']}\n{s['output']}" for s in stages])
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    most = max(stage[f"{column}_share"] for stage in stages for column in ("parameters", "flops"))
    ax.set(
        xlim=(0, math.ceil(100 * most * 1.25)), xlabel="share of the whole network (%)", ylabel="stage and its output"
    )
    ax.legend(loc="best")
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
