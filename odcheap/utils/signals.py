"""Handles the signals that stop a command, such as Ctrl-C, from the start of its process.

This module imports the standard library only, since it is used before packages that take seconds to import.
"""

import os
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # they stop a run after it has saved
PARENT_VARIABLE = "ODCHEAP_PARENT_PID"  # set by a parent for the process that it starts
PARENT_PID = os.getppid()  # read at import, when the parent probably still exists
POLL_SECONDS = 0.5


@contextmanager
def exit_on_signals() -> Generator[None]:
    """A context manager in which SIGTERM, SIGINT, SIGUSR1 and SIGHUP end the process at once, with one line of output.

    It is for the time in which a command imports its packages. Without it, a signal would end in a traceback, or
    without any output. A signal for which a handler is already installed is not changed.
    """
    # The process ends at once: an exception that is raised within an import does not always reach the caller.
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
    """Returns the process id of the parent that started this process; it may have died in the meantime."""
    return int(os.environ.get(PARENT_VARIABLE, PARENT_PID))


@contextmanager
def stop_with_parent(parent_pid: int) -> Generator[None]:
    """A context manager that sends SIGTERM to this process if its parent process dies.

    Args:
        parent_pid: The process id of the parent, as `find_parent` returns it. If the parent is already dead, the signal
            is sent, too.
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


class WorkerSignals:
    """Handles Ctrl-C and SIGTERM in a process whose child processes do the work.

    The first signal is forwarded to the child processes, which save and end. A second signal ends this process at once.
    If the same signal arrives again within a second, it is ignored, since Ctrl-C may reach a process in two ways.

    Attributes:
        received: The number of the signal that has arrived; 0 if there is none.
    """

    def __init__(self) -> None:
        self.received, self.received_at = 0, 0.0
        self.previous_handlers: dict[int, Any] = {}

    def install(self) -> None:
        """Installs the handlers for SIGINT (Ctrl-C) and SIGTERM; does nothing in other threads than the main thread."""
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self.previous_handlers[signum] = signal.signal(signum, self.handle)

    def restore(self) -> None:
        """Restores the handlers that were installed before."""
        for signum, handler in self.previous_handlers.items():
            signal.signal(signum, handler)
        self.previous_handlers.clear()

    def handle(self, signum: int, _: FrameType | None) -> None:
        name = signal.Signals(signum).name
        if signum == self.received and time.monotonic() < self.received_at + 1:
            return
        if self.received:
            os._exit(128 + signum)
        self.received, self.received_at = signum, time.monotonic()
        os.write(2, f"{name}: waiting until every run has saved (once more ends at once)\n".encode())
        for pid in list_children(os.getpid()):
            with suppress(OSError):
                os.kill(pid, signum)


def list_children(pid: int) -> list[int]:
    """Returns the process ids of the child processes of a process; an empty list on systems without `/proc`."""
    found = []
    with suppress(OSError):
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            found += [int(child) for child in path.read_text().split()]
    return found
