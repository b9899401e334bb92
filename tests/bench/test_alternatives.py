import copy

import pytest
import torch
from torch import nn

from odcheap.bench import alternatives
from odcheap.layers.cheap_conv import DW, Group, Shift, Shift2d
from odcheap.layers.fuse import with_pairs
from odcheap.models.cifar import CifarResNet


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("block_type", [DW(), Shift(), Group(1), Group(4)], ids=repr)
def test_a_pair_is_one_dense_convolution_with_gradients_to_both_parts(block_type, stride):
    torch.manual_seed(0)
    pair = block_type(20, 12, stride).double()
    x = torch.randn(3, 20, 7, 8, dtype=torch.double, requires_grad=True)
    found = []
    for way in (pair, lambda x: alternatives.composed(pair, x)):
        pair.zero_grad()
        y = way(x)
        weight = torch.linspace(-1, 1, y.numel(), dtype=torch.double).view_as(y)
        (of_x,) = torch.autograd.grad((y * weight).sum(), x, retain_graph=True)
        (y * weight).sum().backward()
        found.append([y, of_x, *(p.grad.clone() for p in pair.parameters())])
        x.grad = None
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("way", [alternatives.shift_by_slices, alternatives.shift_by_gather])
@pytest.mark.parametrize("channels", [9, 16, 20])
def test_ways_to_shift_are_the_same_shift(way, channels):
    x = torch.randn(2, channels, 5, 6, dtype=torch.double, requires_grad=True)
    expected = Shift2d()(x)
    assert torch.equal(way(x), expected)
    gradient = torch.randn_like(expected)
    (ours,) = torch.autograd.grad(expected, x, gradient)
    (theirs,) = torch.autograd.grad(way(x), x, gradient)
    assert torch.equal(theirs, ours)


def test_a_network_that_shifts_by_slices_is_the_same_network():
    network = CifarResNet(8, Shift(), 3).eval()
    images = torch.randn(2, 3, 9, 10)
    torch.testing.assert_close(with_pairs(network, alternatives.SlicedPair)(images), network(images))


def test_compiling_in_place_leaves_the_names_of_weights_alone():
    network = CifarResNet(14, DW(), 10)
    before = list(network.state_dict())
    alternatives.compile_blocks(network)
    assert list(network.state_dict()) == before
    blocks = [*network.layer1, *network.layer2, *network.layer3]
    assert len(blocks) == 6
    assert all(block._compiled_call_impl is not None for block in blocks)


@pytest.mark.slow
def test_compiled_blocks_train_as_plain_ones_do():
    plain = CifarResNet(8, DW(), 10)
    compiled = copy.deepcopy(plain)
    alternatives.compile_blocks(compiled)
    images, target = torch.randn(8, 3, 16, 16), torch.randint(10, (8,))
    for network in (plain, compiled):
        nn.functional.cross_entropy(network(images), target).backward()
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-3)
