"""Networks, each with `features(x)`, `head(f)`, `num_features` and `classifier` (the last linear layer's name)."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from odcheap.convs import Standard, conv3x3
from odcheap.errors import OptionError

Conv = Callable[[int, int, int], nn.Module]


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 for small images: stem 3 -> 16, three stages of n blocks with 16, 32 and 64 channels.

    Depths, widths and the standard form follow He et al., "Deep residual learning", 2015, section 4.2, with 1 x 1
    convolutions on the shortcuts that change shape (855,770 parameters at depth 56). With a cheap `conv` the blocks
    are those of the 2019 reference code, which differ from He's in more than the convolution: see `CheapBlock`.
    """

    num_features = 64
    classifier = "fc"
    standard_note = "the standard network has He et al.'s block: it differs in more than the convolution"

    def __init__(self, depth: int, conv: Conv, num_classes: int):
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise OptionError("backbone.depth", depth, "must be 6n + 2 with n >= 1: 8, 14, 20, 26, 32, ...")
        block = BasicBlock if isinstance(conv, Standard) else CheapBlock
        self.conv1 = conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = stage(block, conv, 16, 16, (depth - 2) // 6, stride=1)
        self.layer2 = stage(block, conv, 16, 32, (depth - 2) // 6, stride=2)
        self.layer3 = stage(block, conv, 32, 64, (depth - 2) // 6, stride=2)
        self.fc = nn.Linear(64, num_classes)
        init_kaiming(self)

    def features(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 64, H/4, W/4): the last feature map, with no activation behind a cheap block's sum."""
        x = F.relu(self.bn1(self.conv1(x)))
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
        main = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(main)) + self.shortcut(x))


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
        main = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(main))) + self.shortcut(x)


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


def init_kaiming(network: nn.Module) -> None:
    """Kaiming-normal weights (fan-in) for every convolution; all else keeps PyTorch's default."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
