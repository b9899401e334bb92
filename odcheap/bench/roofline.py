"""What a training step must cost on a machine at the least, from two rates measured there.

Operations over the rate of large matrix products, or bytes over the speed of copying, whichever takes longer.
(Williams, Waterman, Patterson, "Roofline", 2009.)
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from odcheap.models import flops


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and elements read and written, of one image in one training step."""

    operations: float
    elements: float


@dataclass(frozen=True)
class Machine:
    """Bytes a second of a copy (read and written both counted), operations a second of a matrix product."""

    bandwidth: float
    rate: float

    def seconds(self, work: Work, images: int, bytes_an_element: int) -> float:
        """The least time for a training step on so many images."""
        return images * max(work.operations / self.rate, work.elements * bytes_an_element / self.bandwidth)


def work_of(network: nn.Module, image_size: tuple[int, int, int]) -> Work:
    """Of one student: forward, and twice as many operations backward.

    Every convolution and linear layer reads its input and writes its output once; backward it reads the output's
    gradient and the input and writes the input's gradient. What lies between (batch norm, ReLU, sums) counts nothing,
    as if it could always be done on the way: no real step gets there.
    """
    moved = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal moved
        moved += 3 * inputs[0].numel() + 2 * output.numel()

    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) or type(m).__name__ == "Shift2d"]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    operations = 6 * flops.macs(network, image_size)  # runs the network once, on one image
    for hook in hooks:
        hook.remove()
    return Work(operations, moved)


def median_seconds(work: Callable[[], object], repeats: int, synchronise: Callable[[], None]) -> float:
    """After two calls to warm up."""
    taken = []
    for k in range(repeats + 2):
        synchronise()
        began = time.perf_counter()
        work()
        synchronise()
        if k > 1:
            taken.append(time.perf_counter() - began)
    return sorted(taken)[len(taken) // 2]


def synchroniser(device: torch.device) -> Callable[[], None]:
    """What waits until the device has done all its work."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def measure(device: torch.device, dtype: torch.dtype, repeats: int = 9) -> Machine:
    """Copies 256 MiB (2 GiB on a GPU) and multiplies matrices of 2048 (8192) a side."""
    large = device.type == "cuda"
    synchronise = synchroniser(device)
    source = torch.ones((512 if large else 64) << 20, device=device)
    sink = torch.empty_like(source)
    copying = median_seconds(lambda: sink.copy_(source), repeats, synchronise)
    side = 8192 if large else 2048
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    multiplying = median_seconds(lambda: matrix @ matrix, repeats, synchronise)
    return Machine(2 * source.numel() * 4 / copying, 2 * side**3 / multiplying)
