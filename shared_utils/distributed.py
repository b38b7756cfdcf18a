"""`torchrun` support in four lines of a training script.

    with process_group(args.device) as world:                          # one process without torchrun
        run = start_run(args, writes=world.is_main)
        ddp = wrap(model, world)                                       # averages the gradients; save `model`
        for batch in minibatches(n, batch_size, rng, drop_last=True):  # the same order in every rank …
            loss(ddp, shard(batch, world)).backward()                  # … of which each rank takes its part

The batch size is the global one: n processes with n-th parts give the gradient of the mean loss over the whole batch,
as one process would. That holds for what is computed image by image. BatchNorm sees its rank's part alone. All ranks
draw the same noise unless it is drawn for the whole batch and then sharded, or each rank has a seed of its own.
"""

import atexit
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from shared_utils.cli import UserError
from shared_utils.device import pick_device


@dataclass(frozen=True)
class World:
    """This process among all: rank 0 … size − 1, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True for the one process that prints and writes."""
        return self.rank == 0

    def check(self, batch_size: int) -> None:
        """Errors: `UserError` for a batch that does not divide evenly: its mean is not the mean of its parts' means."""
        if batch_size % self.size:
            raise UserError(f"--batch-size {batch_size} does not divide among {self.size} processes")


@contextmanager
def process_group(device: str = "auto") -> Iterator[World]:
    """Join torchrun's process group (nccl on CUDA, gloo elsewhere), or run alone without torchrun; leave it at the end.

    With several GPUs each process takes the one of its local rank.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield World(0, 1, pick_device(device))
        return
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = pick_device(device)
    if chosen.type == "cuda":
        chosen = pick_device(f"cuda:{local_rank}")
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), chosen)
        dist.barrier()  # none leaves while another still needs it
    finally:
        dist.destroy_process_group()
        # What still holds the group (DDP, in reference cycles) must release it while the interpreter is alive: gloo's
        # threads may need it in order to end, and abort the process once it is gone.
        atexit.register(gc.collect)


@contextmanager
def main_first(world: World) -> Iterator[None]:
    """The main process runs the block (a download, say) before the others do."""
    if not world.is_main:
        dist.barrier()
    yield
    if world.is_main and world.size > 1:
        dist.barrier()


def total(value: torch.Tensor, world: World) -> torch.Tensor:
    """The sum of `value` over all processes."""
    if world.size > 1:
        dist.all_reduce(value)
    return value


def shard(batch: np.ndarray, world: World) -> np.ndarray:
    """This rank's part of a global batch of indices: parts are disjoint, complete and of one length (`check`)."""
    world.check(len(batch))
    return batch[world.rank :: world.size]


def wrap(model: torch.nn.Module, world: World) -> torch.nn.Module:
    """`model` on the world's device, in DistributedDataParallel where there is more than one process."""
    model = model.to(world.device)
    if world.size == 1:
        return model
    return torch.nn.parallel.DistributedDataParallel(
        model, device_ids=[world.device] if world.device.type == "cuda" else None
    )
