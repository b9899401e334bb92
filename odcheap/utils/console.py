"""The output of commands: lines that only one of several processes prints, a console for tables, and closed pipes."""

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from rich.console import Console

from odcheap.utils.text import escape_control_chars

# Set by torchrun and Slurm, so that the rank is known before the process group is initialized.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")


def process_rank() -> int:
    """Returns the number (rank) of this process in a distributed run; 0 in a run of one process."""
    if is_distributed():
        return sys.modules["torch"].distributed.get_rank()
    ranks = (os.environ[name] for name in RANK_VARIABLES if os.environ.get(name, "").isdecimal())
    return int(next(ranks, "0"))


def is_distributed() -> bool:
    """Returns whether this process has joined a process group."""
    torch = sys.modules.get("torch")  # not imported here: commands that compute nothing start faster without it
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def console() -> Console:
    """Returns a console that does not interpret markup; it has 120 columns if the output is not a terminal."""
    width = None if sys.stdout.isatty() else 120
    return Console(markup=False, highlight=False, width=width)


def say(text: object) -> None:
    """Prints one line on stdout, in the process with rank 0 only."""
    if process_rank() == 0:
        print(escape_control_chars(text), flush=True)


def print_error(line: object, every_rank: bool = False) -> int:
    """Prints `error: <line>` on stderr.

    Args:
        line: The text after `error: `.
        every_rank: Whether each process prints the line, with its rank; otherwise only the process with rank 0 does.

    Returns:
        The exit status of a command that failed, 1.
    """
    rank = process_rank()
    if every_rank or rank == 0:
        process = f"process {rank}: " if every_rank and is_distributed() else ""
        print(f"error: {process}{escape_control_chars(line)}", file=sys.stderr, flush=True)
    return 1


class LastingStream:
    """A text stream that discards its output if nothing can be written any more, where others raise an error.

    This happens if the reader of a pipe ends (`| head`), or if a terminal is closed.

    Args:
        stream: The stream to write to, such as `sys.stdout`.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except OSError:
            self.discard()
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self.discard()

    def discard(self) -> None:
        """Discards what is in the stream's buffer and all that is written later."""
        # The file descriptor then leads to /dev/null.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def keep_going_without_output() -> Generator[None]:
    """A context manager in which output is discarded, without an error, if stdout or stderr is closed."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as null:
        sys.stdout, sys.stderr = (cast(TextIO, LastingStream(stream or null)) for stream in before)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = before
