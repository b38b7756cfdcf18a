"""All-CNN, a network of nothing but convolutions, and which of a network's parameters get weight decay.

    x ∈ [0, 1] → (x − mean) / std → dropout 0.2
      → 3→c1, c1→c1, c1→c1 stride 2 → dropout 0.5
      → c1→c2, c2→c2, c2→c2 stride 2 → dropout 0.5
      → c2→c2, c2→c2 1×1, c2→K 1×1 → mean over the positions = logits,

each a→b a convolution (3×3 with padding 1 unless it says 1×1), BatchNorm and ReLU, the last one too. Convolutions of
stride 2 replace pooling. Normalisation is part of the model, so that an attack's ε is in units of pixels.
Source: Springenberg, Dosovitskiy, Brox and Riedmiller, Striving for Simplicity, 2015 (All-CNN-C, there without
BatchNorm).
Shapes: B images of 3 channels (in the comments 32×32), K classes.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnn_cifar.resnet import BasicBlock, ResNet

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)  # of the training images, in units of [0, 1]
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
MNIST = {"mean": (0.1307,), "std": (0.3081,)}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # what torchvision's weights expect


class Normalize(nn.Module):
    """(x − mean) / std by channel, CIFAR-10's by default: (B, C, H, W) of [0, 1] → the same shape.

    A single mean and std (`**MNIST`) are for all channels alike.

    `nn.Sequential(Normalize(), resnet18(...))` takes pixels in [0, 1] as well.
    """

    def __init__(self, mean: tuple[float, ...] = CIFAR10_MEAN, std: tuple[float, ...] = CIFAR10_STD):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])  # (C or 1, 1, 1)
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images. Errors: `ValueError` when x is not of floats: bytes of 0 to 255 would go unnoticed."""
        if not x.is_floating_point():
            raise ValueError(f"the network takes pixels from 0 to 1 as floats, got {x.dtype}: divide them by 255")
        return (x - self.mean) / self.std


def conv_bn_relu(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution with a bias, padded by (kernel − 1) / 2, then BatchNorm, then ReLU.

    BatchNorm cancels the bias; it is here because the network's published number of parameters includes it.
    """
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    nn.init.zeros_(conv.bias)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels), relu=nn.ReLU()))


class AllCNN(nn.Module):
    """Nine convolutions: images of [0, 1] (B, 3, H, W) → logits (B, K). `allcnn_t` makes it."""

    def __init__(self, c1: int, c2: int, num_classes: int):
        super().__init__()
        self.config = {"c1": c1, "c2": c2, "num_classes": num_classes}
        self.normalize = Normalize()
        self.block1 = conv_bn_relu(3, c1)
        self.block2 = conv_bn_relu(c1, c1)
        self.block3 = conv_bn_relu(c1, c1, stride=2)
        self.block4 = conv_bn_relu(c1, c2)
        self.block5 = conv_bn_relu(c2, c2)
        self.block6 = conv_bn_relu(c2, c2, stride=2)
        self.block7 = conv_bn_relu(c2, c2)
        self.block8 = conv_bn_relu(c2, c2, kernel=1)
        self.block9 = conv_bn_relu(c2, num_classes, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of x (B, 3, H, W) in [0, 1]. Errors: as `Normalize`."""
        x = F.dropout(self.normalize(x), 0.2, self.training)  # a dropped value becomes the mean
        x = self.block1(x)  # (B, c1, 32, 32)
        x = self.block2(x)
        x = F.dropout(self.block3(x), 0.5, self.training)  # (B, c1, 16, 16)
        x = self.block4(x)  # (B, c2, 16, 16)
        x = self.block5(x)
        x = F.dropout(self.block6(x), 0.5, self.training)  # (B, c2, 8, 8)
        x = self.block7(x)
        x = self.block8(x)
        x = self.block9(x)  # (B, K, 8, 8)
        return x.mean((2, 3))  # (B, K)


def allcnn_t(c1: int = 96, c2: int = 192, num_classes: int = 10) -> AllCNN:
    """All-CNN with c1 channels before and c2 after the first convolution of stride 2; 1,372,254 parameters."""
    return AllCNN(c1, c2, num_classes)


def pixel_resnet(
    num_classes: int = 10, blocks: int = 2, width: int = 64, residual: bool = True, cifar_stem: bool = True
) -> nn.Sequential:
    """A ResNet of 8 · blocks + 2 layers that takes pixels: (B, 3, H, W) of [0, 1] → logits (B, K).

    blocks: basic blocks in each of the four stages, 2 for ResNet-18. width: channels of the first stage.
    """
    resnet = ResNet(BasicBlock, (blocks,) * 4, num_classes, cifar_stem, residual, width)
    return nn.Sequential(OrderedDict(normalize=Normalize(), resnet=resnet))


def get_param_groups(model: nn.Module, weight_decay: float = 1e-3) -> list[dict]:
    """Two groups for an optimizer: the weights of convolutions and linear layers, which decay, and the rest.

    The rest is biases and BatchNorm's parameters; every parameter is in exactly one group.
    Source: T. He et al., Bag of Tricks for Image Classification, 2019, section 3.1 ("no bias decay").
    """
    weights = {id(module.weight) for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if id(p) in weights], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in weights], "weight_decay": 0.0},
    ]
