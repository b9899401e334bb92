"""The tables of a report for Markdown, CSV and the console, the text around them, and the tables of a sweep's runs."""

import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from odcheap.report.load_runs import FinishedRun, RunFolder, read_options
from odcheap.report.statistics import (
    ACCURACIES,
    BASELINE,
    COSTS,
    GAINS,
    Latencies,
    Latency,
    Spread,
    summarize_runs,
    tabulate_runs,
)
from odcheap.runs.sweep import Outcome
from odcheap.utils.errors import OptionError
from odcheap.utils.text import (
    count_things,
    escape_control_chars,
    escape_markdown,
    format_accuracy,
    format_code,
    format_count,
    format_macs,
    format_mean_deviation,
    format_seconds,
    hide_folders,
)

COLUMNS = ["mean student", "gain", "selected", "selected gain", "ensemble"]
COLUMNS += [name for name in (*ACCURACIES, *COSTS) if name not in COLUMNS]
WHOLE_NUMBERS = ("params", "macs", "epochs", "training macs")
LATENCIES = ("latency ms", "standard ms")
HEADINGS = {"macs": "MACs", "training macs": "training MACs", "training seconds": "training time"}
# The columns of the CSV file for a value of several numbers: the end of the heading, and the name of the number.
CSV_COLUMNS: dict[type, dict[str, str]] = {
    Latency: {"": "median", " p25": "low", " p75": "high"},
    Spread: {" n": "n", " mean": "mean", " deviation": "deviation"},
}
INTERVAL_COLUMNS = {" low": "low", " high": "high"}  # further columns for a gain
READING = """Top-1 is in percent: mean ± sample standard deviation over n seeds. *Mean student* is the mean of all
students after the last epoch, without any selection; ensemble and teacher are those of the last epoch too. *Selected*
is the student that was best on held-out images; for `alone` it is the best of independent students.
Gains over {baseline} are paired by seed, in percentage points, with their 95 % confidence interval by Student's
t-distribution; a gain is *not resolved* if the interval contains zero, and with one seed. Options that most runs share
are not named. MACs are the multiply-accumulates of one image, training MACs those of the whole training. Teachers of
different kinds cannot be compared."""
LATENCY_READING = """ Milliseconds are medians for one image in ONNX Runtime on this machine, of the student and of the
standard network. Their quartiles are in `report.csv`."""
SMOKE_TEST = "**digits is a smoke test**: it shows that everything works, and nothing about methods."
COMPARISON_TITLE = (
    "{images} top-1 in percent, mean ± standard deviation over n seeds; gain over {baseline}, paired by seed, with its "
    "95 % interval\nmean student (of all students), ensemble, teacher: after the last epoch; selected: the one that "
    "each run selected"
)
# The columns of a comparison on the console that may be left out, the most important one first.
IMPORTANCE = (*COLUMNS[: -len(COSTS)], "params", "MACs", *LATENCIES, "training time", "epochs", "training MACs")
# The columns of a sweep's runs that may be left out.
RUN_IMPORTANCE = ("test top-1 %", "val top-1 %", "teacher test %", "MACs", "parameters")
# Groups whose choice says enough without the name of the group.
PART_GROUPS = ("augment", "backbone", "block_type", "data", "experiment", "method", "optimizer", "scheduler")
BORDERS = 3  # characters that a column needs besides its cells
MAX_TEXT = 24  # characters: longer text may be wrapped


def build_table(rows: pd.DataFrame, latencies: Mapping[str, Latencies]) -> pd.DataFrame:
    """Returns the table of a report, in which runs that differ only in the seed are one row.

    Args:
        rows: The table of `summarize_runs`.
        latencies: The latencies of the student and of the standard network, by the `name` of a row.

    Returns:
        A table with the columns `setting`, `method`, `n` (the number of seeds), those in `COLUMNS` (accuracies, gains
        and costs), `latency ms` and `standard ms`; empty columns are left out. Accuracies and gains are `Spread`
        objects, latencies are `Latency` objects, and costs are means over seeds.
    """
    table = rows[["setting", "method", "n", *COLUMNS]].copy()
    for name in COSTS:
        means = [None if spread is None else spread.mean for spread in table[name]]
        table[name] = pd.array([round(m) if m is not None and name in WHOLE_NUMBERS else m for m in means], object)
    for k, name in enumerate(LATENCIES):
        table[name] = pd.array([latencies[row][k] if row in latencies else None for row in rows["name"]], object)
    return table.loc[:, (table.notna() & (table != "")).any()]


