"""How much memory a piece of work needs at its peak."""

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import torch


def with_peak(device: torch.device, work: Callable[[], Any]) -> tuple[Any, int | None]:
    memory = Memory(device)
    memory.start()
    done = work()
    return done, memory.peak()


class Memory:
    """The most memory in use since `start`, beyond what was in use then: the GPU's as PyTorch counts it.

    On a CPU it is glibc's count of what has been asked for, sampled; elsewhere nobody counts (None).
    """

    def __init__(self, device: torch.device):
        self.device, self.at_start, self.most = device, 0, 0
        self.done = threading.Event()

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.at_start = torch.cuda.memory_allocated()
        elif (used := in_use()) is not None:
            self.at_start = self.most = used
            self.sampler = threading.Thread(target=self.sample, daemon=True)
            self.sampler.start()

    def sample(self) -> None:
        while not self.done.wait(0.005):
            self.most = max(self.most, in_use())

    def peak(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() - self.at_start
        self.done.set()
        return self.most - self.at_start if self.most else None


class Count(ctypes.Structure):
    """glibc's `struct mallinfo2`: ten sizes, of them `hblkhd` in mappings and `uordblks` in the heap, both in use."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def in_use() -> int | None:
    """Bytes that this process has asked of glibc and not given back; None where there is no glibc to ask."""
    try:
        count = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError, TypeError):
        return None
    count.restype = Count
    found = count()
    return found.hblkhd + found.uordblks
