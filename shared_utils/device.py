"""Where the tensors live, and bfloat16 where it pays."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from shared_utils.cli import UserError


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA, else Apple's MPS, else the CPU. Errors: `UserError` when the device asked for is absent."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in present.items() if there))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: unknown, use auto, cpu, cuda, cuda:N or mps") from None
    if not present.get(device.type, False):
        raise UserError(f"--device {name}: PyTorch finds no such device here, use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA device(s)")
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Whether it has instructions for bfloat16, as far as PyTorch knows; without, the products are emulated, slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = getattr(torch.cpu, "get_capabilities", dict)()  # an older PyTorch cannot tell
    return device.type == "cpu" and bool(known.get("avx512_bf16"))


def autocast(device: torch.device, enabled: bool | None = True) -> torch.autocast:
    """Context in which matrix products and convolutions run in bfloat16; with `enabled=False` it does nothing.

    enabled: None enables it where `has_bfloat16`. bfloat16 has float32's range, so no loss scaling is needed. On a CPU
    with AVX-512 BF16 a convolutional network is about twice as fast, with `memory_format=torch.channels_last` a little
    more (cnn_cifar/benchmark.py); on others it was 1.6 to 2.4 times slower than in float32.
    """
    enabled = has_bfloat16(device) if enabled is None else enabled
    return torch.autocast(device_type=device.type, dtype=torch.bfloat16, enabled=enabled)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its queued work; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """How many seconds one call takes, including the work that it queues on a GPU."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


@contextmanager
def cpu_threads(n: int) -> Iterator[None]:
    """Context in which PyTorch's products on the CPU use n threads.

    One is best for small networks: a second gains nothing, and where another process occupies its core, the first
    waits for it at every product (a training run of 2 s then took 180 s).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