def format_table(table: pd.DataFrame, is_console: bool = False) -> pd.DataFrame:
    """Returns the table of `build_table` with all headings and cells as text.

    Args:
        table: The table of `build_table`.
        is_console: True for text on the console, False for Markdown.
    """
    cells = {
        HEADINGS.get(str(name), str(name)): [format_cell(str(name), value, is_console) for value in values]
        for name, values in table.items()
    }
    return pd.DataFrame(cells, dtype=object)


def format_cell(column: str, value: Any, is_console: bool = False) -> str:
    """Returns a value of the table of `build_table` as text.

    Accuracies are in percent, and costs have a suitable unit. None becomes an empty text.

    Args:
        column: The name of the column.
        value: The value.
        is_console: True for text on the console, False for Markdown.
    """
    if value is None:
        return ""
    if isinstance(value, Spread):
        if column in GAINS:
            return format_gain(value, "\n" if is_console else " ")
        return format_mean_deviation(value.mean, value.deviation)
    if isinstance(value, Latency):
        return f"{value.median:#.3g}".rstrip(".")
    if column in ("macs", "training macs"):
        return format_macs(value)
    if column == "training seconds":
        return format_seconds(value)
    if isinstance(value, int | float):
        return f"{value:,}"
    return escape_control_chars(value) if is_console else escape_markdown(value)


def format_gain(gain: Spread, before_note: str) -> str:
    """Returns a gain in percentage points as text, with its confidence interval.

    If the interval contains zero, or is not known, the note "(not resolved)" follows.

    Args:
        gain: The gain.
        before_note: The text between the numbers and the note, a space or a line end.
    """
    text = format_accuracy(gain.mean, "+")
    if gain.low is not None:
        text += f" [{format_accuracy(gain.low, '+')}, {format_accuracy(gain.high, '+')}]"
    return text if gain.is_resolved else f"{text}{before_note}(not resolved)"


def to_markdown(table: pd.DataFrame) -> str:
    """Returns a table of strings in Markdown; the cells are not padded with spaces."""
    return table.to_markdown(index=False, tablefmt="github", disable_numparse=True, stralign=None, numalign=None)


def to_csv(table: pd.DataFrame) -> str:
    """Returns the table of `build_table` as CSV; accuracies are fractions, costs are not abbreviated.

    An accuracy has three columns, with `n`, `mean` and `deviation` after its name. A gain has two more, `low` and
    `high`, for the ends of its confidence interval. A latency has three columns, which are its name for the median, and
    its name with `p25` and `p75` for the quartiles.
    """
    columns: dict[str, Any] = {}
    for name, values in table.items():
        kinds = {type(value) for value in values} & CSV_COLUMNS.keys()
        parts = (CSV_COLUMNS[kinds.pop()] if kinds else {}) | (INTERVAL_COLUMNS if name in GAINS else {})
        columns |= {f"{name}{end}": [getattr(value, part, None) for value in values] for end, part in parts.items()}
        columns |= {} if parts else {str(name): values}
    columns = {name: [escape_formula(cell) for cell in cells] for name, cells in columns.items()}
    return pd.DataFrame(columns, dtype=object).to_csv(index=False, lineterminator="\n")


def escape_formula(cell: Any) -> Any:
    """Returns a cell with an apostrophe before text that a spreadsheet would read as a formula.

    Numbers are not changed. Source: OWASP, "CSV Injection".
    """
    return f"'{cell}" if isinstance(cell, str) and cell.lstrip()[:1] in tuple("=+-@") else cell


