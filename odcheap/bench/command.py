"""Measures how fast training, inference and start-up are; `arguments` has the help of the command."""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from hydra.utils import instantiate
from matplotlib.figure import Figure
from omegaconf import DictConfig

from odcheap.bench.arguments import parse_arguments
from odcheap.bench.exports import bench_exports
from odcheap.bench.loops import LOOPS, NUM_CLASSES, PRECISIONS, LoopTiming, compare_loops
from odcheap.bench.measurement import compare_times, report_progress
from odcheap.bench.operators import measure_operators
from odcheap.bench.peers import PEER_LOOPS, PEERS, build_distillation, has_torchdistill
from odcheap.config.compose import compose_config
from odcheap.config.messages import describe_error, explained_errors, hide_library_warnings
from odcheap.export import latency
from odcheap.layers.cheap_conv import BlockType
from odcheap.models.backbone import Backbone
from odcheap.models.build import build_backbone
from odcheap.training.summary import describe_machine, list_versions
from odcheap.utils.console import print_error
from odcheap.utils.errors import Failure, OptionError
from odcheap.utils.files import write_json, write_text
from odcheap.utils.parts import build_part
from odcheap.utils.performance import keep_freed_memory

BLOCK_TYPES = ("DW", "Shift", "Group")
BATCHES = (1, 64)  # images of an inference call
PEERS_TABLE = """
One student that learns from a standard network (kd), batch {batch_size}, images a second:

{peers}
"""
# Ends the process at the first optimizer step, by a public hook of PyTorch.
EXIT_AT_FIRST_STEP = """
import os, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
register_optimizer_step_post_hook(lambda *_: os._exit(17))
"""
TRAIN = """
from odcheap.cli import main
sys.exit(main(["train", *sys.argv[1:]]))
"""
TABLES = """{hardware}

Training of {num_stu} students, batch {batch_size}; ratios are medians (min to max):

{training}
{peers}
One layer, forward and backward, in milliseconds. A copy is that of one feature map, which is in the cache or in memory;
a pass is the fused operator's time, divided by the number of times that it reads or writes a map:

{operators}

Inference in ONNX Runtime on the CPU, compared with the standard network:

{inference}

Start-up to the first step: {start}
"""


def main(arguments: Sequence[str] | None = None, prog: str = "odcheap bench") -> int:
    """Runs `odcheap bench`.

    Args:
        arguments: The command-line arguments; None for those of this process.
        prog: The name of the command in its help.

    Returns:
        The exit status: 0, or 1 after an error.
    """
    options = parse_arguments(arguments, prog)
    hide_library_warnings()
    keep_freed_memory()
    try:
        if options.peers and not has_torchdistill():
            raise Failure("--peers needs torchdistill: pip install 'odcheap[bench]'")
        if options.exports:
            return bench_exports(options)
        for result in measure(options.overrides, options.quick, options.peers, options.config_dir):
            # Written after each part, so that the measurements stay if a later part fails.
            options.out.mkdir(parents=True, exist_ok=True)
            write_json(options.out / "bench.json", result)
    except explained_errors() as error:
        return print_error(describe_error(error))
    text = format_tables(result)
    write_text(options.out / "bench.md", text)
    plot_training(result).savefig(options.out / "bench.png", dpi=120)
    print(text)
    print(f"written: {options.out}/bench.json, bench.md, bench.png")
    return 0


