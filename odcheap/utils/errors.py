"""Failures that one line explains, in place of a traceback."""

import errno
import re

LOWER_MEMORY = "lower data.batch_size or num_stu, or try trainer.precision=bf16-mixed"
CAN_RESUME = "what was saved before is whole, and resume=auto continues it"
OUT_OF_MEMORY = re.compile(r"not enough memory|can't allocate memory|out of memory", re.IGNORECASE)
CONNECTION_LOST = re.compile(
    r"connection (closed|reset)|broken pipe|socket closed|timed out|remote process exited", re.IGNORECASE
)
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


class Failure(Exception):
    """A failure that the user can act on; its text is one line, which commands print without a traceback."""


class OptionError(Failure, ValueError):
    """An option has a value that is not allowed.

    Args:
        option: The option's name, as it is given on the command line.
        value: The value it has.
        allowed: What is allowed, or what is wrong with the value.

    Example:
        >>> print(OptionError("num_stu", 0, "must be 1 or more"))
        num_stu=0: must be 1 or more
    """

    def __init__(self, option: str, value: object, allowed: str):
        given = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
        super().__init__(f"{option}={given}: {allowed}")

    def with_group(self, group: str) -> "OptionError":
        """Returns the same error with the option named as part of a group of `conf/`: `init` as `backbone.init`."""
        return _restore_option_error(f"{group}.{self}")

    def __reduce__(self):  # pickled by workers: the default would call __init__ with the finished line
        return _restore_option_error, self.args


def _restore_option_error(line: str) -> OptionError:
    error = OptionError.__new__(OptionError)
    error.args = (line,)
    return error


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, at most 160 characters; its type's name where it has no text."""
    return str(error).strip().split("\n")[0][:160] or type(error).__name__


def describe_external_failure(error: BaseException) -> str | None:
    """Describes a failure from outside the program: no memory left, a disk that fails, another process that ended.

    Returns:
        One line that says what to do, or None where the error is something else, such as a bug.
    """
    import torch  # not above: this module is imported by all others

    text = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(text)):
        where = "on the GPU" if isinstance(error, torch.OutOfMemoryError) else "on this machine"
        return f"out of memory {where}: {LOWER_MEMORY}; {CAN_RESUME}"
    if isinstance(error, RuntimeError) and torch.distributed.is_initialized() and CONNECTION_LOST.search(text):
        return f"another process of this run is gone, its own line says why ({first_line(error)}); {CAN_RESUME}"
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}: cannot be written or read; {CAN_RESUME}"
    return None
