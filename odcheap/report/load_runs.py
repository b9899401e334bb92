"""Reads the folders of runs: finished, unfinished, damaged, or written by somebody else."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from odcheap.runs import status
from odcheap.runs.checkpoint_io import list_checkpoints
from odcheap.runs.folder import read_options
from odcheap.utils.errors import OptionError, first_line

READ_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)  # of files written by others


class FinishedRun(NamedTuple):
    """A finished run.

    Attributes:
        options: Its options by dotted names, such as `data.batch_size`; `method.part` is the method's name.
        summary: The content of `summary.json`.
        history: The rows of `metrics.csv`, one an epoch; empty if there is no such file.
        folder: The run's folder.
    """

    options: dict[str, Any]
    summary: dict[str, Any]
    history: pd.DataFrame = pd.DataFrame()
    folder: Path = Path()


class RunFolder(NamedTuple):
    """A run's folder: `state` is finished, failed, running, stopped or unreadable, and `reason` says why."""

    folder: Path
    state: str
    reason: str = ""
    run: FinishedRun | None = None


def load_runs(folders: Iterable[str | Path]) -> list[RunFolder]:
    """Reads every run in or below these folders, each once, sorted by name.

    Raises:
        OptionError: A folder does not exist or holds no run.
    """
    found: list[RunFolder] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise OptionError("DIR", folder, "no such folder")
        runs = sorted({path.parent for name in ("config.yaml", status.FILE_NAME) for path in folder.rglob(name)})
        if not runs:
            raise OptionError("DIR", folder, "holds no run of odcheap")
        found += map(load_run, runs)
    return list({entry.folder.resolve(): entry for entry in found}.values())


def load_run(folder: Path) -> RunFolder:
    """Reads one run's folder. A folder that cannot be read gets the state `unreadable`."""
    try:
        path = folder / "summary.json"
        summary = json.loads(path.read_text()) if path.is_file() else {}
        if not summary.get("finished"):
            return describe_unfinished(folder, status.read_status(folder))
        run = FinishedRun(read_options(folder / "config.yaml"), summary, read_history(folder), folder)
        return RunFolder(folder, "finished", "", run)
    except (*READ_ERRORS, OmegaConfBaseException, YAMLError) as error:
        return RunFolder(folder, "unreadable", first_line(error))


def describe_unfinished(folder: Path, last: dict[str, Any]) -> RunFolder:
    """Returns the state of a run without a finished summary; `last` is the content of `status.json`."""
    epochs = len(read_history(folder))
    progress = f"{epochs} epochs done" if epochs else "no epoch done"
    if last.get("state") == "failed":
        return RunFolder(folder, "failed", last.get("reason", ""))
    if last.get("state") == "running" and status.is_alive(last):
        return RunFolder(folder, "running", f"{progress}; process {last.get('pid')} on {last.get('host')}")
    advice = "the same command continues it" if list_checkpoints(folder) else "nothing was saved yet"
    return RunFolder(folder, "stopped", f"{progress}; {advice}")


def read_history(folder: Path) -> pd.DataFrame:
    """Returns the rows of `metrics.csv` as floats; empty cells are NaN."""
    path = folder / "metrics.csv"
    return pd.read_csv(path).astype(float) if path.is_file() else pd.DataFrame()
