"""Writes the files of a report: its tables, and figures as PNG, SVG and PDF."""

import argparse
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from odcheap.report import latency, plots, tables
from odcheap.report.load_runs import RunFolder
from odcheap.report.statistics import BASELINE, Latencies, Latency, summarize_runs, tabulate_runs
from odcheap.utils.console import console, say, show_steps
from odcheap.utils.errors import Failure, OptionError
from odcheap.utils.files import write_atomic, write_text
from odcheap.utils.text import count_things, escape_control_chars

REPORT_START = re.compile(rb"# Report\n\n\d+ finished runs? on ")
COST_LABELS = {
    "accuracy_macs": "MACs of one image, million",
    "accuracy_latency": "latency of one image in ONNX Runtime on the CPU, ms",
}
TRADEOFF_CAPTION = (
    "The accuracy of the selected student against its cost. Vertical bars: standard deviation over seeds. "
    "Points of about equal cost that would cover each other are drawn side by side."
)
LATENCY_CAPTION = " Points: medians of all calls; horizontal bars: their quartiles."
STANDARD_CAPTION = (
    " The standard network was not trained here and has no accuracy: its cost is a star on the axis, or, if it is much "
    "larger than the others, a number below it."
)
GAINS_CAPTION = (
    "Gains of the mean student over {baseline}, paired by seed, with 95 % intervals by Student's t-distribution."
)
CURVES_CAPTION = (
    "Top-1 on the {images} images by epoch: means over seeds. Bands: standard deviation over seeds. "
    "The first epochs may be below the axis."
)
FIGURES, SUFFIXES = ("accuracy_macs", "accuracy_latency", "gains", "curves"), ("png", "svg", "pdf")


def write_report(folders: list[RunFolder], options: argparse.Namespace) -> int:
    """Writes the report of the finished runs, prints its table, and returns the exit status 0.

    Args:
        folders: All folders of runs that were found.
        options: The options of the command.

    Raises:
        Failure: No run is finished.
    """
    for entry in folders:
        if entry.state == "unreadable":
            say(f"skipped: {entry.reason}")
    finished = [entry.run for entry in folders if entry.run is not None]
    if not finished:
        raise Failure(f"no finished run among {len(folders)}; --status says more")
    images, baseline = "val" if options.val else "test", options.against or BASELINE
    runs = tabulate_runs(finished, options.against, images)
    rows = summarize_runs(runs)
    # The folder is checked before the networks are timed, which takes the longest.
    out = prepare_folder(options.out, Path(options.dirs[0]) / "report")
    with show_steps() as show_step:
        show_step(f"{count_things(len(finished), 'finished run')} of {len(folders)} read")
        latencies = {}
        if not options.no_latency:
            latencies = latency.measure_latencies(runs, options.config_dir, show_step=show_step)
        table = tables.build_table(rows, latencies)
        captions = draw_figures(runs, rows, latencies, baseline, images, out, show_step)
    description = "Held-out images" if options.val else "Test images"
    write_text(out / "report.md", tables.format_report(folders, runs, table, captions, description, baseline))
    write_text(out / "report.csv", tables.to_csv(table))
    tables.show_comparison(console(), table, baseline, images)
    files = ", ".join(["report.csv", *(f"{name}.png" for name in captions)])
    count = f"{count_things(len(finished), 'finished run')} of {len(folders)}"
    line = f"{count}; written: {escape_control_chars(out)}/report.md, {files}"
    console().print(line, soft_wrap=True)
    return 0


