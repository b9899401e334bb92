"""Writes the tables and the figures (PNG, SVG and PDF) of a report, for which it times the students."""

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from odcheap.export.latency import measure_timings
from odcheap.layers.cheap_conv import Standard
from odcheap.models.build import build_network, load_network, read_student_settings
from odcheap.predict import Timing
from odcheap.report import plots, tables
from odcheap.report.load_runs import FinishedRun, RunFolder
from odcheap.report.statistics import BASELINE, Latencies, Latency, summarize_runs, tabulate_runs
from odcheap.utils.console import console, say, show_steps
from odcheap.utils.errors import Failure, OptionError
from odcheap.utils.files import read_safetensors, write_atomic, write_text
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
STUDENT = "student.safetensors"
FIGURES, SUFFIXES = ("accuracy_macs", "accuracy_latency", "gains", "curves"), ("png", "svg", "pdf")


def write_report(folders: list[RunFolder], options: argparse.Namespace) -> int:
    """Writes the report of the finished runs, prints its table, and returns the exit status 0.

    Args:
        folders: The folders of all runs that were found, finished or not.
        options: The arguments of `odcheap report`.

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
            latencies = measure_latencies(runs, options.config_dir, show_step=show_step)
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
        out: The folder that the user has given; None to use `default`.
        default: The default folder.

    Raises:
        OptionError: The folder cannot be made, or a file of the report is there already and is not from a report.
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
    """Returns whether a file begins like a `report.md` of `odcheap report`."""
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
    """Draws the figures for which there are data, writes their files, and returns a dict of captions by figure name.

    Args:
        runs: The table of `tabulate_runs`, with a row for each run.
        rows: The table of `summarize_runs`, with a row for each setting and method.
        latencies: The latencies of the student and of the standard network, by the `name` of a row.
        baseline: The method with which the others are compared, or the `name` of a row (method and setting).
        images: "test" or "val" (held out), for the images on which the accuracies were measured.
        out: The folder of the report.
        show_step: A function that is called with a line of text before each figure is drawn.
    """
    # Accuracy against costs.
    figures, captions, data = {}, {}, plots.describe_data(runs["run"])
    for name, (cost, standard) in {
        "accuracy_macs": collect_macs(rows),
        "accuracy_latency": collect_latencies(rows, latencies),
    }.items():
        if any(c is not None and s is not None for c, s in zip(cost, rows["selected"], strict=True)):
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


def collect_macs(rows: pd.DataFrame) -> tuple[list[Latency | None], list[Latency]]:
    """Returns two lists of multiply-accumulates, in millions, as costs for `plot_tradeoff`.

    Args:
        rows: The table of `summarize_runs`.

    Returns:
        The costs of all rows, None if a cost is not known; and the costs of standard networks that are in no row.
    """
    own = [None if spread is None else Latency(spread.mean / 1e6) for spread in rows["macs"]]
    standard = {Latency(macs / 1e6) for macs in rows["standard macs"].dropna()}
    known = {cost.median for cost in own if cost is not None}
    return own, sorted(cost for cost in standard if cost.median not in known)


def collect_latencies(
    rows: pd.DataFrame, latencies: Mapping[str, Latencies]
) -> tuple[list[Latency | None], list[Latency]]:
    """Returns two lists of latencies, in milliseconds, as costs for `plot_tradeoff`.

    Args:
        rows: The table of `summarize_runs`.
        latencies: The latencies of the student and of the standard network, by the `name` of a row.

    Returns:
        The latencies of all rows, None if one was not measured; and those of standard networks that are in no row.
    """
    own = [latencies[name].student if name in latencies else None for name in rows["name"]]
    if (rows["block type"] == "Standard").any():
        return own, []
    # The standard network is timed beside each student; one of these timings stands for all of them.
    timed = rows[rows["name"].isin(latencies.keys())].drop_duplicates("standard macs")
    return own, sorted(latencies[name].standard for name in timed["name"])


def measure_latencies(
    runs: pd.DataFrame,
    config_dirs: Sequence[Path] = (),
    seconds: float = 1.0,
    show_step: Callable[[str], None] = lambda text: None,
) -> dict[str, Latencies]:
    """Times one student of each row of a report in ONNX Runtime on the CPU; equal networks are timed once.

    A row has all runs that differ in the seed only.

    Args:
        runs: The table of `tabulate_runs`.
        config_dirs: Folders with config files of your own, for parts that odcheap does not have.
        seconds: How long each network is timed.
        show_step: A function that is called with a line of text that says what is timed next.

    Returns:
        A dict from the `name` of a row to its latencies. If a student cannot be built, for example because its block
        type is in none of `config_dirs`, it is left out, and a line that says why is printed.
    """
    # Networks are equal if the options of backbone and block type are.
    has_student = [(run.folder / STUDENT).is_file() for run in runs["run"]]
    firsts = runs[has_student].drop_duplicates("name")
    rows_of_networks: dict[str, list[tuple[str, FinishedRun]]] = {}
    for name, run in zip(firsts["name"], firsts["run"], strict=True):
        shape = [(k, v) for k, v in run.options.items() if k.startswith(("backbone", "block_type", "students"))]
        network = repr((sorted(shape), find_network(run)))
        rows_of_networks.setdefault(network, []).append((name, run))
    latencies = {}
    for number, rows in enumerate(rows_of_networks.values(), 1):
        name, run = rows[0]
        show_step(f"timing network {number} of {len(rows_of_networks)} in ONNX Runtime ({name})")
        try:
            found = time_student(run, config_dirs, seconds)
        except Failure as error:
            say(f"no latency of {'; '.join(name for name, _ in rows)}: {error}")
        else:
            latencies |= {name: found for name, _ in rows}
    return latencies


def find_network(run: FinishedRun) -> str | None:
    """Returns the name of the selected student's network if the students have different shapes, otherwise None."""
    students, selected = run.summary.get("students") or [], run.summary.get("selected") or {}
    number = selected.get("student") or 0
    return students[number].get("network") if number < len(students) else None


def time_student(run: FinishedRun, config_dirs: Sequence[Path] = (), seconds: float = 1.0) -> Latencies:
    """Measures the latencies of a run's student, and of the same network with standard convolutions.

    Args:
        run: The run, whose folder contains a `student.safetensors`.
        config_dirs: Folders with config files of your own, for parts that odcheap does not have.
        seconds: How long each network is timed.

    Raises:
        Failure: The student cannot be read or built.
    """
    path = run.folder / STUDENT
    tensors, metadata = read_safetensors(path)
    settings = read_student_settings(metadata, "student", path)
    student = load_network(settings, tensors, "student", path, config_dirs)
    standard = build_network(settings, "student", path, Standard(), config_dirs).eval()
    networks = {"student": student, "standard": standard}
    times = measure_timings(networks, tuple(settings["image_size"]), (1,), seconds)
    return Latencies(to_milliseconds(times["student", 1]), to_milliseconds(times["standard", 1]))


def to_milliseconds(timing: Timing) -> Latency:
    """Converts the median and the quartiles of a timing from seconds to milliseconds."""
    return Latency(1000 * timing.p50, 1000 * timing.p25, 1000 * timing.p75)
