"""Checkpoints of a run: how they are named, read, listed and removed."""

import re
from pathlib import Path
from typing import Any

from odcheap.runs.schemas import Checkpoint, validate
from odcheap.utils.console import say
from odcheap.utils.errors import OptionError
from odcheap.utils.files import read_torch, verify_checksum

CHECKPOINT_NAME = re.compile(r"epoch-(\d{4,})(?:-step-(\d{7,}))?\.ckpt", re.ASCII)


def read_checkpoint(path: str | Path, option: str = "resume") -> dict[str, Any]:
    """Reads a checkpoint of a run, and checks its checksum and its entries.

    Args:
        path: The file.
        option: The name of the option that gave the file, for messages.

    Returns:
        The content of the checkpoint, with the entries of `schemas.Checkpoint` and others.

    Raises:
        OptionError: The file is damaged, or it is not a checkpoint of an odcheap run.
    """
    verify_checksum(path, option)
    content = read_torch(path, option)
    try:  # a file from an untrusted source may have a correct checksum
        validate(Checkpoint, content, path, option)
    except OptionError as error:
        raise OptionError(option, path, f"not a checkpoint of an odcheap run ({error.allowed})") from error
    return content


def epoch_path(job_dir: Path, epoch: int) -> Path:
    """Returns the path of the checkpoint at the end of an epoch, by the epoch's number from 0."""
    return job_dir / "checkpoints" / f"epoch-{epoch:04d}.ckpt"


def step_path(job_dir: Path, epoch: int, step: int) -> Path:
    """Returns the path of a checkpoint within an epoch (from 0), after `step` of its batches."""
    return job_dir / "checkpoints" / f"epoch-{epoch:04d}-step-{step:07d}.ckpt"


def checkpoint_order(path: Path) -> tuple[int, float]:
    """Returns the epoch and the step in a checkpoint's name, as the key by which checkpoints are sorted.

    The step of a checkpoint at the end of an epoch is infinity.

    Example:
        >>> checkpoint_order(Path("epoch-9999.ckpt")) < checkpoint_order(Path("epoch-10000-step-0000007.ckpt"))
        True
    """
    match = CHECKPOINT_NAME.fullmatch(path.name)
    assert match is not None, path
    epoch, step = match.groups()
    return int(epoch), float("inf") if step is None else int(step)


def list_checkpoints(job_dir: Path) -> list[Path]:
    """Returns the checkpoints of a run, the oldest one first; files with other names are ignored."""
    folder = job_dir / "checkpoints"
    paths = [path for path in folder.glob("epoch-*.ckpt") if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(paths, key=checkpoint_order)


def prune_checkpoints(job_dir: Path, keep: int, selected: Path | None) -> None:
    """Removes the oldest checkpoints of a run.

    Args:
        job_dir: The run's folder.
        keep: The number of checkpoints that are kept, the newest ones.
        selected: A checkpoint that is kept in addition; None for none.
    """
    for path in list_checkpoints(job_dir)[:-keep]:
        if path != selected:
            path.unlink(missing_ok=True)


def find_newest_usable(job_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """Returns the newest checkpoint that can be read, and its content; None if no checkpoint can be read.

    For each newer checkpoint that cannot be read, a line is printed that says why.
    """
    for path in reversed(list_checkpoints(job_dir)):
        try:
            return path, read_checkpoint(path)
        except OptionError as error:
            say(f"skipped: {error}")
    return None
