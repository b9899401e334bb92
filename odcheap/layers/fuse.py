"""Copies of a trained network that compute the same function with other layers, which may be faster on a device.

A pair is a `CheapConv`: a spatial operator, then a 1 x 1 convolution.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from odcheap.layers.cheap_conv import CheapConv, spatial_kernel
from odcheap.layers.spatial import RepDepthwise


def replace_modules(network: nn.Module, kind: type[nn.Module], change: Callable[[Any], nn.Module]) -> nn.Module:
    """Replaces each module of a given class in a network, in place.

    Args:
        network: The network.
        kind: The class of the modules to replace.
        change: A function that takes such a module and returns the module to put in its place.

    Returns:
        The network; or, if it is itself of this class, what `change` returns for it.
    """
    if isinstance(network, kind):
        return change(network)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                setattr(parent, name, change(child))
    return network


def has_pairs(network: nn.Module) -> bool:
    """Returns whether the network has a cheap convolution (`CheapConv`: spatial operator, then 1 x 1 convolution)."""
    return any(isinstance(module, CheapConv) for module in network.modules())


def has_branches(network: nn.Module) -> bool:
    """Returns whether the network has a `RepDepthwise`, a depth-wise convolution that sums branches in training."""
    return any(isinstance(module, RepDepthwise) for module in network.modules())


def fold_branches(network: nn.Module, in_place: bool = False) -> nn.Module:
    """Replaces each `RepDepthwise`, which has three branches in training, by one depth-wise convolution.

    In eval mode the outputs stay the same. The result should not be trained: it lacks the batch norms of the branches.

    Args:
        network: The network.
        in_place: True changes the network itself, False changes a copy of it.

    Returns:
        The changed network.
    """
    return replace_modules(network if in_place else copy.deepcopy(network), RepDepthwise, RepDepthwise.fold)


def cheap_form(network: nn.Module) -> nn.Module:
    """Returns a copy of the network in which strides are moved from 1 x 1 convolutions to the spatial operators.

    This is done in each `CheapConv` (a spatial operator, then a 1 x 1 convolution). The outputs in eval mode are the
    same, but the spatial operator no longer computes pixels that the 1 x 1 convolution skips. Each `RepDepthwise` is
    replaced by one depth-wise convolution.
    """
    return replace_modules(fold_branches(network), CheapConv, _move_stride)


def _move_stride(pair: CheapConv) -> CheapConv:
    spatial: Any = pair.spatial
    if hasattr(spatial, "stride"):
        spatial.stride = pair.stride
        pair.pointwise.stride = (1, 1)
    return pair


def standard_form(network: nn.Module) -> nn.Module:
    """Returns a copy of the network in which each `CheapConv` is replaced by a standard convolution of the same shape.

    A `CheapConv` is a spatial operator, then a 1 x 1 convolution. The weights of the new convolutions are random.
    """
    return replace_modules(copy.deepcopy(network), CheapConv, _make_standard)


def _make_standard(pair: CheapConv) -> nn.Conv2d:
    conv = pair.window.make_conv(pair.in_channels, pair.out_channels, bias=pair.bias is not None)
    conv.stride = pair.stride
    return conv.to(pair.pointwise.weight).train(pair.training)


def dense_form(network: nn.Module) -> nn.Module:
    """Returns a copy of the network in which each `CheapConv` is replaced by an equivalent K x K `nn.Conv2d`.

    A `CheapConv` is a spatial operator, then a 1 x 1 convolution. The outputs in eval mode stay the same. A `CheapConv`
    is not replaced if a convolution has other outputs: a spatial operator of a user may break the rules of `BlockType`.
    """
    return replace_modules(fold_branches(network), CheapConv, _fuse)


@torch.no_grad()
def _fuse(pair: CheapConv) -> nn.Module:
    spatial, pointwise = pair.spatial, pair.pointwise
    kernel, bias = dense_kernel(pair), pointwise.bias
    if isinstance(spatial, nn.Conv2d) and spatial.bias is not None:
        # The spatial operator's bias is the same at each pixel, so the 1 x 1 convolution makes one bias of it.
        own = pointwise.weight.flatten(1) @ spatial.bias
        bias = own if bias is None else bias + own
    conv = pair.window.make_conv(kernel.shape[1], kernel.shape[0], bias=bias is not None).to(kernel)
    conv.stride = pair.stride
    conv.weight.copy_(kernel)
    if conv.bias is not None and bias is not None:
        conv.bias.copy_(bias)
    conv.train(pair.training)
    return conv if isinstance(spatial, nn.Conv2d) or _computes_same(conv, pair) else pair


def _computes_same(conv: nn.Conv2d, pair: CheapConv) -> bool:
    """Returns True if a convolution and a `CheapConv` have the same outputs for images of random noise."""
    # A user's spatial operator may treat the border differently, or may mix channels.
    side = [2 * d * k + 4 for k, d in zip(pair.window.kernel_size, pair.window.dilation, strict=True)]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, conv.in_channels, *side, generator=generator).to(conv.weight)
    expected = pair(images)
    tolerance = 1e-2 if conv.weight.dtype in (torch.bfloat16, torch.float16) else 1e-4
    found = conv(images)
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


def dense_kernel(pair: CheapConv) -> Tensor:
    """Returns the kernel (O, C, kh, kw) of the K x K convolution that is equivalent to a `CheapConv`.

    It is W[o, c] = sum_m P[o, m] S[m, c], where P are the weights of the 1 x 1 convolution, S those of the spatial
    operator, and m the channels in the group of channel c.

    Args:
        pair: The `CheapConv`: a spatial operator, then a 1 x 1 convolution.
    """
    mix = pair.pointwise.weight
    kernels = spatial_kernel(pair.spatial, mix, pair.window)
    groups = mix.shape[1] // kernels.shape[1]
    mix, kernels = mix.flatten(1).unflatten(1, (groups, -1)), kernels.unflatten(0, (groups, -1))
    return torch.einsum("ogm,gmihw->ogihw", mix, kernels).flatten(1, 2)
