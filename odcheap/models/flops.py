"""Costs of a network: its number of parameters and of multiply-accumulates (MACs)."""

from itertools import chain

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from odcheap.layers.spatial import RepDepthwise


def count_params(network: nn.Module) -> int:
    """Returns the number of parameters, trainable or not; buffers are not counted.

    For a `RepDepthwise` those of the folded convolution are counted, and not those of its branches.
    """
    branched = [module for module in network.modules() if isinstance(module, RepDepthwise)]
    folded = sum(m.folded_params - sum(p.numel() for p in m.parameters()) for m in branched)
    return sum(p.numel() for p in network.parameters()) + folded


def count_macs(network: nn.Module, image_size: tuple[int, int, int]) -> int:
    """Returns the number of multiply-accumulates of convolutions and matrix products in a forward pass of one image.

    This is half of the number of PyTorch's FLOP counter, since a multiply-accumulate is two FLOPs. Operators such as
    `Shift2d`, which run as a convolution but only move data, are not counted.

    Args:
        network: Any network; it runs in eval mode, and its mode is restored afterwards.
        image_size: (C, H, W) of the image.

    Example:
        >>> count_macs(nn.Conv2d(3, 8, 3, padding=1), (3, 32, 32))
        221184
    """
    return count_macs_by_module(network, image_size)[""]


def count_macs_by_module(network: nn.Module, image_size: tuple[int, int, int]) -> dict[str, int]:
    """Returns the number of multiply-accumulates of each module, by its name; that of the whole network has the key "".

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
