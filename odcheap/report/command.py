"""Compares finished runs and sweeps in a table and in figures.

The report is written to DIR/report: report.md, report.csv, and figures as PNG and SVG. Runs that differ in the seed
only become one row; gains over method=alone are paired by seed.

  odcheap report runs/sweep                 the report of all runs below runs/sweep
  odcheap report --status runs/sweep        which runs are finished, running or failed
  odcheap report --costs                    parameters and MACs of every backbone with every block type
  odcheap report --costs backbone=resnet56  the same of one backbone
"""

import argparse
import io
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pandas as pd
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from odcheap.config.messages import describe_error
from odcheap.report import costs, latency, plots, tables
from odcheap.report.console_tables import build_table, short_names
from odcheap.report.load_runs import RunFolder, list_planned_runs, load_runs
from odcheap.report.statistics import BASELINE, summarize_runs, tabulate_runs
from odcheap.utils.console import console, print_error, say
from odcheap.utils.errors import Failure, OptionError
from odcheap.utils.files import write_atomic, write_text
from odcheap.utils.text import escape_control_chars

REPORT_START = re.compile(rb"# Report\n\n\d+ finished runs on ")
FIGURES, SUFFIXES = ("accuracy_macs", "accuracy_latency", "gains", "curves"), ("png", "svg")


def main(arguments: Sequence[str] | None = None, prog: str = "odcheap report") -> int:
    """Runs the command and returns the exit status."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("dirs", nargs="*", metavar="DIR", help="folders of runs or sweeps; with --costs: OPTION=VALUE")
    add("--out", type=Path, help="folder of the report (default: report/ in the first DIR)")
    add("--status", action="store_true", help="only list the runs with their states")
    add("--no-latency", action="store_true", help="do not time the students in ONNX Runtime")
    add("--val", action="store_true", help="figures of the held-out images: to make decisions, not to publish")
    add(
        "--against",
        metavar="METHOD",
        help="gains are over this method, or over this row (default: alone)",
    )
    add("--costs", action="store_true", help="parameters and MACs of networks, without any run")
    more = "folder with configuration files of your own, for networks that odcheap does not have; may be repeated"
    add("--config-dir", type=Path, action="append", default=[], metavar="DIR", help=more)
    options = parser.parse_args(arguments)
    try:
        if options.costs:
            return costs.show_costs(options.dirs, options.config_dir)
        if not options.dirs:
            parser.error("name a DIR, or --costs")
        folders = load_runs(options.dirs)
        if options.status:
            return show_status([*folders, *list_planned_runs(options.dirs, folders)])
        return write_report(folders, options)
    except (HydraException, OmegaConfBaseException) as error:
        return print_error(describe_error(error))
    except Failure as error:
        return print_error(str(error))


def show_status(folders: list[RunFolder]) -> int:
    """Prints a line for each run; returns 1 if one has failed."""
    names = short_names([entry.folder.name for entry in folders])
    rows = [
        {"run": name, "state": entry.state, "details": entry.reason} for name, entry in zip(names, folders, strict=True)
    ]
    console().print(build_table(rows, left=("run", "state", "details")))
    counts = Counter(entry.state for entry in folders)
    console().print(", ".join(f"{count} {state}" for state, count in counts.items()))
    return int("failed" in counts)


def write_report(folders: list[RunFolder], options: argparse.Namespace) -> int:
    """Writes the report of the finished runs; returns the exit status."""
    for entry in folders:
        if entry.state == "unreadable":
            say(f"skipped: {entry.reason}")
    finished = [entry.run for entry in folders if entry.run is not None]
    if not finished:
        raise Failure(f"no finished run among {len(folders)}; --status says more")
    runs = tabulate_runs(finished, options.against, "val" if options.val else "test")
    rows = summarize_runs(runs)
    latencies = {} if options.no_latency else latency.measure_latencies(runs, options.config_dir)
    table, baseline = tables.build_table(rows, latencies), options.against or BASELINE
    out = prepare_folder(options.out, Path(options.dirs[0]) / "report")
    figures = draw_figures(runs, rows, table, baseline, out)
    images = "Held-out images" if options.val else "Test images"
    write_text(out / "report.md", tables.format_report(folders, runs, table, figures, images, baseline))
    write_text(out / "report.csv", tables.to_csv(table))
    line = f"{len(finished)} finished runs of {len(folders)}; written: {escape_control_chars(out)}/report.md"
    console().print(line, soft_wrap=True)
    return 0


def prepare_folder(out: Path | None, default: Path) -> Path:
    """Makes the report's folder, and returns it.

    Raises:
        OptionError: The folder cannot be made, or files in it that no report has written have a report's names.
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
    """Returns whether a file is a report: it begins as every report does."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return REPORT_START.match(file.read(100)) is not None


def draw_figures(runs: pd.DataFrame, rows: pd.DataFrame, table: pd.DataFrame, baseline: str, out: Path) -> list[str]:
    """Writes the figures for which there are data, and returns their names."""
    figures = {}
    with matplotlib.rc_context({"text.parse_math": False}):  # a $ in an option's value starts no formula
        for name, column, factor, label in (
            ("accuracy_macs", "macs", 1e-6, "million multiply-accumulates of one image"),
            ("accuracy_latency", "latency ms", 1.0, "ms for one image in ONNX Runtime on the CPU"),
        ):
            cost = table[column].astype(float) * factor if column in table else pd.Series(dtype=float)
            if (cost.notna() & rows["selected"].notna()).any():
                figures[name] = plots.plot_tradeoff(rows, cost, label)
        if rows["gain"].notna().any():
            figures["gains"] = plots.plot_gains(rows, baseline)
        columns = {column for run in runs["run"] for column, values in run.history.items() if values.notna().any()}
        if columns:
            figures["curves"] = plots.plot_curves(runs, "val" if "val/student_0/top1" in columns else "train")
        for name, figure in figures.items():
            for suffix in SUFFIXES:
                image = io.BytesIO()
                figure.savefig(image, format=suffix, dpi=150)
                write_atomic(out / f"{name}.{suffix}", lambda file, image=image: file.write(image.getbuffer()))
    return list(figures)
