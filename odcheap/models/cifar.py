"""Networks for small images.

Each has `features(x)`, `head(f)`, `num_features`, `num_classes`, `classifier` (the last linear layer's name) and
`made_for` (the images' side in pixels).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odcheap.layers.cheap_conv import Standard, conv3x3
from odcheap.utils.errors import OptionError

Conv = Callable[[int, int, int], nn.Module]

DEEPEST = 1202  # of He et al.'s; a slip of the hand would be built until the memory is gone
WIDEST = 100  # of a wide ResNet's factor and a DenseNet's growth: published ones are 20 and 48 at most


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 for small images: stem 3 -> 16, three stages of n blocks with 16, 32 and 64 channels.

    Depths, widths and the standard form follow He et al., "Deep residual learning", 2015, section 4.2, with 1 x 1
    convolutions on the shortcuts that change shape (855,770 parameters at depth 56). With a cheap `conv` the blocks
    are those of the 2019 reference code, which differ from He's in more than the convolution: see `CheapBlock`.
    """

    made_for = 32
    num_features = 64
    classifier = "fc"
    standard_note = "the standard network has He et al.'s block: it differs in more than the convolution"

    def __init__(self, depth: int, conv: Conv, num_classes: int):
        super().__init__()
        if not 8 <= depth <= DEEPEST or (depth - 2) % 6:
            raise OptionError("backbone.depth", depth, f"must be 6n + 2 with n >= 1: 8, 14, 20, 26, ..., {DEEPEST}")
        block = BasicBlock if isinstance(conv, Standard) else CheapBlock
        self.conv1 = conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = stage(block, conv, 16, 16, (depth - 2) // 6, stride=1)
        self.layer2 = stage(block, conv, 16, 32, (depth - 2) // 6, stride=2)
        self.layer3 = stage(block, conv, 32, 64, (depth - 2) // 6, stride=2)
        self.num_classes = num_classes
        self.fc = nn.Linear(64, num_classes)
        init_kaiming(self)

    def features(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 64, H/4, W/4): the last feature map, with no activation behind a cheap block's sum."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.layer3(self.layer2(self.layer1(x)))

    def head(self, features: Tensor) -> Tensor:
        """(N, 64, H, W) -> (N, K): global average pool, linear."""
        return self.fc(features.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class BasicBlock(nn.Module):
    """He et al.'s block: the first convolution carries the stride, the last ReLU comes after the sum."""

    def __init__(self, conv: Conv, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = conv(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, 1)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        main = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(main)) + self.shortcut(x), inplace=True)


class CheapBlock(nn.Module):
    """The 2019 code's block: the second convolution carries the stride, both have a ReLU, none follows the sum."""

    def __init__(self, conv: Conv, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = conv(in_channels, out_channels, 1)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        main = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(main)), inplace=True) + self.shortcut(x)


def stage(
    block: Callable[..., nn.Module], conv: Conv, in_channels: int, out_channels: int, blocks: int, stride: int
) -> nn.Sequential:
    first = block(conv, in_channels, out_channels, stride)
    return nn.Sequential(first, *(block(conv, out_channels, out_channels, 1) for _ in range(blocks - 1)))


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class Plain(nn.Module):
    """A standard network of three parts: the maps, global average pool, linear."""

    made_for = 32
    classifier = "fc"

    def __init__(self, maps: nn.Sequential, num_features: int, num_classes: int):
        super().__init__()
        self.maps = maps
        self.num_features, self.num_classes = num_features, num_classes
        self.fc = nn.Linear(num_features, num_classes)
        init_kaiming(self)

    def features(self, x: Tensor) -> Tensor:
        return self.maps(x)

    def head(self, features: Tensor) -> Tensor:
        return self.fc(features.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def vgg16(num_classes: int) -> Plain:
    """VGG-16 with batch norm and one linear layer, (N, 3, H, W) -> maps (N, 512, H/32, W/32).

    Source: Simonyan and Zisserman, "Very deep convolutional networks", 2015, configuration D; the small head is usual
    for 32 x 32 images.
    """
    layers: list[nn.Module] = []
    channels = 3
    for width, convs in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(convs):
            layers += [conv3x3(channels, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return Plain(nn.Sequential(*layers), 512, num_classes)


def densenet(depth: int, growth: int, num_classes: int) -> Plain:
    """DenseNet without bottlenecks or compression, (N, 3, H, W) -> maps (N, C, H/4, W/4).

    Source: Huang et al., "Densely connected convolutional networks", 2017, section 4.2: three blocks, a first
    convolution of 16 channels. Raises `OptionError` where the depth is not 3n + 4 or the growth not 1 to 100.
    """
    if not 7 <= depth <= DEEPEST or (depth - 4) % 3:
        raise OptionError("backbone.network.depth", depth, "must be 3n + 4 with n >= 1: 7, 10, ..., 40, ..., 1201")
    check_width("growth", growth)
    layers, channels = [conv3x3(3, 16)], 16
    for block in range(3):
        if block:
            layers += [before(channels), nn.Conv2d(channels, channels, 1, bias=False), nn.AvgPool2d(2)]
        for _ in range((depth - 4) // 3):
            layers.append(DenseLayer(channels, growth))
            channels += growth
    return Plain(nn.Sequential(*layers, before(channels)), channels, num_classes)


def check_width(name: str, value: int) -> None:
    if not isinstance(value, int) or not 1 <= value <= WIDEST:
        raise OptionError(f"backbone.network.{name}", value, f"must be a whole number, 1 to {WIDEST}")


class DenseLayer(nn.Module):
    """(N, C, H, W) -> (N, C + growth, H, W): the input and what is made of it."""

    def __init__(self, channels: int, growth: int):
        super().__init__()
        self.before, self.conv = before(channels), conv3x3(channels, growth)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(self.before(x))], dim=1)


def wide_resnet(depth: int, width: int, num_classes: int) -> Plain:
    """Wide ResNet with activations before the convolutions, (N, 3, H, W) -> maps (N, 64 * width, H/4, W/4).

    Source: Zagoruyko and Komodakis, "Wide residual networks", 2016. Raises `OptionError` where the depth is not 6n + 4
    or the width not 1 to 100.
    """
    if not 10 <= depth <= DEEPEST or (depth - 4) % 6:
        raise OptionError("backbone.network.depth", depth, "must be 6n + 4 with n >= 1: 10, 16, 22, 28, ..., 1198")
    check_width("width", width)
    layers, channels = [conv3x3(3, 16)], 16
    for out, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
        for k in range((depth - 4) // 6):
            layers.append(WideBlock(channels, out, 1 if k else stride))
            channels = out
    return Plain(nn.Sequential(*layers, before(channels)), channels, num_classes)


class WideBlock(nn.Module):
    """Two convolutions, each behind its batch norm and ReLU; a 1 x 1 shortcut of the activated input where it must."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.before1, self.conv1 = before(in_channels), conv3x3(in_channels, out_channels, stride)
        self.before2, self.conv2 = before(out_channels), conv3x3(out_channels, out_channels)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = None if same else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.before1(x)
        main = self.conv2(self.before2(self.conv1(active)))
        return main + (x if self.shortcut is None else self.shortcut(active))


def before(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def init_kaiming(network: nn.Module) -> None:
    """Kaiming-normal weights (fan-in) for every convolution; all else keeps PyTorch's default."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
