"""Writes the text of a report: its tables in Markdown and CSV, and what a reader must know about them."""

import re
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from odcheap.report.load_runs import RunFolder
from odcheap.report.statistics import ACCURACIES, COSTS, GAINS, Latencies, Latency, Spread
from odcheap.utils.text import (
    count_things,
    escape_control_chars,
    escape_markdown,
    format_accuracy,
    format_code,
    format_macs,
    format_mean_deviation,
    format_seconds,
    hide_folders,
)

COLUMNS = ["mean student", "gain", "selected", "selected gain", "ensemble"]
COLUMNS += [name for name in (*ACCURACIES, *COSTS) if name not in COLUMNS]
WHOLE_NUMBERS = ("params", "macs", "epochs", "training macs")
LATENCIES = ("latency ms", "standard ms")
QUARTILES = {"": "median", " p25": "low", " p75": "high"}  # columns of the CSV file, and what they are of a latency
HEADINGS = {"macs": "MACs", "training macs": "training MACs", "training seconds": "training time"}
READING = """Top-1 is in percent: mean ± sample standard deviation over n seeds. *Mean student* is the mean of all
students after the last epoch, without any selection. *Selected* is the student that was best on held-out images; for
`alone` it is the best of independent students. Gains over {baseline} are paired by seed, in percentage points, with
their 95 % confidence interval by Student's t-distribution; a gain is *not resolved* if the interval contains zero, and
with one seed. Options that most runs share are not named. MACs are the multiply-accumulates of one image, training MACs
those of the whole training. Teachers of different kinds cannot be compared."""
LATENCY_READING = """ Milliseconds are medians for one image in ONNX Runtime on this machine, of the student and of the
standard network. Their quartiles are in `report.csv`."""
SMOKE_TEST = "**digits is a smoke test**: it shows that everything works, and nothing about methods."


def build_table(rows: pd.DataFrame, latencies: Mapping[str, Latencies]) -> pd.DataFrame:
    """Returns the table of a report, with a row for each setting and method, without empty columns.

    Args:
        rows: The table of `summarize_runs`.
        latencies: The latencies of the student and of the standard network, by the `name` of a row.

    Returns:
        The columns `setting`, `method`, `n` (the number of seeds), those in `COLUMNS` (accuracies, gains and costs),
        `latency ms` and `standard ms`. Accuracies and gains are `Spread` objects, latencies `Latency` objects, and
        costs are means over seeds.
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
        is_console: Whether the text is for the console; otherwise it is for Markdown.
    """
    cells = {
        HEADINGS.get(str(name), str(name)): [format_cell(str(name), value, is_console) for value in values]
        for name, values in table.items()
    }
    return pd.DataFrame(cells, dtype=object)


def format_cell(column: str, value: Any, is_console: bool = False) -> str:
    """Returns a value of the table as text: accuracies in percent, costs with a suitable unit, nothing for None.

    Args:
        column: The name of the column.
        value: The value.
        is_console: Whether the text is for the console; otherwise it is for Markdown.
    """
    if value is None:
        return ""
    if isinstance(value, Spread):
        return format_gain(value, "\n" if is_console else " ") if column in GAINS else format_spread(value)
    if isinstance(value, Latency):
        return f"{value.median:#.3g}".rstrip(".")
    if column in ("macs", "training macs"):
        return format_macs(value)
    if column == "training seconds":
        return format_seconds(value)
    if isinstance(value, int | float):
        return f"{value:,}"
    return escape_control_chars(value) if is_console else escape_markdown(value)


def format_spread(spread: Spread) -> str:
    """Returns a mean accuracy in percent as text, with its standard deviation if there is more than one seed."""
    return format_mean_deviation(spread.mean, spread.deviation)


def format_gain(gain: Spread, before_note: str) -> str:
    """Returns a gain in percentage points as text, with its confidence interval and a note if it is not resolved.

    Args:
        gain: The gain.
        before_note: The text between the numbers and the note, such as a space.
    """
    interval = gain.interval and " [{}, {}]".format(*(format_accuracy(end, "+") for end in gain.interval))
    note = "" if gain.is_resolved else "(not resolved)"
    return f"{format_accuracy(gain.mean, '+')}{interval or ''}{before_note if note else ''}{note}"


def to_markdown(table: pd.DataFrame) -> str:
    """Returns a table of strings in Markdown; the cells are not padded with spaces."""
    return table.to_markdown(index=False, tablefmt="github", disable_numparse=True, stralign=None, numalign=None)


def to_csv(table: pd.DataFrame) -> str:
    """Returns the table of `build_table` as CSV; accuracies are fractions, costs are not abbreviated.

    An accuracy has three columns: `n`, `mean` and `deviation` after its name. A gain has two more, `low` and `high`,
    the ends of its confidence interval. A latency has three: the median under its own name, `p25` and `p75`.
    """
    columns: dict[str, Any] = {}
    for name, values in table.items():
        if any(isinstance(value, Latency) for value in values):
            columns |= {f"{name}{end}": [getattr(v, part, None) for v in values] for end, part in QUARTILES.items()}
            continue
        if not any(isinstance(value, Spread) for value in values):
            columns[str(name)] = values
            continue
        for part in Spread._fields:
            columns[f"{name} {part}"] = [getattr(value, part, None) for value in values]
        if name in GAINS:
            intervals = [getattr(value, "interval", None) or (None, None) for value in values]
            columns |= {f"{name} low": [low for low, _ in intervals], f"{name} high": [high for _, high in intervals]}
    columns = {name: [escape_formula(cell) for cell in cells] for name, cells in columns.items()}
    return pd.DataFrame(columns, dtype=object).to_csv(index=False, lineterminator="\n")


def escape_formula(cell: Any) -> Any:
    """Returns a cell with an apostrophe before text that a spreadsheet would read as a formula.

    Numbers are not changed. Source: OWASP, "CSV Injection".
    """
    return f"'{cell}" if isinstance(cell, str) and cell.lstrip()[:1] in tuple("=+-@") else cell


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
        folders: All folders, of finished and other runs.
        runs: The table of `tabulate_runs`.
        table: The table of `build_table`.
        figures: The captions of the figures in the report's folder, by the names of the figures.
        images: The images on which the accuracies were measured, as text, such as "Test images".
        baseline: The method over which the gains are, or the `name` of a row (method and setting).
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
    """Yields lines of Markdown with a table of the gains of each seed, which a mean over seeds may hide.

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
    """Yields lines of Markdown that name the settings and methods without a gain, if others have one.

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
        folders: All folders, of finished and other runs.
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
