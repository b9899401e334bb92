"""Tables for the console, which fit into its width: the runs of a sweep, and a comparison of methods."""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pandas as pd
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from odcheap.report.load_runs import FinishedRun, read_options
from odcheap.report.statistics import BASELINE, TEACHER_KINDS, summarize_runs, tabulate_runs
from odcheap.report.tables import build_table as build_report_table
from odcheap.report.tables import format_table
from odcheap.runs.sweep import Outcome
from odcheap.utils.errors import OptionError
from odcheap.utils.text import escape_control_chars, format_accuracy, format_count, format_macs

COMPARISON_TITLE = (
    "{images} top-1 in percent, mean ± standard deviation over n seeds; gain over {baseline}, paired by seed, with its "
    "95 % interval\nmean student: of all students after the last epoch; selected: the one that each run selected"
)
# The columns of a comparison that may be left out, the most important one first.
IMPORTANCE = ("mean student", "gain", "selected", "selected gain", "ensemble")
IMPORTANCE += tuple(f"teacher ({kind})" for kind in TEACHER_KINDS)
IMPORTANCE += ("params", "MACs", "latency ms", "standard ms", "training time", "epochs", "training MACs")
# The columns of a sweep's runs that may be left out.
RUN_IMPORTANCE = ("test top-1 %", "val top-1 %", "teacher test %", "MACs", "parameters")
# Groups whose choice says enough without the name of the group.
PART_GROUPS = ("augment", "backbone", "block_type", "data", "experiment", "method", "optimizer", "scheduler")
BORDERS = 3  # characters that a column needs besides its cells
MAX_TEXT = 24  # characters: longer text may be wrapped


def build_table(
    rows: Sequence[dict[str, str]],
    left: Sequence[str],
    width: int | None = None,
    optional: Sequence[str] = (),
) -> Table:
    """Returns a table of text, in which nothing is interpreted as markup.

    Args:
        rows: For each row the text of its cells by column; all rows have the columns of the first one.
        left: The columns that are aligned left and wrapped if they are long; all others are aligned right.
        width: The largest width of the table in characters; None for any width.
        optional: The columns that may be left out if the table is too wide, the most important one first. A line below
            the table names the columns that are left out.
    """
    columns = list(rows[0])
    left_out: list[str] = []
    while width is not None and measure_width(rows, columns, left) > width:
        dispensable = [column for column in optional if column in columns]
        if not dispensable:
            break
        columns.remove(dispensable[-1])
        left_out.insert(0, dispensable[-1])
    caption = f"left out for lack of width: {', '.join(left_out)}" if left_out else None
    table = Table()
    table.caption, table.caption_justify, table.caption_style = caption, "left", ""
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", overflow="fold")
    for row in rows:
        cells = ("\n".join(map(escape_control_chars, row[column].split("\n"))) for column in columns)
        table.add_row(*map(Text, cells))
    return table


def measure_width(rows: Sequence[dict[str, str]], columns: Sequence[str], left: Sequence[str]) -> int:
    """Returns the width, in characters, that a table of these columns needs.

    Args:
        rows: For each row the text of its cells by column.
        columns: The columns of the table.
        left: Those columns whose text can be wrapped. Each of them needs at most 24 characters, or the width of its
            heading.
    """
    widths = []
    for column in columns:
        lines = [column, *(line for row in rows for line in row[column].split("\n"))]
        width = max(map(cell_len, lines))
        widths.append(min(width, max(MAX_TEXT, cell_len(column))) if column in left else width)
    return sum(widths) + BORDERS * len(columns) + 1


def show_comparison(console: Console, table: pd.DataFrame, baseline: str, images: str) -> None:
    """Prints the table of a report, with as many columns as fit.

    Args:
        console: The console to print on.
        table: The table of `tables.build_table`.
        baseline: The method with which the others are compared, or the `name` of a row (method and setting).
        images: The images on which the accuracies were measured: `test` or `val`.
    """
    rows = format_table(table, is_console=True).to_dict("records")
    title = COMPARISON_TITLE.format(
        images={"val": "held-out"}.get(images, images), baseline=escape_control_chars(baseline)
    )
    console.print(title)
    console.print(build_table(rows, ("setting", "method"), console.width, IMPORTANCE))


