"""The report's text: tables in Markdown and CSV, and what a reader must know about them."""

import re
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from odcheap.report.load_runs import RunFolder
from odcheap.report.statistics import ACCURACIES, COSTS, GAINS, Latencies, Latency, Spread
from odcheap.utils.text import (
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
`alone` it is the best of independent students. Gains over `{baseline}` are paired by seed, in percentage points, with
their 95 % confidence interval by Student's t-distribution; a gain is *not resolved* if the interval contains zero, and
with one seed. Options that most runs share are not named. MACs are the multiply-accumulates of one image, training MACs
those of the whole training. Teachers of different kinds cannot be compared."""
LATENCY_READING = """ Milliseconds are medians for one image in ONNX Runtime on this machine, of the student and of the
standard network. Their quartiles are in `report.csv`."""
SMOKE_TEST = "**digits is a smoke test**: it shows that everything works, and nothing about methods."


def build_table(rows: pd.DataFrame, latencies: Mapping[str, Latencies]) -> pd.DataFrame:
    """Returns the report's table, without empty columns.

    Args:
        rows: The rows of `summarize_runs`.
        latencies: Latencies of the student and of the standard network by the row's name.
    """
    table = rows[["setting", "method", "n", *COLUMNS]].copy()
    for name in COSTS:
        means = [None if spread is None else spread.mean for spread in table[name]]
        table[name] = pd.array([round(m) if m is not None and name in WHOLE_NUMBERS else m for m in means], object)
    for k, name in enumerate(LATENCIES):
        table[name] = pd.array([latencies[row][k] if row in latencies else None for row in rows["name"]], object)
    return table.loc[:, (table.notna() & (table != "")).any()]


def format_table(table: pd.DataFrame, is_console: bool = False) -> pd.DataFrame:
    """Returns the cells and headings of `build_table` as text for readers.

    Args:
        table: The table of `build_table`.
        is_console: Whether the text is for the console. Otherwise it is for Markdown.
    """
    cells = {
        HEADINGS.get(str(name), str(name)): [format_cell(str(name), value, is_console) for value in values]
        for name, values in table.items()
    }
    return pd.DataFrame(cells, dtype=object)


def format_cell(column: str, value: Any, is_console: bool = False) -> str:
    """Returns a value as text: a `Spread` in percent, costs with fitting units, nothing for None."""
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
    """Returns a mean accuracy in percent, with its standard deviation if there is more than one seed."""
    return format_mean_deviation(spread.mean, spread.deviation)


def format_gain(gain: Spread, before_note: str) -> str:
    """Returns a gain in percentage points with its interval, and says if it is not resolved."""
    interval = gain.interval and " [{}, {}]".format(*(format_accuracy(end, "+") for end in gain.interval))
    note = "" if gain.is_resolved else "(not resolved)"
    return f"{format_accuracy(gain.mean, '+')}{interval or ''}{before_note if note else ''}{note}"


def to_markdown(table: pd.DataFrame) -> str:
    """Returns a table of strings in Markdown, its cells not padded."""
    return table.to_markdown(index=False, tablefmt="github", disable_numparse=True, stralign=None, numalign=None)


def to_csv(table: pd.DataFrame) -> str:
    """Returns the table of `build_table` as CSV, in fractions, ones and seconds.

    A spread becomes three columns, a gain five, and a latency three: the median and the quartiles.
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
    """Puts an apostrophe before text that a spreadsheet would take for a formula. Numbers stay as they are.

    Source: OWASP, "CSV Injection".
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
        runs: The rows of `tabulate_runs`.
        table: The table of `build_table`.
        figures: The captions of the figures that lie beside the report, by their names.
        images: Which images the accuracies are of.
        baseline: What gains are over.
    """
    lines = ["# Report", "", *describe_runs(folders), "", to_markdown(format_table(table))]
    reading = READING + (LATENCY_READING if LATENCIES[0] in table else "")
    lines += ["", f"{images}. {reading.format(baseline=escape_markdown(baseline))}"]
    for name, caption in figures.items():
        lines += ["", f"![{name.replace('_', ' against ')}]({name}.png)", "", escape_markdown(caption)]
    lines += ["", *format_gains_by_seed(runs), *describe_missing_gains(runs), *describe_left_out(folders, runs)]
    return "\n".join(lines) + "\n"


def describe_runs(folders: list[RunFolder]) -> list[str]:
    """Returns the number of runs, their data and epochs, and the version of PyTorch."""
    summaries = [entry.run.summary for entry in folders if entry.run is not None]
    data = sorted({str(summary.get("data", "unknown data")) for summary in summaries})
    epochs = sorted({str(summary.get("epochs", "?")) for summary in summaries})
    versions = sorted({f"torch {v.get('torch', '?')}" for s in summaries if (v := s.get("versions") or {})})
    text = f"{len(summaries)} finished runs on {escape_markdown(', '.join(data))}, "
    text += f"{escape_markdown(', '.join(epochs))} epochs"
    text += f" ({escape_markdown(', '.join(versions))})." if versions else "."
    return [text, "", SMOKE_TEST] if "digits" in data else [text]


def format_gains_by_seed(runs: pd.DataFrame) -> Iterator[str]:
    """Yields a table of each seed's own gain, which a mean may hide."""
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
    """Yields the rows that could not be compared, if others could."""
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
    """Yields the runs that are not in the table, and why."""
    duplicates = sum(entry.run is not None for entry in folders) - len(runs)
    if duplicates:
        yield from (f"{duplicates} finished runs have the options and the seed of another one and are left out.", "")
    unfinished = [entry for entry in folders if entry.run is None]
    if unfinished:
        yield from ("Not in the table:", "")
        for entry in unfinished:
            reason = hide_folders(hide_host(entry.reason, entry.host), [entry.folder])
            yield f"- {format_code(entry.folder.name)}: {entry.state}; {format_code(reason)}"


def hide_host(text: str, host: str | None) -> str:
    """Returns the text without the name of a machine; a reason may contain it, such as in an address."""
    for name in filter(None, (host, socket.gethostname())):
        text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", "HOST", text)
    return text
