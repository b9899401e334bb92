"""Measures the inference time of networks, in ONNX Runtime and ExecuTorch on the CPU, and in PyTorch also on a GPU."""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from odcheap import predict
from odcheap.export import executorch
from odcheap.export.onnx import export_program, to_onnx
from odcheap.layers.fuse import cheap_form

ONNX_RUNTIME, PYTORCH, EXECUTORCH = "ONNX Runtime", "PyTorch", "ExecuTorch"


class Key(NamedTuple):
    """What one measurement times: a network in a runtime, with a number of images and of threads.

    Attributes:
        name: The name of the network, or of the file that contains it.
        runtime: The runtime, such as "ONNX Runtime".
        batch: The number of images in a call.
        threads: The number of CPU threads; 0 for all.
    """

    name: str
    runtime: str
    batch: int
    threads: int


Calls = dict[Key, Callable[[], object]]
Timings = dict[Key, predict.Timing]


def onnx_calls(models: Mapping[str, bytes], size: tuple[int, int, int], batches: tuple[int, ...]) -> Calls:
    """Returns functions that run ONNX files on the CPU, with one thread and with all threads.

    Args:
        models: The contents of ONNX files by name.
        size: The shape (C, H, W) of an image.
        batches: The numbers of images in a call; there is a function for each.

    Returns:
        A dict from each `Key` to a function without arguments, which runs one file once on random images.
    """
    calls: Calls = {}
    for name, model in models.items():
        for threads in (1, 0):
            predictor = predict.create_predictor(predict.create_session(model, threads))
            for batch in batches:
                images = predict.random_images(batch, size)
                calls[Key(name, ONNX_RUNTIME, batch, threads)] = partial(predictor, images)
    return calls


def executorch_calls(programs: Mapping[str, bytes], size: tuple[int, int, int], batch: int | None) -> Calls:
    """Returns functions that run ExecuTorch programs on the CPU with the threads that ExecuTorch takes by itself.

    That is a thread for each fast core. ExecuTorch has one pool of threads in a process, and programs that are loaded
    do not survive a change of it, so that one thread cannot be timed beside it.

    Args:
        programs: The contents of `.pte` files by name.
        size: The shape (C, H, W) of an image.
        batch: The number of images for which the programs were written; None for one image.

    Returns:
        A dict from each `Key` to a function without arguments, which runs one program once on random images.
    """
    count = batch or executorch.EXPORTED_BATCH
    images = torch.from_numpy(predict.random_images(count, size))
    return {
        Key(name, EXECUTORCH, count, 0): partial(executorch.load_method(content), images)
        for name, content in programs.items()
    }


def torch_calls(networks: Mapping[str, nn.Module], size: tuple[int, int, int], batches: tuple[int, ...]) -> Calls:
    """Returns functions that run networks in PyTorch: on the CPU with one thread and all, and on a GPU if there is one.

    Args:
        networks: The networks by name, in eval mode on the CPU.
        size: The shape (C, H, W) of an image.
        batches: The numbers of images in a call; there is a function for each.

    Returns:
        A dict from each `Key` to a function without arguments, which runs one network once on random images.
    """
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
    """Returns a function that runs a network on images with a number of CPU threads, which it restores afterwards.

    Args:
        network: The network.
        images: The images, (n, C, H, W); if they are on a GPU, the function waits for the GPU.
        threads: The number of CPU threads; 0 for all.
    """
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
    """Returns the timing with the number of threads that was fastest.

    Args:
        timings: The timings of all calls.
        name: The name of the network.
        runtime: The runtime, such as "ONNX Runtime".
        batch: The number of images in a call.
    """
    # For one small image a single thread is often faster than several.
    return min(timing for key, timing in timings.items() if key[:3] == (name, runtime, batch))


def time_networks(
    networks: Mapping[str, nn.Module], size: tuple[int, int, int], batches: tuple[int, ...], seconds: float
) -> dict[tuple[str, int], float]:
    """Times networks as ONNX files alternately on the CPU, and returns the median times.

    Args:
        networks: The networks by name.
        size: The shape (C, H, W) of an image.
        batches: The numbers of images in a call.
        seconds: The time for each measurement, in seconds.

    Returns:
        The milliseconds of a call by (name, number of images), with the number of threads that was faster.
    """
    timings = measure_timings(networks, size, batches, seconds)
    return {key: 1000 * timing.p50 for key, timing in timings.items()}


def measure_timings(
    networks: Mapping[str, nn.Module], size: tuple[int, int, int], batches: tuple[int, ...], seconds: float
) -> dict[tuple[str, int], predict.Timing]:
    """Times networks as ONNX files alternately on the CPU.

    Args:
        networks: The networks by name.
        size: The shape (C, H, W) of an image.
        batches: The numbers of images in a call.
        seconds: The time for each measurement.

    Returns:
        The seconds of a call by (name, number of images), with the number of threads that was faster.
    """
    models = {name: to_onnx(export_program(cheap_form(network), size)) for name, network in networks.items()}
    timings = predict.time_alternately(onnx_calls(models, size, batches), seconds)
    return {(n, b): fastest(timings, n, ONNX_RUNTIME, b) for n in networks for b in batches}
