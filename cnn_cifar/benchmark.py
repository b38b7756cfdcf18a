"""Where does the time of a training step go: into the images, or into the network?

    python cnn_cifar/benchmark.py
    python cnn_cifar/benchmark.py --device cuda --batches 100

Four measurements, images per second of each: (1) the input pipeline alone, flip, crop and colour jitter: whole batches
at once on the device (augment.py), and torchvision's transforms image by image in a `DataLoader` with 0, 1, 2 … worker
processes; (2) All-CNN's training step alone, in float32 and bfloat16, with the channels first or last in memory;
(3) both together, with each pipeline; (4) on a GPU, the fraction of the time in which it computes (`torch.profiler`).
The alternatives are measured in turn, several times; the median counts.

Writes throughput.png, metrics.json.
Shapes: B batch.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from cnn_cifar.augment import random_color_jitter, random_crop, random_flip
from cnn_cifar.inputs import Split, add_data_flags, load, pixels
from cnn_cifar.models import allcnn_t, get_param_groups
from shared_utils.cli import make_parser, non_negative_int, positive_int, run_main
from shared_utils.device import autocast, pick_device, synchronize
from shared_utils.plotting import COLORS, new_figure, save_figure
from shared_utils.runs import start_run
from shared_utils.seeding import seed_everything

OURS = "whole batches on the device"
SETTINGS = {  # name: (bfloat16, channels last)
    "float32, channels first": (False, False),
    "float32, channels last": (False, True),
    "bfloat16, channels first": (True, False),
    "bfloat16, channels last": (True, True),
}
Jobs = dict[str, tuple[Callable[[], Iterator], Callable, int]]  # name: (a source's maker, use, batches to skip)


def build_parser():
    """The command line."""
    quick = {"batches": 2, "repeats": 1, "c1": 8, "c2": 8, "batch_size": 32, "workers": [0, 1]}
    parser = make_parser(__doc__, dataset="cifar10", quick=quick)
    add_data_flags(parser, batch_size=128, val_size=0)
    workers = [0, 1, 2, 4] + [n for n in (8, 16) if n <= (os.cpu_count() or 1)]
    parser.add_argument("--batches", type=positive_int, default=20, help="batches per measurement")
    parser.add_argument("--repeats", type=positive_int, default=3, help="measurements of each, in turn")
    parser.add_argument(
        "--workers", type=non_negative_int, nargs="+", default=workers, help="numbers of DataLoader workers to try"
    )
    parser.add_argument("--c1", type=positive_int, default=96, help="All-CNN's channels before the first stride of 2")
    parser.add_argument("--c2", type=positive_int, default=192, help="All-CNN's channels after it")
    return parser


class ImageByImage(Dataset):
    """The training images as most tutorials read them: one at a time, through torchvision's transforms."""

    def __init__(self, split: Split):
        self.x, self.y = split.x.cpu().permute(0, 2, 3, 1).numpy(), split.y.tolist()  # (N, 32, 32, 3)
        self.transform = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomHorizontalFlip(),
                transforms.RandomCrop(32, padding=4, padding_mode="reflect"),
                transforms.ColorJitter(0.2, 0.2, 0.2, 0.05),
                transforms.ToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.x[index]), self.y[index]


