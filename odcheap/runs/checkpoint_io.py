"""Checkpoints of a run: how they are written, read, named, and removed."""

from pathlib import Path
from typing import Any

from lightning_fabric.plugins import CheckpointIO

from odcheap.utils.console import say
from odcheap.utils.errors import OptionError
from odcheap.utils.files import read_torch, verify_checksum, write_checkpoint


class AtomicCheckpointIO(CheckpointIO):
    """Writes Lightning's checkpoints so that a crash never leaves an incomplete file, and reads them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(path, checkpoint)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: str | Path, option: str = "resume") -> dict[str, Any]:
    """Reads a checkpoint of a run.

    Args:
        path: The file.
        option: The option that named the file, for messages.

    Raises:
        OptionError: The file is damaged, or it is not a checkpoint of an odcheap run.
    """
    verify_checksum(path, option)
    content = read_torch(path, option)
    if not is_run_checkpoint(content):
        raise OptionError(option, path, "not a checkpoint of an odcheap run")
    return content


def is_run_checkpoint(content: dict[str, Any]) -> bool:
    """Returns whether a checkpoint has the entries that are read before Lightning loads it, with the right types.

    This is checked since a file from an untrusted source may have a correct checksum.
    """
    return (
        has_entries(content, odcheap=dict, callbacks=dict, epoch=int, loops=dict, state_dict=dict)
        and has_entries(content["odcheap"], overrides=list, config=dict, split=str, classes=list, student=dict)
        and all(isinstance(text, str) for name in ("overrides", "classes") for text in content["odcheap"][name])
        and has_entries(content["callbacks"], Record=dict)
        and has_entries(content["callbacks"]["Record"], history=list, selected=dict)
        and has_entries(content["callbacks"]["Record"]["selected"], candidate=int, epoch=int)
    )


def has_entries(node: dict[str, Any], **types: type) -> bool:
    """Returns whether a dict has entries of these names and types."""
    return all(isinstance(node.get(name), kind) for name, kind in types.items())


def epoch_path(job_dir: Path, epoch: int) -> Path:
    """Returns the path of the checkpoint at the end of an epoch (from 0)."""
    return job_dir / "checkpoints" / f"epoch-{epoch:04d}.ckpt"


def step_path(job_dir: Path, epoch: int, step: int) -> Path:
    """Returns the path of a checkpoint after `step` batches of an epoch. It sorts before the epoch's checkpoint."""
    return job_dir / "checkpoints" / f"epoch-{epoch:04d}-step-{step:07d}.ckpt"


def list_checkpoints(job_dir: Path) -> list[Path]:
    """Returns the run's checkpoints, oldest first."""
    return sorted((job_dir / "checkpoints").glob("epoch-*.ckpt"))


def prune_checkpoints(job_dir: Path, keep: int, selected: Path | None) -> None:
    """Removes all checkpoints except the newest `keep` and the selected one."""
    for path in list_checkpoints(job_dir)[:-keep]:
        if path != selected:
            path.unlink(missing_ok=True)


def find_newest_usable(job_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """Returns the newest usable checkpoint and its content, or None. Prints which ones were skipped, and why."""
    for path in reversed(list_checkpoints(job_dir)):
        try:
            return path, read_checkpoint(path)
        except OptionError as error:
            say(f"skipped: {error}")
    return None
