"""Runs read back from their folders, whoever made them and however they ended."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from odcheap.report.statistics import Finished
from odcheap.runs import status
from odcheap.runs.checkpoint_io import all_paths
from odcheap.runs.resume import options_of
from odcheap.utils.errors import OptionError, first_line

STRANGE = (OSError, ValueError, KeyError, TypeError, AttributeError)  # what files that we did not write lead to


class Found(NamedTuple):
    """A run's folder: `state` is finished, failed, running, stopped or unreadable, `reason` says more where it can."""

    folder: Path
    state: str
    reason: str = ""
    run: Finished | None = None


def read(folders: Iterable[str | Path]) -> list[Found]:
    """Every run at or below these folders, in the order of their names. `OptionError` where there is none."""
    found: list[Found] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise OptionError("DIR", folder, "no such folder")
        inside = sorted({path.parent for name in ("config.yaml", status.NAME) for path in folder.rglob(name)})
        if not inside:
            raise OptionError("DIR", folder, "holds no run of odcheap")
        found += [of(path) for path in inside]
    return list({entry.folder.resolve(): entry for entry in found}.values())


def of(folder: Path) -> Found:
    """What became of one run. A folder that cannot be read is told, and is no reason to stop."""
    try:
        summary = json_of(folder / "summary.json")
        if summary is None or not summary.get("finished"):
            return unfinished(folder, json_of(folder / status.NAME) or {})
        history = records(folder / "metrics.csv")
        return Found(folder, "finished", "", Finished(options_of(folder / "config.yaml"), summary, history))
    except (*STRANGE, OmegaConfBaseException, YAMLError, RecursionError) as error:
        return Found(folder, "unreadable", first_line(error))


def unfinished(folder: Path, word: dict[str, Any]) -> Found:
    epochs = len(records(folder / "metrics.csv"))
    far = f"{epochs} epochs done" if epochs else "no epoch done"
    if word.get("state") == "failed":
        return Found(folder, "failed", word.get("reason", ""))
    if word.get("state") == "running" and status.is_alive(word):
        return Found(folder, "running", f"{far}; process {word.get('pid')} on {word.get('host')}")
    way = "the same command continues it" if all_paths(folder) else "nothing was saved yet"
    return Found(folder, "stopped", f"{far}; {way}")


def json_of(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def records(path: Path) -> tuple[dict[str, float], ...]:
    """The rows of a `metrics.csv`; what is empty is left out."""
    if not path.is_file():
        return ()
    with open(path, newline="") as file:
        return tuple({k: float(v) for k, v in row.items() if k and v} for row in csv.DictReader(file))