def measure(
    overrides: list[str], quick: bool, peers: bool = False, config_dirs: Sequence[Path] = ()
) -> Iterator[dict[str, Any]]:
    """Measures training, inference and start-up, and yields the result so far after each measurement.

    Args:
        overrides: Training options, such as `num_stu=2`.
        quick: Whether to measure one block type (kind of cheap convolution) only, in fewer rounds.
        peers: Whether to measure the training loops of other projects too.
        config_dirs: Folders with config files of your own.

    Yields:
        The same dict each time, with more entries. In the end they are `machine`, `versions`, `overrides`, and:

        - `training`: a dict for each block type and precision, with the entries of `summarize`, `num_stu`,
          `page_faults` (of a step, medians by loop), `speedup_over_2019` (how many times as fast odcheap is as the loop
          of 2019), and `time_over_bare` (odcheap's time over that of the bare loop);
        - `peers`, if they are measured: a dict for each block type and precision, with the entries of `summarize`, and
          `speedup` (how many times as fast odcheap is as each loop);
        - `operators`, `inference` and `start_seconds`: what `measure_operators`, `measure_inference` and
          `measure_start` return.

        The ratios have the form of `compare_times`.
    """

    def compose(*more: str) -> DictConfig:
        # The data are random, so no images are held out.
        return compose_config([*overrides, *more, "select=last", "data.val_size=0"], config_dirs)

    cfg = compose()
    if cfg.students is not None:
        raise OptionError("students", cfg.students, "must be null: the benchmark trains students of one shape")
    on_gpu = cfg.trainer.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    steps, rounds = (20, 5) if on_gpu else (1, 3) if quick else (2, 5)
    result: dict[str, Any] = {"machine": describe_machine(device), "versions": list_versions(), "overrides": overrides}

    # Training: every block type with every precision, unless the options choose one.
    chosen = dict(override.partition("=")[::2] for override in overrides)
    block_types = [chosen["block_type"]] if "block_type" in chosen else BLOCK_TYPES[: 1 if quick else None]
    precisions = [chosen["trainer.precision"]] if "trainer.precision" in chosen else PRECISIONS

    def time_loops(title: str, *loops: Any) -> Iterator[tuple[dict[str, LoopTiming], dict[str, Any]]]:
        for block_type, precision in product(block_types, precisions):
            report_progress(f"{title}, {block_type}, {precision}: {rounds} rounds")
            own = compose(f"block_type={block_type}", f"trainer.precision={precision}")
            timings = compare_loops(own, device, steps, rounds, *loops)
            row = {"block_type": block_type, "precision": precision}
            yield timings, row | summarize(timings, own.data.batch_size)

    result["training"] = []
    for timings, row in time_loops("training"):
        row["num_stu"] = cfg.num_stu
        row["page_faults"] = {name: statistics.median(timing.page_faults) for name, timing in timings.items()}
        row["speedup_over_2019"] = compare_times(timings["loop_2019"].seconds, timings["trainer"].seconds)
        row["time_over_bare"] = compare_times(timings["trainer"].seconds, timings["bare_loop"].seconds)
        result["training"].append(row)
        yield result
    if peers:
        result["peers"] = []
        for timings, row in time_loops("other projects", build_distillation, PEER_LOOPS):
            ours = timings["trainer"].seconds
            row["speedup"] = {name: compare_times(timings[name].seconds, ours) for name in PEER_LOOPS}
            result["peers"].append(row)
            yield result

    report_progress("layers with and without fused operators")
    batch_size = min(row["batch_size"] for row in result["training"])
    result["operators"] = measure_operators(device, batch_size, 3 if quick else 9)
    yield result
    report_progress("inference in ONNX Runtime")
    convs = {t: build_part("block_type", {"part": t}, config_dirs=config_dirs) for t in (*block_types, "Standard")}
    result["inference"] = measure_inference(instantiate(cfg.backbone), convs, 0.5 if quick else 3.0)
    report_progress("start-up")
    result["start_seconds"] = measure_start()
    yield result


def summarize(timings: dict[str, LoopTiming], batch_size: int) -> dict[str, Any]:
    """Returns the entries of `bench.json` that each comparison of training loops has.

    Args:
        timings: The timing of each loop, by name.
        batch_size: The number of images in a batch.

    Returns:
        A dict with `batch_size`, and three dicts by the names of the loops: `seconds` (of a step, one value for each
        round), `images_per_second` (the median over the rounds), and `peak_bytes`.
    """
    return {
        "batch_size": batch_size,
        "seconds": {name: timing.seconds for name, timing in timings.items()},
        "images_per_second": {n: batch_size / statistics.median(t.seconds) for n, t in timings.items()},
        "peak_bytes": {name: timing.peak_bytes for name, timing in timings.items()},
    }


def measure_inference(
    build: Callable[..., Backbone], convs: dict[str, BlockType], seconds: float
) -> list[dict[str, Any]]:
    """Times the inference of a backbone with several block types, in ONNX Runtime on the CPU.

    Args:
        build: A function that builds the backbone.
        convs: The block types by name; one of them is "Standard".
        seconds: The time for the measurement of each network, in seconds.

    Returns:
        A dict for each block type. `block_type` is its name. `ms_1` and `ms_64` are the milliseconds of a call with 1
        image and with 64 images. `speedup_1` and `speedup_64` say how many times as fast as the standard network it is.
    """
    networks = {name: build_backbone(build, conv, NUM_CLASSES, for_comparison=True) for name, conv in convs.items()}
    size = (3, networks["Standard"].native_size, networks["Standard"].native_size)
    timings = latency.measure_timings(networks, size, BATCHES, seconds)
    ms = {key: 1000 * timing.p50 for key, timing in timings.items()}
    return [
        {"block_type": name}
        | {f"ms_{batch}": ms[name, batch] for batch in BATCHES}
        | {f"speedup_{batch}": ms["Standard", batch] / ms[name, batch] for batch in BATCHES}
        for name in networks
    ]


