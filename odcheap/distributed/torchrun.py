"""`python -m odcheap.distributed.torchrun`: torchrun that ends with its starter, and says in one line which process failed."""

import logging
import os
import signal
import sys
import threading

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

# What a run is told to end by.
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def main(arguments: list[str]) -> int:
    """torchrun's `arguments`; returns the exit status, 128 + its number where a signal ended the run in order."""
    logging.disable(logging.ERROR)  # the line below says it
    for signum in (signal.SIGUSR1, signal.SIGUSR2):  # sent to all of a group: who started us passes them on
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=end_with_starter, daemon=True).start()
    try:
        run.main(arguments)
    except SignalException as stop:
        return 128 + stop.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode - 128 in ENDING:
            return failure.exitcode
        print(f"error: process {rank} {ended(failure)}; the others were ended", file=sys.stderr, flush=True)
        return 1
    return 0


def end_with_starter() -> None:
    """Its end of our standard input closes when it is gone, however it went."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def ended(failure: ProcessFailure) -> str:
    if failure.exitcode >= 0:
        return f"ended with status {failure.exitcode}"
    name = signal.Signals(-failure.exitcode).name
    return f"was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
