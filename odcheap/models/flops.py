"""What a network costs: parameters and multiply-accumulates."""

from itertools import chain

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from odcheap.layers.cheap_conv import Shift2d


def params(network: nn.Module) -> int:
    """Number of trainable and frozen parameters; buffers do not count."""
    return sum(p.numel() for p in network.parameters())


def macs(network: nn.Module, image_size: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one forward pass of one (C, H, W) image, convolutions and matrix products only.

    Half of what PyTorch's own FLOP counter sees (a multiply-accumulate is two FLOPs), less its reading of Shift, which
    moves data and computes nothing but runs as a convolution.
    """
    return macs_by_module(network, image_size)[""]


def macs_by_module(network: nn.Module, image_size: tuple[int, int, int]) -> dict[str, int]:
    """The same for each module that computes anything, by name; the network itself is ""."""
    training = {module: module.training for module in network.modules()}
    network.eval()
    own = next(chain(network.parameters(), network.buffers()))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        network(torch.zeros(1, *image_size, dtype=own.dtype, device=own.device))
    for module, mode in training.items():
        module.training = mode
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    root = type(network).__name__
    found = {"": counts["Global"]}
    found |= {name.removeprefix(f"{root}."): count for name, count in counts.items() if name.startswith(f"{root}.")}
    shifts = [name for name, m in network.named_modules() if isinstance(m, Shift2d)]
    for shift in shifts:
        moved = found.pop(shift, 0)
        for name in {"", *(shift[:k] for k, sign in enumerate(shift) if sign == ".")} & found.keys():
            found[name] -= moved
    return {name: count // 2 for name, count in found.items()}
