"""How many images a second does the network train on, how many steps does it take, compared with a common UNet?

    python ddpm/benchmark.py
    python ddpm/benchmark.py --peer-attention linear --out runs/ddpm/benchmark_linear
    python ddpm/benchmark.py --device cuda --batch-size 256 --repeats 20

An update is forward, backward, clipping, the optimizer (here Muon, for the peer AdamW) and that of the mean weights, as
in train_ddpm.py; an image-step is one image through the network once, without gradients, as in sampling.py. The
peer is the UNet that is common for 28×28 digits, built here: dim 32, multipliers 1, 2 and 4 at 28×28, 14×14 and 7×7,
two blocks and attention of four heads at each size, on the way down and up. Implementations differ in the attention at
28×28 and 14×14, full or linear: `--peer-attention`. Both networks in float32 and in bfloat16; the peer channels first,
as is usual, the network here channels last. evaluate.py measures the quality.

All are measured in turn, `--repeats` times; the shortest time of each counts. The network here is compared in its
faster precision (bfloat16 only where the processor has it) with the peer in its usual float32.
Writes speed.png, metrics.json. Shapes: B images of a batch.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.diffusion import GaussianDiffusion
from ddpm.train_ddpm import follow, make_optimizers
from ddpm.unet import Block, UNet, time_embedding
from shared_utils.cli import make_parser, positive_int, run_main
from shared_utils.device import autocast, pick_device
from shared_utils.plotting import COLORS, new_figure, save_figure
from shared_utils.runs import start_run
from shared_utils.seeding import seed_everything

OURS, PEER = "this UNet", "a common UNet"
PEER_DIM = 32  # its channels at 28×28
PRECISIONS = {"float32": False, "bfloat16": True}  # whether products run in bfloat16


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, dataset=None, quick={"repeats": 1, "batch_size": 4})
    parser.add_argument("--batch-size", type=positive_int, default=64, help="images of an update, and of a step")
    attention = "the peer's attention at 28×28 and 14×14; at 7×7 it is full"
    parser.add_argument("--peer-attention", choices=("full", "linear"), default="full", help=attention)
    parser.add_argument("--repeats", type=positive_int, default=5, help="how often each is measured")
    return parser


class PeerAttention(nn.Module):
    """Attention of four heads of 32 over all positions, full or linear in their number: (B, c, H, W) → the same.

    Source of the linear one: Shen et al. 2021, arXiv 1812.01243.
    """

    def __init__(self, channels: int, full: bool):
        super().__init__()
        self.full = full
        self.norm = nn.GroupNorm(1, channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * 128, 1, bias=False), nn.Conv2d(128, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        qkv = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, 4, 32)).transpose(3, 4)  # (B, 3, 4, H W, 32)
        q, k, v = (each.contiguous() for each in qkv.unbind(1))  # without copies the kernel takes three times as long
        if self.full:
            seen = F.scaled_dot_product_attention(q, k, v)  # (B, 4, H W, 32)
        else:
            seen = q.softmax(3) / math.sqrt(32) @ (k.softmax(2).transpose(2, 3) @ v)  # the right product is (32, 32)
        return x + self.out(seen.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:]))


class PeerUNet(nn.Module):
    """The UNet of the common implementations at dim 32, multipliers 1, 2, 4: (B, 1, 28, 28), t (B,) → the same.

    attention: at 28×28 and 14×14, `full` or `linear`; at 7×7 it is full.
    """

    def __init__(self, attention: str):
        super().__init__()
        dim, width = PEER_DIM, 4 * PEER_DIM
        sizes = [dim, dim, 2 * dim, 4 * dim]
        self.time = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, width), nn.SiLU())
        self.first = nn.Conv2d(1, dim, 7, padding=3)
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for level, (before, after) in enumerate(pairwise(sizes)):
            last = level == 2
            full = last or attention == "full"
            blocks = [Block(before, before, width), Block(before, before, width), PeerAttention(before, full)]
            self.downs.append(nn.ModuleList([*blocks, nn.Conv2d(before, after, 3, 1 if last else 2, 1)]))
            blocks = [Block(after + before, after, width), Block(after + before, after, width)]
            up = [*blocks, PeerAttention(after, full), nn.Conv2d(after, before, 3, padding=1)]
            self.ups.insert(0, nn.ModuleList(up))
        self.middle = nn.ModuleList(
            [Block(4 * dim, 4 * dim, width), PeerAttention(4 * dim, True), Block(4 * dim, 4 * dim, width)]
        )
        self.end, self.last = Block(2 * dim, dim, width), nn.Conv2d(dim, 1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """See the class."""
        time = self.time(time_embedding(t, PEER_DIM))
        x = self.first(x)
        start, kept = x, []
        for block1, block2, attention, smaller in self.downs:
            x = block1(x, time)
            kept.append(x)
            x = attention(block2(x, time))
            kept.append(x)
            x = smaller(x)
        block1, attention, block2 = self.middle
        x = block2(attention(block1(x, time)), time)
        for level, (block1, block2, attention, larger) in enumerate(self.ups):
            x = block1(torch.cat([x, kept.pop()], 1), time)
            x = attention(block2(torch.cat([x, kept.pop()], 1), time))
            x = larger(x if level == 2 else F.interpolate(x, scale_factor=2.0))
        return self.last(self.end(torch.cat([x, start], 1), time))


def main(argv=None) -> dict:
    """Measure; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    run = start_run(args)
    seed_everything(args.seed)
    ours = UNet().to(device, memory_format=torch.channels_last)
    networks = {OURS: ours, PEER: PeerUNet(args.peer_attention).to(device)}
    calls: dict[tuple[str, str], Callable[[], None]] = {}
    for name, network in networks.items():
        for kind, amp in PRECISIONS.items():
            calls[f"{name}, {kind}", "images_per_second"] = training_call(network, args.batch_size, amp, device)
            calls[f"{name}, {kind}", "image_steps_per_second"] = step_call(network, args.batch_size, amp, device)
    least = least_seconds(calls, args.repeats)
    rows = []
    for what in dict.fromkeys(what for what, _ in calls):
        speeds = {key: args.batch_size / least[what, key] for key in ("images_per_second", "image_steps_per_second")}
        rows.append({"what": what, **speeds})
        run.log(**rows[-1])
    by_name = {row["what"]: row for row in rows}
    precision = max(PRECISIONS, key=lambda name: by_name[f"{OURS}, {name}"]["images_per_second"])
    best, usual = by_name[f"{OURS}, {precision}"], by_name[f"{PEER}, float32"]
    ratios = {
        "training_against_peer": best["images_per_second"] / usual["images_per_second"],
        "sampling_against_peer": best["image_steps_per_second"] / usual["image_steps_per_second"],
    }
    sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    save_figure(draw(rows, ratios, sizes, precision, args.peer_attention), run.path("speed.png"))
    found = {"precision": precision, "parameters": sizes[OURS], "parameters_of_peer": sizes[PEER]}
    found |= {"batch_size": args.batch_size, "threads": torch.get_num_threads()}
    return run.finish({**ratios, **found, "cases": rows})


