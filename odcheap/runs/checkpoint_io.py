"""Checkpoints: atomic to write, safe to read, bounded in number."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_fabric.plugins import CheckpointIO

from odcheap.utils.errors import OptionError
from odcheap.utils.files import read_torch, verify_checksum, write_checkpoint


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's reading and writing, made safe: a crash while saving leaves the older files whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(path, checkpoint)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_run(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def read_run(path: str | Path, option: str = "resume") -> dict[str, Any]:
    """A whole checkpoint of an odcheap run; `OptionError` for anything else."""
    verify_checksum(path, option)
    content = read_torch(path, option)
    if not is_of_run(content):
        raise OptionError(option, path, "not a checkpoint of an odcheap run")
    return content


def is_of_run(content: dict[str, Any]) -> bool:
    """Whether it has what is asked of it before Lightning sees it: somebody may have made it up, checksum and all."""
    about, record = content.get("odcheap"), (content.get("callbacks") or {}).get("Record")
    kinds = {"overrides": list, "config": dict, "split": str, "classes": list, "student": dict}
    if not isinstance(about, dict) or not all(isinstance(about.get(name), kind) for name, kind in kinds.items()):
        return False
    texts = [*about["overrides"], *about["classes"]]
    numbers = isinstance(content.get("epoch"), int) and isinstance(record, dict) and record_is_whole(record)
    return numbers and "loops" in content and "state_dict" in content and all(isinstance(t, str) for t in texts)


def record_is_whole(record: dict[str, Any]) -> bool:
    selected = record.get("selected")
    return (
        isinstance(record.get("history"), list)
        and isinstance(selected, dict)
        and all(isinstance(selected.get(name), int) for name in ("candidate", "epoch"))
    )


def epoch_path(job_dir: Path, epoch: int) -> Path:
    """Where the weights lie as they were when this epoch (from 0) had ended."""
    return job_dir / "checkpoints" / f"epoch-{epoch:04d}.ckpt"


def step_path(job_dir: Path, epoch: int, step: int) -> Path:
    """The same in the middle of an epoch, after `step` of its batches; sorts before the epoch's own file."""
    return job_dir / "checkpoints" / f"epoch-{epoch:04d}-step-{step:07d}.ckpt"


def all_paths(job_dir: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((job_dir / "checkpoints").glob("epoch-*.ckpt"))


def prune(job_dir: Path, keep: int, selected: Path | None) -> None:
    """Leaves the newest `keep` files and the selected one."""
    for path in all_paths(job_dir)[:-keep]:
        if path != selected:
            path.unlink(missing_ok=True)


def newest_usable(job_dir: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its content; tells what was passed over and why."""
    for path in reversed(all_paths(job_dir)):
        try:
            return path, read_run(path)
        except OptionError as error:
            say(f"passed over: {error}")
    return None
