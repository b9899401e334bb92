"""What a command prints: one line for all processes, one console for tables."""

import os
import sys

import torch
from rich.console import Console

from odcheap.utils.text import escape_control_chars

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # set by torchrun and Slurm before the processes have met


def process_rank() -> int:
    """Returns this process's rank in a distributed run, 0 in a run of one process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    found = (os.environ[name] for name in RANK_VARIABLES if os.environ.get(name, "").isdecimal())
    return int(next(found, "0"))


def console() -> Console:
    """Returns a console that prints text as it is, not as markup, and is wide enough for tables without a terminal."""
    found = Console(markup=False, highlight=False)
    return found if found.is_terminal else Console(markup=False, highlight=False, width=120)


def say(text: object) -> None:
    """Prints one line on stdout, from the process of rank 0 only."""
    if process_rank() == 0:
        print(escape_control_chars(text), flush=True)


def print_error(line: object, every_rank: bool = False) -> int:
    """Prints `error: <line>` on stderr, from the process of rank 0 or from each one with its rank.

    Returns:
        The exit status of a command that failed, 1.
    """
    rank = process_rank()
    if every_rank or rank == 0:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        where = f"process {rank}: " if every_rank and distributed else ""
        print(f"error: {where}{escape_control_chars(line)}", file=sys.stderr, flush=True)
    return 1
