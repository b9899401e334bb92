"""A Lightning plugin that writes checkpoint files atomically: a file is complete, or it is not there."""

from pathlib import Path
from typing import Any

from lightning_fabric.plugins import CheckpointIO

from odcheap.runs.checkpoint_io import read_checkpoint
from odcheap.utils.files import write_checkpoint


class AtomicCheckpointIO(CheckpointIO):
    """Writes, reads and removes Lightning's checkpoints; a crash never leaves an incomplete file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(path, checkpoint)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)
