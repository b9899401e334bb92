"""Writes the model card of an export, its README.md: accuracy, limits, speed, checks, origin, and checksums.

The card is made for publication, so it names no folder of this machine, and escapes text that comes from users. The
text that is the same in all cards is in the folder `card_text`.
"""

import datetime
import hashlib
import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import onnx
import onnxruntime
import pandas as pd
from torch import nn

from odcheap.export import card_accuracy, card_speed, quantize
from odcheap.export.card_accuracy import to_markdown
from odcheap.export.card_speed import STANDARD, STUDENT
from odcheap.export.latency import Timings, fastest
from odcheap.export.load_run import RunStudent
from odcheap.export.runtimes import (
    EXECUTORCH,
    FLOAT_FILES,
    INT8,
    ONNX,
    ONNX_RUNTIME,
    OPENVINO,
    PT2,
    PTE,
    PYTORCH,
    WEIGHTS,
)
from odcheap.export.verify import Verification, name_in_openvino
from odcheap.models import flops
from odcheap.models.student_shapes import name_shape
from odcheap.predict import Timing
from odcheap.training.summary import list_versions
from odcheap.utils.text import count_things, escape_markdown, format_accuracy, format_code, hide_folders

CARD_TEXT = Path(__file__).with_name("card_text")
RESULTS_FILE = "results.json"
FIGURES = ("images", "correct", "top1", "top1_interval", "balanced_accuracy")  # of results.json
OPTIONS = ("block_type", "backbone", "method", "num_stu", "optimizer", "scheduler", "data", "augment", "seed", "select")
# Options in the name of a network, with the values at which they are left out.
NAMING_OPTIONS = {"depth": None, "expansion": 1, "width": 16, "name": None, "groups": None}


def write_card(
    run: RunStudent,
    folder: Path,
    files: Mapping[str, nn.Module],
    timings: Timings,
    verification: Verification,
    cpu: str,
    graph: str,
) -> str:
    """Returns the model card in Markdown.

    Args:
        run: The exported student.
        folder: The folder of the exported files, whose checksums are computed.
        files: The PyTorch networks in the files that were timed, by the names of the files.
        timings: The times of the files, of the student and of the standard network.
        verification: The results of the checks of the files.
        cpu: The name of the CPU on which the times were measured.
        graph: A text about the ONNX file's input and operators, from `onnx.describe_graph`.
    """
    figures = card_accuracy.compute_figures(run, verification)
    batch = min((key.batch for key in timings), default=1)
    channels, height, width = run.image_size
    values = {
        "kind": "gray" if channels == 1 else "RGB",
        "shape": f"{batch}, {channels}, {height}, {width}",
        "images": count_things(batch, "image"),
    }
    names = [name for name in (WEIGHTS, PTE, PT2) if (folder / name).is_file()]
    snippets = [read_text(name, **values).rstrip() for name in names + ["openvino"] * uses_openvino(verification)]
    rows = [(k.name, k.runtime, k.batch, k.threads or "all", format_timing(t)) for k, t in timings.items()]
    disturbance = card_speed.find_disturbance(run, timings)
    sections = {
        "accuracy": card_accuracy.describe_accuracy(run, verification, figures),
        "speed": [*card_speed.describe_speed(run, timings), *card_speed.describe_further_speeds(timings)],
        "classes": card_accuracy.tabulate_classes(run, verification, figures),
        "training": card_accuracy.describe_training_data(run),
        "sizes": size_table(run, folder, files, timings),
        "timings": [to_markdown(pd.DataFrame(rows, columns=["", "runtime", "images", "threads", "ms"]))],
        "checks": describe_checks(verification, folder / INT8),
        "origin": describe_origin(run, verification),
        "checksums": checksum_lines(folder),
    }
    return read_text(
        "card",
        **values,
        **{name: "\n".join(lines) for name, lines in sections.items()},
        network=format_code(name_network(run)),
        graph=graph,
        snippets="\n\n".join(snippets),
        count=f"{len(run.settings['classes']):,}",
        height=height,
        width=width,
        shorter_side=run.settings["shorter_side"],
        few_images=card_accuracy.describe_rare_classes(figures),
        cpu=escape_markdown(cpu),
        mark=f" **The times are uncertain**: {disturbance}." if disturbance else "",
    )


def read_text(name: str, **values: object) -> str:
    """Reads `card_text/NAME.md`, and replaces its placeholders, such as `$shape`, by the values of these names."""
    return Template((CARD_TEXT / f"{name}.md").read_text(encoding="utf-8")).substitute(values)


