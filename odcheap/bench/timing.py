"""Times calls of a function."""

import time
import timeit
from collections.abc import Callable

import torch

WARM_UP_CALLS = 2


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
