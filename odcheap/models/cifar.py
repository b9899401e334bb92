"""Networks for images of about 32 x 32 pixels: ResNets with cheap convolutions, and standard networks to convert."""

from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from odcheap.layers.cheap_conv import BlockType, check_block_type, conv3x3
from odcheap.layers.norm_act import batch_norm_act, block_norm_act
from odcheap.layers.spatial import Window
from odcheap.models.backbone import Backbone
from odcheap.utils.arguments import check_arguments
from odcheap.utils.errors import OptionError

MAX_DEPTH = 1202  # the deepest network of He et al.; a mistyped number would fill the memory
BASE_WIDTH = 16  # channels of the first stage in He et al.'s networks
MAX_BASE_WIDTH = 1024
MAX_EXPANSION = 16  # published ones are 9 at most
MAX_WIDTH = 100  # of a wide ResNet's factor and a DenseNet's growth; published ones are 20 and 48 at most


@check_arguments("backbone")
class CifarResNet(Backbone):
    """ResNet of depth 6n + 2 for small images: a stem, and three stages of n blocks with 16, 32 and 64 channels.

    With standard convolutions it is the network of He et al., "Deep residual learning", 2015, section 4.2, with 1 x 1
    convolutions on the shortcuts that change the shape (855,770 parameters at depth 56). With cheap convolutions its
    blocks are those of the 2019 code of online distillation, see `CheapBlock`. They differ from the blocks of He et al.
    in the place of the stride and of the second ReLU too.

    Args:
        depth: The number of layers, 6n + 2: 8, 14, 20, ..., 1202.
        conv: The block type: the kind of convolution, such as `DW`, with which the 3 x 3 convolutions of the blocks are
            built.
        num_classes: The number of classes, K.
        expansion: How many times as many channels as its output a cheap block has between its two convolutions; it must
            be 1 with standard convolutions. Source: Wu et al., "Shift: a zero FLOP, zero parameter alternative to
            spatial convolutions", 2018.
        width: The number of channels of the stem and of the first stage. The second and the third stage have 2 and 4
            times as many.

    Shape:
        Images (N, 3, H, W) -> logits (N, K).

    Raises:
        OptionError: The depth is not 6n + 2, or `expansion` or `width` does not suit the block type.

    Example:
        >>> from odcheap.layers.cheap_conv import DW
        >>> sum(p.numel() for p in CifarResNet(56, DW(), num_classes=10).parameters())
        119818
    """

    native_size = 32
    classifier = "fc"
    standard_note = "the standard network has He et al.'s block: it differs in more than the convolution"

    def __init__(
        self,
        depth: int,
        conv: BlockType,
        num_classes: int,
        expansion: Annotated[int, Field(ge=1, le=MAX_EXPANSION)] = 1,
        width: Annotated[int, Field(ge=1, le=MAX_BASE_WIDTH)] = BASE_WIDTH,
    ):
        super().__init__()
        check_block_type(conv)
        if not 8 <= depth <= MAX_DEPTH or (depth - 2) % 6:
            raise OptionError("backbone.depth", depth, f"must be 6n + 2 with n >= 1: 8, 14, 20, 26, ..., {MAX_DEPTH}")
        if expansion != 1 and not conv.is_cheap:
            allowed = "must be 1 with the standard convolution: only the blocks of cheap convolutions are widened"
            raise OptionError("backbone.expansion", expansion, allowed)
        reason = conv.reason_to_keep(width, Window()) if width != BASE_WIDTH else None
        if reason is not None:
            raise OptionError("backbone.width", width, f"does not suit the block type: {reason}")
        block = partial(CheapBlock, expansion=expansion) if conv.is_cheap else BasicBlock
        self.conv1 = conv3x3(3, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = make_stage(block, conv, width, width, (depth - 2) // 6, stride=1)
        self.layer2 = make_stage(block, conv, width, 2 * width, (depth - 2) // 6, stride=2)
        self.layer3 = make_stage(block, conv, 2 * width, 4 * width, (depth - 2) // 6, stride=2)
        self.num_features, self.num_classes = 4 * width, num_classes
        self.fc = nn.Linear(self.num_features, num_classes)
        init_kaiming(self)

    def features(self, x: Tensor) -> Tensor:
        """Returns the last feature map (N, 4 * width, H/4, W/4) of images (N, 3, H, W)."""
        x = batch_norm_act(self.conv1(x), self.bn1)
        return self.layer3(self.layer2(self.layer1(x)))

    def head(self, features: Tensor) -> Tensor:
        """Returns the logits (N, K) of the last feature map, by a global average pool and a linear layer."""
        return self.fc(features.mean((2, 3)))


class BasicBlock(nn.Module):
    """The ResNet block of He et al.: relu(norm(conv2(relu(norm(conv1(x))))) + shortcut(x)); conv1 has the stride.

    Args:
        conv: The block type, which builds conv1 and conv2.
        in_channels: The number of input channels.
        out_channels: The number of output channels.
        stride: The stride of conv1 and of the shortcut.
    """

    def __init__(self, conv: BlockType, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = conv(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, 1)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = make_shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        main = batch_norm_act(self.conv1(x), self.bn1)
        return batch_norm_act(self.conv2(main), self.bn2, self.shortcut(x), "add_act")


class CheapBlock(nn.Module):
    """A residual block of cheap convolutions: relu(norm(conv2(relu(norm(conv1(x)))))) + shortcut(x).

    conv2 has the stride, and the second ReLU comes before the sum. This is the block of the 2019 code of online
    distillation.

    Args:
        conv: The block type, which builds conv1 and conv2.
        in_channels: The number of input channels.
        out_channels: The number of output channels.
        stride: The stride of conv2 and of the shortcut.
        expansion: The number of channels between conv1 and conv2, divided by `out_channels`.
    """

    def __init__(self, conv: BlockType, in_channels: int, out_channels: int, stride: int, expansion: int = 1):
        super().__init__()
        self.conv1 = conv(in_channels, expansion * out_channels, 1)
        self.bn1 = nn.BatchNorm2d(expansion * out_channels)
        self.conv2 = conv(expansion * out_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = make_shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        return block_norm_act(x, (self.conv1, self.conv2), (self.bn1, self.bn2), self.shortcut)


def make_stage(
    block: Callable[..., nn.Module], conv: BlockType, in_channels: int, out_channels: int, blocks: int, stride: int
) -> nn.Sequential:
    """Returns a sequence of blocks; the first block has the stride and changes the number of channels.

    Args:
        block: The class of the blocks, such as `CheapBlock`, called as block(conv, in_channels, out_channels, stride).
        conv: The block type, which builds the convolutions of the blocks.
        in_channels: The number of input channels of the first block.
        out_channels: The number of output channels of all blocks.
        blocks: The number of blocks.
        stride: The stride of the first block.
    """
    first = block(conv, in_channels, out_channels, stride)
    return nn.Sequential(first, *(block(conv, out_channels, out_channels, 1) for _ in range(blocks - 1)))


def make_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Returns the shortcut of a block: the identity, or a 1 x 1 convolution with batch norm if the shape changes."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class PlainNetwork(Backbone):
    """A network of given layers, which compute the last feature map, a global average pool, and a linear layer.

    Args:
        body: The layers that compute the last feature map of an image.
        num_features: The number of channels of the last feature map.
        num_classes: The number of classes, K.
    """

    native_size = 32
    classifier = "fc"

    def __init__(self, body: nn.Sequential, num_features: int, num_classes: int):
        super().__init__()
        self.body = body
        self.num_features, self.num_classes = num_features, num_classes
        self.fc = nn.Linear(num_features, num_classes)
        init_kaiming(self)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def head(self, features: Tensor) -> Tensor:
        return self.fc(features.mean((2, 3)))


def vgg16(num_classes: int) -> PlainNetwork:
    """Returns VGG-16 with batch norm; its last feature map is (N, 512, H/32, W/32).

    It has one linear layer in place of three, as is usual for images of 32 x 32 pixels. Source: Simonyan and Zisserman,
    "Very deep convolutional networks", 2015, configuration D.
    """
    # Five stages, given as (channels, convolutions), with a max pool after each.
    layers: list[nn.Module] = []
    channels = 3
    for width, convs in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(convs):
            layers += [conv3x3(channels, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return PlainNetwork(nn.Sequential(*layers), 512, num_classes)


@check_arguments("backbone.network")
def densenet(depth: int, growth: Annotated[int, Field(ge=1, le=MAX_WIDTH)], num_classes: int) -> PlainNetwork:
    """Returns a DenseNet without bottlenecks and without compression; its last feature map is (N, C, H/4, W/4).

    It has a first convolution with 16 channels and three blocks of n layers. C is 16 + 3 n growth. Source: Huang et
    al., "Densely connected convolutional networks", 2017, section 4.2.

    Args:
        depth: The number of layers, 3n + 4: 7, 10, ..., 40, ..., 1201.
        growth: The number of channels that each layer adds.
        num_classes: The number of classes, K.
    """
    if not 7 <= depth <= MAX_DEPTH or (depth - 4) % 3:
        raise OptionError("backbone.network.depth", depth, "must be 3n + 4 with n >= 1: 7, 10, ..., 40, ..., 1201")
    layers: list[nn.Module] = [conv3x3(3, 16)]
    channels = 16
    # Between two blocks a 1 x 1 convolution and an average pool halve the sides.
    for block in range(3):
        if block:
            layers += [norm_relu(channels), nn.Conv2d(channels, channels, 1, bias=False), nn.AvgPool2d(2)]
        for _ in range((depth - 4) // 3):
            layers.append(DenseLayer(channels, growth))
            channels += growth
    return PlainNetwork(nn.Sequential(*layers, norm_relu(channels)), channels, num_classes)


class DenseLayer(nn.Module):
    """A layer of a DenseNet: appends conv(relu(norm(x))) to x, (N, C, H, W) -> (N, C + growth, H, W).

    Args:
        channels: The number of input channels, C.
        growth: The number of channels that are appended.
    """

    def __init__(self, channels: int, growth: int):
        super().__init__()
        self.norm, self.conv = norm_relu(channels), conv3x3(channels, growth)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(self.norm(x))], dim=1)


@check_arguments("backbone.network")
def wide_resnet(depth: int, width: Annotated[int, Field(ge=1, le=MAX_WIDTH)], num_classes: int) -> PlainNetwork:
    """Returns a wide ResNet; its last feature map is (N, 64 * width, H/4, W/4).

    In its blocks batch norm and ReLU come before each convolution. Source: Zagoruyko and Komodakis, "Wide residual
    networks", 2016.

    Args:
        depth: The number of layers, 6n + 4: 10, 16, 22, 28, ..., 1198.
        width: The factor by which the numbers of channels (16, 32 and 64) are multiplied.
        num_classes: The number of classes, K.
    """
    if not 10 <= depth <= MAX_DEPTH or (depth - 4) % 6:
        raise OptionError("backbone.network.depth", depth, "must be 6n + 4 with n >= 1: 10, 16, 22, 28, ..., 1198")
    layers: list[nn.Module] = [conv3x3(3, 16)]
    channels = 16
    for out, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
        for k in range((depth - 4) // 6):
            layers.append(WideBlock(channels, out, 1 if k else stride))
            channels = out
    return PlainNetwork(nn.Sequential(*layers, norm_relu(channels)), channels, num_classes)


class WideBlock(nn.Module):
    """The block of a wide ResNet: conv2(relu(norm2(conv1(relu(norm1(x)))))) + shortcut.

    The shortcut is x, or a 1 x 1 convolution of relu(norm1(x)) if the shape changes.

    Args:
        in_channels: The number of input channels.
        out_channels: The number of output channels.
        stride: The stride of conv1 and of the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.norm1, self.conv1 = norm_relu(in_channels), conv3x3(in_channels, out_channels, stride)
        self.norm2, self.conv2 = norm_relu(out_channels), conv3x3(out_channels, out_channels)
        is_identity = stride == 1 and in_channels == out_channels
        self.shortcut = None if is_identity else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.norm1(x)
        main = self.conv2(self.norm2(self.conv1(active)))
        return main + (x if self.shortcut is None else self.shortcut(active))


def norm_relu(channels: int) -> nn.Sequential:
    """Returns a sequence of batch norm and ReLU."""
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def init_kaiming(network: nn.Module) -> None:
    """Sets the weights of each convolution to random Kaiming-normal values (fan-in); other layers are not changed."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
