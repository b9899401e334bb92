import copy

import numpy as np
import pytest
import torch
from torch import nn

from odcheap.layers.cheap_conv import DW, CheapConv, RepDW
from odcheap.layers.fuse import cheap_form, dense_form, fold_branches, has_branches, has_pairs
from odcheap.layers.spatial import RepDepthwise, Window, keep_branches
from odcheap.models import flops
from odcheap.models.cifar import CifarResNet
from odcheap.models.convert import cheapen, conversion_table
from odcheap.models.wrappers import MobileNetV2

WINDOWS = {
    "usual": Window(),
    "stride": Window(stride=(2, 2)),
    "large": Window((5, 5), (1, 1), (4, 4), (2, 2)),
    "uneven": Window((3, 2), (1, 2), (0, 1)),
    "even": Window((4, 4), padding="same"),
    "valid": Window((3, 3), (2, 1), "valid"),
    "same": Window((3, 5), padding="same", dilation=(2, 1), padding_mode="reflect"),
    "circular": Window(padding=(2, 2), padding_mode="circular"),
}


def settle(network: nn.Module) -> nn.Module:
    """Gives all batch norms other values than those of a new network; returns the network in eval mode, in float64."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 2)
            module.weight.data.uniform_(-1.5, 1.5)
            module.bias.data.normal_()
    return network.double().eval()


def sum_by_hand(operator: RepDepthwise, x: np.ndarray) -> np.ndarray:
    """The three branches of a 3 x 3 window in training, by NumPy."""
    convolved = np.zeros_like(x)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    kernel = operator.conv.weight.detach().numpy()
    for row in range(3):
        for column in range(3):
            shifted = padded[:, :, row : row + x.shape[2], column : column + x.shape[3]]
            convolved += kernel[None, :, 0, row, column, None, None] * shifted
    total = np.zeros_like(x)
    scaled = operator.scale.weight.detach().numpy().reshape(1, -1, 1, 1) * x
    for branch, norm in (
        (convolved, operator.conv_norm),
        (scaled, operator.scale_norm),
        (x, operator.identity_norm),
    ):
        mean, var = (f((0, 2, 3), keepdims=True) for f in (branch.mean, branch.var))
        weight, bias = (t.detach().numpy().reshape(1, -1, 1, 1) for t in (norm.weight, norm.bias))
        total += weight * (branch - mean) / np.sqrt(var + norm.eps) + bias
    return total


def test_training_is_the_sum_of_three_normalized_branches():
    operator = settle(RepDepthwise(6, Window())).train()
    images = torch.randn(4, 6, 7, 5, dtype=torch.double)
    expected = sum_by_hand(operator, images.numpy())
    np.testing.assert_allclose(operator(images).detach().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # PyTorch's remark about its own speed
def test_the_folded_convolution_equals_the_branches(window):
    operator = settle(RepDepthwise(6, window))
    images = torch.randn(2, 6, 11, 12, dtype=torch.double)
    with keep_branches(operator):
        branches = operator(images)
    folded = operator.fold()
    assert branches.shape == window.make_conv(6, 6, groups=6).double()(images).shape
    for made in (operator(images), folded(images)):
        torch.testing.assert_close(made, branches, atol=1e-6, rtol=0)
        torch.testing.assert_close(made, branches, atol=1e-12, rtol=1e-12)
    assert (type(folded), folded.groups, folded.stride) == (nn.Conv2d, 6, window.stride)
    # In float32, and with weights in bfloat16, only rounding differs.
    single = copy.deepcopy(operator).float()
    torch.testing.assert_close(single(images.float()).double(), branches, atol=1e-4, rtol=1e-4)
    assert operator.to(torch.bfloat16)(images.to(torch.bfloat16)).dtype == torch.bfloat16


def test_the_forms_of_a_network_are_folded_and_compute_the_same():
    network = settle(CifarResNet(14, RepDW(), 5))
    images = torch.randn(2, 3, 15, 12, dtype=torch.double)
    with keep_branches(network):
        expected = network(images)
    forms = [fold_branches(network), cheap_form(network), dense_form(network)]
    for made in forms:
        assert not has_branches(made)
        torch.testing.assert_close(made(images), expected, atol=1e-9, rtol=1e-9)
    assert [has_pairs(made) for made in forms] == [True, True, False]
    assert has_branches(network)
    pairs = [module for module in forms[1].modules() if isinstance(module, CheapConv)]
    assert {(type(pair.spatial), pair.pointwise.stride) for pair in pairs} == {(nn.Conv2d, (1, 1))}


def test_depth_wise_layers_of_a_published_network_are_folded():
    """MobileNetV2 has the spatial operators alone, without pairs, and some of them have a stride."""
    network = settle(MobileNetV2(RepDW(), 3))
    operators = [module for module in network.modules() if isinstance(module, RepDepthwise)]
    assert (len(operators), len({operator.stride for operator in operators})) == (17, 2)
    images = torch.randn(2, 3, 16, 16, dtype=torch.double)
    with keep_branches(network):
        torch.testing.assert_close(cheap_form(network)(images), network(images), atol=1e-9, rtol=1e-9)


def test_costs_are_those_of_depth_wise_and_a_bias_for_each_channel():
    own, plain = CifarResNet(8, RepDW(), 10), CifarResNet(8, DW(), 10)
    biases = 16 + 16 + 16 + 32 + 32 + 64  # the channels of the six spatial operators
    assert flops.count_params(own) == flops.count_params(fold_branches(own)) == flops.count_params(plain) + biases
    assert flops.count_macs(own, (3, 32, 32)) == flops.count_macs(plain, (3, 32, 32))
    with keep_branches(own):  # each operator has a 1 x 1 branch, too: its channels times its pixels
        more = (16 + 16 + 16 + 32) * 1024 + (32 + 64) * 256
        assert flops.count_macs(own, (3, 32, 32)) - flops.count_macs(plain, (3, 32, 32)) == more


@pytest.mark.parametrize("stride", [1, 2])
def test_a_fitted_pair_approximates_the_kernel_as_depth_wise_does(stride):
    conv = nn.Conv2d(12, 7, 3, stride, 1).double()
    images = torch.randn(2, 12, 9, 9, dtype=torch.double)
    own, plain = (cheapen(conv, name, keep=(), init="fit").eval() for name in ("RepDW", "DW"))
    torch.testing.assert_close(own(images), plain(images), atol=1e-10, rtol=1e-10)
    dense = dense_form(settle(own))
    assert type(dense) is nn.Conv2d
    torch.testing.assert_close(dense(images), own(images), atol=1e-10, rtol=1e-10)


def test_the_table_of_a_conversion_counts_the_folded_form():
    before = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, bias=False))
    row = conversion_table(before, cheapen(before, "RepDW"), (3, 32, 32)).rows[1]
    assert (row.after, row.params) == ("depth-wise in 3 branches + 1 x 1", (4608, 656 + 16))
