"""Tables for the console: the runs of a sweep, and what the methods gain."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from odcheap.report.load_runs import FinishedRun, read_options
from odcheap.report.statistics import Spread, summarize_runs, tabulate_runs
from odcheap.runs.sweep import Outcome
from odcheap.utils.errors import OptionError
from odcheap.utils.text import (
    escape_control_chars,
    format_accuracy,
    format_count,
    format_mean_deviation,
    format_millions,
)

METHODS_TITLE = (
    "test top-1, mean ± deviation over seeds; gain over alone, paired by seed\n"
    "mean student: of all students after the last epoch, nothing selected; selected: the one that each run chose"
)


def build_table(rows: Sequence[dict[str, str]], left: Sequence[str], title: str | None = None) -> Table:
    """Returns a table of text in which nothing is read as markup.

    Args:
        rows: Cells by column; all rows have the columns of the first one.
        left: The columns that are aligned left; numbers are aligned right.
        title: A line above the table.
    """
    table = Table(title=title, title_justify="left", title_style="")
    for column in rows[0]:
        table.add_column(column.strip(), justify="left" if column in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(escape_control_chars(cell)) for cell in row.values()))
    return table


def show_sweep(console: Console, outcomes: list[Outcome], is_search: bool = False) -> None:
    """Prints a table of the runs and, if methods or seeds can be compared, one of the methods.

    Args:
        console: Where to print.
        outcomes: How the runs of the sweep ended.
        is_search: Whether the runs are trials of a search. Then no figures of test images are shown, since a choice
            among trials by these figures would make them too high.
    """
    names = short_names([Path(outcome.job_dir).name for outcome in outcomes])
    runs = [describe_outcome(name, outcome) for name, outcome in zip(names, outcomes, strict=True)]
    if is_search:
        runs = [{column: cell for column, cell in run.items() if "test" not in column} for run in runs]
    console.print(build_table(runs, left=("run", "outcome"), title="sweep"))
    if is_search:
        return
    rows = summarize_runs(tabulate_runs(finished_runs(outcomes)))
    if not rows.empty and (rows["n"].max() > 1 or rows["method"].nunique() > 1):
        methods = [
            ({"setting": row["setting"]} if rows["setting"].any() else {})
            | {
                "method": row["method"],
                "seeds": str(row["n"]),
                "mean student": format_spread(row["mean student"]),
                "gain": format_spread(row["gain"], "+"),
                "selected": format_spread(row["selected"]),
                "gain ": format_spread(row["selected gain"], "+"),
            }
            for row in rows.to_dict("records")
        ]
        console.print(build_table(methods, left=("setting", "method"), title=METHODS_TITLE))


def finished_runs(outcomes: list[Outcome]) -> list[FinishedRun]:
    """Returns the runs that have a summary of their training, with their options."""
    found = [(o.summary, Path(o.job_dir) / "config.yaml") for o in outcomes if o.summary and "last" in o.summary]
    runs = []
    for summary, path in found:
        with suppress(OptionError):  # a config that cannot be read: the run's row is in the first table anyway
            runs.append(FinishedRun(read_options(path), summary))
    return runs


def short_names(names: list[str]) -> list[str]:
    """Returns the names without the overrides that all runs share."""
    parts = [name.split(",") for name in names]
    shared = set.intersection(*map(set, parts)) if len(parts) > 1 else set()
    return [
        ",".join(part for part in mine if part not in shared) or name for mine, name in zip(parts, names, strict=True)
    ]


def describe_outcome(name: str, outcome: Outcome) -> dict[str, str]:
    """Returns a run's row: its name, how it ended, and its figures if it has a summary."""
    summary = outcome.summary or {}
    # A run that did not finish has no figures, and one with test_only=true has no costs.
    selected, teacher, cost = (summary.get(key) or {} for key in ("selected", "teacher", "cost"))
    return {
        "run": name,
        "outcome": outcome.text,
        "val top-1": format_accuracy(selected.get("val_top1")),
        "test top-1": format_accuracy(selected.get("test_top1")),
        "teacher test": format_accuracy(teacher.get("test_top1")),
        "parameters": format_count(cost.get("params")),
        "MACs": format_millions(cost.get("macs")),
    }


def format_spread(spread: Spread | None, sign: str = "") -> str:
    return "-" if spread is None else format_mean_deviation(spread.mean, spread.deviation, sign)
