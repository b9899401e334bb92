"""Outcomes of a sweep's runs, read from their folders."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from odcheap.runs import status
from odcheap.runs.folder import SUMMARY, TEST

KILLED = "failed: ended without a reason (killed, or out of memory?)"


@dataclass(frozen=True)
class Outcome:
    """How a run of a sweep ended.

    Attributes:
        job_dir: The run's folder.
        text: `finished`, `was finished` (before this sweep began), `stopped: SIGNAL` or `failed: REASON`.
        summary: What the run wrote at its end; None where it did not finish.
    """

    job_dir: str
    text: str
    summary: dict[str, Any] | None


class SweepFolder:
    """The folder of a sweep. It is created when the sweep begins, to know later which files the sweep has changed.

    Args:
        path: `hydra.sweep.dir`.
    """

    def __init__(self, path: Path):
        self.path = path
        self.files_before = self.list_files()
        self.unwritten: list[Outcome] = []  # of runs whose folder could not be written

    def list_files(self) -> dict[Path, tuple[int, int]]:
        """Returns the files that tell how runs ended, with what changes when they are written again."""
        paths = [path for name in (SUMMARY, TEST, status.FILE_NAME) for path in self.path.rglob(name)]
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}

    def read_outcomes(self) -> list[Outcome]:
        """Returns the outcome of each run, by name. Failures from before this sweep are left out."""
        files = self.list_files()
        changed = {path for path, version in files.items() if self.files_before.get(path) != version}
        outcomes = [read_outcome(folder, changed) for folder in sorted({path.parent for path in files})]
        return [outcome for outcome in outcomes if outcome is not None] + self.unwritten


def read_outcome(folder: Path, changed: set[Path]) -> Outcome | None:
    """Returns how the run in this folder ended, None where nothing there belongs to this sweep.

    Args:
        folder: The run's folder.
        changed: The files that were written since the sweep began.
    """
    if folder / TEST in changed:
        return Outcome(str(folder), "finished", json.loads((folder / TEST).read_text()))
    if (folder / SUMMARY).is_file():
        text = "finished" if folder / SUMMARY in changed else "was finished"
        return Outcome(str(folder), text, json.loads((folder / SUMMARY).read_text()))
    if folder / status.FILE_NAME not in changed:
        return None
    last = status.read_status(folder)
    if last["state"] == "running":
        return Outcome(str(folder), "running" if status.is_alive(last) else KILLED, None)
    return Outcome(str(folder), f"{last['state']}: {last['reason']}", None)
