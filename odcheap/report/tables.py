"""The report's text: tables in Markdown and CSV, and what a reader must know about them."""

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from odcheap.export.model_card import format_code
from odcheap.report.load_runs import RunFolder
from odcheap.report.statistics import ACCURACIES, COSTS, GAINS, Spread
from odcheap.utils.text import escape_markdown, hide_folders

COLUMNS = ["mean student", "gain", "selected", "selected gain", "ensemble"]
COLUMNS += [name for name in (*ACCURACIES, *COSTS) if name not in COLUMNS]
WHOLE_NUMBERS = ("params", "macs", "epochs")
READING = """Top-1 is in percent: mean ± sample standard deviation over n seeds. *Mean student* is the mean of all
students after the last epoch, without any selection. *Selected* is the student that was best on held-out images; for
`alone` it is the best of independent students. Gains over `{baseline}` are paired by seed, in percentage points, with
their 95 % confidence interval by Student's t-distribution; a gain is *not resolved* if the interval contains zero, and
with one seed. Options that most runs share are not named. A PMAC is 10^15
multiply-accumulates. Milliseconds are for one image in ONNX Runtime on this machine, of the student and of the standard
network. Teachers of different kinds cannot be compared."""
SMOKE_TEST = "**digits is a smoke test**: it shows that everything works, and nothing about methods."


def build_table(rows: pd.DataFrame, latencies: Mapping[str, tuple[float, float]]) -> pd.DataFrame:
    """Returns the report's table, without empty columns.

    Args:
        rows: The rows of `summarize_runs`.
        latencies: Milliseconds of the student and of the standard network by the row's name.
    """
    table = rows[["setting", "method", "n", *COLUMNS]].copy()
    for name in COSTS:
        means = [None if spread is None else spread.mean for spread in table[name]]
        table[name] = pd.array([round(m) if m is not None and name in WHOLE_NUMBERS else m for m in means], object)
    for k, name in enumerate(("latency ms", "standard ms")):
        table[name] = pd.array([latencies[row][k] if row in latencies else None for row in rows["name"]], object)
    return table.loc[:, (table.notna() & (table != "")).any()]


def format_cell(column: str, value: Any) -> str:
    """Formats a value for Markdown: a `Spread` in percent, other numbers with three digits, nothing for None."""
    if isinstance(value, Spread):
        if column in GAINS:
            interval = value.interval and " [{:+.2f}, {:+.2f}]".format(*(100 * end for end in value.interval))
            return f"{100 * value.mean:+.2f}{interval or ''}{'' if value.is_resolved else ' (not resolved)'}"
        return f"{100 * value.mean:.2f}" + ("" if value.deviation is None else f" ± {100 * value.deviation:.2f}")
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else escape_markdown(value)


def to_markdown(table: pd.DataFrame) -> str:
    """Returns a table of strings in Markdown, its cells not padded."""
    return table.to_markdown(index=False, tablefmt="github", disable_numparse=True, stralign=None, numalign=None)


def to_csv(table: pd.DataFrame) -> str:
    """Returns the table of `build_table` as CSV, in fractions; a spread becomes three columns, a gain five."""
    columns = {}
    for name, values in table.items():
        if not any(isinstance(value, Spread) for value in values):
            columns[name] = values
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
    figures: list[str],
    images: str,
    baseline: str,
) -> str:
    """Returns the report in Markdown.

    Args:
        folders: All folders, of finished and other runs.
        runs: The rows of `tabulate_runs`.
        table: The table of `build_table`.
        figures: Names of the figures that lie beside the report.
        images: Which images the accuracies are of.
        baseline: What gains are over.
    """
    cells = pd.DataFrame({name: [format_cell(str(name), value) for value in values] for name, values in table.items()})
    lines = ["# Report", "", *describe_runs(folders), "", to_markdown(cells)]
    lines += ["", f"{images}. {READING.format(baseline=escape_markdown(baseline))}"]
    for name in figures:
        lines += ["", f"![{name.replace('_', ' against ')}]({name}.png)"]
    lines += ["", *format_gains_by_seed(runs), *describe_left_out(folders, runs)]
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


def describe_left_out(folders: list[RunFolder], runs: pd.DataFrame) -> Iterator[str]:
    """Yields the runs that are not in the table, and why."""
    duplicates = sum(entry.run is not None for entry in folders) - len(runs)
    if duplicates:
        yield from (f"{duplicates} finished runs have the options and the seed of another one and are left out.", "")
    unfinished = [entry for entry in folders if entry.run is None]
    if unfinished:
        yield from ("Not in the table:", "")
        for entry in unfinished:
            reason = hide_folders(entry.reason, [entry.folder])
            yield f"- {format_code(entry.folder.name)}: {entry.state}; {format_code(reason)}"
