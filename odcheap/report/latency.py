"""Inference time of finished runs' students, and of the standard network in their place."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from odcheap.export.latency import time_networks
from odcheap.layers.cheap_conv import Standard
from odcheap.models.build import build_network, load_network, read_student_settings
from odcheap.report.load_runs import FinishedRun
from odcheap.utils.errors import Failure
from odcheap.utils.files import read_safetensors


def measure_latencies(
    runs: pd.DataFrame, config_dirs: Sequence[Path] = (), seconds: float = 1.0
) -> dict[str, tuple[float, float]]:
    """Times one student of each row in ONNX Runtime on the CPU; the same network is timed once.

    Args:
        runs: The rows of `tabulate_runs`.
        config_dirs: `conf` directories with parts that odcheap does not have.
        seconds: Time for each network.

    Returns:
        Milliseconds of one image, of the student and of the standard network, by the row's name. A student that cannot
        be rebuilt, such as one of an older version, is left out.
    """
    firsts = runs.drop_duplicates("name")
    by_network: dict[str, tuple[float, float] | None] = {}
    latencies = {}
    for name, run in zip(firsts["name"], firsts["run"], strict=True):
        network = repr(sorted((k, v) for k, v in run.options.items() if k.startswith(("backbone", "block_type"))))
        if network not in by_network:
            by_network[network] = time_student(run, config_dirs, seconds)
        latencies[name] = by_network[network]
    return {name: pair for name, pair in latencies.items() if pair is not None}


def time_student(
    run: FinishedRun, config_dirs: Sequence[Path] = (), seconds: float = 1.0
) -> tuple[float, float] | None:
    """Returns the milliseconds of one image, of the student and of the standard network; None if it has no network."""
    path = run.folder / "student.safetensors"
    try:
        tensors, metadata = read_safetensors(path)
        settings = read_student_settings(metadata, "student", path)
        student = load_network(settings, tensors, "student", path, config_dirs)
        standard = build_network(settings, "student", path, Standard(), config_dirs).eval()
    except Failure:
        return None
    networks = {"student": student, "standard": standard}
    times = time_networks(networks, tuple(settings["image_size"]), (1,), seconds)
    return times["student", 1], times["standard", 1]
