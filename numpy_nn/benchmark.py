"""How fast is a network in NumPy beside PyTorch, and how far is each layer from what this machine can do?

    python numpy_nn/benchmark.py

One training step of the patch-embedding network (batch 32) and of Conv 1→16 → ReLU → Pool → Conv 16→32 → ReLU → Pool →
Linear (3×3, batch 64) is timed in turns (NumPy, PyTorch, NumPy, …) in this one process, and the median ratio reported,
since a shared machine's speed drifts. Then three ways to convolve (Python loops over pixels, im2col through
`sliding_window_view`, the column copies of conv.py) with their memory; and each layer's GFLOP/s, forward and backward,
below its ceiling, this machine's matrix product: there the least time of several counts.

Writes roofline.png, metrics.json.
"""

import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import torch

from numpy_nn.activations import ReLU
from numpy_nn.conv import Conv2d, MaxPool2d, columns
from numpy_nn.embedding import embedding_network
from numpy_nn.layers import Flatten, Linear
from numpy_nn.losses import SoftmaxCrossEntropy
from numpy_nn.network import Sequential
from numpy_nn.optimizers import SGD
from numpy_nn.twin import torch_twin
from shared_utils.cli import make_parser, positive_int, run_main
from shared_utils.plotting import COLORS, new_figure, save_figure
from shared_utils.runs import start_run
from shared_utils.seeding import seed_everything


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, dataset=None, device=False, quick={"repeats": 2})
    parser.add_argument("--repeats", type=positive_int, default=15, help="turns of each measurement")
    return parser


def timed(call: Callable, times: int) -> float:
    """Seconds per call of `call`, over `times` calls."""
    started = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - started) / times


def traced_peak_mb(call: Callable) -> float:
    """The most memory (MB, 10⁶ bytes) that NumPy and Python hold at once for `call`, beyond what they held before."""
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


def in_turns(calls: dict[str, Callable], repeats: int, times: int) -> dict[str, list[float]]:
    """Seconds per call of each, measured `repeats` times, one after the other in turns."""
    for call in calls.values():
        call()  # warm up
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            found[name].append(timed(call, times))
    return found


def numpy_step(network: Sequential, x: np.ndarray, y: np.ndarray) -> Callable:
    """One training step of `network` as a call."""
    optimizer, loss = SGD(network.layers, 0.01), SoftmaxCrossEntropy()

    def step():
        loss.forward(network.forward(x, training=True), y)
        network.backward(loss.backward(), need_dx=False)
        optimizer.step()

    return step


def torch_step(network: torch.nn.Module, x: np.ndarray, y: np.ndarray) -> Callable:
    """The same in eager PyTorch."""
    optimizer, x, y = torch.optim.SGD(network.parameters(), 0.01), torch.from_numpy(x), torch.from_numpy(y)

    def step():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()

    return step


def convolutional_twins(rng: np.random.Generator) -> tuple[Sequential, torch.nn.Module]:
    """The small CNN of the benchmark in both; weights need not agree for a timing."""
    ours = Sequential(
        Conv2d(1, 16, 3, rng=rng),
        ReLU(),
        MaxPool2d(2),
        Conv2d(16, 32, 3, rng=rng),
        ReLU(),
        MaxPool2d(2),
        Flatten(),
        Linear(32 * 25, 10, rng=rng),
    )
    nn = torch.nn
    theirs = nn.Sequential(
        nn.Conv2d(1, 16, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 25, 10),
    )
    return ours, theirs


def compare_steps(rng: np.random.Generator, repeats: int) -> list[dict]:
    """A row per network: milliseconds of both, the median of the ratios turn by turn, NumPy's memory for a step."""
    embedding = embedding_network(rng, 10)
    pairs = {
        "patch embedding, batch 32": (embedding, torch_twin(embedding), 32, 200),
        "convolutions, batch 64": (*convolutional_twins(rng), 64, 3),
    }
    rows = []
    for name, (ours, theirs, batch, times) in pairs.items():
        x = rng.standard_normal((batch, 1, 28, 28)).astype(np.float32)
        y = rng.integers(0, 10, batch)
        step = numpy_step(ours, x, y)
        found = in_turns({"numpy": step, "torch": torch_step(theirs, x, y)}, repeats, times)
        ratio = np.median(np.divide(found["numpy"], found["torch"]))
        milliseconds = {f"{key}_ms": 1000 * float(np.median(values)) for key, values in found.items()}
        peak = traced_peak_mb(step)
        rows.append({"step": name, **milliseconds, "numpy_over_torch": float(ratio), "numpy_peak_mb": peak})
    return rows


def naive_convolution(x: np.ndarray, W: np.ndarray) -> np.ndarray:
    """x (N, C, H, W), W (O, C, k, k) → (N, O, H', W'): a product for every image and output pixel."""
    n, _, height, width = x.shape
    k = W.shape[2]
    y = np.empty((n, len(W), height - k + 1, width - k + 1), x.dtype)
    for image in range(n):
        for i in range(y.shape[2]):
            for j in range(y.shape[3]):
                y[image, :, i, j] = np.tensordot(W, x[image, :, i : i + k, j : j + k], 3)
    return y


