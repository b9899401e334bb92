"""Times the files of several exports alternately in every runtime, and tabulates them with sizes and accuracies."""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from odcheap import predict
from odcheap.bench.measurement import report_progress
from odcheap.export import card_accuracy, executorch
from odcheap.export.model_card import RESULTS_FILE
from odcheap.export.runtimes import (
    EXECUTORCH,
    INT8,
    ONNX,
    ONNX_RUNTIME,
    OPENVINO,
    PTE,
    PTE_INT8,
    create_predictor,
    is_installed,
)
from odcheap.export.verify import name_in_openvino
from odcheap.training.summary import describe_machine, list_versions
from odcheap.utils.errors import Failure, OptionError
from odcheap.utils.files import write_json, write_text
from odcheap.utils.text import format_accuracy

OPTION = "--exports"
FLOATS, INTEGERS = "float", "int8"
ONNX_FILES = {FLOATS: ONNX, INTEGERS: INT8}
FILES = {ONNX_RUNTIME: ONNX_FILES, OPENVINO: ONNX_FILES, EXECUTORCH: {FLOATS: PTE, INTEGERS: PTE_INT8}}


def bench_exports(options: argparse.Namespace) -> int:
    """Times the files of exports in every runtime, writes and prints the result, and returns the exit status 0.

    Args:
        options: The arguments of `odcheap bench`, as `parse_arguments` returns them.

    Raises:
        OptionError: The value of an option is not allowed.
    """
    if options.overrides:
        raise OptionError(OPTION, options.overrides[0], "must be a folder: training options have no effect here")
    if not options.seconds > 0:
        raise OptionError("--seconds", options.seconds, "must be above 0")
    if options.threads < 1:
        raise OptionError("--threads", options.threads, "must be 1 or more")
    machine = describe_machine(torch.device("cpu"))
    rows = measure_exports(options.exports, options.seconds, options.threads)
    text = format_exports(rows, options.threads, machine["cpu"])
    options.out.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine, "versions": list_versions(), "threads": options.threads, "exports": rows}
    write_json(options.out / "exports.json", result)
    write_text(options.out / "exports.md", text)
    print(text)
    print(f"written: {options.out}/exports.json, exports.md")
    return 0


class Export(NamedTuple):
    """An export that is measured.

    Attributes:
        name: The name of the network.
        contents: The contents of its ONNX files and ExecuTorch programs, by the names of the files.
        top1: The top-1 accuracies on the test images: the entry `top1` of `results.json`. Its keys are names of files
            and programs that run them, such as "student.onnx". It is empty if the accuracies are not known.
        shape: The shape (n, C, H, W) of a batch of images that all files can take.
    """

    name: str
    contents: dict[str, bytes]
    top1: dict[str, float]
    shape: tuple[int, int, int, int]


def read_export(folder: Path) -> Export:
    """Reads the files of an export whose speed is to be measured.

    Args:
        folder: The folder that `odcheap export` has written.

    Raises:
        OptionError: It is not an export, or a file of it was changed after the export.
    """
    try:
        preprocess, _ = predict.read_export(folder)
        results = json.loads(predict.read_verified(folder, RESULTS_FILE))
        names = {name for files in FILES.values() for name in files.values()}
        contents = {name: predict.read_verified(folder, name) for name in sorted(names) if (folder / name).exists()}
        batch = predict.get_input_shape(predict.create_session(contents["student.onnx"]))[0] or 1
        shape = batch, preprocess["channels"], *preprocess["size"]
        return Export(str(results["network"]), contents, dict(results["top1"]), shape)
    except (ValueError, KeyError, TypeError) as error:  # a PredictError is a ValueError, and names the file
        raise OptionError(OPTION, folder, f"is not an export with all files ({error})") from error


