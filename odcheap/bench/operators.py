"""Times single layers with the fused operators and with PyTorch's, on maps of a CIFAR ResNet's three stages."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from odcheap.bench.measurement import compare_times, time_calls
from odcheap.layers import kernels
from odcheap.layers.cheap_conv import DW, Group
from odcheap.layers.norm_act import batch_norm_act, block_norm_act, conv_norm_act

STAGES = ((16, 32), (32, 16), (64, 8))  # channels, and height and width in pixels
# The layers, with the passes of the fused CPU operators: how often a map is read or written, forward and backward.
LAYERS = {
    "batch norm, ReLU, sum": 9,
    "depth-wise, 1 x 1, batch norm, ReLU, sum": 11,
    "grouped (4), 1 x 1, batch norm, ReLU, sum": 13,
    "block of two depth-wise pairs": 18,
}
DTYPES = (torch.float32, torch.bfloat16)
FORMS: tuple[kernels.Mode, ...] = ("off", "auto")  # PyTorch's operators, and the fused ones
CALLS = 7  # of a measurement, after two that warm up
MEMORY_BYTES = 2**28  # of a copy that comes from memory: no cache is as large


def measure_operators(device: torch.device, batch_size: int, rounds: int) -> list[dict[str, Any]]:
    """Times forward and backward passes of the layers in `LAYERS`, alternately with and without fused operators.

    Args:
        device: The device.
        batch_size: The number of images, N.
        rounds: The number of rounds; each layer is timed once with and once without fused operators in a round.

    Returns:
        A dict for each layer, feature map and dtype; an empty list if there are no fused operators for this device.

        - `layer`, `map`, `dtype`: a name in `LAYERS`, the shape [N, C, H, W], and a name such as "float32";
        - `plain_ms`, `fused_ms`: the milliseconds without and with fused operators, medians over the rounds;
        - `copy_ms`, `memory_copy_ms`: the milliseconds of a copy of one map in the cache and in memory;
        - `pass_over_copy`: the time in which the fused operator reads or writes a map once, over `memory_copy_ms`;
        - `speedup`: the `median`, `min` and `max` over the rounds.
    """
    if kernels.load_operators(device.type) is None:
        return []
    rows = []
    large = torch.ones(2, MEMORY_BYTES, dtype=torch.uint8, device=device)
    memory_ms_per_byte = time_call(lambda: large[0].copy_(large[1])) / MEMORY_BYTES
    for dtype in DTYPES:
        for channels, side in STAGES:
            shape = (batch_size, channels, side, side)
            x, residual, gradient = (
                torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
                for _ in range(3)
            )
            target = torch.empty_like(x)
            copy_ms = time_call(lambda target=target, x=x: target.copy_(x))
            memory_ms = memory_ms_per_byte * x.numel() * x.element_size()
            for layer, run in make_layers(x.requires_grad_(), residual.requires_grad_(), gradient).items():
                turns = list(zip(*([time_form(run, mode) for mode in FORMS] for _ in range(rounds)), strict=True))
                plain, fused = map(statistics.median, turns)
                row: dict[str, Any] = {"layer": layer, "map": list(shape), "dtype": str(dtype).removeprefix("torch.")}
                row |= {"copy_ms": copy_ms, "memory_copy_ms": memory_ms, "plain_ms": plain, "fused_ms": fused}
                row |= {"pass_over_copy": fused / LAYERS[layer] / memory_ms, "speedup": compare_times(*turns)}
                rows.append(row)
    return rows


def make_layers(x: Tensor, residual: Tensor, gradient: Tensor) -> dict[str, Callable[[], object]]:
    """Returns a dict from the name of each layer to a function that runs the layer forward and backward.

    Args:
        x: The input of the layers, (N, C, H, W).
        residual: The map that is added to the result, of the same shape.
        gradient: The gradient of the layers' output, of the same shape.
    """
    channels, device = x.shape[1], x.device
    norms = nn.BatchNorm2d(channels).to(device), nn.BatchNorm2d(channels).to(device)
    pairs = DW()(channels, channels, 1).to(device), DW()(channels, channels, 1).to(device)
    grouped = Group()(channels, channels, 1).to(device)

    def make_run(forward: Callable[[], Tensor], *modules: nn.Module) -> Callable[[], object]:
        parameters = [p for module in modules for p in module.parameters()]

        def run() -> object:
            with torch.autocast(device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
                y = forward()
            return torch.autograd.grad(y, [x, residual, *parameters], gradient, allow_unused=True)

        return run

    runs = (
        make_run(lambda: batch_norm_act(x, norms[0], residual), norms[0]),
        make_run(lambda: conv_norm_act(x, pairs[0], norms[0], residual)[0], pairs[0], norms[0]),
        make_run(lambda: conv_norm_act(x, grouped, norms[0], residual)[0], grouped, norms[0]),
        make_run(lambda: block_norm_act(x, pairs, norms, nn.Identity()), *pairs, *norms),
    )
    return dict(zip(LAYERS, runs, strict=True))


def time_form(run: Callable[[], object], mode: kernels.Mode) -> float:
    """Returns the mean milliseconds of a call, with fused operators or without them.

    Args:
        run: The function to call.
        mode: "auto" to use the fused operators, "off" to use PyTorch's.
    """
    before = kernels.use(mode)
    try:
        return time_call(run)
    finally:
        kernels.use(before)


def time_call(run: Callable[[], object]) -> float:
    """Returns the mean milliseconds of a call, over `CALLS` calls; on a GPU it waits for the end of the last call."""
    return 1000 * time_calls(run, CALLS)
