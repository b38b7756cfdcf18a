"""Which pixels of an image a network's answer rests on: three maps, and two ways to test a map.

    input gradient         max over the channels of |∂z_k/∂x|
    integrated gradients   Σ over the channels of (x − x̄) · (1/m) Σᵢ ∂z_k/∂x at x̄ + (i − ½)/m · (x − x̄)
    Grad-CAM               Σ_c w_c A_c,   w_c = mean over the positions of ∂z_k/∂A_c

z_k is the logit of class k, x̄ a baseline without content, A the feature maps of a layer. Integrated gradients add up
to z_k(x) − z_k(x̄) (completeness), which is what they are made for and how they are tested.

A map that looks right proves nothing. It should change when the weights do (`randomized`: the layers' weights
shuffled one by one, from the logits down), and the pixels it calls important should matter (`curve`: the class's
probability when they are taken away or put in first), more than those that another image's map calls important.
Grad-CAM is usually clipped at 0; here it is not, since a map that is 0 at most pixels does not rank them.
Sources: Simonyan et al. 2014; Sundararajan et al. 2017; Selvaraju et al. 2017; Adebayo et al. 2018 (shuffled weights);
Petsiuk et al. 2018 (deletion and insertion).
Shapes: B images x (B, 3, H, W) of [0, 1], classes k int64 (B,), maps (B, H, W).
"""

from collections.abc import Iterator
from copy import deepcopy

import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor, nn

from cnn_cifar.models import CIFAR10_MEAN


def baseline_of(x: Tensor) -> Tensor:
    """CIFAR-10's mean colour everywhere, which the networks' normalisation makes 0: shaped like x."""
    return torch.tensor(CIFAR10_MEAN, device=x.device)[:, None, None].expand_as(x)


def logit_gradient(model: nn.Module, x: Tensor, k: Tensor) -> Tensor:
    """∂z_k/∂x of each image, shaped like x."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(model(x).gather(1, k[:, None]).sum(), x)[0]


def input_gradient_map(model: nn.Module, x: Tensor, k: Tensor) -> Tensor:
    """The largest |∂z_k/∂x| over the channels at each pixel: (B, H, W)."""
    return logit_gradient(model, x, k).abs().amax(1)


def integrated_gradients(model: nn.Module, x: Tensor, k: Tensor, steps: int = 32) -> Tensor:
    """What each pixel adds to z_k between the baseline and x, by the midpoint rule: (B, H, W), of either sign."""
    start = baseline_of(x)
    total = torch.zeros_like(x)
    for i in range(steps):
        total += logit_gradient(model, start + (i + 0.5) / steps * (x - start), k)
    return ((x - start) * total / steps).sum(1)


def grad_cam(model: nn.Module, x: Tensor, k: Tensor, layer: nn.Module) -> Tensor:
    """Where the maps of `layer` speak for class k (above 0) or against it: (B, H, W), upsampled bilinearly.

    The maps are stretched over the whole image, though a layer behind a pooling that drops rows sees a little less.
    """
    kept = []
    handle = layer.register_forward_hook(lambda module, given, output: kept.append(output))
    try:
        with torch.enable_grad():
            logit = model(x.detach().requires_grad_()).gather(1, k[:, None]).sum()
        (maps,) = kept  # (B, C, h, w)
        gradient = torch.autograd.grad(logit, maps)[0]
    finally:
        handle.remove()
    weights = gradient.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
    cam = (weights * maps.detach()).sum(1, keepdim=True)  # (B, 1, h, w)
    return F.interpolate(cam, size=x.shape[2:], mode="bilinear", align_corners=False)[:, 0]


def randomized(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A copy of the model with one more layer shuffled each time, from the logits down: (the layer's name, the copy).

    The layer's weights are permuted at random; biases and BatchNorm's parameters and statistics stay.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    forgotten = deepcopy(model)
    for name, _ in reversed(layers):
        weight = forgotten.get_submodule(name).weight
        with torch.no_grad():
            weight.copy_(weight.flatten()[torch.randperm(weight.numel()).to(weight.device)].view_as(weight))
        yield name, forgotten


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's correlation of two maps for each image: (B, H, W) twice → (B,) on the CPU; NaN where one is constant.

    Equal values share their mean rank.
    """
    ranks = [torch.from_numpy(rankdata(values.flatten(1).cpu().numpy(), axis=1)) for values in (a, b)]  # (B, H W)
    centred = [rank - rank.mean(1, keepdim=True) for rank in ranks]
    return (centred[0] * centred[1]).sum(1) / (centred[0].norm(dim=1) * centred[1].norm(dim=1))


@torch.no_grad()
def curve(model: nn.Module, x: Tensor, k: Tensor, maps: Tensor, parts: int, insert: bool) -> Tensor:
    """The probability of class k with the share 0, 1/parts, … 1 of the pixels taken away, the map's largest first.

    insert: the pixels are put into the baseline instead. Returns (B, parts + 1).
    """
    ranked = maps.flatten(1).argsort(dim=1, descending=True, stable=True)  # (B, H W), the largest pixel first
    order = ranked.argsort(1).view_as(maps)  # the rank of each pixel, from 0
    without, pixels, found = baseline_of(x), maps[0].numel(), []
    for part in range(parts + 1):
        chosen = (order < round(part / parts * pixels))[:, None]  # (B, 1, H, W)
        shown = torch.where(chosen, x, without) if insert else torch.where(chosen, without, x)
        found.append(model(shown).softmax(1).gather(1, k[:, None])[:, 0])
    return torch.stack(found, 1)


def area(curves: Tensor) -> Tensor:
    """The area under each curve over [0, 1], by trapezoids: (B, parts + 1) → (B,)."""
    return torch.trapezoid(curves, dx=1 / (curves.shape[1] - 1), dim=1)
