"""Residual networks (ResNet-18, 34, 50, 101, 152), with torchvision's module names, and their plain twins.

A block learns the difference from its input, not the output itself (He et al. 2016, eq. 1 and 2):

    y = relu(F(x) + x),      y = relu(F(x) + W_s x)  where F changes the shape,

with F(x) = BN(W_2 relu(BN(W_1 x))) (basic block, 3×3 twice) or BN(W_3 relu(BN(W_2 relu(BN(W_1 x))))) (bottleneck: 1×1,
3×3, 1×1 with four times the channels), BN batch normalisation after every convolution and W_s a 1×1 convolution (with
BN; `downsample`). `residual=False` is the plain network of the same layers, y = relu(F(x)), without W_s.

A bottleneck's stride of 2 sits in its 3×3 convolution, not in the first 1×1, which would skip three of four positions
("v1.5"; Goyal et al. 2017). Convolutions start as N(0, 2 / (k² C_out)), which keeps the variance of the gradients from
layer to layer (He et al. 2015, eq. 14). State dicts are interchangeable with those of torchvision's models.

Sources: He, Zhang, Ren and Sun, Delving Deep into Rectifiers, 2015; the same, Deep Residual Learning for Image
Recognition, 2016; Goyal et al., Accurate, Large Minibatch SGD, 2017.
Shapes: B images of 3 channels, C channels, H W pixels, K classes, e the block's expansion (1 or 4). In the comments the
images are 224×224, or 32×32 with the CIFAR stem.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3×3 convolutions: (B, in_channels, H, W) → (B, width, H / stride, W / stride)."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, residual: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.residual = residual
        self.downsample = projection(in_channels, width, stride) if residual else None

    def forward(self, x: Tensor) -> Tensor:
        """relu(F(x) + x), or relu(F(x)) in the plain network."""
        y = F.relu(self.bn1(self.conv1(x)))  # (B, width, H / stride, W / stride)
        y = self.bn2(self.conv2(y))
        return F.relu(y + shortcut(self, x) if self.residual else y)


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 convolutions: (B, in_channels, H, W) → (B, 4 width, H / stride, W / stride)."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, residual: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.residual = residual
        self.downsample = projection(in_channels, 4 * width, stride) if residual else None

    def forward(self, x: Tensor) -> Tensor:
        """relu(F(x) + x), or relu(F(x)) in the plain network."""
        y = F.relu(self.bn1(self.conv1(x)))  # (B, width, H, W)
        y = F.relu(self.bn2(self.conv2(y)))  # (B, width, H / stride, W / stride)
        y = self.bn3(self.conv3(y))  # (B, 4 width, H / stride, W / stride)
        return F.relu(y + shortcut(self, x) if self.residual else y)


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """W_s, a 1×1 convolution and its BN, where the block changes the shape; None where x fits as it is."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )


def shortcut(block: BasicBlock | Bottleneck, x: Tensor) -> Tensor:
    """x or W_s x: (B, in_channels, H, W) → (B, e width, H / stride, W / stride)."""
    return x if block.downsample is None else block.downsample(x)


class ResNet(nn.Module):
    """Stem, four stages of blocks, average over the positions, linear layer: (B, 3, H, W) → logits (B, K).

    It takes normalised images: its state dict is torchvision's, so mean and deviation have no place in it. The stages
    have 1, 2, 4 and 8 times `width` channels (times the expansion); the paper's width is 64. In the comments w = width.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        num_classes: int,
        cifar_stem: bool,
        residual: bool,
        width: int = 64,
    ):
        super().__init__()
        if cifar_stem:  # 32×32 is too small to shrink at once
            self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        e = block.expansion
        self.layer1 = stage(block, width, width, depths[0], 1, residual)
        self.layer2 = stage(block, width * e, 2 * width, depths[1], 2, residual)
        self.layer3 = stage(block, 2 * width * e, 4 * width, depths[2], 2, residual)
        self.layer4 = stage(block, 4 * width * e, 8 * width, depths[3], 2, residual)
        self.fc = nn.Linear(8 * width * e, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of x (B, 3, H, W)."""
        x = F.relu(self.bn1(self.conv1(x)))  # (B, w, 112, 112), CIFAR stem (B, w, 32, 32)
        x = self.maxpool(x)  # (B, w, 56, 56), CIFAR stem as before
        x = self.layer1(x)  # (B, w e, 56, 56), CIFAR stem (B, w e, 32, 32)
        x = self.layer2(x)  # (B, 2 w e, 28, 28), CIFAR stem (B, 2 w e, 16, 16)
        x = self.layer3(x)  # (B, 4 w e, 14, 14), CIFAR stem (B, 4 w e, 8, 8)
        x = self.layer4(x)  # (B, 8 w e, 7, 7), CIFAR stem (B, 8 w e, 4, 4)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)  # (B, 8 w e)
        return self.fc(x)  # (B, K)


def stage(
    block: type[BasicBlock] | type[Bottleneck], in_channels: int, width: int, depth: int, stride: int, residual: bool
) -> nn.Sequential:
    """`depth` blocks of one width, the first with `stride`: (B, in_channels, H, W) → (B, e width, H / stride, …)."""
    first = block(in_channels, width, stride, residual)
    rest = (block(block.expansion * width, width, 1, residual) for _ in range(depth - 1))
    return nn.Sequential(first, *rest)


def resnet18(num_classes: int = 1000, cifar_stem: bool = False, residual: bool = True) -> ResNet:
    """ResNet-18: 8 basic blocks. cifar_stem: 3×3, stride 1, no pooling; residual=False: the plain network."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, cifar_stem, residual)


def resnet34(num_classes: int = 1000, cifar_stem: bool = False, residual: bool = True) -> ResNet:
    """ResNet-34: 16 basic blocks. The arguments are those of `resnet18`."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, cifar_stem, residual)


def resnet50(num_classes: int = 1000, cifar_stem: bool = False, residual: bool = True) -> ResNet:
    """ResNet-50: 16 bottlenecks. The arguments are those of `resnet18`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, cifar_stem, residual)


def resnet101(num_classes: int = 1000, cifar_stem: bool = False, residual: bool = True) -> ResNet:
    """ResNet-101: 33 bottlenecks. The arguments are those of `resnet18`."""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, cifar_stem, residual)


def resnet152(num_classes: int = 1000, cifar_stem: bool = False, residual: bool = True) -> ResNet:
    """ResNet-152: 50 bottlenecks. The arguments are those of `resnet18`."""
    return ResNet(Bottleneck, (3, 8, 36, 3), num_classes, cifar_stem, residual)


RESNETS = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnet152": resnet152,
}