def measure_start(script: str = TRAIN) -> float | None:
    """Starts a small run in a new process, and returns the seconds until its first step; None if it takes no step.

    Args:
        script: Python code that starts a training with the options in `sys.argv[1:]`.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, "-c", EXIT_AT_FIRST_STEP + script, "experiment=quickstart", "trainer=cpu"]
        ended = subprocess.run([*command, f"job_dir={folder}/run"], capture_output=True)
        return time.perf_counter() - start if ended.returncode == 17 else None


def format_tables(result: dict[str, Any]) -> str:
    """Returns the result in Markdown, with tables of training, layers and inference, and with the start-up time.

    Args:
        result: The last result of `measure`.
    """
    # A row for each block type and precision, then a row for each block type.
    training = [
        {"block_type": row["block_type"], "precision": row["precision"]}
        | {f"{LOOPS[name]}, images/s": f"{rate:.0f}" for name, rate in row["images_per_second"].items()}
        | {
            "Trainer / 2019": format_ratio(row["speedup_over_2019"]),
            "time over bare loop": format_ratio(row["time_over_bare"]),
            "peak GiB, 2019": format_gib(row["peak_bytes"]["loop_2019"]),
            "peak GiB, Trainer": format_gib(row["peak_bytes"]["trainer"]),
            "page faults a step, Trainer": f"{row['page_faults']['trainer']:.0f}",
        }
        for row in result["training"]
    ]
    inference = [
        {"block_type": row["block_type"]}
        | {f"ms for {batch}": f"{row[f'ms_{batch}']:.3g}" for batch in BATCHES}
        | {f"speedup for {batch}": f"{row[f'speedup_{batch}']:.2f}" for batch in BATCHES}
        for row in result["inference"]
    ]
    operators = [
        {"layer": row["layer"], "map": row["map"], "dtype": row["dtype"]}
        | {"copy": f"{row['copy_ms']:.2f}", "copy in memory": f"{row['memory_copy_ms']:.2f}"}
        | {"PyTorch": f"{row['plain_ms']:.2f}", "fused": f"{row['fused_ms']:.2f}"}
        | {"a pass / copy in memory": f"{row['pass_over_copy']:.2f}", "speedup": format_ratio(row["speedup"])}
        for row in result["operators"]
    ]
    peers = [
        {"block_type": row["block_type"], "precision": row["precision"]}
        | {PEERS[name]: f"{rate:.0f}" for name, rate in row["images_per_second"].items()}
        | {f"odcheap / {PEERS[name]}": format_ratio(ratio) for name, ratio in row["speedup"].items()}
        for row in result.get("peers", [])
    ]
    first, start, hardware = result["training"][0], result["start_seconds"], result["machine"]
    return TABLES.format(
        hardware=f"{hardware['gpu'] or hardware['cpu']}, {hardware['threads']} threads",
        num_stu=first["num_stu"],
        batch_size=first["batch_size"],
        training=to_table(training),
        peers=PEERS_TABLE.format(batch_size=first["batch_size"], peers=to_table(peers)) if peers else "",
        operators=to_table(operators) if operators else "(no fused operators here)",
        inference=to_table(inference),
        start="not measured" if start is None else f"{start:.1f} s",
    )


def to_table(rows: list[dict[str, Any]]) -> str:
    """Returns a table in Markdown; each dict is a row, and its keys are the headings."""
    return pd.DataFrame(rows).to_markdown(index=False)


def format_ratio(ratio: dict[str, float]) -> str:
    """Returns ratios of `compare_times` as text with median, minimum and maximum, such as "1.52 (1.49 to 1.60)"."""
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"


def format_gib(count: int | None) -> str:
    """Returns a number of bytes in GiB (1,073,741,824 bytes) as text with two decimals; empty for None."""
    return "" if count is None else f"{count / 2**30:.2f}"


def plot_training(result: dict[str, Any]) -> Figure:
    """Draws the training images per second of the three training loops as bars.

    Args:
        result: The last result of `measure`.
    """
    rows = result["training"]
    rates = pd.DataFrame([row["images_per_second"] for row in rows]).rename(columns=LOOPS)
    rates.index = pd.Index([f"{row['block_type']}\n{row['precision']}" for row in rows])
    figure = Figure(figsize=(2 + 1.4 * max(2, len(rows)), 4), layout="constrained")
    axes = rates.plot.bar(ax=figure.subplots(), rot=0, width=0.8, color=["#999999", "#56B4E9", "#0072B2"])
    for bars in axes.containers:
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_ylabel("training images per second")
    axes.set_title(f"{rows[0]['num_stu']} students, batch {rows[0]['batch_size']}", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
