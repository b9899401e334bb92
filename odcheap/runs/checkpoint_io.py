"""Checkpoints of a run: written whole or not at all, read without running code, bounded in number."""

from pathlib import Path
from typing import Any

from lightning_fabric.plugins import CheckpointIO

from odcheap.utils.console import say
from odcheap.utils.errors import OptionError
from odcheap.utils.files import read_torch, verify_checksum, write_checkpoint


class AtomicCheckpointIO(CheckpointIO):
    """Writes and reads Lightning's checkpoints such that a crash during a save leaves the older files whole."""

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
        OptionError: The file is damaged, or no checkpoint of an odcheap run.
    """
    verify_checksum(path, option)
    content = read_torch(path, option)
    if not is_run_checkpoint(content):
        raise OptionError(option, path, "not a checkpoint of an odcheap run")
    return content


def is_run_checkpoint(content: dict[str, Any]) -> bool:
    """Returns whether a checkpoint has every entry that is read before Lightning loads it, with the right type.

    The file may be a stranger's, with a correct checksum.
    """
    saved, record = content.get("odcheap"), (content.get("callbacks") or {}).get("Record")
    types = {"overrides": list, "config": dict, "split": str, "classes": list, "student": dict}
    if not isinstance(saved, dict) or not all(isinstance(saved.get(name), kind) for name, kind in types.items()):
        return False
    if not all(isinstance(text, str) for text in [*saved["overrides"], *saved["classes"]]):
        return False
    has_record = isinstance(content.get("epoch"), int) and isinstance(record, dict) and is_record(record)
    return has_record and "loops" in content and "state_dict" in content


def is_record(record: dict[str, Any]) -> bool:
    """Whether this is the state of the callback that keeps figures and selection."""
    selected = record.get("selected")
    return (
        isinstance(record.get("history"), list)
        and isinstance(selected, dict)
        and all(isinstance(selected.get(name), int) for name in ("candidate", "epoch"))
    )


def epoch_path(job_dir: Path, epoch: int) -> Path:
    """Returns the path of the checkpoint at the end of an epoch (from 0)."""
    return job_dir / "checkpoints" / f"epoch-{epoch:04d}.ckpt"


def step_path(job_dir: Path, epoch: int, step: int) -> Path:
    """Returns the path of a checkpoint after `step` batches of an epoch; it sorts before the epoch's own."""
    return job_dir / "checkpoints" / f"epoch-{epoch:04d}-step-{step:07d}.ckpt"


def list_checkpoints(job_dir: Path) -> list[Path]:
    """Returns the run's checkpoints, oldest first."""
    return sorted((job_dir / "checkpoints").glob("epoch-*.ckpt"))


def prune_checkpoints(job_dir: Path, keep: int, selected: Path | None) -> None:
    """Removes all checkpoints but the newest `keep` and the selected one."""
    for path in list_checkpoints(job_dir)[:-keep]:
        if path != selected:
            path.unlink(missing_ok=True)


def find_newest_usable(job_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """Returns the newest whole checkpoint and its content, None without one. Prints which were skipped, and why."""
    for path in reversed(list_checkpoints(job_dir)):
        try:
            return path, read_checkpoint(path)
        except OptionError as error:
            say(f"skipped: {error}")
    return None
