"""Inference time of networks in ONNX Runtime on the CPU, and in PyTorch on the CPU and on a GPU if there is one."""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from odcheap import predict
from odcheap.export.onnx import export_program, to_onnx
from odcheap.layers.fuse import cheap_form

ONNX_RUNTIME, PYTORCH = "ONNX Runtime", "PyTorch"


class Key(NamedTuple):
    """One measurement: the network's name, where it runs, images per call, and CPU threads (0: all)."""

    name: str
    runtime: str
    batch: int
    threads: int


Calls = dict[Key, Callable[[], object]]
Timings = dict[Key, predict.Timing]


def onnx_calls(models: Mapping[str, bytes], size: tuple[int, int, int], batches: tuple[int, ...]) -> Calls:
    """Returns functions that run ONNX files on the CPU, with one thread and with all.

    Args:
        models: The contents of ONNX files by name.
        size: Shape (C, H, W) of an image.
        batches: Numbers of images per call.
    """
    calls: Calls = {}
    for name, model in models.items():
        for threads in (1, 0):
            predictor = predict.create_predictor(predict.create_session(model, threads))
            for batch in batches:
                images = predict.random_images(batch, size)
                calls[Key(name, ONNX_RUNTIME, batch, threads)] = partial(predictor, images)
    return calls


def torch_calls(networks: Mapping[str, nn.Module], size: tuple[int, int, int], batches: tuple[int, ...]) -> Calls:
    """Returns functions that run networks in PyTorch; arguments as in `onnx_calls`."""
    calls: Calls = {}
    for name, network in networks.items():
        network = network.to(memory_format=torch.channels_last)
        for batch in batches:
            images = torch.from_numpy(predict.random_images(batch, size)).contiguous(memory_format=torch.channels_last)
            for threads in (1, 0):
                calls[Key(name, PYTORCH, batch, threads)] = torch_call(network, images, threads)
            if torch.cuda.is_available():
                on_gpu = torch_call(copy.deepcopy(network).cuda(), images.cuda())
                calls[Key(name, f"{PYTORCH}, GPU", batch, 0)] = on_gpu
    return calls


def torch_call(network: nn.Module, images: torch.Tensor, threads: int = 0) -> Callable[[], None]:
    """Returns a function that runs the network with so many CPU threads (0: all) and then restores their number."""
    before = torch.get_num_threads()

    def call() -> None:
        torch.set_num_threads(threads or before)
        try:
            with torch.inference_mode():
                network(images)
            if images.is_cuda:
                torch.cuda.synchronize()
        finally:
            torch.set_num_threads(before)

    return call


def fastest(timings: Timings, name: str, runtime: str, batch: int) -> predict.Timing:
    """Returns the timing of the fastest number of threads; for one small image a single thread is often fastest."""
    return min(timing for key, timing in timings.items() if key[:3] == (name, runtime, batch))


def time_networks(
    networks: Mapping[str, nn.Module], size: tuple[int, int, int], batches: tuple[int, ...], seconds: float
) -> dict[tuple[str, int], float]:
    """Returns median milliseconds of a call by (name, batch); see `measure_timings`."""
    timings = measure_timings(networks, size, batches, seconds)
    return {key: 1000 * timing.p50 for key, timing in timings.items()}


def measure_timings(
    networks: Mapping[str, nn.Module], size: tuple[int, int, int], batches: tuple[int, ...], seconds: float
) -> dict[tuple[str, int], predict.Timing]:
    """Times the ONNX files of networks alternately on the CPU; for the arguments see `onnx_calls`.

    Returns:
        The seconds of a call by (name, batch), with the faster number of threads.
    """
    models = {name: to_onnx(export_program(cheap_form(network), size)) for name, network in networks.items()}
    timings = predict.time_alternately(onnx_calls(models, size, batches), seconds)
    return {(n, b): fastest(timings, n, ONNX_RUNTIME, b) for n in networks for b in batches}
