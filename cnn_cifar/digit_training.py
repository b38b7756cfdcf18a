"""How the networks of zoo.py are trained: by which optimizer, on which images.

    fcnn and the CNNs     Adam, learning rate 1e-3, weight decay 1e-5
    vit                   AdamW, learning rate 1e-3, weight decay 0.05
    vgg16, alexnet        Adam, learning rate 1e-4; with ImageNet's weights only the layers after the convolutions learn

The learning rate rises over the first tenth of the updates, then falls to 0, both along half a cosine. The `strong`
recipe turns, stretches, shears and shifts every image anew each time that it is seen, and smooths the labels by 0.1.
Sources: Kingma and Ba 2015 (Adam); Loshchilov and Hutter 2019 (AdamW); Simard, Steinkraus and Platt 2003 (distorted
digits); Szegedy et al. 2016 (smoothed labels).
Shapes: N images uint8 (N, 1, H, W), B batch, F features, K classes.
"""

import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from cnn_cifar.inputs import Split, pixels, share
from cnn_cifar.zoo import TORCHVISION, Torchvision
from shared_utils.data import minibatches
from shared_utils.device import autocast
from shared_utils.modes import evaluating
from shared_utils.runs import check_finite
from shared_utils.schedules import one_cycle
from shared_utils.seeding import seed_everything

RECIPES = ("plain", "strong")
DEGREES, STRETCH, SHEAR, SHIFT = 12.0, 0.12, 0.15, 2.0  # at most: an angle, parts of the size, a slope, pixels
SMOOTHING = 0.1
RISE = 0.1  # the fraction of the updates in which the learning rate rises
TOGETHER, LARGE_TOGETHER = 250, 25  # images per batch without learning; at 224×224 a VGG16 layer takes 13 MB each


@dataclass
class Trained:
    """After each epoch the mean training loss (nats) and the accuracy; the seconds that training took."""

    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0


def distorted(x: Tensor, generator: Generator) -> Tensor:
    """Each float image (B, 1, H, W) turned, stretched, sheared and shifted by amounts of its own, on black."""
    uniform = 2 * torch.rand(6, len(x), generator=generator, device=generator.device).to(x.device) - 1  # in −1 … 1
    turn, shear = math.radians(DEGREES) * uniform[0], SHEAR * uniform[1]
    wide, tall = (math.log1p(STRETCH) * uniform[2:4]).exp()
    right, down = 2 * SHIFT / x.shape[-1] * uniform[4:]  # in units of half a side
    cos, sin = turn.cos(), turn.sin()
    # Where a pixel of the new image comes from: the turn of ((wide, shear), (0, tall)), and the shift.
    rows = [cos * wide, cos * shear - sin * tall, right, sin * wide, sin * shear + cos * tall, down]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def optimizer_of(name: str, network: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that the module's docstring names, without frozen parameters."""
    learned = [p for p in network.parameters() if p.requires_grad]
    if name == "vit":
        return torch.optim.AdamW(learned, lr=1e-3, weight_decay=0.05, fused=True)
    if name in TORCHVISION:
        return torch.optim.Adam(learned, lr=1e-4, fused=True)
    return torch.optim.Adam(learned, lr=1e-3, weight_decay=1e-5, fused=True)


def fit(
    name: str,
    network: nn.Module,
    train: Split,
    test: Split | None,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    strong: bool,
    amp: bool,
) -> Trained:
    """Train one of zoo.py's networks in place.

    test: its accuracy is measured after each epoch, and nothing is chosen by it; None: never. seed: of the images'
    order, their distortions, and dropout. With frozen convolutions and no distortion, features are computed once.
    Errors: `UserError` when the loss is no longer finite.
    """
    found, device, learner = Trained(), train.x.device, network
    if isinstance(network, Torchvision) and network.frozen and not strong:
        started = time.perf_counter()
        train = Split(features_of(network, train.x, amp), train.y)
        learner, found.seconds = network.classifier, time.perf_counter() - started
        test = test and Split(features_of(network, test.x, amp), test.y)
    optimizer = optimizer_of(name, network)
    peak, per_epoch = optimizer.param_groups[0]["lr"], len(train) // batch_size
    order, generator = np.random.default_rng(seed), Generator(device).manual_seed(seed)
    seed_everything(seed)
    for epoch in range(epochs):
        started, total = time.perf_counter(), torch.zeros((), device=device)  # read once an epoch
        network.train()
        batches = minibatches(len(train), batch_size, order, drop_last=True)
        for step, batch in enumerate(batches, start=epoch * per_epoch):
            batch = torch.from_numpy(batch).to(device)
            for group in optimizer.param_groups:
                group["lr"] = one_cycle(step, epochs * per_epoch, peak, rise=RISE)
            x = seen(train.x[batch])
            if strong:
                x = distorted(x, generator)
            with autocast(device, amp):
                logits = learner(x)  # (B, K)
            loss = F.cross_entropy(logits.float(), train.y[batch], label_smoothing=SMOOTHING if strong else 0.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        found.losses.append(total.item() / per_epoch)
        found.seconds += time.perf_counter() - started
        check_finite(found.losses[-1], step + 1, peak, "rate in cnn_cifar/digit_training.py")
        if test:
            found.accuracies.append(share(probabilities(learner, test.x, amp).argmax(1) == test.y))
            print(
                f"epoch {epoch + 1} of {epochs}  accuracy {found.accuracies[-1]:.4f}  {found.seconds:.0f} s", flush=True
            )
    return found


def seen(x: Tensor) -> Tensor:
    """Images uint8 as floats of [0, 1]; features as float32."""
    return pixels(x) if x.dtype == torch.uint8 else x.float()


@torch.no_grad()
def probabilities(network: nn.Module, x: Tensor, amp: bool) -> Tensor:
    """Class probabilities for images uint8 (N, 1, H, W), or for features (N, F): float32 (N, K)."""
    with evaluating(network), autocast(x.device, amp):
        return torch.cat([network(seen(some)).float().softmax(1) for some in x.split(TOGETHER)])


@torch.no_grad()
def features_of(network: Torchvision, x: Tensor, amp: bool) -> Tensor:
    """What the frozen convolutions make of images uint8: (N, F), with amp in bfloat16 (VGG16: 50 kB an image)."""
    network.eval()
    found = None
    with autocast(x.device, amp):
        for start in range(0, len(x), LARGE_TOGETHER):
            features = network.features(pixels(x[start : start + LARGE_TOGETHER]))
            if found is None:
                found = features.new_empty(len(x), features.shape[1])  # filled in place: all of it twice may not fit
            found[start : start + len(features)] = features
    return found