def prepare_folder(out: Path | None, default: Path) -> Path:
    """Makes the folder of the report, and returns it.

    Args:
        out: The folder that the user has given; None for the default.
        default: The default.

    Raises:
        OptionError: The folder cannot be made, or contains files with the names of a report's files that no report has
            written.
    """
    folder = default if out is None else out
    if out is None and default.is_symlink():
        raise OptionError("--out", default, "is a link to elsewhere: name the folder to write with --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError("--out", folder, f"cannot be written ({error.strerror})") from error
    names = ["report.csv", *(f"{figure}.{suffix}" for figure in FIGURES for suffix in SUFFIXES)]
    others = [name for name in names if os.path.lexists(folder / name)]
    if not is_report(folder / "report.md") and (others or os.path.lexists(folder / "report.md")):
        name = others[0] if others else "report.md"
        raise OptionError("--out", folder, f"holds a {name} that no report has written: name another folder")
    wrong = [name for name in ("report.md", *names) if (folder / name).is_dir()]
    if wrong:
        raise OptionError("--out", folder, f"holds a folder called {wrong[0]}: name another folder")
    return folder


def is_report(path: Path) -> bool:
    """Returns whether a file begins as every `report.md` does."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return REPORT_START.match(file.read(100)) is not None


def draw_figures(
    runs: pd.DataFrame,
    rows: pd.DataFrame,
    latencies: Mapping[str, Latencies],
    baseline: str,
    images: str,
    out: Path,
    show_step: Callable[[str], None],
) -> dict[str, str]:
    """Writes the figures for which there are data, and returns their captions by the names of the figures.

    Args:
        runs: The table of `tabulate_runs`, with a row for each run.
        rows: The table of `summarize_runs`, with a row for each setting and method.
        latencies: The latencies of the student and of the standard network, by the `name` of a row.
        baseline: The method with which the others are compared, or the `name` of a row (method and setting).
        images: The images on which the accuracies were measured: `test` or `val`.
        out: The folder of the report.
        show_step: A function that is called with a line of text before each figure is drawn.
    """
    # Accuracy against costs.
    figures, captions, data = {}, {}, plots.describe_data(runs["run"])
    for name, (cost, standard) in {
        "accuracy_macs": collect_macs(rows),
        "accuracy_latency": collect_latencies(rows, latencies),
    }.items():
        if (cost["median"].notna() & rows["selected"].notna()).any():
            show_step(f"drawing {name}")
            figures[name] = plots.plot_tradeoff(rows, cost, COST_LABELS[name], data, images, standard)
            captions[name] = TRADEOFF_CAPTION + (LATENCY_CAPTION if name == "accuracy_latency" else "")
            captions[name] += STANDARD_CAPTION if standard else ""

    # Gains over the baseline, and accuracy by epoch.
    if rows["gain"].notna().any():
        show_step("drawing gains")
        figures["gains"] = plots.plot_gains(rows, baseline, data)
        captions["gains"] = GAINS_CAPTION.format(baseline=baseline)
    columns = {column for run in runs["run"] for column, values in run.history.items() if values.notna().any()}
    if columns:
        show_step("drawing curves")
        stage = "val" if "val/student_0/top1" in columns else "train"
        figures["curves"] = plots.plot_curves(runs, stage, data)
        captions["curves"] = CURVES_CAPTION.format(images=plots.STAGES[stage])

    for name, figure in figures.items():
        for suffix in SUFFIXES:
            content = plots.render(figure, suffix)
            write_atomic(out / f"{name}.{suffix}", lambda file, content=content: file.write(content))
    return captions


def collect_macs(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[Latency]]:
    """Returns the multiply-accumulates, in millions, of all rows, and of standard networks that are in no row.

    Args:
        rows: The table of `summarize_runs`.

    Returns:
        A table as `to_costs` returns it, and the costs of the standard networks.
    """
    own = [None if spread is None else spread.mean / 1e6 for spread in rows["macs"]]
    standard = {macs / 1e6 for macs in rows["standard macs"].dropna()} - set(own)
    return to_costs([(macs, None, None) for macs in own], rows), [
        Latency(m, math.nan, math.nan) for m in sorted(standard)
    ]


def collect_latencies(rows: pd.DataFrame, latencies: Mapping[str, Latencies]) -> tuple[pd.DataFrame, list[Latency]]:
    """Returns the latencies, in milliseconds, of all rows, and of standard networks that are in no row.

    Args:
        rows: The table of `summarize_runs`.
        latencies: The latencies of the student and of the standard network, by the `name` of a row.

    Returns:
        A table as `to_costs` returns it, and the latencies of the standard networks.
    """
    own = [latencies[name].student if name in latencies else (None, None, None) for name in rows["name"]]
    is_trained = (rows["block type"] == "Standard").any()
    # The standard network is timed beside each student; one of these timings stands for all of them.
    by_macs = {
        macs: latencies[name].standard
        for name, macs in zip(rows["name"][::-1], rows["standard macs"][::-1], strict=True)
        if name in latencies
    }
    return to_costs(own, rows), [] if is_trained else sorted(by_macs.values())


def to_costs(values: Sequence[tuple[float | None, ...]], rows: pd.DataFrame) -> pd.DataFrame:
    """Returns costs as a table with the index of `rows` and the columns `median`, `low` and `high`.

    Args:
        values: For each row the cost as (median, lower quartile, upper quartile); None for what is not known.
        rows: The table of `summarize_runs`.
    """
    return pd.DataFrame(values, index=rows.index, columns=["median", "low", "high"], dtype=float)