def build_console_table(
    rows: Sequence[dict[str, str]],
    left: Sequence[str],
    width: int | None = None,
    optional: Sequence[str] = (),
) -> Table:
    """Returns a table of text for the console, in which nothing is interpreted as markup.

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
    table = Table(caption=caption, caption_justify="left", caption_style="")
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", overflow="fold")
    for row in rows:
        cells = ("\n".join(map(escape_control_chars, row[column].split("\n"))) for column in columns)
        table.add_row(*map(Text, cells))
    return table


def measure_width(rows: Sequence[dict[str, str]], columns: Sequence[str], left: Sequence[str]) -> int:
    """Returns the width, in characters, of a table with these columns and a border.

    Args:
        rows: For each row the text of its cells by column.
        columns: The columns of the table.
        left: Those columns whose text can be wrapped. Their texts are counted with at most 24 characters, or with the
            width of the heading if that is larger.
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
        table: The table of `build_table`.
        baseline: The method with which the others are compared, or the `name` of a row (method and setting).
        images: "test" or "val" (held out), for the images on which the accuracies were measured.
    """
    rows = format_table(table, is_console=True).to_dict("records")
    title = COMPARISON_TITLE.format(
        images={"val": "held-out"}.get(images, images), baseline=escape_control_chars(baseline)
    )
    console.print(title)
    console.print(build_console_table(rows, ("setting", "method"), console.width, IMPORTANCE))


def format_report(
    folders: list[RunFolder],
    runs: pd.DataFrame,
    table: pd.DataFrame,
    figures: Mapping[str, str],
    images: str,
    baseline: str,
) -> str:
    """Returns the report in Markdown.

    Args:
        folders: The folders of all runs, finished or not.
        runs: The table of `tabulate_runs`.
        table: The table of `build_table`.
        figures: The captions of the figures in the report's folder, by the names of the figures.
        images: The images on which the accuracies were measured, as text, such as "Test images".
        baseline: The name of the baseline of the gains, which is a method or the `name` of a row (method and setting).
    """
    lines = ["# Report", "", *describe_runs(folders), "", to_markdown(format_table(table))]
    reading = READING + (LATENCY_READING if LATENCIES[0] in table else "")
    lines += ["", f"{images}. {reading.format(baseline=format_code(baseline))}"]
    for name, caption in figures.items():
        lines += ["", f"![{name.replace('_', ' against ')}]({name}.png)", "", escape_markdown(caption)]
    lines += ["", *format_gains_by_seed(runs), *describe_missing_gains(runs), *describe_left_out(folders, runs)]
    return "\n".join(lines) + "\n"


def describe_runs(folders: list[RunFolder]) -> list[str]:
    """Returns lines of Markdown with the number of runs, their data sets and epochs, and the versions of PyTorch."""
    summaries = [entry.run.summary for entry in folders if entry.run is not None]
    data = sorted({str(summary.get("data", "unknown data")) for summary in summaries})
    epochs = sorted({str(summary.get("epochs", "?")) for summary in summaries})
    versions = sorted({f"torch {v.get('torch', '?')}" for s in summaries if (v := s.get("versions") or {})})
    text = f"{count_things(len(summaries), 'finished run')} on {escape_markdown(', '.join(data))}, "
    text += f"{escape_markdown(', '.join(epochs))} epoch{'' if epochs == ['1'] else 's'}"
    text += f" ({escape_markdown(', '.join(versions))})." if versions else "."
    return [text, "", SMOKE_TEST] if "digits" in data else [text]


def format_gains_by_seed(runs: pd.DataFrame) -> Iterator[str]:
    """Yields lines of Markdown with a table of the gains, with a column for each seed.

    Args:
        runs: The table of `tabulate_runs`, with a row for each run.
    """
    paired = runs[runs["gain"].notna()]
    if paired.empty:
        return
    seeds = sorted(set(paired["seed"]), key=str)
    table = paired.pivot(index="name", columns="seed", values="gain").reindex(paired["name"].unique())[seeds]
    cells = table.map(lambda gain: "" if pd.isna(gain) else f"{100 * gain:+.2f}")
    cells.columns = [f"seed {seed}" for seed in seeds]
    cells.insert(0, "", [escape_markdown(name) for name in table.index])
    yield from ("Gain of the mean student by seed, percentage points:", "", to_markdown(cells), "")


def describe_missing_gains(runs: pd.DataFrame) -> Iterator[str]:
    """Yields lines of Markdown that name the rows (method and setting) without a gain; none if no row has a gain.

    Args:
        runs: The table of `tabulate_runs`, with a row for each run.
    """
    if runs["gain"].isna().all():
        return
    compared = {*runs.loc[runs["gain"].notna(), "name"], *runs.loc[runs["baseline"], "name"]}
    others = [name for name in dict.fromkeys(runs["name"]) if name not in compared]
    if others:
        names = ", ".join(format_code(name) for name in others)
        yield from (
            f"Without a gain, because no run of the baseline has their setting and one of their seeds: {names}.",
            "",
        )


def describe_left_out(folders: list[RunFolder], runs: pd.DataFrame) -> Iterator[str]:
    """Yields lines of Markdown that name the runs that are not in the table, and say why.

    Args:
        folders: The folders of all runs, finished or not.
        runs: The table of `tabulate_runs`, with a row for each run.
    """
    duplicates = sum(entry.run is not None for entry in folders) - len(runs)
    if duplicates:
        have, are = ("has", "is") if duplicates == 1 else ("have", "are")
        runs_left = count_things(duplicates, "finished run")
        yield from (f"{runs_left} {have} the options and the seed of another one and {are} left out.", "")
    unfinished = [entry for entry in folders if entry.run is None]
    if unfinished:
        yield from ("Not in the table:", "")
        for entry in unfinished:
            reason = hide_folders(hide_host(entry.reason, entry.host), [entry.folder])
            yield f"- {format_code(entry.folder.name)}: {entry.state}; {format_code(reason)}"


def hide_host(text: str, host: str | None) -> str:
    """Returns a text in which the names of `host` and of this machine are replaced by "HOST"."""
    for name in filter(None, (host, socket.gethostname())):
        text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", "HOST", text)
    return text


def show_sweep(console: Console, outcomes: list[Outcome], is_search: bool = False) -> None:
    """Prints a table of the runs of a sweep and, if methods or seeds can be compared, a table of the methods.

    Args:
        console: The console to print on.
        outcomes: The outcomes of the runs.
        is_search: Whether the runs are trials of a search for options. No accuracy on test images is printed then,
            because trials must not be chosen by it.
    """
    names, shared = shorten_names([Path(outcome.job_dir) for outcome in outcomes])
    runs = [describe_outcome(name, outcome) for name, outcome in zip(names, outcomes, strict=True)]
    if is_search:
        runs = [{column: cell for column, cell in run.items() if "test" not in column} for run in runs]
    console.print(f"sweep; all runs have {shared}" if shared else "sweep", soft_wrap=True)
    console.print(build_console_table(runs, ("run", "outcome"), console.width, RUN_IMPORTANCE))
    if is_search:
        return
    rows = summarize_runs(tabulate_runs(finished_runs(outcomes)))
    if not rows.empty and (rows["n"].max() > 1 or rows["method"].nunique() > 1):
        show_comparison(console, build_table(rows, {}), BASELINE, "test")


def finished_runs(outcomes: list[Outcome]) -> list[FinishedRun]:
    """Returns those runs of a sweep that have finished their training, with their options and their summary."""
    found = [(o.summary, Path(o.job_dir) / "config.yaml") for o in outcomes if o.summary and "last" in o.summary]
    runs = []
    for summary, path in found:
        with suppress(OptionError):  # a config that cannot be read: the run's row is in the first table anyway
            runs.append(FinishedRun(read_options(path), summary))
    return runs


def shorten_names(folders: Sequence[Path]) -> tuple[list[str], str]:
    """Returns a short name for the folder of each run, and the overrides that the names of all folders contain.

    A short name has only the overrides that differ between the runs, without their groups, such as `DW` for
    `block_type=DW`. If the runs are in different folders, it also has the folder.

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
    """Returns the row of a run in the table of a sweep, with its name, outcome, accuracies and costs.

    Args:
        name: The short name of the run, as `shorten_names` returns it.
        outcome: How the run ended, with the content of its `summary.json` if there is one.

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
