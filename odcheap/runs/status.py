"""The file `status.json` in a run's folder, and the lock that keeps other processes from training there."""

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from odcheap.runs.schemas import State, Status, validate
from odcheap.utils.errors import OptionError
from odcheap.utils.files import read_json, write_json

FILE_NAME = "status.json"
LOCK = ".lock"
MAX_BYTES = 1 << 20
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # file systems without locks


def write_status(job_dir: Path, state: State, reason: str = "") -> None:
    """Writes `status.json` into a run's folder: the state, its reason, and the host and id of this process."""
    status = {"state": state, "reason": reason, "host": socket.gethostname(), "pid": os.getpid()}
    write_json(job_dir / FILE_NAME, status)


def read_status(job_dir: Path) -> dict[str, Any]:
    """Reads `status.json`: a dict with `state`, `reason`, `host` and `pid`, which is empty if there is no such file.

    Raises:
        OptionError: The file is damaged, or another program has written it.
    """
    path = job_dir / FILE_NAME
    if not os.path.lexists(path):
        return {}
    return validate(Status, read_json(path, "job_dir", MAX_BYTES), path, "job_dir").model_dump()


def is_alive(status: Mapping[str, Any]) -> bool:
    """Returns whether the process that wrote a status still runs; True if it is on another host, as this is not known.

    Args:
        status: The content of `status.json`, as `read_status` returns it.
    """
    if status.get("host") != socket.gethostname():
        return True
    try:
        os.kill(status["pid"], 0)
    except (KeyError, TypeError, ProcessLookupError):  # no process is named, or it has ended
        return False
    except PermissionError:  # another user's process
        return True
    return True


@contextmanager
def lock_folder(job_dir: Path) -> Generator[None]:
    """A context manager that locks a run's folder, so that no other process trains in it at the same time.

    The operating system releases the lock if the process dies. On a file system without locks, nothing is locked.

    Raises:
        OptionError: Another process holds the lock, or the lock file cannot be opened.
    """
    # Nothing is written to the lock file and no link is followed, since a file of this name may belong to the user.
    path = job_dir / LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise OptionError("job_dir", job_dir, f"its lock {path.name} cannot be opened ({error.strerror})") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OptionError("job_dir", job_dir, f"its lock {path.name} is not a regular file")
        # A file system without locks is used without a lock.
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OptionError("job_dir", job_dir, f"another process trains here ({name_writer(job_dir)})") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise OptionError("job_dir", job_dir, f"cannot be locked ({error.strerror})") from error
        yield
    finally:
        # Processes that read images have inherited the descriptor: without this line they would keep the lock.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def name_writer(job_dir: Path) -> str:
    """Returns a text for messages that names the process in `status.json`, such as "process 7 on host1, by its
    status.json".
    """
    try:
        status = read_status(job_dir)
    except OptionError:
        status = {}
    return f"process {status.get('pid')} on {status.get('host')}, by its status.json"
