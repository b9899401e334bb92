"""Networks timed side by side, in ONNX Runtime and in PyTorch, on the CPU and on a GPU where there is one."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import onnxruntime
import torch
from torch import nn

from odcheap import predict

CUDA = "CUDAExecutionProvider"


class Key(NamedTuple):
    """What is timed: a network by its name, where it runs, how many images at once, how many threads (0: all)."""

    name: str
    runtime: str
    batch: int
    threads: int


Works = dict[Key, Callable[[], object]]
Found = dict[Key, predict.Timing]
ORT, TORCH = "ONNX Runtime", "PyTorch"


def in_onnxruntime(models: dict[str, bytes], size: tuple[int, int, int], batches: tuple[int, ...]) -> Works:
    ways = [(ORT, "CPUExecutionProvider", threads) for threads in (1, 0)]
    ways += [(f"{ORT}, GPU", CUDA, 0)] if CUDA in onnxruntime.get_available_providers() else []
    works: Works = {}
    for name, model in models.items():
        for runtime, provider, threads in ways:
            try:
                ask = predict.create_predictor(predict.create_session(model, threads, provider))
            except predict.PredictError as error:
                if provider != CUDA:
                    raise
                print(f"not timed: {error}", flush=True)
                continue
            for batch in batches:
                images = predict.random_images(batch, size)
                works[Key(name, runtime, batch, threads)] = lambda ask=ask, images=images: ask(images)
    return works


def in_torch(networks: dict[str, nn.Module], size: tuple[int, int, int], batches: tuple[int, ...]) -> Works:
    works: Works = {}
    for name, network in networks.items():
        for batch in batches:
            images = torch.from_numpy(predict.random_images(batch, size)).contiguous(memory_format=torch.channels_last)
            for threads in (1, 0):
                works[Key(name, TORCH, batch, threads)] = on_cpu(network, images, threads or torch.get_num_threads())
            if torch.cuda.is_available():
                works[Key(name, f"{TORCH}, GPU", batch, 0)] = on_gpu(network, images)
    return works


def on_cpu(network: nn.Module, images: torch.Tensor, threads: int) -> Callable[[], object]:
    network = network.to(memory_format=torch.channels_last)
    before = torch.get_num_threads()

    def work() -> None:
        torch.set_num_threads(threads)
        try:
            with torch.inference_mode():
                network(images)
        finally:
            torch.set_num_threads(before)

    return work


def on_gpu(network: nn.Module, images: torch.Tensor) -> Callable[[], object]:
    network, images = copy.deepcopy(network).cuda(), images.cuda()

    def work() -> None:
        with torch.inference_mode():
            network(images)
        torch.cuda.synchronize()

    return work


def fastest(found: Found, name: str, runtime: str, batch: int) -> predict.Timing:
    """With the number of threads that takes least."""
    return min(time for key, time in found.items() if key[:3] == (name, runtime, batch))
