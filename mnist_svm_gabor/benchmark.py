"""How fast are the features, and how far from what this machine can do?

    python mnist_svm_gabor/benchmark.py

Features of all images (train and test) by both banks, each timed three times in a fresh process: seconds (the least),
images per second, the filters' arithmetic over the whole time (at 28×28 deskewing is part of it) beside this machine's
matrix product, and the process's peak memory, with what its imports take. The targets: all 70,000 MNIST images through
the 14×14 bank in at most 6 s and 1.5 GB.

Writes history.csv, metrics.json.
"""

import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from mnist_svm_gabor.features import BANKS, Preparation
from shared_utils.cli import make_parser, positive_int, run_main
from shared_utils.data import load_images
from shared_utils.device import pick_device
from shared_utils.runs import start_run


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, quick={"repeats": 1})
    parser.add_argument("--repeats", type=positive_int, default=3, help="timings, of which the least counts")
    return parser


def peak_gflops(device: torch.device, n: int = 2048) -> float:
    """The rate of a float32 matrix product of n × n, in GFLOP/s: the best of five."""
    a = torch.rand(n, n, device=device)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / min(seconds) / 1e9


def peak_memory_mb() -> float | None:
    """The most memory this process has held so far, in MB (10⁶ bytes); None where the system does not tell."""
    try:  # Linux: getrusage would also tell of the parent's peak
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS counts bytes


def measure(resolution: int, dataset: str, data_dir: str, device: str, repeats: int) -> dict:
    """A row for one bank; called in a process of its own, so that the peak is this bank's."""
    imports = peak_memory_mb()
    x = np.concatenate([load_images(dataset, split, data_dir, shape=(1, 28, 28)).x for split in ("train", "test")])
    bank = BANKS[resolution]
    prepare, seconds = Preparation(resolution, resolution == 28, bank), []
    for _ in range(repeats):
        started = time.perf_counter()
        prepare(x, device)
        seconds.append(time.perf_counter() - started)
    n_filters = len(bank.kernels) * (2 if bank.energy else 1)
    flops = 2 * len(x) * n_filters * bank.kernel_size**2 * resolution**2
    return {
        "bank": f"{resolution}×{resolution}, {n_filters} filters of {bank.kernel_size}×{bank.kernel_size}",
        "images": len(x),
        "best_seconds": min(seconds),
        "images_per_second": len(x) / min(seconds),
        "gflop_per_second": flops / min(seconds) / 1e9,
        "imports_mb": imports,
        "peak_mb": peak_memory_mb(),
    }


def main(argv=None) -> dict:
    """Time both banks; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    load_images(args.dataset, "test", args.data_dir, shape=(1, 28, 28))  # a missing set is said here, in one line
    run = start_run(args)
    rows = []
    for resolution in BANKS:
        with get_context("spawn").Pool(1) as pool:
            row = pool.apply(measure, (resolution, args.dataset, args.data_dir, str(device), args.repeats))
        rows.append(row)
        run.log(bank=row["bank"], seconds=row["best_seconds"], peak_mb=row["peak_mb"])
    rate = peak_gflops(device)
    return run.finish({"images": rows[0]["images"], "rows": rows, "matrix_product_gflop_per_second": rate})


if __name__ == "__main__":
    run_main(main, build_parser)
