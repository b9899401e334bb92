import pytest
import torch
from torch.nn import functional as F

from odcheap.layers.cheap_conv import DW, Group, Shift, Standard
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
