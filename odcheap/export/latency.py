"""Measures how long networks take in their runtimes, and how many times as fast one is as another."""

import copy
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from odcheap import predict
from odcheap.export.onnx import export_program, to_onnx
from odcheap.export.runtimes import EXECUTORCH, ONNX_RUNTIME, PYTORCH, create_predictor
from odcheap.layers.fuse import cheap_form
from odcheap.predict import Timing

# A speedup is not stated if the quartiles of the rounds' ratios differ by a larger factor than this one, or if the
# calls with one thread ran in a smaller fraction of the time: other programs used the cores then.
MAX_SPREAD = 1.25
MIN_RUNNING = 0.75


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
Timings = dict[Key, Timing]


class Speedup(NamedTuple):
    """How many times as fast one network is as another: the time of the other network divided by its own time.

    Attributes:
        value: The median of the ratios of all rounds of the measurement, such as 2.0 for half the time.
        low, high: The lower and the upper quartile of these ratios.
    """

    value: float
    low: float
    high: float

    @property
    def is_resolved(self) -> bool:
        """Whether both quartiles agree on which network is faster."""
        return self.low > 1 or self.high < 1


def file_calls(
    runtime: str, contents: Mapping[str, bytes], size: tuple[int, int, int], batches: tuple[int, ...]
) -> Calls:
    """Returns functions to time exported files in a runtime on the CPU, with one thread and with all threads.

    Files for ExecuTorch are run only with the number of threads that ExecuTorch chooses, one for each fast core. It
    cannot be changed while programs are loaded.

    Args:
        runtime: The name of the runtime, such as "ONNX Runtime".
        contents: The contents of the files by name.
        size: The shape (C, H, W) of an image.
        batches: The numbers of images in a call, such as (1, 64). There is a function for each number.

    Returns:
        A dict from a `Key` (file, runtime, number of images and of threads) to a function without arguments, which runs
        the file once on random images.
    """
    calls: Calls = {}
    for name, content in contents.items():
        for threads in (0,) if runtime == EXECUTORCH else (1, 0):
            predictor = create_predictor(runtime, content, batches[0], threads)
            for batch in batches:
                calls[Key(name, runtime, batch, threads)] = partial(predictor, predict.random_images(batch, size))
    return calls


def torch_calls(networks: Mapping[str, nn.Module], size: tuple[int, int, int], batches: tuple[int, ...]) -> Calls:
    """Returns functions to time networks in PyTorch on the CPU, with one thread and all, and on a GPU if there is one.

    Args:
        networks: The networks by name, in eval mode on the CPU.
        size: The shape (C, H, W) of an image.
        batches: The numbers of images in a call, such as (1, 64). There is a function for each number.

    Returns:
        A dict from a `Key` (network, runtime, number of images and of threads) to a function without arguments, which
        runs the network once on random images.
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
    """Returns a function that runs a network once on images. PyTorch's number of threads is the same before and after.

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


def fastest(timings: Timings, name: str, runtime: str, batch: int) -> Timing:
    """Returns the timing of a network in a runtime with the number of threads that was fastest.

    Args:
        timings: The timings of all calls.
        name: The name of the network.
        runtime: The runtime, such as "ONNX Runtime".
        batch: The number of images in a call.
    """
    # For one small image a single thread is often faster than several.
    return min(timing for key, timing in timings.items() if key[:3] == (name, runtime, batch))


def measure_timings(
    networks: Mapping[str, nn.Module], size: tuple[int, int, int], batches: tuple[int, ...], seconds: float
) -> dict[tuple[str, int], Timing]:
    """Exports networks to ONNX and measures how long they take in ONNX Runtime on the CPU.

    Args:
        networks: The networks by name.
        size: The shape (C, H, W) of an image.
        batches: The numbers of images in a call, such as (1, 64).
        seconds: The time for each measurement, in seconds.

    Returns:
        The timing of each network for each number of images, by (name, number of images). One thread and all threads
        were tried, and it is the timing of the faster.
    """
    models = {name: to_onnx(export_program(cheap_form(network), size)) for name, network in networks.items()}
    timings = predict.time_alternately(file_calls(ONNX_RUNTIME, models, size, batches), seconds)
    return {(n, b): fastest(timings, n, ONNX_RUNTIME, b) for n in networks for b in batches}


def compare_timings(slow: Timing, fast: Timing) -> Speedup:
    """Returns how many times as fast the second network is as the first; below 1 if the second is slower.

    Args:
        slow: The times of the first network, such as the standard network.
        fast: The times of the second network, such as the student, in the same rounds of measurement.
    """
    pairs = list(zip(slow.rounds, fast.rounds, strict=True)) or [(slow.p50, fast.p50)]
    ratios = [theirs / ours for theirs, ours in pairs]
    # Quartiles and not extremes: in one of many rounds another program may have used the cores.
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios
    return Speedup(median, low, high)


def compute_speedups(timings: Timings, network: tuple[str, str], other: tuple[str, str]) -> dict[int, Speedup]:
    """Returns how many times as fast `network` is as `other`.

    Args:
        timings: The times of both networks.
        network: The name of a network or file, and its runtime.
        other: The name and the runtime of the network or file with which it is compared.

    Returns:
        The speedups by the number of images in a call; empty if `network` was not timed.
    """
    batches = sorted({key.batch for key in timings if key[:2] == network})
    return {
        batch: compare_timings(fastest(timings, *other, batch), fastest(timings, *network, batch)) for batch in batches
    }


def describe_disturbance(speedups: Iterable[Speedup], timings: Timings) -> str:
    """Returns why speedups are too uncertain to be stated, as part of a sentence; empty if they are certain enough.

    They are too uncertain if other programs used the CPU, or if the rounds of the measurement differ too much.

    Args:
        speedups: The speedups to judge.
        timings: All times of the same measurement, which say whether the CPU was busy.
    """
    # The system's load is no measure of this: it is a mean over a minute in which this program itself was busy.
    known = [t.running for key, t in timings.items() if key.threads == 1 and not math.isnan(t.running)]
    running, reasons = statistics.mean(known or [1.0]), []
    if running < MIN_RUNNING:
        waited = f"{100 * (1 - running):.0f} % of the time"
        reasons.append(f"the machine was busy (the calls waited for other programs for {waited})")
    if any(speedup.high > MAX_SPREAD * speedup.low for speedup in speedups):
        reasons.append("the rounds of the measurement disagree")
    return ", and ".join(reasons)
