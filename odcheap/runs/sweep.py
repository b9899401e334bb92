"""Sweeps: a callback at their beginning, and the outcomes of their runs, read from the runs' folders."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from odcheap.runs import status
from odcheap.runs.folder import SUMMARY, TEST
from odcheap.utils.console import say

KILLED = "failed: ended without a reason (killed, or out of memory?)"


@dataclass(frozen=True)
class Outcome:
    """How a run of a sweep ended.

    Attributes:
        job_dir: The run's folder.
        text: `finished`, `was finished` (before this sweep began), `stopped: SIGNAL` or `failed: REASON`.
        summary: The content of `summary.json` or `test.json`; None if the run did not finish.
    """

    job_dir: str
    text: str
    summary: dict[str, Any] | None


class SweepFolder:
    """The folder of a sweep.

    The object is built when the sweep begins, so that it knows later which files the sweep has changed.

    Args:
        path: `hydra.sweep.dir`.
    """

    def __init__(self, path: Path):
        self.path = path
        self.files_before = self.list_files()
        self.unwritten: list[Outcome] = []  # outcomes of runs whose folder could not be written

    def list_files(self) -> dict[Path, tuple[int, int]]:
        """Returns the files from which outcomes are read, with values that change when a file is written again."""
        paths = [path for name in (SUMMARY, TEST, status.FILE_NAME) for path in self.path.rglob(name)]
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}

    def read_outcomes(self) -> list[Outcome]:
        """Returns the outcome of each run, sorted by name, without failures from before this sweep."""
        files = self.list_files()
        changed = {path for path, version in files.items() if self.files_before.get(path) != version}
        outcomes = [read_outcome(folder, changed) for folder in sorted({path.parent for path in files})]
        return [outcome for outcome in outcomes if outcome is not None] + self.unwritten


# The sweep that this process has started, if any. Hydra builds the callback itself and gives no access to it.
started_sweeps: list[SweepFolder] = []


class SweepStart(Callback):
    """Remembers the state of the sweep's folder before the first run, and prints where the folder is."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        folder = config.hydra.sweep.dir
        started_sweeps.append(SweepFolder(Path(folder)))
        say(f"sweep in {folder}; its progress: odcheap report --status {folder}")


def read_outcome(folder: Path, changed: set[Path]) -> Outcome | None:
    """Returns how the run in this folder ended, or None if nothing in it belongs to this sweep.

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
