"""`python -m odcheap.distributed.torchrun`: torchrun that ends with its parent and reports which process failed."""

import logging
import os
import signal
import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from odcheap.utils.signals import PARENT_VARIABLE, STOP_SIGNALS, find_parent, stop_with_parent


def main(arguments: Sequence[str]) -> int:
    """Runs torchrun.

    Args:
        arguments: The arguments of torchrun.

    Returns:
        The exit status; if a signal stopped the run after it had saved, 128 + the signal's number.
    """
    logging.disable(logging.ERROR)  # the line printed below replaces torchrun's report
    for signum in (signal.SIGUSR1, signal.SIGUSR2):  # they reach the whole process group, and the parent forwards them
        signal.signal(signum, signal.SIG_IGN)
    leader, os.environ[PARENT_VARIABLE] = find_parent(), str(os.getpid())  # the latter is for the processes of the run
    try:
        with stop_with_parent(leader):
            run.main(list(arguments))
    except SignalException as stop:
        return 128 + stop.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode - 128 in STOP_SIGNALS:
            return failure.exitcode
        print(f"error: process {rank} {describe_exit(failure)}; the others were stopped", file=sys.stderr, flush=True)
        return 1
    return 0


def describe_exit(failure: ProcessFailure) -> str:
    """Returns how a process ended, as a part of a sentence."""
    if failure.exitcode >= 0:
        return f"ended with status {failure.exitcode}"
    name = signal.Signals(-failure.exitcode).name
    return f"was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
