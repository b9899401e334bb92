"""The file `status.json` in a run's folder, and the lock of the folder."""

import json
import os
import socket
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from odcheap.utils.errors import OptionError
from odcheap.utils.files import write_json

FILE_NAME = "status.json"
State = Literal["running", "stopped", "failed", "finished"]


def write_status(job_dir: Path, state: State, reason: str = "") -> None:
    """Writes the state of the run, with the process and the host of the writer."""
    status = {"state": state, "reason": reason, "host": socket.gethostname(), "pid": os.getpid()}
    write_json(job_dir / FILE_NAME, status)


def read_status(job_dir: Path) -> dict[str, Any]:
    """Returns the latest status, or an empty dict if there is none."""
    path = job_dir / FILE_NAME
    return json.loads(path.read_text()) if path.is_file() else {}


def is_alive(status: Mapping[str, Any]) -> bool:
    """Returns whether the process that wrote the status still runs. This is assumed if it is on another host."""
    if status.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(status["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process
        return True
    return True


@contextmanager
def lock_folder(job_dir: Path) -> Generator[None]:
    """Keeps other processes from training in the folder. The lock of a process that has died is free.

    Raises:
        OptionError: Another process holds the lock.
    """
    lock = FileLock(job_dir / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        status = read_status(job_dir)
        process = f"process {status.get('pid')} on {status.get('host')}"
        raise OptionError("job_dir", job_dir, f"another process trains here ({process}, by its status.json)") from None
    with lock:
        yield
