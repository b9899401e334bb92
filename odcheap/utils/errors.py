"""Exceptions that commands report as one line, without a traceback."""

import re
import shutil
from pathlib import Path

LOWER_MEMORY = "lower data.batch_size or num_stu, or try trainer.precision=bf16-mixed"
CAN_RESUME = "the last checkpoint is complete, and resume=auto continues from it"
OUT_OF_MEMORY = re.compile(r"not enough memory|can't allocate memory|out of memory", re.IGNORECASE)
CONNECTION_LOST = re.compile(
    r"connection (closed|reset)|broken pipe|socket closed|timed out|remote process exited", re.IGNORECASE
)
LOADER_ENDED = re.compile(r"DataLoader (worker \(pid|timed out)")  # not an error that was raised in a worker
SHARED_MEMORY = Path("/dev/shm")


class Failure(Exception):
    """An error that the user can correct. Commands print its text, which is one line, and no traceback."""


class OptionError(Failure, ValueError):
    """An error about the value of one option (or of one argument in Python).

    Args:
        option: The name of the option, as on the command line.
        value: The value of the option.
        allowed: What is allowed, or what is wrong with the value.

    Example:
        >>> print(OptionError("num_stu", 0, "must be 1 or more"))
        num_stu=0: must be 1 or more
    """

    def __init__(self, option: str, value: object, allowed: str):
        as_written = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        super().__init__(option, as_written, allowed)

    def __str__(self) -> str:
        option, value, allowed = self.args
        return f"{option}={value}: {allowed}"

    @property
    def allowed(self) -> str:
        """What is allowed, or what is wrong with the value; the last part of the error's text."""
        return self.args[2]

    def with_group(self, group: str) -> "OptionError":
        """Returns a copy of the error with a config group before the option, such as `backbone.init` for `init`."""
        option, value, allowed = self.args
        return OptionError(f"{group}.{option}", value, allowed)

    def without_dashes(self) -> "OptionError":
        """Returns a copy of the error for calls from Python: the flag `--out` in it becomes the argument `out`."""
        return OptionError(*(re.sub(r"--([a-z]\w*)", r"\1", text) for text in self.args))


class WriteError(OSError):
    """The error that a file cannot be written, because its folder no longer exists."""

    # It is not a `FileNotFoundError`, which may be a bug if it comes from elsewhere.


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, cut to 160 characters; the name of its class if it has no text."""
    return str(error).strip().split("\n")[0][:160] or type(error).__name__


def describe_external_failure(error: BaseException) -> str | None:
    """Explains an error that is no bug but has a cause outside of the program: memory, disk or another process.

    Returns:
        One line that says what has happened and what the user can do; None if the error has another cause.
    """
    import torch  # imported here, since commands that need no torch import this module too

    # Memory, another process of a distributed run, a loader process, and files. The messages of PyTorch's errors are
    # all that tells them from bugs.
    text = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(text)):
        place = "on the GPU" if isinstance(error, torch.OutOfMemoryError) else "on this machine"
        return f"out of memory {place}: {LOWER_MEMORY}; {CAN_RESUME}"
    if isinstance(error, RuntimeError) and torch.distributed.is_initialized() and CONNECTION_LOST.search(text):
        return f"another process of this run has ended, and its own line says why ({first_line(error)}); {CAN_RESUME}"
    if isinstance(error, RuntimeError) and LOADER_ENDED.match(text):
        free = f"{shutil.disk_usage(SHARED_MEMORY).free / 1e6:.0f} MB of it are free" if SHARED_MEMORY.is_dir() else ""
        what = "a process that loads images has ended or delivers nothing"
        cause = first_line(error).partition(". ")[0]
        advice = f"if {SHARED_MEMORY} is full ({free}), enlarge it (docker run --shm-size=8g) or lower data.workers"
        return f"data.workers: {what} ({cause}); {advice}; {CAN_RESUME}"
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
        file = f"{error.filename}: " if error.filename else ""
        return f"{file}{error.strerror or first_line(error)}: cannot be written or read; {CAN_RESUME}"
    return None