def measure_exports(folders: Sequence[Path], seconds: float, threads: int) -> list[dict[str, Any]]:
    """Times the files of exports alternately in every runtime that is installed.

    Args:
        folders: The folders of the exports.
        seconds: The time for each measurement.
        threads: The number of CPU threads of each runtime. No ExecuTorch program may have been loaded before, because
            the number of its threads is changed.

    Returns:
        A dict for each export and each precision that it has, with these entries:

        - `network`: the name of the network;
        - `precision`: "float" or "int8";
        - `images`: the number of images in a call;
        - `bytes`: a dict of file sizes, by the names of the runtimes;
        - `top1`: a dict of accuracies in [0, 1], or None, by the names of the runtimes;
        - `ms`: a dict by the names of the runtimes, of the milliseconds of a call (first quartile, median, third
          quartile).

    Raises:
        OptionError: A folder is not an export, or one of its files was changed.
    """
    exports, runtimes = [read_export(folder) for folder in folders], list(filter(is_installed, FILES))
    if EXECUTORCH in runtimes and any(PTE in export.contents for export in exports):
        executorch.set_threads(threads)
    calls: dict[Any, Callable[[], object]] = {}
    rows = []
    for export in exports:
        images = predict.random_images(export.shape[0], export.shape[1:])
        for precision in ONNX_FILES:
            row: dict[str, Any] = {"network": export.name, "precision": precision, "images": len(images)}
            row |= {"bytes": {}, "top1": {}, "ms": {}}
            for runtime in runtimes:
                name = FILES[runtime][precision]
                if name not in export.contents:
                    continue
                try:
                    predictor = create_predictor(runtime, export.contents[name], len(images), threads)
                except Failure as error:  # such as OpenVINO, which does not run all forms of 8-bit integers
                    report_progress(f"{export.name}: {name}: {error}")
                    continue
                row["bytes"][runtime] = len(export.contents[name])
                own = name_in_openvino(name) if runtime == OPENVINO else name
                row["top1"][runtime] = export.top1.get(own)
                calls[len(rows), runtime] = partial(predictor, images)
            if row["bytes"]:
                rows.append(row)
    report_progress(f"{len(calls)} timings of {seconds:g} s each")
    for (row_index, runtime), timing in predict.time_alternately(calls, seconds).items():
        rows[row_index]["ms"][runtime] = [1000 * time for time in (timing.p25, timing.p50, timing.p75)]
    return rows


def format_exports(rows: Sequence[dict[str, Any]], threads: int, cpu: str) -> str:
    """Returns two tables in Markdown, one with the times of a call, and one with sizes and accuracies.

    Args:
        rows: What `measure_exports` returned.
        threads: The number of CPU threads.
        cpu: The name of the CPU.
    """
    runtimes = list(dict.fromkeys(runtime for row in rows for runtime in row["bytes"]))
    times, others = [], []
    for row in rows:
        label, files = {"": row["network"], "numbers": row["precision"]}, row["bytes"]
        times.append(label | {"images": row["images"]} | {r: format_ms(row["ms"].get(r)) for r in runtimes})
        suffixes = {runtime: Path(FILES[runtime][row["precision"]]).suffix for runtime in files}
        sizes = {f"{suffixes[runtime]}, MB": f"{size / 1e6:.2f}" for runtime, size in files.items()}
        top1 = {f"top-1 in {r}, %": format_accuracy(top1) for r, top1 in row["top1"].items() if top1 is not None}
        others.append(label | sizes | top1)
    tables = (card_accuracy.to_markdown(pd.DataFrame(table).fillna("")) for table in (times, others))
    lines = [f"Milliseconds of a call, median (quartiles), on {cpu}, with {threads} thread{'s' * (threads > 1)}:"]
    return "\n\n".join([*lines, *tables]) + "\n"


def format_ms(quartiles: Sequence[float] | None) -> str:
    """Returns the quartiles of a measurement as text, such as "2.5 (2.4 to 2.7)" with the median first.

    Args:
        quartiles: The first quartile, the median and the third quartile. For None, the text is empty.
    """
    if quartiles is None:
        return ""
    low, median, high = quartiles
    return f"{median:.3g} ({low:.3g} to {high:.3g})"
