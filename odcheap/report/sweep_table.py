"""Tables at the end of a sweep: a row for each run, and what the methods gain."""

from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from odcheap.report.load_runs import FinishedRun, read_options
from odcheap.report.statistics import Spread, summarize_runs, tabulate_runs
from odcheap.runs.sweep import Outcome
from odcheap.utils.text import (
    escape_control_chars,
    format_accuracy,
    format_count,
    format_mean_deviation,
    format_millions,
)


def show_sweep(console: Console, outcomes: list[Outcome]) -> None:
    """Prints a table of the runs and, where methods or seeds can be compared, one of the methods."""
    console.print(runs_table(outcomes))
    rows = summarize_runs(tabulate_runs(finished_runs(outcomes)))
    if not rows.empty and (rows["n"].max() > 1 or rows["method"].nunique() > 1):
        console.print(methods_table(rows))


def finished_runs(outcomes: list[Outcome]) -> list[FinishedRun]:
    """Returns the runs that have a summary of their training, with their options."""
    found = [(o.summary, Path(o.job_dir) / "config.yaml") for o in outcomes if o.summary and "last" in o.summary]
    return [FinishedRun(read_options(path), summary) for summary, path in found if path.is_file()]


def short_names(names: list[str]) -> list[str]:
    """Returns the names without the overrides that all runs share."""
    parts = [name.split(",") for name in names]
    shared = set.intersection(*map(set, parts)) if len(parts) > 1 else set()
    return [
        ",".join(part for part in mine if part not in shared) or name for mine, name in zip(parts, names, strict=True)
    ]


def runs_table(outcomes: list[Outcome]) -> Table:
    """Returns a table with a row for each run: its name, how it ended and its figures."""
    table = Table(title="sweep", title_justify="left")
    for column in ("run", "outcome", "val top-1", "test top-1", "teacher test", "parameters", "MACs"):
        table.add_column(column, justify="left" if column in ("run", "outcome") else "right", overflow="fold")
    for name, outcome in zip(short_names([Path(o.job_dir).name for o in outcomes]), outcomes, strict=True):
        summary = outcome.summary
        if summary is None:
            table.add_row(Text(escape_control_chars(name)), Text(escape_control_chars(outcome.text)), *["-"] * 5)
            continue
        teacher = (summary["teacher"] or {}).get("test_top1")
        figures = [format_accuracy(summary["selected"][f]) for f in ("val_top1", "test_top1")]
        spent = summary.get("cost")  # test_only has none
        price = [format_count(spent["params"]), format_millions(spent["macs"])] if spent else ["-", "-"]
        table.add_row(
            Text(escape_control_chars(name)),
            Text(escape_control_chars(outcome.text)),
            *figures,
            format_accuracy(teacher),
            *price,
        )
    return table


def methods_table(rows: pd.DataFrame) -> Table:
    """Returns each method's test top-1 and its gain over `alone`, paired by seed: means and sample deviations.

    Args:
        rows: The rows of `summarize_runs`.
    """
    title = (
        "test top-1, mean ± deviation over seeds; gain over alone, paired by seed\n"
        "mean student: of all students after the last epoch, nothing selected; selected: the one that each run chose"
    )
    table = Table(title=title, title_justify="left", title_style="")
    names = ["setting", "method"] if rows["setting"].any() else ["method"]
    for column in (*names, "seeds", "mean student", "gain", "selected", "gain"):
        table.add_column(column, justify="left" if column in names else "right", overflow="fold")
    for row in rows.to_dict("records"):
        figures = [format_spread(row["mean student"]), format_spread(row["gain"], "+")]
        figures += [format_spread(row["selected"]), format_spread(row["selected gain"], "+")]
        table.add_row(*(Text(row[name]) for name in names), str(row["n"]), *figures)
    return table


def format_spread(spread: Spread | None, sign: str = "") -> str:
    return "-" if spread is None else format_mean_deviation(spread.mean, spread.deviation, sign)
