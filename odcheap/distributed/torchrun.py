"""`python -m odcheap.distributed.torchrun`: a torchrun that ends if its parent dies, and says which process failed."""

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
    """Runs torchrun, and prints one line if a process fails.

    Args:
        arguments: The command-line arguments of torchrun.

    Returns:
        The exit status: 0, 1 if a process failed, or 128 + the number of the signal that has stopped the run.
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
    """Returns how a failed process ended, as the end of a sentence, such as "was killed by SIGTERM"."""
    if failure.exitcode >= 0:
        return f"ended with status {failure.exitcode}"
    name = signal.Signals(-failure.exitcode).name
    return f"was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
