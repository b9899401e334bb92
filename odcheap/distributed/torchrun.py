"""`python -m odcheap.distributed.torchrun`: torchrun that stops with its parent, and names the process that failed."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # they stop a run in order


def main(arguments: Sequence[str]) -> int:
    """Runs torchrun.

    Args:
        arguments: What torchrun is called with.

    Returns:
        The exit status: 128 + its number where a signal stopped the run in order.
    """
    logging.disable(logging.ERROR)  # the line below says it
    for signum in (signal.SIGUSR1, signal.SIGUSR2):  # sent to the whole process group: the parent forwards them
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=stop_with_parent, daemon=True).start()
    try:
        run.main(list(arguments))
    except SignalException as stop:
        return 128 + stop.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode - 128 in STOP_SIGNALS:
            return failure.exitcode
        print(f"error: process {rank} {describe_exit(failure)}; the others were ended", file=sys.stderr, flush=True)
        return 1
    return 0


def stop_with_parent() -> None:
    """Sends this process a SIGTERM when the parent dies, in whatever way: our standard input then closes."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def describe_exit(failure: ProcessFailure) -> str:
    """Returns how a process ended, as a part of a sentence."""
    if failure.exitcode >= 0:
        return f"ended with status {failure.exitcode}"
    name = signal.Signals(-failure.exitcode).name
    return f"was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
