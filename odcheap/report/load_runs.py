"""Reads the folders of runs, which may be finished, unfinished, damaged, or from an untrusted source."""

import csv
import io
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from odcheap.models.student_shapes import GROUPS, name_shape
from odcheap.runs import status
from odcheap.runs.folder import list_checkpoints, read_options, read_summary
from odcheap.runs.sweep import PLAN, read_plans
from odcheap.utils.errors import OptionError, first_line
from odcheap.utils.files import read_text
from odcheap.utils.text import count_things, escape_control_chars

MAX_BYTES = 64 << 20  # of metrics.csv
MAX_FIGURE = 1e100  # larger numbers cannot be drawn


class FinishedRun(NamedTuple):
    """What is read from the folder of a finished run.

    Attributes:
        options: The options of the run by dotted names, such as `data.batch_size`; `method.part` is the name of the
            method.
        summary: The content of `summary.json`.
        history: The content of `metrics.csv`, with a row for each epoch; empty if there is no such file.
        folder: The run's folder.
    """

    options: dict[str, Any]
    summary: dict[str, Any]
    history: pd.DataFrame = pd.DataFrame()
    folder: Path = Path()


class RunFolder(NamedTuple):
    """The folder of a run, and the state of the run.

    Attributes:
        folder: The folder.
        state: "finished", "failed", "running", "stopped", "not begun" or "unreadable".
        reason: A text that says why the run is in this state; it may be empty.
        run: What was read, if the run is finished, otherwise None.
        host: The name of the machine that wrote the run's status, if known. A report, which others may read, does not
            name it.
        process: The id of the process that trains, if the run is running, otherwise None.
    """

    folder: Path
    state: str
    reason: str = ""
    run: FinishedRun | None = None
    host: str | None = None
    process: int | None = None


def load_runs(folders: Iterable[str | Path]) -> list[RunFolder]:
    """Reads all runs in the given folders and in the folders below them, each run once, sorted by name.

    Args:
        folders: Folders of runs, or folders that contain such folders, as that of a sweep does.

    Raises:
        OptionError: A folder does not exist, or holds no run and no sweep.
    """
    found: list[RunFolder] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise OptionError("DIR", folder, "no such folder")
        runs = sorted({path.parent for name in ("config.yaml", status.FILE_NAME) for path in folder.rglob(name)})
        if not runs and not any(folder.rglob(PLAN)):
            raise OptionError("DIR", folder, "holds no run of odcheap")
        found += map(load_run, runs)
    return list({entry.folder.resolve(): entry for entry in found}.values())


def list_planned_runs(folders: Iterable[str | Path], known: Iterable[RunFolder]) -> list[RunFolder]:
    """Returns the planned runs of sweeps that have not begun, with the state "not begun".

    Args:
        folders: Folders of sweeps, or folders that contain such folders.
        known: The runs that have begun, as `load_runs` returns them; they are left out.
    """
    begun = {entry.folder.resolve() for entry in known}
    plans = sorted({path.parent for folder in folders for path in Path(folder).rglob(PLAN)})
    planned = [folder / name for folder in plans for plan in read_plans(folder) for name in plan.runs]
    return [RunFolder(folder, "not begun") for folder in dict.fromkeys(planned) if folder.resolve() not in begun]


def load_run(folder: Path) -> RunFolder:
    """Reads the folder of a run. If it cannot be read, nothing is raised, and the state is "unreadable"."""
    try:
        summary = read_summary(folder)
        if summary is None:
            return describe_unfinished(folder, status.read_status(folder))
        options = name_students(read_options(folder / "config.yaml", "DIR"), folder / "config.yaml")
        run = FinishedRun(options, summary, read_history(folder), folder)
        return RunFolder(folder, "finished", "", run)
    except OptionError as error:  # one line of our own, which is not cut, however long the folder's path is
        return RunFolder(folder, "unreadable", str(error))
    except (OSError, ValueError) as error:
        return RunFolder(folder, "unreadable", first_line(error))


def name_students(options: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns the options of a run, in which short names replace the option `students`.

    This option describes students with different shapes. For example, a run with `students=[DW,Shift]` gets the option
    `block_type.part` "DW+Shift". All other options of its backbone and block type are left out. If the students differ
    in one of these, `students` becomes a text with the names of all students; otherwise `students` is left out, too. A
    run without `students` keeps its options.

    Args:
        options: The options of the run by dotted names; the entry `students` is removed from this dict.
        path: The file of the options, for messages.

    Raises:
        OptionError: The option `students` does not have the form in which odcheap writes it.
    """
    shapes = options.pop("students", None)
    if shapes is None:
        return options
    try:
        kept = {key: value for key, value in options.items() if key.partition(".")[0] not in GROUPS}
        for group in GROUPS:
            parts = [str(shape[group]["part"]) for shape in shapes]
            kept[f"{group}.part"] = parts[0] if len(set(parts)) == 1 else "+".join(parts)
        names = [name_shape(shape, shapes) for shape in shapes]
    except (KeyError, TypeError, AttributeError) as error:
        raise OptionError("DIR", path, f"its students are not as odcheap writes them ({error!r})") from error
    return kept | ({"students": ", ".join(names)} if any("=" in name for name in names) else {})


def describe_unfinished(folder: Path, last: dict[str, Any]) -> RunFolder:
    """Returns the folder and state of a run that is not finished, from `last`, the content of its `status.json`."""
    epochs = len(read_history(folder))
    progress = f"{count_things(epochs, 'epoch')} done" if epochs else "no epoch done"
    if last.get("state") == "failed":
        return RunFolder(folder, "failed", last["reason"], host=last.get("host"))
    if last.get("state") == "running" and status.is_alive(last):
        return RunFolder(folder, "running", progress, host=last.get("host"), process=last.get("pid"))
    # In a sweep, resume=auto is the default.
    command = "the same command" if read_plans(folder.parent) else "the same command with resume=auto"
    advice = f"{command} continues it" if list_checkpoints(folder) else "nothing was saved yet"
    return RunFolder(folder, "stopped", f"{progress}; {advice}")


def read_history(folder: Path) -> pd.DataFrame:
    """Reads a run's `metrics.csv` as a table of floats, with NaN for empty cells.

    The table is empty if there is no such file.

    Raises:
        OptionError: The file is not a table of numbers; the message names the row and the column.
    """
    path = folder / "metrics.csv"
    if not os.path.lexists(path):
        return pd.DataFrame()
    text = read_text(path, "DIR", MAX_BYTES)
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    except csv.Error as error:
        raise OptionError("DIR", path, f"cannot be read ({first_line(error)})") from error
    if not rows or "epoch" not in rows[0] or len(set(rows[0])) < len(rows[0]):
        raise OptionError("DIR", path, "its first row must name the columns, each once, with an epoch among them")
    names, *values = rows
    table = []
    for number, row in enumerate(values, 2):
        figures = [to_figure(text) for text in row] if len(row) == len(names) else [math.inf]
        if math.inf in figures:
            column = escape_control_chars(names[figures.index(math.inf)])[:60]
            raise OptionError("DIR", path, f"row {number}, column {column}: must be a number or empty")
        table.append(figures)
    return pd.DataFrame(table, columns=names, dtype=float)


def to_figure(text: str) -> float:
    """Converts the text of a cell to a number, which is NaN for an empty cell and infinity for an unusable text."""
    try:
        value = float(text or "nan")
    except ValueError:
        return math.inf
    return math.inf if abs(value) > MAX_FIGURE else value