def training_call(network: nn.Module, batch_size: int, amp: bool, device: torch.device) -> Callable[[], None]:
    """An update of train_ddpm.py as a call."""
    diffusion, x = GaussianDiffusion(1000, "cosine", "v"), torch.rand(batch_size, 1, 28, 28, device=device) * 2 - 1
    if isinstance(network, UNet):
        optimizers = make_optimizers(network, argparse.Namespace(optimizer="muon", lr=1e-4, muon_lr=1e-3))
    else:
        optimizers = [torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)]
    mean = copy.deepcopy(network)

    def call() -> None:
        network.train()
        with autocast(device, amp):
            loss = diffusion.loss(network, x)
        network.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        follow(mean, network, 0.999)
        loss.item()  # waits for a GPU

    return call


def step_call(network: nn.Module, batch_size: int, amp: bool, device: torch.device) -> Callable[[], None]:
    """A batch through the network once, as a call."""
    x, t = torch.randn(batch_size, 1, 28, 28, device=device), torch.full((batch_size,), 500, device=device)

    @torch.inference_mode()
    def call() -> None:
        network.eval()
        with autocast(device, amp):
            network(x, t)[0, 0, 0, 0].item()  # waits for a GPU

    return call


def least_seconds(calls: dict, repeats: int) -> dict:
    """The least time of `repeats` of each call, after one to warm up; in turn, so that other load affects all alike."""
    least = dict.fromkeys(calls, math.inf)
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if repeat:
                least[name] = min(least[name], time.perf_counter() - started)
    return least


def draw(rows: list[dict], ratios: dict[str, float], sizes: dict[str, int], precision: str, attention: str):
    """Images a second in training, and image-steps a second in sampling."""
    figure, axes = new_figure(1, 2, width=10.4, height=3.2)
    keys = {"images_per_second": "images per second of training", "image_steps_per_second": "image-steps per second"}
    for ax, (key, label) in zip(axes[0], keys.items(), strict=True):
        for at, row in enumerate(rows):
            ax.barh(at, row[key], color=COLORS[1 if row["what"].startswith(OURS) else 0])
            ax.annotate(f"{row[key]:,.0f}", (row[key], at), (4, 0), textcoords="offset points", va="center")
        ax.set_yticks(range(len(rows)), [row["what"] for row in rows])
        ax.invert_yaxis()
        ax.margins(x=0.16)
        ax.set(xlabel=label)
    figure.suptitle(
        f"{sizes[OURS]:,} parameters in {precision} against {sizes[PEER]:,} with {attention} attention in float32:\n"
        f"{ratios['training_against_peer']:.1f} times the images, {ratios['sampling_against_peer']:.1f} times the steps"
    )
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
