from functools import partial

import pytest
import torch
from torch.nn import functional as F

from odcheap.layers.cheap_conv import DW, Group, RepDW, Shift, Standard
from odcheap.models import flops
from odcheap.models.build import build_backbone
from odcheap.models.cifar import CifarResNet
from odcheap.utils.errors import OptionError

BLOCK_TYPES = [Shift(), DW(), Group(4), Standard()]


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_features_and_head_make_the_network(block_type):
    network = CifarResNet(20, block_type, 7).eval()
    x = torch.randn(2, 3, 16, 16)
    features = network.features(x)
    assert features.shape == (2, network.num_features, 4, 4)
    assert torch.equal(network(x), network.head(features))
    assert network(x).shape == (2, 7)


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_every_parameter_learns(block_type):
    network = CifarResNet(14, block_type, 10)
    network(torch.randn(4, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in network.parameters())


def test_cheap_block_ends_in_the_sum_and_the_basic_block_in_relu():
    """The reference's block: S, 1x1, BN, ReLU twice, then the sum, which may be negative."""
    network = CifarResNet(8, DW(), 10).eval()
    x = torch.randn(2, 16, 8, 8)
    block = network.layer2[0]
    main = F.conv2d(x, block.conv1.spatial.weight, padding=1, groups=16)
    main = F.relu(block.bn1(F.conv2d(main, block.conv1.pointwise.weight)))
    main = F.conv2d(main, block.conv2.spatial.weight, padding=1, groups=32)
    main = F.relu(block.bn2(F.conv2d(main, block.conv2.pointwise.weight, stride=2)))
    expected = main + block.shortcut[1](F.conv2d(x, block.shortcut[0].weight, stride=2))
    torch.testing.assert_close(block(x), expected)
    assert block(x).min() < 0
    assert CifarResNet(8, Standard(), 10).eval().features(torch.randn(2, 3, 16, 16)).min() == 0


def test_convolutions_start_kaiming_normal_fan_in():
    for name, p in CifarResNet(56, Group(4), 10).named_parameters():
        if p.ndim == 4 and p.numel() > 4000:
            fan_in = p[0].numel()
            assert p.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.06), name


@pytest.mark.parametrize("depth", [2, 7, 21, 57])
def test_impossible_depths_are_refused(depth):
    with pytest.raises(OptionError, match=f"backbone.depth={depth}: must be 6n \\+ 2"):
        CifarResNet(depth, DW(), 10)


def count_by_hand(blocks: int, taps: int, expansion: int, width: int) -> tuple[int, int]:
    """Parameters and MACs of a network with cheap blocks and 10 classes, for 32 x 32 pixels.

    The spatial operator has `taps` weights for each channel. A block has it twice, on maps of the block's input size.
    """
    channels, pixels = width, 32 * 32
    params = 27 * width + 2 * width  # the stem and its batch norm
    macs = 27 * width * pixels
    for stage in (1, 2, 4):
        out = stage * width
        for block in range(blocks):
            after = pixels // 4 if stage > 1 and block == 0 else pixels
            middle = expansion * out
            params += taps * channels + channels * middle + 2 * middle + taps * middle + middle * out + 2 * out
            macs += (taps * channels + channels * middle + taps * middle) * pixels + middle * out * after
            if channels != out:
                params += channels * out + 2 * out
                macs += channels * out * after
            channels, pixels = out, after
    return params + 10 * channels + 10, macs + 10 * channels


@pytest.mark.parametrize(("expansion", "width"), [(1, 16), (3, 16), (2, 24), (1, 9)])
def test_costs_with_an_expansion_and_a_width_are_those_counted_by_hand(expansion, width):
    for conv, taps in ((Shift(), 0), (DW(), 9)):
        network = CifarResNet(20, conv, 10, expansion=expansion, width=width)
        found = flops.count_params(network), flops.count_macs(network, (3, 32, 32))
        assert found == count_by_hand(3, taps, expansion, width)


def test_published_numbers_of_parameters():
    """ShiftResNet-56 with expansions 1, 3 and 6 (Wu et al., 2018, table 3): 0.10, 0.29 and 0.58 million."""
    found = [flops.count_params(CifarResNet(56, Shift(), 10, expansion=e)) for e in (1, 3, 6)]
    assert found == [102_106, 294_554, 583_226]
    assert flops.count_params(CifarResNet(56, Standard(), 10)) == 855_770


def test_the_middle_of_an_expanded_block_is_wider():
    network = CifarResNet(8, RepDW(), 7, expansion=3, width=12)
    shapes = [
        (b.conv1.in_channels, b.conv1.out_channels, b.conv2.out_channels)
        for b in (network.layer1[0], network.layer2[0])
    ]
    assert shapes == [(12, 36, 12), (12, 72, 24)]
    x = torch.randn(2, 3, 16, 16)
    assert network.features(x).shape == (2, network.num_features, 4, 4) == (2, 48, 4, 4)
    assert network(x).shape == (2, 7)


def test_the_standard_network_of_a_comparison_has_the_width_and_no_expansion():
    build = partial(CifarResNet, 8, expansion=3, width=12)
    standard = build_backbone(build, Standard(), 5, for_comparison=True)
    assert str(standard) == str(CifarResNet(8, Standard(), 5, width=12))
    assert str(build_backbone(build, DW(), 5, for_comparison=True)) == str(build(DW(), 5))


@pytest.mark.parametrize(
    ("conv", "options", "line"),
    [
        (Standard(), {"expansion": 2}, "backbone.expansion=2: must be 1 with the standard convolution"),
        (DW(), {"expansion": 0}, "backbone.expansion=0: must be a whole number, 1 or more and at most 16"),
        (DW(), {"expansion": 1.5}, "backbone.expansion=1.5: must be a whole number"),
        (DW(), {"width": 0}, "backbone.width=0: must be a whole number"),
        (Shift(), {"width": 8}, "backbone.width=8: does not suit .* a shift of 9 taps moves none of 8 channels"),
        (Group(4), {"width": 18}, "block_type.groups=4: must divide the layer's 18 channels"),
    ],
)
def test_shapes_that_make_no_sense_are_refused(conv, options, line):
    with pytest.raises(OptionError, match=line):
        CifarResNet(8, conv, 10, **options)
