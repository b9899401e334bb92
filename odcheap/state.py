"""`status.json` in a run's folder: whether it runs, where, or why it failed. How it ended well is in `summary.json`."""

import json
import os
import socket
from pathlib import Path
from typing import Any

from odcheap.files import write_text

NAME = "status.json"


def mark(job_dir: Path, state: str, reason: str = "") -> None:
    """Leaves word for `python -m odcheap.report --status`; `state` is running, failed or finished."""
    word = {"state": state, "reason": reason, "host": socket.gethostname(), "pid": os.getpid()}
    write_text(job_dir / NAME, json.dumps(word, indent=2) + "\n")


def alive(word: dict[str, Any]) -> bool:
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
