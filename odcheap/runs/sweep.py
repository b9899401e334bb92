"""Sweeps: a callback for the beginning of a sweep, and the outcomes of its runs, which are read from their folders."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from pydantic import BaseModel

from odcheap.runs import status
from odcheap.runs.folder import SUMMARY, TEST
from odcheap.runs.schemas import Summary, Test, validate
from odcheap.utils.console import print_error, say
from odcheap.utils.documents import read_json
from odcheap.utils.errors import OptionError

SWEEP_CONFIG = b"hydra:\n"  # the beginning of the multirun.yaml that Hydra writes for each sweep
KILLED = "failed: ended without a reason (killed, or out of memory?)"


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run of a sweep.

    Attributes:
        job_dir: The run's folder.
        text: `finished`, `was finished` (before this sweep began), `running`, `stopped: SIGNAL` or `failed: REASON`.
        summary: The content of `summary.json` or `test.json`; None if the run did not finish.
    """

    job_dir: str
    text: str
    summary: dict[str, Any] | None


class SweepFolder:
    """The folder of a sweep, which must be constructed when the sweep begins: it notes which files exist then.

    Args:
        path: The value of the option `hydra.sweep.dir`.

    Attributes:
        unwritten: The outcomes of runs whose folder could not be written.
    """

    def __init__(self, path: Path):
        self.path = path
        self.files_before = self.list_files()
        self.unwritten: list[Outcome] = []

    def list_files(self) -> dict[Path, tuple[int, int]]:
        """Returns the files from which outcomes are read, each with its inode and modification time."""
        paths = [path for name in (SUMMARY, TEST, status.FILE_NAME) for path in self.path.rglob(name)]
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}

    def read_outcomes(self) -> list[Outcome]:
        """Returns the outcomes of all runs in the folder, sorted by name, without failures from before this sweep."""
        files = self.list_files()
        changed = {path for path, version in files.items() if self.files_before.get(path) != version}
        outcomes = [read_outcome(folder, changed) for folder in sorted({path.parent for path in files})]
        return [outcome for outcome in outcomes if outcome is not None] + self.unwritten


# The sweep that this process has started, if any. Hydra builds the callback itself and gives no access to it.
started_sweeps: list[SweepFolder] = []


class SweepStart(Callback):
    """A Hydra callback that creates the `SweepFolder` before the first run, and prints the path of the folder."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        folder = config.hydra.sweep.dir
        # Hydra reduces an exception of a callback to a warning, but lets SystemExit pass.
        try:
            check_sweep_folder(Path(folder))
        except OptionError as error:
            sys.exit(print_error(str(error)))
        started_sweeps.append(SweepFolder(Path(folder)))
        say(f"sweep in {folder}; its progress: odcheap report --status {folder}")


def check_sweep_folder(folder: Path) -> None:
    """Raises `OptionError` if Hydra's `multirun.yaml` would overwrite a user's file, or be written through a link."""
    path = folder / "multirun.yaml"
    if not os.path.lexists(path):
        return
    is_own = path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1
    if is_own:
        with open(path, "rb") as file:
            is_own = file.read(len(SWEEP_CONFIG)) == SWEEP_CONFIG
    if not is_own:
        raise OptionError(
            "hydra.sweep.dir", folder, "holds a multirun.yaml that no sweep has written: name another folder"
        )


def read_outcome(folder: Path, changed: set[Path]) -> Outcome | None:
    """Returns the outcome of the run in a folder; None if the folder contains no result and nothing of this sweep.

    Args:
        folder: The run's folder.
        changed: The files that have been written since the sweep began.
    """
    # A result counts if it was there before; a status counts only if it was written in this sweep.
    try:
        if folder / TEST in changed:
            return Outcome(str(folder), "finished", read_checked(folder / TEST, Test))
        if (folder / SUMMARY).is_file():
            text = "finished" if folder / SUMMARY in changed else "was finished"
            return Outcome(str(folder), text, read_checked(folder / SUMMARY, Summary))
        last = status.read_status(folder) if folder / status.FILE_NAME in changed else {}
    except OptionError as error:
        return Outcome(str(folder), f"failed: {error}", None)
    if not last:
        return None
    if last["state"] == "running":
        return Outcome(str(folder), "running" if status.is_alive(last) else KILLED, None)
    return Outcome(str(folder), f"{last['state']}: {last['reason']}", None)


def read_checked(path: Path, schema: type[BaseModel]) -> dict[str, Any]:
    """Returns the content of a JSON file of a run; raises `OptionError` if it does not fit the schema."""
    content = read_json(path, "job_dir")
    validate(schema, content, path, "job_dir")
    return content
