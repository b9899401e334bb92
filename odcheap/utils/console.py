"""The output of commands: lines that only one of several processes prints, a console for tables, and closed pipes."""

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any, TextIO, cast

from rich.console import Console
from rich.text import Text

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
    """Returns a console that does not interpret markup; it has 80 columns if the output is not a terminal.

    The environment variable `COLUMNS` sets another width.
    """
    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal() else 80
    return Console(markup=False, highlight=False, width=width)


@contextmanager
def show_steps() -> Generator[Callable[[str], None]]:
    """A context manager that returns a function, which takes a text and shows it as what the command does now.

    On a terminal each text replaces the one before in the same line; otherwise each is printed in a line of its own.
    """
    if not sys.stdout.isatty():
        yield say
        return
    with console().status("") as status:
        yield lambda text: status.update(Text(escape_control_chars(text)))


def show_progress(items: Iterable, count: int, description: str) -> Iterable:
    """Yields the items, and shows a progress bar if the output is a terminal.

    Args:
        items: The items.
        count: The number of items.
        description: The text before the bar.
    """
    from rich.progress import track  # here, since most commands start without it

    out = console()
    return track(items, description, total=count, console=out, transient=True, disable=not out.is_terminal)


def say(text: object) -> None:
    """Prints a text in one line on stdout; in a distributed run only the process with rank 0 prints it."""
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


def name_command(name: str) -> str:
    """Returns how the user calls one of odcheap's commands: `odcheap report`, or what works in a clone instead of it.

    Args:
        name: The command, such as `report`.
    """
    if "UV_RUN_RECURSION_DEPTH" in os.environ:  # set by `uv run`
        return f"uv run odcheap {name}"
    if shutil.which("odcheap"):
        return f"odcheap {name}"
    python = shutil.which("python")
    if python is not None and os.path.dirname(python) == os.path.dirname(sys.executable):
        return f"python -m odcheap {name}"
    shorter = min(sys.executable, os.path.relpath(sys.executable), key=len)
    return f"{shlex.quote(shorter)} -m odcheap {name}"


class PrefixedStream:
    """A text stream that writes whole lines only, each with a prefix, so that the lines of processes can be told apart.

    Args:
        stream: The stream, such as `sys.stdout`.
        prefix: The text before each line.
    """

    def __init__(self, stream: TextIO, prefix: str):
        self.stream, self.prefix, self.rest = stream, prefix, ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        if lines:
            self.stream.write("".join(f"{self.prefix}{line}\n" for line in lines))
            self.stream.flush()
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        """Returns False: progress bars of several processes would overwrite each other."""
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def prefix_lines(prefix: str) -> Generator[None]:
    """A context manager in which each line that this process writes to stdout or stderr begins with a prefix."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, PrefixedStream(stream, prefix)) for stream in streams)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.write("\n" if cast(Any, stream).rest else "")
        sys.stdout, sys.stderr = streams


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
