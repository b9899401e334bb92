"""Costs of a network: its number of parameters and of multiply-accumulates (MACs)."""

from itertools import chain

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from odcheap.layers.spatial import RepDepthwise


def count_params(network: nn.Module) -> int:
    """Returns the number of parameters of a network, trainable or not; buffers are not counted.

    A `RepDepthwise`, which has three branches in training, counts as the one convolution that replaces it in exports.
    """
    branched = [module for module in network.modules() if isinstance(module, RepDepthwise)]
    folded = sum(m.folded_params - sum(p.numel() for p in m.parameters()) for m in branched)
    return sum(p.numel() for p in network.parameters()) + folded


def count_macs(network: nn.Module, image_size: tuple[int, int, int]) -> int:
    """Returns the number of multiply-accumulates of convolutions and matrix products in a forward pass of one image.

    It is half of what PyTorch's FLOP counter counts, since a multiply-accumulate is two FLOPs. Operators that only move
    data, such as `Shift2d`, are not counted, although they run as a convolution.

    Args:
        network: Any network; it runs in eval mode, and its mode is restored afterwards.
        image_size: (C, H, W) of the image.

    Example:
        >>> count_macs(nn.Conv2d(3, 8, 3, padding=1), (3, 32, 32))
        221184
    """
    return count_macs_by_module(network, image_size)[""]


def count_macs_by_module(network: nn.Module, image_size: tuple[int, int, int]) -> dict[str, int]:
    """Returns a dict from the name of each module to its number of multiply-accumulates; "" is the whole network.

    Args:
        network: Any network; it runs in eval mode, and its mode is restored afterwards.
        image_size: (C, H, W) of the image.
    """
    # One forward pass in eval mode; the modes of all modules are restored.
    modes = {module: module.training for module in network.modules()}
    network.eval()
    example = next(chain(network.parameters(), network.buffers()))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        network(torch.zeros(1, *image_size, dtype=example.dtype, device=example.device))
    for module, mode in modes.items():
        module.training = mode
    # The counter's names begin with the class of the network; the total is "Global".
    counts = {name: sum(operators.values()) for name, operators in counter.get_flop_counts().items()}
    root = f"{type(network).__name__}."
    flops = {"": counts["Global"]}
    flops |= {name.removeprefix(root): count for name, count in counts.items() if name.startswith(root)}
    # Operators that only move data are subtracted from the counts of all modules that contain them.
    for name in [name for name, module in network.named_modules() if getattr(module, "zero_macs", False)]:
        moved = flops.pop(name, 0)
        parents = {"", *(name[:k] for k, char in enumerate(name) if char == ".")}
        for parent in parents & flops.keys():
            flops[parent] -= moved
    return {name: count // 2 for name, count in flops.items()}
