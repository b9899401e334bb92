"""The output of commands: lines that only the main process prints, a console for tables, and streams that may close."""

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
    """Returns whether PyTorch's process group is initialized in this process. PyTorch is not imported for this."""
    torch = sys.modules.get("torch")  # not imported here: commands that compute nothing start faster without it
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def console() -> Console:
    """Returns a rich console for tables, which prints text as it is, without interpreting markup.

    It has 80 columns if the output is not a terminal; the environment variable `COLUMNS` sets another width.
    """
    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal() else 80
    return Console(markup=False, highlight=False, width=width)


@contextmanager
def show_steps() -> Generator[Callable[[str], None]]:
    """A context manager that shows what a command is doing: it yields a function to call with a text for each step.

    On a terminal, each text replaces the previous text in the same line. Otherwise, each text is printed in its own
    line.
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
    """Prints `error: <line>` on stderr, and returns 1.

    Args:
        line: The text after `error: `.
        every_rank: If true, each process of a distributed run prints the line, with its rank. If false, only the
            process with rank 0 prints it.

    Returns:
        1, the exit status of a command that failed.
    """
    rank = process_rank()
    if every_rank or rank == 0:
        process = f"process {rank}: " if every_rank and is_distributed() else ""
        print(f"error: {process}{escape_control_chars(line)}", file=sys.stderr, flush=True)
    return 1


def name_command(name: str) -> str:
    """Returns the text with which the user can call a command of odcheap here, such as `uv run odcheap report`.

    Args:
        name: The name of the command, such as "report".
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
    """A text stream that writes a prefix before each line, so that the output of several processes can be told apart.

    Only whole lines are written; an unfinished line is kept until its end arrives.

    Args:
        stream: The stream to write to, such as `sys.stdout`.
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
    """A text stream that raises no error if its output can no longer be written, but discards it.

    Output can no longer be written if the reader of a pipe has ended (`| head`), or if a terminal was closed.

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
        """Discards what is in the stream's buffer, and everything that is written later."""
        # The file descriptor then leads to /dev/null.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def keep_going_without_output() -> Generator[None]:
    """A context manager in which a closed stdout or stderr is no error: what is written to it is discarded."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as null:
        sys.stdout, sys.stderr = (cast(TextIO, LastingStream(stream or null)) for stream in before)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = before
