import copy

import pytest
import torch
from torch import nn

from odcheap.data.transforms import Normalization
from odcheap.layers.cheap_conv import DW, CheapConv, Group, Shift, Standard
from odcheap.layers.fuse import cheap_form, dense_form, has_pairs
from odcheap.models.build import NormalizedNetwork
from odcheap.models.cifar import CifarResNet
from odcheap.models.convert import cheapen

BLOCK_TYPES = [DW(), Shift(), Group(4)]


def settled(network):
    """As after training: normalisation that is not the identity."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    return network.double().eval()


@pytest.mark.parametrize("form", [cheap_form, dense_form])
@pytest.mark.parametrize("block_type", BLOCK_TYPES, ids=repr)
def test_a_form_computes_the_same_and_leaves_the_network_alone(form, block_type):
    network = settled(CifarResNet(14, block_type, 5))
    before = copy.deepcopy(network)
    made = form(network)
    for side in (8, 15):
        images = torch.randn(2, 3, side, side + 2, dtype=torch.double)
        torch.testing.assert_close(made(images), before(images), atol=1e-9, rtol=1e-9)
        assert torch.equal(network(images), before(images))
    assert str(network) == str(before)
    strides = {m.pointwise.stride for m in made.modules() if isinstance(m, CheapConv)}
    assert strides == ({(1, 1)} if form is cheap_form else set())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # PyTorch's remark about its own speed
@pytest.mark.parametrize("block_type", ["DW", "Shift", "Group"])
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(48, 6, 5, 2, 1, dilation=2),
        nn.Conv2d(16, 6, (3, 2), (1, 2), (0, 1), bias=False),
        nn.Conv2d(16, 6, 4, padding="same"),
        nn.Conv2d(16, 6, 3, padding=2, padding_mode="circular"),
        nn.Conv2d(16, 6, 3, padding=1, padding_mode="replicate"),
        nn.Conv2d(16, 6, 3, padding=1, padding_mode="reflect"),
    ],
    ids=str,
)
def test_a_pair_of_any_window_is_one_dense_convolution(conv, block_type):
    torch.manual_seed(0)
    pair = cheapen(conv.double(), block_type, keep=())
    made = dense_form(pair)
    assert not has_pairs(made)
    images = torch.randn(2, conv.in_channels, 11, 12, dtype=torch.double)
    torch.testing.assert_close(made(images), pair(images), atol=1e-10, rtol=1e-10)


def test_a_network_without_pairs_stays_as_it_is():
    network = CifarResNet(8, Standard(), 3)
    assert not has_pairs(network)
    assert str(dense_form(network)) == str(cheap_form(network)) == str(network)


def test_normalised_is_the_training_normalisation():
    mean, std = [0.4, 0.5, 0.6], [0.1, 0.2, 0.3]
    images = torch.randint(256, (4, 3, 5, 6), dtype=torch.uint8)
    made = NormalizedNetwork(nn.Identity(), mean, std)(images / 255)
    torch.testing.assert_close(made, Normalization(tuple(mean), tuple(std)).apply(images), atol=1e-5, rtol=1e-5)
