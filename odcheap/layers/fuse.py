"""Copies of a trained network that compute the same in another form, for speed on a device."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from odcheap.layers.cheap_conv import CheapConv
from odcheap.layers.factorize import spatial_kernel
from odcheap.layers.shift import to_pair


def replace_pairs(network: nn.Module, change: Callable[[CheapConv], nn.Module]) -> nn.Module:
    """Returns a copy of the network with each cheap pair replaced by `change(pair)`."""
    changed = copy.deepcopy(network)
    if isinstance(changed, CheapConv):
        return change(changed)
    for parent in list(changed.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, CheapConv):
                setattr(parent, name, change(child))
    return changed


def has_pairs(network: nn.Module) -> bool:
    """Whether the network has cheap pairs."""
    return any(isinstance(module, CheapConv) for module in network.modules())


def cheap_form(network: nn.Module) -> nn.Module:
    """Returns the network with each pair's stride on its spatial operator.

    The spatial operator then computes no pixel that a 1 x 1 convolution with a stride would skip.
    """
    return replace_pairs(network, _move_stride)


def _move_stride(pair: CheapConv) -> CheapConv:
    spatial: Any = pair.spatial
    if hasattr(spatial, "stride"):
        spatial.stride = _total_stride(pair)
        pair.pointwise.stride = (1, 1)
    return pair


def _total_stride(pair: CheapConv) -> tuple[int, int]:
    rows, columns = to_pair(getattr(pair.spatial, "stride", 1))
    return rows * pair.pointwise.stride[0], columns * pair.pointwise.stride[1]


def dense_form(network: nn.Module) -> nn.Module:
    """Returns the network with each pair replaced by the one K x K convolution that computes the same.

    A pair is left as it is if its spatial operator breaks the rules of `BlockType`: it must be linear and must treat
    each channel by itself.
    """
    return replace_pairs(network, _fuse)


@torch.no_grad()
def _fuse(pair: CheapConv) -> nn.Module:
    spatial, pointwise = pair.spatial, pair.pointwise
    kernel = dense_kernel(pair)
    conv = pair.window.make_conv(kernel.shape[1], kernel.shape[0], bias=pointwise.bias is not None).to(kernel)
    conv.stride = _total_stride(pair)
    conv.weight.copy_(kernel)
    if conv.bias is not None and pointwise.bias is not None:
        conv.bias.copy_(pointwise.bias)
    conv.train(pair.training)
    return conv if isinstance(spatial, nn.Conv2d) or _computes_same(conv, pair) else pair


def _computes_same(conv: nn.Conv2d, pair: CheapConv) -> bool:
    """Whether both agree on noise; a user's spatial operator may depend on the border or on other channels."""
    side = [2 * d * k + 4 for k, d in zip(pair.window.kernel_size, pair.window.dilation, strict=True)]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, conv.in_channels, *side, generator=generator).to(conv.weight)
    expected = pair(images)
    tolerance = 1e-2 if conv.weight.dtype in (torch.bfloat16, torch.float16) else 1e-4
    found = conv(images)
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


def dense_kernel(pair: CheapConv) -> Tensor:
    """Returns the kernel (O, C, kh, kw) that a pair computes.

    With 1 x 1 weights P and spatial kernels S it is W[o, c] = sum_m P[o, m] S[m, c], over the channels m in the group
    of channel c.
    """
    mix = pair.pointwise.weight
    kernels = spatial_kernel(pair.spatial, mix, pair.window)
    groups = mix.shape[1] // kernels.shape[1]
    mix, kernels = mix.flatten(1).unflatten(1, (groups, -1)), kernels.unflatten(0, (groups, -1))
    return torch.einsum("ogm,gmihw->ogihw", mix, kernels).flatten(1, 2)