def show_sweep(console: Console, outcomes: list[Outcome], is_search: bool = False) -> None:
    """Prints a table of the runs of a sweep and, if methods or seeds can be compared, a table of the methods.

    Args:
        console: The console to print on.
        outcomes: The outcomes of the runs.
        is_search: Whether the runs are trials of a search for options. No accuracy on test images is printed then: it
            would be too high for a trial that was chosen by it.
    """
    names, shared = shorten_names([Path(outcome.job_dir) for outcome in outcomes])
    runs = [describe_outcome(name, outcome) for name, outcome in zip(names, outcomes, strict=True)]
    if is_search:
        runs = [{column: cell for column, cell in run.items() if "test" not in column} for run in runs]
    console.print(f"sweep; all runs have {shared}" if shared else "sweep", soft_wrap=True)
    console.print(build_table(runs, ("run", "outcome"), console.width, RUN_IMPORTANCE))
    if is_search:
        return
    rows = summarize_runs(tabulate_runs(finished_runs(outcomes)))
    if not rows.empty and (rows["n"].max() > 1 or rows["method"].nunique() > 1):
        show_comparison(console, build_report_table(rows, {}), BASELINE, "test")


def finished_runs(outcomes: list[Outcome]) -> list[FinishedRun]:
    """Returns those runs of a sweep that have finished their training, with options and summary."""
    found = [(o.summary, Path(o.job_dir) / "config.yaml") for o in outcomes if o.summary and "last" in o.summary]
    runs = []
    for summary, path in found:
        with suppress(OptionError):  # a config that cannot be read: the run's row is in the first table anyway
            runs.append(FinishedRun(read_options(path), summary))
    return runs


def shorten_names(folders: Sequence[Path]) -> tuple[list[str], str]:
    """Returns a short name for the folder of each run, and the overrides that the names of all folders contain.

    A short name has only the overrides that differ between the runs, without their groups: `DW` for `block_type=DW`,
    `max_epochs=5` for `trainer.max_epochs=5`. If the runs are in different folders, it also has the folder.

    Args:
        folders: The folders of the runs. Their names consist of overrides, such as `block_type=DW,seed=0`.

    Returns:
        The short names, in the order of `folders`, and the overrides that all names contain, joined by commas.
    """
    if not folders:
        return [], ""
    parts = [split_overrides(folder.name) for folder in folders]
    shared = set.intersection(*map(set, parts)) if len(parts) > 1 else set()
    own = [[part for part in mine if part not in shared] or mine for mine in parts]
    names = [",".join(map(shorten_override, mine)) for mine in own]
    if len(set(names)) < len(set(folders)):  # the groups that were left out tell them apart
        names = [",".join(mine) for mine in own]
    parents = [os.path.abspath(folder.parent) for folder in folders]
    if len(set(parents)) > 1:
        top = os.path.commonpath(parents)
        prefixes = [os.path.relpath(parent, top) for parent in parents]
        names = [name if prefix == "." else f"{prefix}/{name}" for prefix, name in zip(prefixes, names, strict=True)]
    return names, ",".join(part for part in parts[0] if part in shared)


def split_overrides(name: str) -> list[str]:
    """Returns the overrides in the name of a folder, which is split at its commas, but not at those in a list.

    Example:
        >>> split_overrides("block_type=DW,experiment=[od,short],seed=0")
        ['block_type=DW', 'experiment=[od,short]', 'seed=0']
    """
    return re.split(r",(?![^\[\]]*\])", name)


def shorten_override(override: str) -> str:
    """Returns an override without its config group.

    Example:
        >>> [shorten_override(o) for o in ("block_type=DW", "trainer.max_epochs=5", "seed=0", "my-run")]
        ['DW', 'max_epochs=5', 'seed=0', 'my-run']
    """
    key, equals, value = override.partition("=")
    if not equals:
        return override
    return value if key in PART_GROUPS and value else f"{key.rpartition('.')[2]}={value}"


def describe_outcome(name: str, outcome: Outcome) -> dict[str, str]:
    """Returns the row of a run in the table of a sweep: its name, its outcome, its accuracies and its costs.

    Args:
        name: The short name of the run; see `shorten_names`.
        outcome: How the run ended.

    Returns:
        The texts of the cells, by the headings of the columns.
    """
    summary = outcome.summary or {}
    # A run that did not finish has no figures, and one with test_only=true has no costs.
    selected, teacher, cost = (summary.get(key) or {} for key in ("selected", "teacher", "cost"))
    return {
        "run": name,
        "outcome": outcome.text,
        "val top-1 %": format_accuracy(selected.get("val_top1")),
        "test top-1 %": format_accuracy(selected.get("test_top1")),
        "teacher test %": format_accuracy(teacher.get("test_top1")),
        "parameters": format_count(cost.get("params")),
        "MACs": format_macs(cost.get("macs")),
    }
