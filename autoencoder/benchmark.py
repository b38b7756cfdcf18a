"""Does a backward pass written by hand take longer than autograd's, and are its gradients the same?

    python autoencoder/benchmark.py

The autoencoder that `Recipe` describes, and the same network of `nn.Linear` layers with autograd and PyTorch's fused
AdamW, from the same weights. One epoch of each in turn, several times; in float32 and with the products in bfloat16.
The gradients of one batch are compared in float64. This is the one script of the folder that uses autograd.

Writes speed.png, history.csv, metrics.json.
Shapes: N images, B batch, 784 pixels.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from autoencoder.fitting import Recipe
from autoencoder.layers import GELU, BatchNorm1d, Linear, Sigmoid
from autoencoder.models import Autoencoder
from autoencoder.optimizers import AdamW
from shared_utils.cli import make_parser, positive_int, run_main
from shared_utils.device import autocast, cpu_threads, pick_device, seconds_of
from shared_utils.gradcheck import relative_error
from shared_utils.plotting import COLORS, new_figure, save_figure
from shared_utils.runs import start_run
from shared_utils.seeding import seed_everything

PIXELS = 784


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, dataset=None, quick={"repeats": 2, "images": 1024})
    parser.add_argument("--images", type=positive_int, default=55_000, help="random images in an epoch")
    parser.add_argument("--repeats", type=positive_int, default=5, help="timed epochs of each")
    parser.add_argument("--threads", type=positive_int, default=1, help="CPU threads of the products")
    return parser


def twin(model: Autoencoder) -> nn.Sequential:
    """The same network of PyTorch's modules, with a copy of the weights."""
    modules = []
    for layer in model.layers:
        if isinstance(layer, Linear):
            n_in, n_out = layer.params["W"].shape
            module = nn.Linear(n_in, n_out, dtype=layer.params["W"].dtype)
            module.weight.data.copy_(layer.params["W"].T)
            module.bias.data.copy_(layer.params["b"])
        elif isinstance(layer, BatchNorm1d):
            module = nn.BatchNorm1d(len(layer.params["gamma"]), dtype=layer.params["gamma"].dtype)
        else:
            module = {GELU: nn.GELU, Sigmoid: nn.Sigmoid}[type(layer)]()
        modules.append(module)
    return nn.Sequential(*modules)


def gradient_error(recipe: Recipe, seed: int) -> float:
    """The relative error of our gradient against autograd's, all parameters in one vector, one batch, float64.

    In one vector, because the bias in front of a BatchNorm has the gradient 0, and both give rounding errors for it.
    """
    model = recipe.build(seed, PIXELS).to(torch.float64)
    network, x = twin(model), torch.rand(64, PIXELS, dtype=torch.float64)
    _, gradient = model.loss(model.forward(x, training=True), x)
    model.backward(gradient)
    nn.functional.mse_loss(network(x), x).backward()
    ours = [value.T if name == "W" else value for layer in model.layers for name, value in layer.grads.items()]
    theirs = [parameter.grad for parameter in network.parameters()]
    return relative_error(*(torch.cat([value.flatten() for value in values]).numpy() for values in (ours, theirs)))


def epoch_by_hand(model: Autoencoder, x: Tensor, batch_size: int, amp: bool) -> Callable:
    """An epoch over x (N, 784) as a call, as in fitting.py: forward, loss, backward, AdamW."""
    optimizer = AdamW(model.layers, lr=1e-3)

    @torch.no_grad()
    def epoch():
        for batch in x.split(batch_size):
            with autocast(x.device, amp):
                _, gradient = model.loss(model.forward(batch, training=True), batch)
                model.backward(gradient)
            optimizer.step()

    return epoch


def epoch_by_autograd(network: nn.Module, x: Tensor, batch_size: int, amp: bool) -> Callable:
    """The same with autograd."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0, fused=True)

    def epoch():
        for batch in x.split(batch_size):
            with autocast(x.device, amp):
                loss = nn.functional.mse_loss(network(batch).float(), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def main(argv=None) -> dict:
    """Measure; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    run = start_run(args)
    seed_everything(args.seed)
    recipe = Recipe()
    error = gradient_error(recipe, args.seed)
    batch = min(recipe.batch_size, args.images)
    x = torch.rand(args.images // batch * batch, PIXELS, device=device)
    weights = sum(value.numel() for value in recipe.build(args.seed, PIXELS).parameters().values() if value.ndim == 2)
    # Forward, the weights' gradient and the input's: three products a layer, but the images' gradient is not needed.
    operations = 2.0 * len(x) * (3 * weights - PIXELS * recipe.enc_dims[0])
    table = []
    with cpu_threads(args.threads):
        for precision, amp in (("float32", False), ("bfloat16 products", True)):
            model = recipe.build(args.seed, PIXELS).to(device)
            network = twin(recipe.build(args.seed, PIXELS)).to(device)
            calls = (epoch_by_hand(model, x, batch, amp), epoch_by_autograd(network, x, batch, amp))
            for call in calls:
                call()  # warms up
            found = [[seconds_of(call, device) for call in calls] for _ in range(args.repeats)]
            large = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16 if amp else torch.float32)
            products = [seconds_of(lambda large=large: large @ large, device) for _ in range(args.repeats)]
            peak = 2.0 * 2048**3 / min(products)
            by_hand, autograd = np.median(found, axis=0)
            row = {"precision": precision, "by_hand_seconds": by_hand, "autograd_seconds": autograd}
            row["ratio_of_seconds"] = float(np.median([a / b for a, b in found]))
            row["products_alone_seconds"] = operations / peak
            table.append(row)
            run.log(**row)
    save_figure(draw(table, recipe, len(x), error), run.path("speed.png"))
    shared = {"threads": args.threads, "images": len(x), "batch_size": batch, "gradient_error": error}
    return run.finish({**shared, "network": recipe.sizes, "epochs": table})


def draw(table: list[dict], recipe: Recipe, n: int, error: float):
    """Seconds of an epoch by hand and with autograd, and what its products alone would take."""
    figure, axes = new_figure(width=9.2, height=3.9)
    ax = axes[0, 0]
    kinds = {"by_hand_seconds": "by hand", "autograd_seconds": "nn.Linear, autograd, fused AdamW"}
    kinds["products_alone_seconds"] = "the matrix products alone, at the speed of a large one"
    for i, (key, name) in enumerate(kinds.items()):
        at = [row_at + (i - 1) * 0.26 for row_at in range(len(table))]
        ax.barh(at, [row[key] for row in table], height=0.24, color=COLORS[i], label=name)
        for y, row in zip(at, table, strict=True):
            ax.text(row[key], y, f" {row[key]:.2f} s", va="center", fontsize=9)
    ax.set_yticks(range(len(table)), [row["precision"] for row in table])
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set(xlabel=f"seconds of one epoch of {n:,} images, batches of {recipe.batch_size}")
    ax.set_xlim(0, 1.12 * max(row[key] for row in table for key in kinds))
    ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=3, fontsize=8.5)
    ratios = " and ".join(f"{row['ratio_of_seconds']:.2f} ({row['precision']})" for row in table)
    figure.suptitle(
        f"784-{recipe.sizes} and back: by hand takes\n{ratios} of autograd's time\n"
        f"gradients equal to {error:.0e}, relative, in float64"
    )
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
