"""What a network costs: parameters and multiply-accumulates."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from odcheap.convs import Shift2d


def params(network: nn.Module) -> int:
    """Number of trainable and frozen parameters; buffers do not count."""
    return sum(p.numel() for p in network.parameters())


def macs(network: nn.Module, image_size: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one forward pass of one (C, H, W) image, convolutions and matrix products only.

    Half of what PyTorch's own FLOP counter sees (a multiply-accumulate is two FLOPs), less its reading of Shift, which
    moves data and computes nothing but runs as a convolution.
    """
    was_training = network.training
    network.eval()
    shifts = {f"{type(network).__name__}.{name}" for name, m in network.named_modules() if isinstance(m, Shift2d)}
    parameter = next(network.parameters())
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        network(torch.zeros(1, *image_size, dtype=parameter.dtype, device=parameter.device))
    network.train(was_training)
    counts = counter.get_flop_counts()
    moved = sum(sum(ops.values()) for name, ops in counts.items() if name in shifts)
    return (counter.get_total_flops() - moved) // 2
