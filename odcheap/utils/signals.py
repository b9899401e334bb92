"""Handling of the signals that stop a command, from the moment at which its process starts.

This module imports nothing but the standard library, since it is used before the packages that take seconds to import.
"""

import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # they stop a run after it has saved
PARENT_VARIABLE = "ODCHEAP_PARENT_PID"  # set by a parent for the process that it starts
PARENT_PID = os.getppid()  # read at import, when the parent probably still exists
POLL_SECONDS = 0.5


@contextmanager
def exit_on_signals() -> Generator[None]:
    """Ends the process with one line if a signal arrives that has Python's or the system's default handler.

    Without this, a signal during the imports of a command would end in a traceback or without any output. The process
    ends at once, because an exception that is raised within an import does not always reach the caller.
    """
    own_pid = os.getpid()

    def end(signum: int, _: FrameType | None) -> None:
        if os.getpid() == own_pid:
            os.write(2, f"{signal.Signals(signum).name}: ended before anything was started\n".encode())
        os._exit(128 + signum)

    defaults = (signal.SIG_DFL, signal.default_int_handler)
    is_main = threading.current_thread() is threading.main_thread()  # which alone may set handlers
    before = {s: handler for s in STOP_SIGNALS if is_main and (handler := signal.getsignal(s)) in defaults}
    for signum in before:
        signal.signal(signum, end)
    try:
        yield
    finally:
        for signum, handler in before.items():
            if signal.getsignal(signum) is end:
                signal.signal(signum, handler)


def find_parent() -> int:
    """Returns the process id of the parent that started this process, which may have died since."""
    return int(os.environ.get(PARENT_VARIABLE, PARENT_PID))


@contextmanager
def stop_with_parent(parent_pid: int) -> Generator[None]:
    """Sends this process a SIGTERM when its parent has died.

    Args:
        parent_pid: The parent's process id. It is compared with the present one, so that a parent that died before this
            call is noticed too.
    """
    is_done = threading.Event()

    def watch() -> None:
        while os.getppid() == parent_pid:
            if is_done.wait(POLL_SECONDS):
                return
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        is_done.set()
