"""Times calls of a function, measures peak memory on a GPU or on the CPU, and counts page faults."""

import ctypes
import resource
import statistics
import sys
import threading
import time
import timeit
from collections.abc import Callable, Sequence

import torch

WARM_UP_CALLS = 2
STARTED = time.perf_counter()


def report_progress(text: str) -> None:
    """Prints a line of text on stderr, after the seconds since the start of the command."""
    print(f"  {time.perf_counter() - STARTED:4.0f} s  {text}", file=sys.stderr, flush=True)


def time_calls(run: Callable[[], object], count: int) -> float:
    """Returns the mean seconds of a call; on a GPU it waits for the end of the last call.

    Args:
        run: The function. It is called twice before the calls that are timed.
        count: The number of calls that are timed.

    Example:
        >>> time_calls(lambda: torch.ones(3) + 1, count=10) > 0
        True
    """
    # This is not `torch.utils.benchmark.Timer`, whose import prints a line on machines with nvcc and without a GPU.
    for _ in range(WARM_UP_CALLS):
        run()
    return timeit.timeit(run, timer=read_clock, number=count) / count


def read_clock() -> float:
    """Returns the time of a clock in seconds; if this process uses a GPU, it first waits for the GPU's work to end."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def compare_times(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Divides two lists of times, element by element, and returns the `median`, `min` and `max` of the ratios.

    The two times of an element must be from the same round, since the speed of a machine changes over time.
    """
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


class PeakMemory:
    """Measures the peak memory between `start` and `stop`, without the memory that was in use at the start.

    On a GPU this is the memory that PyTorch has allocated. On a CPU it is the memory that glibc has allocated, read
    every 5 ms; without glibc, `stop` returns None.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device):
        self.device, self.bytes_at_start, self.bytes_at_peak = device, 0, 0
        self.stopped = threading.Event()

    def start(self) -> None:
        """Begins the measurement, and notes how much memory is in use now."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.bytes_at_start = torch.cuda.memory_allocated()
        elif (used := count_allocated_bytes()) is not None:
            self.bytes_at_start = self.bytes_at_peak = used
            threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while not self.stopped.wait(0.005):
            self.bytes_at_peak = max(self.bytes_at_peak, count_allocated_bytes() or 0)

    def stop(self) -> int | None:
        """Returns the peak memory in bytes; None if it cannot be measured here."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() - self.bytes_at_start
        self.stopped.set()
        return self.bytes_at_peak - self.bytes_at_start if self.bytes_at_peak else None


class Mallinfo2(ctypes.Structure):
    """The `struct mallinfo2` of glibc: memory mappings use `hblkhd` bytes, and the heap uses `uordblks` bytes."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def count_allocated_bytes() -> int | None:
    """Returns the number of bytes that this process has allocated from glibc; None on a system without glibc."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError, TypeError):
        return None
    mallinfo2.restype = Mallinfo2
    info = mallinfo2()
    return info.hblkhd + info.uordblks


def count_page_faults() -> int:
    """Returns the number of page faults of this process so far that needed no reading from disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