def window_convolution(x: np.ndarray, W: np.ndarray) -> np.ndarray:
    """The same through `sliding_window_view`, whose windows tensordot copies into one matrix."""
    windows = np.lib.stride_tricks.sliding_window_view(x, W.shape[2:], axis=(2, 3))  # (N, C, H', W', k, k)
    return np.tensordot(windows, W, axes=((1, 4, 5), (1, 2, 3))).transpose(0, 3, 1, 2)  # (N, O, H', W')


def column_convolution(x: np.ndarray, W: np.ndarray) -> np.ndarray:
    """The same as conv.py does it."""
    n, k = len(x), W.shape[2]
    out = (x.shape[2] - k + 1, x.shape[3] - k + 1)
    y = W.reshape(len(W), -1) @ columns(x.transpose(1, 0, 2, 3), k, 1, out)  # (O, N·H'·W')
    return y.reshape(len(W), n, *out).transpose(1, 0, 2, 3)


def compare_convolutions(rng: np.random.Generator, repeats: int) -> list[dict]:
    """A row per way to convolve 16 → 32 channels, 3×3, batch 64, 14×14: milliseconds and MB, the output among them."""
    x = rng.standard_normal((64, 16, 14, 14)).astype(np.float32)
    W = rng.standard_normal((32, 16, 3, 3)).astype(np.float32)
    ways = {
        "Python loops over images and pixels": (naive_convolution, 1),
        "sliding_window_view + tensordot": (window_convolution, 5),
        "column copies (conv.py)": (column_convolution, 5),
    }
    expected, rows = naive_convolution(x, W), []
    for name, (way, times) in ways.items():
        if not np.allclose(way(x, W), expected, atol=1e-3):
            raise AssertionError(f"{name} computes something else")
        peak = traced_peak_mb(lambda way=way: way(x, W))
        seconds = min(timed(lambda way=way: way(x, W), times) for _ in range(max(1, repeats // 5)))
        rows.append({"way": name, "ms": 1000 * seconds, "peak_mb": peak})
    for row in rows:
        row["faster_than_loops"] = rows[0]["ms"] / row["ms"]
    return rows


def matrix_product_gflops(n: int = 1536) -> float:
    """The float32 rate of an n × n matrix product, in GFLOP/s: the best of eight."""
    a = np.ones((n, n), np.float32)
    return 2 * n**3 / min(timed(lambda: a @ a, 1) for _ in range(8)) / 1e9


def roofline(rng: np.random.Generator, repeats: int) -> list[dict]:
    """A row per layer of the benchmark's CNN at batch 64: GFLOP/s of its products, forward and backward."""
    network, _ = convolutional_twins(rng)
    x, rows = rng.standard_normal((64, 1, 28, 28)).astype(np.float32), []
    for i, layer in enumerate(network.layers):
        y = layer.forward(x, training=True)
        if "W" in layer.params:
            W = layer.params["W"]
            flops = 2 * W.size * (y.size // W.shape[0] if W.ndim == 4 else len(x))
            forward = min(timed(lambda layer=layer, x=x: layer.forward(x, True), 3) for _ in range(repeats))
            backward = min(timed(lambda layer=layer, y=y: layer.backward(y), 3) for _ in range(repeats))
            name = f"{i}: {type(layer).__name__} {'×'.join(map(str, W.shape))}"
            rates = {"forward_gflops": flops / forward / 1e9, "backward_gflops": 2 * flops / backward / 1e9}
            rows.append({"layer": name, **rates})
        x = y
    return rows


def main(argv=None) -> dict:
    """Measure; returns the metrics."""
    args = build_parser().parse_args(argv)
    rng = seed_everything(args.seed)
    run = start_run(args)
    steps = compare_steps(rng, args.repeats)
    ways = compare_convolutions(rng, args.repeats)
    peak, layers = matrix_product_gflops(), roofline(rng, args.repeats)
    for row in [*steps, *ways, *layers]:
        print("  ".join(f"{key} {value:.3g}" if isinstance(value, float) else str(value) for key, value in row.items()))
    save_figure(draw(layers, peak), run.path("roofline.png"))
    return run.finish({"steps": steps, "convolutions": ways, "layers": layers, "matrix_product_gflops": peak})


def draw(layers: list[dict], peak: float):
    """Each layer's rate beside the matrix product's."""
    best = max(max(row["forward_gflops"], row["backward_gflops"]) for row in layers)
    figure, axes = new_figure(
        width=8, height=3.6, title=f"Layers reach up to {best:.0f} of the {peak:.0f} GFLOP/s of a large matrix product"
    )
    ax, places = axes[0, 0], np.arange(len(layers))
    for index, part in enumerate(("forward", "backward")):
        rates = [row[f"{part}_gflops"] for row in layers]
        ax.barh(places + 0.2 * (2 * index - 1), rates, height=0.38, color=COLORS[index], label=part)
    ax.axvline(peak, color="black", linestyle="--", label="matrix product, 1536 × 1536")
    ax.set_yticks(places, [row["layer"] for row in layers])
    ax.invert_yaxis()
    ax.set(xlabel="GFLOP/s (float32, batch 64)")
    ax.legend()
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
