"""Seven classifiers of digits, from a network that sees pixels in no order to one that sees the whole image at once.

    fcnn       784 → 512 → 256 → 10, no convolution
    cnn        three convolutions (32, 64, 128 channels), each pooled: 28 → 14 → 7 → 3; then 1152 → 256 → 128 → 10
    deep_cnn   three pairs (64, 128, 256 channels), each pooled; then 2304 → 512 → 10
    slim_cnn   seven convolutions (32, 32 | 64, 64 | 96, 96, 128 channels), twice pooled; the mean of 7×7 positions → 10
    vit        a vision transformer (vit.py)
    vgg16      torchvision's, thirteen convolutions
    alexnet    torchvision's, five

The last two can start from ImageNet's weights (pretrained.py): then they see 224×224 pixels of three equal channels,
their convolutions are frozen, and only the layers after them learn. Without weights they are trained from
scratch, on images padded to 32×32: VGG16 with a classifier for its one remaining position, AlexNet also with a first
convolution of 3×3 without stride, since its own, 11×11 with stride 4, would leave nothing.

All take images (B, 1, 28, 28) of [0, 1]; normalisation, and whatever else an image needs, is part of the network.
Sources: LeCun et al. 1998 and Ioffe and Szegedy 2015 (cnn, deep_cnn); Simonyan and Zisserman 2015 (VGG); Krizhevsky
2014, arXiv 1404.5997 (AlexNet as torchvision has it). Shapes: B images, K classes.
"""

from collections.abc import Callable
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models as torchvision_models

from cnn_cifar.inputs import resized
from cnn_cifar.models import IMAGENET, MNIST, Normalize
from cnn_cifar.pretrained import take_weights
from cnn_cifar.vit import ViT
from shared_utils.dropout import Dropout

TORCHVISION = {"vgg16": "VGG16", "alexnet": "AlexNet"}


def convolution(c_in: int, c_out: int, stride: int = 1) -> list[nn.Module]:
    """3×3 with BatchNorm and ReLU."""
    return [nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]


def convolutional(widths: tuple[int, ...], each: int, hidden: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """`each` convolutions of each width, then pooling and dropout ¼; then hidden layers with dropout ½."""
    layers: list[nn.Module] = [Normalize(**MNIST)]
    for before, width in pairwise((1, *widths)):
        for i in range(each):
            layers += convolution(width if i else before, width)
        layers += [nn.MaxPool2d(2), Dropout(0.25)]
    layers.append(nn.Flatten())
    for before, width in pairwise((9 * widths[-1], *hidden)):  # 3×3 positions are left
        layers += [nn.Linear(before, width), nn.ReLU(), Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], num_classes))


def fcnn(num_classes: int = 10) -> nn.Sequential:
    """Two hidden layers with BatchNorm and dropout."""
    layers: list[nn.Module] = [Normalize(**MNIST), nn.Flatten()]
    for before, width in pairwise((784, 512, 256)):
        layers += [nn.Linear(before, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(), Dropout(0.25)]
    return nn.Sequential(*layers, nn.Linear(256, num_classes))


def cnn(num_classes: int = 10) -> nn.Sequential:
    """Three convolutions."""
    return convolutional((32, 64, 128), 1, (256, 128), num_classes)


def deep_cnn(num_classes: int = 10) -> nn.Sequential:
    """Six convolutions."""
    return convolutional((64, 128, 256), 2, (512,), num_classes)


def slim_cnn(num_classes: int = 10) -> nn.Sequential:
    """Seven convolutions and no hidden layer: fewer parameters than the CNN, nearly all of them in convolutions."""
    layers: list[nn.Module] = [Normalize(**MNIST)]
    widths = (1, 32, 32, 64, 64, 96, 96, 128)
    for index, pair in enumerate(pairwise(widths)):
        layers += convolution(*pair)
        if index in (1, 3):
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))


class Torchvision(nn.Module):
    """torchvision's VGG16 or AlexNet for digits: (B, 1, 28, 28) of [0, 1] → logits (B, K).

    weights: ImageNet's state dict; the convolutions are then frozen, in evaluation mode. None: all of it learns, on
    32×32 pixels. Errors: `UserError` when the weights are another network's.
    """

    def __init__(self, name: str, num_classes: int, weights: dict[str, Tensor] | None = None):
        super().__init__()
        network = getattr(torchvision_models, name)(weights=None)
        self.frozen = weights is not None
        if weights is not None:
            take_weights(network, weights, f"these are no weights of {TORCHVISION[name]}")
        else:
            network.avgpool = nn.Identity()
            if name == "vgg16":
                network.classifier[0] = nn.Linear(512, 4096)  # 1×1 is left
            else:
                network.features[0] = nn.Conv2d(3, 64, 3, padding=1)
                network.classifier[1] = nn.Linear(256 * 3 * 3, 4096)  # 3×3 is left
        network.classifier[-1] = nn.Linear(4096, num_classes)
        self.normalize = Normalize(**(IMAGENET if self.frozen else MNIST))  # one channel's serve all three
        self.convolutions, self.classifier = nn.Sequential(network.features, network.avgpool), network.classifier
        self.convolutions.requires_grad_(not self.frozen)

    def train(self, mode: bool = True) -> "Torchvision":
        """As for any module, but what is frozen stays in evaluation mode."""
        super().train(mode)
        self.convolutions.train(mode and not self.frozen)
        return self

    def features(self, x: Tensor) -> Tensor:
        """What the classifier is given: (B, F)."""
        x = resized(x, 224) if self.frozen else F.pad(x, (2, 2, 2, 2))
        return self.convolutions(self.normalize(x.expand(-1, 3, -1, -1))).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.classifier(self.features(x))


OURS: dict[str, Callable[[int], nn.Module]] = {
    "fcnn": fcnn,
    "cnn": cnn,
    "deep_cnn": deep_cnn,
    "slim_cnn": slim_cnn,
    "vit": ViT,
}
MODELS = (*OURS, *TORCHVISION)
TITLES = {"fcnn": "FCNN", "cnn": "CNN", "deep_cnn": "deep CNN", "slim_cnn": "slim CNN", "vit": "ViT"}


def title_of(name: str, pretrained: bool) -> str:
    """What a figure calls one of `MODELS`; for one of `TORCHVISION` also how it is initialised."""
    if name in TITLES:
        return TITLES[name]
    if pretrained:
        return f"{TORCHVISION[name]}, ImageNet's, frozen"
    return f"{TORCHVISION[name]}, {'32×32' if name == 'vgg16' else 'small stem'}, from scratch"


def build(name: str, num_classes: int, weights: dict[str, Tensor] | None = None) -> nn.Module:
    """One of `MODELS`. weights: ImageNet's, for one of `TORCHVISION`; None for a random start."""
    return OURS[name](num_classes) if name in OURS else Torchvision(name, num_classes, weights)