def extract_opening(text: str) -> str:
    """Returns the text of a card between its title and its first block of code, as plain text for a terminal."""
    return text.partition("\n")[2].partition("```")[0].strip().replace("**", "").replace("\n\n", "\n")


def name_network(run: RunStudent) -> str:
    """Returns a student's name: its kind of cheap convolution, its backbone, and options such as depth."""
    block_type, backbone = run.settings["block_type"], run.settings["backbone"]
    shown = {key: value for key, value in (backbone | block_type).items() if key in NAMING_OPTIONS}
    options = [f"{key} {value}" for key, value in shown.items() if value != NAMING_OPTIONS[key]]
    parts = [str(part["part"]) for part in (block_type, backbone) if part]
    return ", ".join([*parts, *options])


def describe_results(run: RunStudent, verification: Verification) -> dict[str, Any]:
    """Returns the accuracy and the size of an exported student.

    Args:
        run: The exported student.
        verification: The results of the checks of the files.

    Returns:
        The content of `results.json`: a dict with these entries. Accuracies are fractions.

        - `network`: the name of the network, with its block type, backbone and options such as depth.
        - `data`: the name of the data set of the training; None if it is not known.
        - `test`: the student's figures on the test images: the number of `images`, how many of them are `correct`, the
          accuracy `top1` with its 95 % interval `top1_interval`, and the mean recall of the classes
          `balanced_accuracy`; None if they are not known.
        - `verified_on_data`: whether the export measured the figures in `test`; otherwise they are those of the run's
          summary.
        - `top1`: the accuracy of each exported file on the test images, by its name; empty without labeled test images.
        - `params`, `macs`: the numbers of parameters and of multiply-accumulates.
    """
    figures, data = card_accuracy.compute_figures(run, verification), (run.summary or {}).get("data")
    return {
        "network": name_network(run),
        "data": None if data is None else hide_folders(data),
        "test": None if figures is None else {name: figures[name] for name in FIGURES},
        "verified_on_data": verification.on_data,
        "top1": dict(verification.top1),
        "params": flops.count_params(run.network),
        "macs": flops.count_macs(run.network, run.image_size),
    }


def size_table(run: RunStudent, folder: Path, files: Mapping[str, nn.Module], timings: Timings) -> list[str]:
    """Returns lines of Markdown with a table: size, costs and times of the files, the student and the standard network.

    Args:
        run: The exported student.
        folder: The folder of the exported files.
        files: The PyTorch networks in the files that were timed, by the names of the files.
        timings: The times of the files, of the student and of the standard network.
    """
    networks = {**files, STANDARD: run.standard, STUDENT: run.network}
    costs = {
        name: (flops.count_params(network), flops.count_macs(network, run.image_size))
        for name, network in networks.items()
    }
    timed, batches = {key[:3] for key in timings}, sorted({key.batch for key in timings})
    rows = []
    for runtime in (ONNX_RUNTIME, OPENVINO, EXECUTORCH, PYTORCH):
        for name, (params, macs) in costs.items():
            own = [batch for batch in batches if (name, runtime, batch) in timed]
            if not own:
                continue
            title, path = format_code(name) if name in files else name, folder / name
            if runtime == OPENVINO or (runtime != ONNX_RUNTIME and name not in files):
                title += f", in {runtime}"
            size = f"{path.stat().st_size / 1e6:.2f} MB" if path.is_file() else ""
            row = {"": title, "size": size, "parameters": f"{params:,}", "MACs": f"{macs / 1e6:.2f} M"}
            times = {batch: format_timing(fastest(timings, name, runtime, batch)) for batch in own}
            rows.append(row | {count_things(batch, "image"): times.get(batch, "") for batch in batches})
    lines = [to_markdown(pd.DataFrame(rows))]
    note = getattr(run.standard, "standard_note", None)
    if note and costs[STANDARD][1] != costs[STUDENT][1]:
        lines += ["", f"{escape_markdown(note[0].upper() + note[1:])}."]
    return lines


def format_timing(timing: Timing) -> str:
    """Returns a timing in milliseconds as text, such as "1.52 (1.71)": the median and the 95th percentile."""
    return f"{1000 * timing.p50:.3g} ({1000 * timing.p95:.3g})"


