"""Makes computations on a CPU faster, by settings of this process for waiting threads and for freed memory."""

import ctypes
import os
from functools import cache
from pathlib import Path

# By default a waiting thread of OpenMP computes in a loop: about 15 ms with GCC's library, 200 ms with LLVM's. If other
# work needs the cores, the threads that are waited for do not run meanwhile. With these values it is about 50
# microseconds and 1 ms: long enough for the short waits within a step.
SHORT_WAIT = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
POLICY = "OMP_WAIT_POLICY"
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # parameters of mallopt, from glibc's malloc.h
TOP_PAD = 64 * 2**20  # bytes: the heap grows by this much at a time
MADV_HUGEPAGE = 14  # from Linux' mman.h
HUGE_PAGE = 2 * 2**20  # bytes
RESERVED = 4 * 2**30  # bytes of addresses that may get huge pages; they take no memory before they are used
SETTINGS = ("MALLOC_", "LD_PRELOAD", "GLIBC_TUNABLES")  # a user who has set one of these has chosen an allocator


@cache
def keep_freed_memory() -> bool:
    """Makes the C library glibc keep freed memory for the next tensors, and lets it use huge pages (2 MiB).

    By default, the memory of a large tensor goes back to Linux when the tensor is freed, and Linux must clear the
    memory of the next tensor, which takes time. Nothing is changed if the C library is not glibc, or if the user has
    set an environment variable about memory allocation. Call this function before the first tensor is created.

    Returns:
        True if the settings were changed.
    """
    if any(name.startswith(SETTINGS) for name in os.environ):
        return False
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 - only glibc has it
        mallopt = libc.mallopt
    except (OSError, AttributeError, TypeError):
        return False
    # No mappings of their own, and -1: freed memory is never given back. mallopt returns 1 if it has taken a value.
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: TOP_PAD}
    changed = {mallopt(parameter, value) for parameter, value in settings.items()} == {1}
    if changed:
        request_huge_pages(libc)
    return changed


def request_huge_pages(libc: ctypes.CDLL) -> None:
    """Reserves 4 GiB of addresses for which Linux may use huge pages (2 MiB instead of 4 KiB), which are faster.

    The addresses take no memory until they are used. Failures are ignored, since they only cost speed.

    Args:
        libc: The C library of this process, `ctypes.CDLL(None)`.
    """
    # In this mode Linux counts addresses as memory, whether they are used or not.
    mode = Path("/proc/sys/vm/overcommit_memory")
    if not mode.exists() or mode.read_text().strip() == "2":
        return
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if (start := libc.malloc(RESERVED)) is not None:
        first = -(-start // HUGE_PAGE) * HUGE_PAGE
        libc.madvise(first, (start + RESERVED - first) // HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE)
        libc.free(start)  # the addresses stay with the heap


def shorten_waiting() -> None:
    """Sets environment variables by which OpenMP's threads sleep soon when they have to wait for each other.

    Nothing is set if the user has set one of these variables, or `OMP_WAIT_POLICY`. Call it before PyTorch is imported.
    """
    if not any(name in os.environ for name in (POLICY, *SHORT_WAIT)):
        os.environ.update(SHORT_WAIT)


def describe_load(threads: int) -> str | None:
    """Returns a warning, in one line, if other work keeps the machine busy; None if not, or if that is not known.

    Args:
        threads: The number of threads with which this process computes.
    """
    try:
        load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    except (OSError, AttributeError):  # not on every system
        return None
    if load < 1.2 * cores + 0.5:  # this process and its imports count too
        return None
    advice = "OMP_NUM_THREADS=1 is often faster then" if threads > 1 else "fewer runs at a time help"
    return f"the {cores} cores of this machine are busy (load {load:.1f}), so the run takes longer; {advice}"
