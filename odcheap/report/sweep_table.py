"""Tables at the end of a sweep: a row for each run, and what the methods gain."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from odcheap.report import statistics
from odcheap.report.statistics import Spread, mean_student, selected_student
from odcheap.runs import resume
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
    compared = statistics.rows(finished_runs(outcomes))
    if any(len(row.by_seed) > 1 for row in compared) or len({row.method for row in compared}) > 1:
        console.print(methods_table(compared))


def finished_runs(outcomes: list[Outcome]) -> list[statistics.Finished]:
    """Returns the runs that have a summary of their training, with their options."""
    found = [(o.summary, Path(o.job_dir) / "config.yaml") for o in outcomes if o.summary and "last" in o.summary]
    return [statistics.Finished(resume.options_of(path), summary) for summary, path in found if path.is_file()]


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


def methods_table(compared: list[statistics.Row]) -> Table:
    """Returns each method's test top-1 and its gain over `alone`, paired by seed: means and sample deviations."""
    title = (
        "test top-1, mean ± deviation over seeds; gain over alone, seed by seed\n"
        "mean student: of all students after the last epoch, nothing picked; selected: the one that each run chose"
    )
    table = Table(title=title, title_justify="left", title_style="")
    words = ["setting"] * any(row.setting for row in compared) + ["method"]
    for column in (*words, "seeds", "mean student", "gain", "selected", "gain"):
        table.add_column(column, justify="left" if column in words else "right", overflow="fold")
    for row in compared:
        found = ((row.of(f), row.gain(f)) for f in (mean_student, selected_student))
        figures = [text for value, gain in found for text in (format_spread(value), format_spread(gain, "+"))]
        table.add_row(*(Text(getattr(row, word)) for word in words), str(len(row.by_seed)), *figures)
    return table


def format_spread(spread: Spread | None, sign: str = "") -> str:
    return "-" if spread is None else format_mean_deviation(spread.mean, spread.deviation, sign)
