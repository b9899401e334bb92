"""Forms of a trained network that compute the same at another speed; each is a copy, the given network is untouched."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from odcheap.layers.cheap_conv import CheapConv, Shift2d, shift_taps


class Normalised(nn.Module):
    """A network for RGB in [0, 1], (N, 3, H, W): subtracts `mean`, divides by `std`, channel by channel."""

    def __init__(self, network: nn.Module, mean: list[float], std: list[float]):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / self.std)


def with_pairs(network: nn.Module, change: Callable[[CheapConv], nn.Module]) -> nn.Module:
    """The network with what `change` makes of each of its pairs."""
    made = copy.deepcopy(network)
    if isinstance(made, CheapConv):
        return change(made)
    for parent in list(made.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, CheapConv):
                setattr(parent, name, change(child))
    return made


def has_pairs(network: nn.Module) -> bool:
    return any(isinstance(module, CheapConv) for module in network.modules())


def cheap_form(network: nn.Module) -> nn.Module:
    """Pairs carry their stride on the spatial operator, which then computes no pixel that the 1 x 1 would skip."""
    return with_pairs(network, strided)


def strided(pair: CheapConv) -> CheapConv:
    spatial, pointwise = pair.spatial, pair.pointwise
    spatial.stride = tuple(a * b for a, b in zip(spatial.stride, pointwise.stride, strict=True))
    pointwise.stride = (1, 1)
    return pair


def dense_form(network: nn.Module) -> nn.Module:
    """Each pair as the one K x K convolution that it is, there being nothing but linear maps in it."""
    return with_pairs(network, dense)


def dense(pair: CheapConv) -> nn.Module:
    spatial, pointwise = strided(pair).spatial, pair.pointwise
    kernel = dense_kernel(pair)
    padding, mode, border = spatial.padding, spatial.padding_mode, []
    if isinstance(spatial, Shift2d):
        padding, border = (0, 0), spatial.border
    made = nn.Conv2d(
        *(kernel.shape[1], kernel.shape[0], tuple(kernel.shape[2:]), spatial.stride, padding, spatial.dilation),
        bias=pointwise.bias is not None,
        padding_mode="zeros" if isinstance(spatial, Shift2d) else mode,
    ).to(kernel)
    with torch.no_grad():
        made.weight.copy_(kernel)
        if pointwise.bias is not None:
            made.bias.copy_(pointwise.bias)
    made.train(pair.training)
    return nn.Sequential(padder(border, mode), made) if any(border) else made


def padder(border: list[int], mode: str) -> nn.Module:
    """Adds (left, right, top, bottom) pixels as `nn.Conv2d`'s `padding_mode` names the ways."""
    kinds = {"reflect": nn.ReflectionPad2d, "replicate": nn.ReplicationPad2d, "circular": nn.CircularPad2d}
    return kinds.get(mode, nn.ZeroPad2d)(tuple(border))


def dense_kernel(pair: CheapConv) -> Tensor:
    """(out, C, kh, kw): the kernel that a pair is, W[o, i] = sum over m in i's group of P[o, m] G[m, i]."""
    mix = pair.pointwise.weight
    if isinstance(pair.spatial, Shift2d):
        rows, columns = pair.spatial.kernel_size
        taps = shift_taps(mix.shape[1], (rows, columns), mix.device)
        return mix * nn.functional.one_hot(taps, rows * columns).to(mix).view(1, -1, rows, columns)
    kernels, groups = pair.spatial.weight, pair.spatial.groups
    mix, kernels = mix.flatten(1).unflatten(1, (groups, -1)), kernels.unflatten(0, (groups, -1))
    return torch.einsum("ogm,gmihw->ogihw", mix, kernels).flatten(1, 2)
