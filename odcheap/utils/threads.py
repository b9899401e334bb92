"""Sets how the threads of OpenMP wait for each other, which must be done before PyTorch is imported."""

import os

# By default a waiting thread of OpenMP computes in a loop: about 15 ms with GCC's library, 200 ms with LLVM's. If other
# work needs the cores, the threads that are waited for do not run meanwhile. With these values it is about 50
# microseconds and 1 ms: long enough for the short waits within a step.
SHORT_WAIT = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
POLICY = "OMP_WAIT_POLICY"


def shorten_waiting() -> None:
    """Sets environment variables with which OpenMP's threads sleep soon when they wait for each other.

    Nothing is set if the user has set one of these variables, or `OMP_WAIT_POLICY`. Call it before PyTorch is imported.
    """
    if not any(name in os.environ for name in (POLICY, *SHORT_WAIT)):
        os.environ.update(SHORT_WAIT)


def describe_load(threads: int) -> str | None:
    """Returns a line about a machine that is busy with other work, None if it is not or if that cannot be known.

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