def batches_of_loader(loader: DataLoader, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end, on the device, channels last."""
    while True:
        for x, y in loader:
            x = x.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
            yield x, y.to(device, non_blocking=True)


def batches_of_ours(split: Split, batch_size: int, generator: Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """The same from the images on the device, as in allcnn.py."""
    device = split.x.device
    while True:
        order = torch.randperm(len(split), generator=generator, device=device)
        for batch in order[: len(split) // batch_size * batch_size].split(batch_size):
            x = random_crop(random_flip(split.x[batch], generator), generator)
            yield pixels(random_color_jitter(x, generator)), split.y[batch]


def loader_of(split: Split, batch_size: int, workers: int) -> DataLoader:
    """A DataLoader of the images one by one, with so many worker processes."""
    return DataLoader(
        ImageByImage(split),
        batch_size,
        shuffle=True,
        drop_last=True,
        pin_memory=split.x.device.type == "cuda",
        num_workers=workers,
        persistent_workers=workers > 0,
    )


class Trainer:
    """All-CNN and its optimizer: `step` makes one update."""

    def __init__(self, c1: int, c2: int, classes: int, device: torch.device, amp: bool, channels_last: bool):
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.network = allcnn_t(c1, c2, classes).to(device, memory_format=self.layout)
        groups = get_param_groups(self.network)
        self.optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True, fused=True)
        self.device, self.amp = device, amp

    def step(self, x: Tensor, y: Tensor) -> None:
        """One update on a batch x (B, 3, 32, 32) of [0, 1]."""
        with autocast(self.device, self.amp):
            logits = self.network(x.contiguous(memory_format=self.layout))
        self.optimizer.zero_grad()
        F.cross_entropy(logits.float(), y).backward()
        self.optimizer.step()


def seconds_of_batches(source: Iterator, batches: int, use: Callable, skip: int, device: torch.device) -> float:
    """Seconds to use `batches` batches of `source`, after `skip` others; includes waiting for a GPU's work.

    The skipped ones are the warm-up, and use up what a DataLoader's workers had ready before the clock started.
    """
    for _ in range(skip):
        use(*next(source))
    synchronize(device)
    started = time.perf_counter()
    for _ in range(batches):
        use(*next(source))
    synchronize(device)
    return time.perf_counter() - started


def drop(x: Tensor, y: Tensor) -> None:
    """Use nothing."""


def sources(split: Split, args: argparse.Namespace, generator: Generator, use: Callable) -> Jobs:
    """The pipelines as jobs that `use` their batches: ours, and a DataLoader for each number of workers."""

    def loaded(workers: int) -> Iterator:
        return batches_of_loader(loader_of(split, args.batch_size, workers), split.x.device)

    jobs = {OURS: (partial(batches_of_ours, split, args.batch_size, generator), use, 1)}
    return jobs | {f"DataLoader, {n} workers": (partial(loaded, n), use, 2 * n + 1) for n in args.workers}


def measure(jobs: Jobs, args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Images per second of each, in turn: the median and all.

    A source lives for its turn alone: another's workers would prefetch on the same cores.
    """
    found = {name: [] for name in jobs}
    for _ in range(args.repeats):
        for name, (make_source, use, skip) in jobs.items():
            seconds = seconds_of_batches(make_source(), args.batches, use, skip, device)
            found[name].append(args.batches * args.batch_size / seconds)
    table = [{"name": name, "images_per_second": float(np.median(all_)), "all": all_} for name, all_ in found.items()]
    for row in table:
        print(f"{row['name']}: {row['images_per_second']:,.0f} images/s", flush=True)
    return table


def gpu_busy(source: Iterator, batches: int, use: Callable, device: torch.device) -> float:
    """The fraction of the wall time in which the GPU runs a kernel; the wall time is taken without the profiler."""
    wall = seconds_of_batches(source, batches, use, skip=3, device=device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        seconds_of_batches(source, batches, use, skip=0, device=device)
    kernels = (event for event in profiler.events() if event.device_type == DeviceType.CUDA)
    return sum(event.self_device_time_total for event in kernels) / 1e6 / wall  # from µs


def training_flops(trainer: Trainer, x: Tensor, y: Tensor) -> float:
    """FLOPs of the convolutions of one training step per image, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        trainer.step(x, y)
    return counter.get_total_flops() / len(x)


def product_speed(device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """FLOPs per second of a large matrix product, the most that a network can hope for; the fastest of the repeats."""
    large = torch.randn(4096, 4096, device=device).to(dtype)
    product = iter(lambda: (large, large), None)
    least = min(seconds_of_batches(product, 1, torch.matmul, skip=1, device=device) for _ in range(repeats))
    return 2 * 4096**3 / least


def best_loader(table: list[dict]) -> dict:
    """The row of the fastest DataLoader."""
    return max((row for row in table if row["name"] != OURS), key=lambda row: row["images_per_second"])


def ours_to_best(table: list[dict]) -> float:
    """How many times as fast whole batches are as the fastest DataLoader: the median over the repeats."""
    ours = next(row for row in table if row["name"] == OURS)
    return float(np.median(np.array(ours["all"]) / np.array(best_loader(table)["all"])))


def main(argv=None) -> dict:
    """Measure; returns the metrics."""
    args = build_parser().parse_args(argv)
    args.workers = list(dict.fromkeys(args.workers))
    device = pick_device(args.device)
    data = load(args, device)
    run = start_run(args)
    seed_everything(args.seed)
    generator = Generator(device).manual_seed(args.seed)

    pipeline = measure(sources(data.train, args, generator, drop), args, device)
    trainers = {
        name: Trainer(args.c1, args.c2, len(data.classes), device, *setting) for name, setting in SETTINGS.items()
    }
    batch = next(batches_of_ours(data.train, args.batch_size, generator))
    again = partial(iter, lambda: batch, None)  # the same batch without end
    network = measure({name: (again, trainer.step, 1) for name, trainer in trainers.items()}, args, device)
    fast = trainers["bfloat16, channels last"]
    flops, peak = training_flops(fast, *batch), product_speed(device, torch.bfloat16, args.repeats)
    both = measure(sources(data.train, args, generator, fast.step), args, device)
    metrics = {
        "batch_size": args.batch_size,
        "threads": torch.get_num_threads(),
        "pipeline": pipeline,
        "pipeline_ratio": ours_to_best(pipeline),
        "best_loader": best_loader(pipeline)["name"],
        "network": network,
        "gflop_per_image": flops / 1e9,
        "gflop_per_second": flops * network[-1]["images_per_second"] / 1e9,
        "gflop_per_second_of_a_large_product": peak / 1e9,
        "end_to_end": both,
        "end_to_end_ratio": ours_to_best(both),
    }
    if device.type == "cuda":
        source = batches_of_ours(data.train, args.batch_size, generator)
        metrics["gpu_busy"] = gpu_busy(source, args.batches, fast.step, device)
    save_figure(draw(metrics, data.title), run.path("throughput.png"))
    return run.finish(metrics)


def draw(metrics: dict, title: str):
    """Images per second of the pipelines, the network and both together, on logarithmic axes."""
    parts = {
        "input pipeline alone": metrics["pipeline"],
        "training step of All-CNN alone": metrics["network"],
        "both together, bfloat16, channels last": metrics["end_to_end"],
    }
    lengths = [len(table) for table in parts.values()]
    figure, axes = new_figure(3, width=8.6, height=6.6, sharex=True, gridspec_kw={"height_ratios": lengths})
    for ax, (part, table), color in zip(axes[:, 0], parts.items(), COLORS, strict=False):
        values = [row["images_per_second"] for row in table]
        ax.plot(values, range(len(table)), "o", color=color, markersize=9)
        for at, row in enumerate(table):
            ax.plot(row["all"], [at] * len(row["all"]), "k|", markersize=7)
            ax.text(1.25 * max(row["all"]), at, f"{values[at]:,.0f}", va="center", fontsize=9)
        ax.set_yticks(range(len(table)), [row["name"] for row in table])
        ax.set(xscale="log", title=part)
        ax.set_ylim(len(table) - 0.4, -0.6)
    axes[-1, 0].set_xlabel("images per second (dot: median, ticks: each repeat; logarithmic)")
    axes[-1, 0].set_xlim(right=3 * max(row["images_per_second"] for table in parts.values() for row in table))
    busy = f"\nthe GPU is busy for {metrics['gpu_busy']:.0%} of the time" if "gpu_busy" in metrics else ""
    figure.suptitle(
        f"{title}: batches made at once come {metrics['pipeline_ratio']:.0f} times as fast as image by image;\n"
        f"with the network the whole is {metrics['end_to_end_ratio']:.2f} times as fast{busy}"
    )
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
