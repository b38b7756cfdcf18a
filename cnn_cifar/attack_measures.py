"""How many images survive an attack, and signs that a network masks its gradient instead of being robust.

Shapes: N images, B batch, K classes.
"""

from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from cnn_cifar.attacks import input_gradient
from cnn_cifar.inputs import Split, pixels, share

BATCH = 250  # images attacked together
Attack = Callable[[Tensor, Tensor], Tensor]  # (x, y) → x moved, floats of [0, 1]


def noise(x: Tensor, eps: float, generator: Generator) -> Tensor:
    """Each value of x (B, 3, H, W) moved by +eps or −eps at random, within [0, 1]: the control for an attack."""
    coins = torch.rand(x.shape, generator=generator, device=generator.device).to(x.device) < 0.5
    return (x + eps * torch.where(coins, 1.0, -1.0)).clamp(0, 1)


@torch.no_grad()
def logits_of_floats(model: nn.Module, x: Tensor) -> Tensor:
    """float32 logits (N, K) of images x (N, 3, H, W) of [0, 1]; the model is in evaluation mode."""
    return torch.cat([model(batch).float() for batch in x.split(BATCH)])


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy of each image of [0, 1], nats: (N,)."""
    return F.cross_entropy(logits_of_floats(model, x), y, reduction="none")


def survivors(model: nn.Module, split: Split, attack: Attack | None = None) -> Tensor:
    """Which images the network gets right under the attack (None: unattacked): bool (N,)."""
    right = []
    for images, y in zip(split.x.split(BATCH), split.y.split(BATCH), strict=True):
        x = pixels(images)
        moved = attack(x, y) if attack else x
        right.append(logits_of_floats(model, moved).argmax(1) == y)
    return torch.cat(right)


def fgsm_accuracy_again(model: nn.Module, split: Split, eps: float) -> float:
    """The accuracy under FGSM again, an independent check in ten lines that share nothing with attacks.py."""
    right = 0
    for images, y in zip(split.x.split(BATCH), split.y.split(BATCH), strict=True):
        x = (images.float() / 255).contiguous(memory_format=torch.channels_last).requires_grad_()
        (-model(x).log_softmax(1)[torch.arange(len(y)), y].sum()).backward()
        with torch.no_grad():
            moved = torch.clip(x + eps * torch.sign(x.grad), 0.0, 1.0)
            right += int((model(moved).argmax(1) == y).sum())
    model.zero_grad()
    return right / len(split)


def masking_checks(
    model: nn.Module, split: Split, by_eps: list[dict], eps: float, by_steps: list[dict], everything: float
):
    """What should be seen where gradients are not masked, and what was: rows of check, measured, passes.

    by_eps: accuracies by ε, `eps` among them. by_steps: accuracy under PGD with more and more steps.
    everything: the accuracy under PGD with ε = 1, which allows every image to become any other. One
    percentage point, what chance may do on a thousand images, is tolerated. Source: Athalye, Carlini and Wagner 2018,
    section 3.1.
    """
    gradients = [
        input_gradient(model, pixels(images), y).flatten(1).abs().amax(1)
        for images, y in zip(split.x.split(BATCH), split.y.split(BATCH), strict=True)
    ]
    vanished = share(torch.cat(gradients) == 0)
    by_step, by_size = (
        _largest_rise(row["one start"] for row in by_steps),
        _largest_rise(row["PGD-20"] for row in by_eps),
    )
    row = next(row for row in by_eps if row["eps"] == eps)
    one, twenty, at_random = row["FGSM"], row["PGD-20"], row["noise"]
    rows = [
        ("an attack does more than noise", f"{one:.1%} against {at_random:.1%}", one < at_random - 0.01),
        ("twenty steps are not weaker than one", f"{twenty:.1%} against {one:.1%}", twenty <= one + 0.01),
        ("more steps are not weaker", f"largest rise {100 * by_step:+.1f} points", by_step <= 0.01),
        ("a larger ε is not weaker", f"largest rise {100 * by_size:+.1f} points", by_size <= 0.01),
        ("with ε = 1 nothing is left", f"{everything:.1%}", everything == 0),
        ("no image has a gradient of 0", f"{vanished:.1%} of the images", vanished == 0),
    ]
    return [{"check": check, "measured": measured, "passes": bool(passes)} for check, measured, passes in rows]


def _largest_rise(values: Iterable[float]) -> float:
    return max(after - before for before, after in pairwise(values))
