"""Measures the inference time of the students of finished runs, and that of the standard networks."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from odcheap.export.latency import measure_timings
from odcheap.layers.cheap_conv import Standard
from odcheap.models.build import build_network, load_network, read_student_settings
from odcheap.predict import Timing
from odcheap.report.load_runs import FinishedRun
from odcheap.report.statistics import Latencies, Latency
from odcheap.utils.console import say
from odcheap.utils.errors import Failure
from odcheap.utils.files import read_safetensors

STUDENT = "student.safetensors"


def measure_latencies(
    runs: pd.DataFrame,
    config_dirs: Sequence[Path] = (),
    seconds: float = 1.0,
    show_step: Callable[[str], None] = lambda text: None,
) -> dict[str, Latencies]:
    """Times one student of each setting and method in ONNX Runtime on the CPU; equal networks are timed once.

    Args:
        runs: The table of `tabulate_runs`.
        config_dirs: Further `conf` directories, with parts that odcheap does not have.
        seconds: The time for each network.
        show_step: A function that is called with a line of text that says what is timed next.

    Returns:
        The latencies by the `name` in the table. A student that cannot be built is left out, and a line is printed that
        says why: for example, it is of an earlier version, or its block type is in none of `config_dirs`.
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
    """Measures the latencies of a run's student and of the standard network.

    Args:
        run: The run, whose folder contains a `student.safetensors`.
        config_dirs: Further `conf` directories, with parts of the student that odcheap does not have.
        seconds: The time for each measurement.

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
    """Returns the median and the quartiles of a timing, which are in seconds, in milliseconds."""
    return Latency(1000 * timing.p50, 1000 * timing.p25, 1000 * timing.p75)
