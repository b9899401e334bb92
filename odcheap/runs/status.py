"""`status.json` in a run's folder: whether it runs, where, or why it failed. How it ended well is in `summary.json`."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from odcheap.utils.errors import OptionError
from odcheap.utils.files import write_text

NAME = "status.json"


def mark(job_dir: Path, state: str, reason: str = "") -> None:
    """Leaves word for `python -m odcheap.report --status`; `state` is running, stopped, failed or finished."""
    word = {"state": state, "reason": reason, "host": socket.gethostname(), "pid": os.getpid()}
    write_text(job_dir / NAME, json.dumps(word, indent=2) + "\n")


def read(job_dir: Path) -> dict[str, Any]:
    """The latest word; nothing where there is none."""
    path = job_dir / NAME
    return json.loads(path.read_text()) if path.is_file() else {}


def is_alive(word: dict[str, Any]) -> bool:
    """Whether the process is there still; of another machine's there is no telling, and it is believed."""
    if word.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(word["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def occupied(job_dir: Path) -> Iterator[None]:
    """Keeps other processes from training in this folder; a process that dies leaves it free."""
    lock = FileLock(job_dir / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        word = read(job_dir)
        who = f"process {word.get('pid')} on {word.get('host')}"
        raise OptionError("job_dir", job_dir, f"another process trains here ({who}, by its last word)") from None
    with lock:
        yield