def describe_checks(verification: Verification, int8: Path) -> list[str]:
    """Returns lines of Markdown about the checks of the exported files.

    They say on which images the files were run, by how much their logits differ from the trained network's, and how
    much accuracy 8-bit integers lose. The logits of files with 8-bit integers differ by design and are not compared.

    Args:
        verification: The results of the checks.
        int8: The path of the ONNX file with 8-bit integers, which need not exist.
    """
    what = "test images, from their files" if verification.on_data else "images of noise"
    lines = [f"Each of these files ran in its own runtime on {verification.images:,} {what},"]
    lines += ["prepared as above; the largest difference of a logit from the trained network's was", ""]
    lines += [f"- {format_file(name)}: {difference:.1e}" for name, difference in verification.differences.items()]
    top1, openvino = verification.top1, name_in_openvino(INT8)
    for name, float_file in FLOAT_FILES.items():
        if name in top1:
            origin = f" ({quantize.describe_origin(int8.read_bytes())})" if name == INT8 and int8.is_file() else ""
            lost = f"{format_accuracy(top1[name] - top1[float_file], '+')} percentage points"
            change = card_accuracy.describe_change(*verification.changes[name], verification.images)
            lines.append(
                f"- {format_code(name)}{origin}: accuracy {format_accuracy(top1[name])} %, {lost} against "
                f"{format_code(float_file)} ({change}); the same class as the trained network for "
                f"{format_accuracy(verification.agreement[name])} % of them"
            )
    if openvino in top1:
        lines.append(f"- {format_file(openvino)}: accuracy {format_accuracy(top1[openvino])} %")
    if not verification.on_data:
        lines += ["", f"**Not verified on data**: {format_code(verification.reason)}."]
    return lines


def format_file(name: str) -> str:
    """Returns a name such as "student.onnx" or "student.onnx in OpenVINO" with the name of the file as code."""
    file, _, runtime = name.partition(" ")
    return f"{format_code(file)} {runtime}".rstrip()


def uses_openvino(verification: Verification) -> bool:
    """Returns whether the ONNX files were checked in OpenVINO."""
    return name_in_openvino(ONNX) in verification.differences


def describe_origin(run: RunStudent, verification: Verification) -> list[str]:
    """Returns lines of Markdown that say how the exported student was made.

    They contain the name of the run, its data, number of epochs and options, and the versions of packages.

    Args:
        run: The exported student, and the run from which it comes.
        verification: The results of the checks of the export. If OpenVINO was used in them, its version is named too.
    """
    summary, seconds = run.summary or {}, (run.summary or {}).get("train_seconds")
    unfinished = "" if summary else " (which has not finished)"
    facts = {
        "data": summary.get("data"),
        "epochs": summary.get("epochs"),
        "split": run.settings["split"],
        "training time": f"{seconds / 3600:.2f} h" if isinstance(seconds, int | float) else None,
        "classes": len(run.settings["classes"]),
        "exported": datetime.datetime.now(datetime.UTC).date(),
    }
    options, shapes = run.config, run.config.get("students")
    if shapes:  # the exported student's own shape, and the names of all
        options = run.config | {group: run.settings[group] for group in ("block_type", "backbone")}
        facts["students"] = ", ".join(name_shape(shape, shapes) for shape in shapes)
    facts |= {name: format_options(options[name]) for name in OPTIONS if name in options}
    tools = list_versions() | {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    if uses_openvino(verification):
        tools["openvino"] = importlib.metadata.version("openvino")
    facts |= {"exported with": format_options(tools), "trained with": format_options(summary.get("versions") or "")}
    if run.job_dir is None:
        lines = [f"- {escape_markdown(run.title)}, exported with `odcheap.export_student`"]
    else:
        job_name = os.path.basename(os.path.abspath(run.job_dir))
        lines = [f"- {escape_markdown(run.title)} of the run {format_code(job_name)}{unfinished}"]
    return [*lines, *(f"- {name}: {format_code(value)}" for name, value in facts.items() if value not in (None, ""))]


def format_options(node: object) -> str:
    """Returns a part of a config as one line, such as "resnet20 width=16"; the folder of the images is left out."""
    if isinstance(node, list):
        return f"[{', '.join(map(format_options, node))}]"
    if not isinstance(node, dict):
        return hide_folders(node)
    shown = {key: value for key, value in node.items() if key not in ("part", "data_dir") and not is_folder_only(value)}
    options = (f"{key}={format_options(value)}" for key, value in shown.items())
    return " ".join([*filter(None, [str(node.get("part", ""))]), *options])


def is_folder_only(node: object) -> bool:
    """Returns whether a node of a config has no other option than the folder of the images."""
    return isinstance(node, dict) and bool(node) and set(node) <= {"part", "data_dir"}


def checksum_lines(folder: Path) -> list[str]:
    """Returns one line for each file in a folder, with its SHA-256 checksum and name, as `sha256sum` prints it."""
    names = sorted(path.name for path in folder.iterdir())
    return [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}" for name in names]
