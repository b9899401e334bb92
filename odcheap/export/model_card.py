"""The model card of an export, its README.md: accuracy, limits, speed, checks, origin, and checksums of the files.

Others read the card, so it names no folder of the machine, and text of other people is no markup in it.
"""

import datetime
import hashlib
import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnxruntime
import pandas as pd
from torch import nn

from odcheap.export import card_accuracy, quantize
from odcheap.export.card_accuracy import to_markdown
from odcheap.export.executorch import PTE, PTE_INT8
from odcheap.export.latency import EXECUTORCH, ONNX_RUNTIME, PYTORCH, Timings, fastest
from odcheap.export.load_run import RunStudent
from odcheap.export.openvino import OPENVINO
from odcheap.export.snippets import list_snippets
from odcheap.export.speedup import (
    Speedup,
    compare_timings,
    compute_speedups,
    describe_disturbance,
    find_opposites,
    format_speedup,
)
from odcheap.export.verify import FLOAT_FILES, INT8, Verification, name_in_openvino
from odcheap.models import flops
from odcheap.models.student_shapes import name_shape
from odcheap.predict import Timing
from odcheap.training.summary import list_versions
from odcheap.utils.text import escape_markdown, format_accuracy, format_code, hide_folders

STANDARD, STUDENT, DENSE = "the standard network", "the student", "student-dense.onnx"
OPTIONS = ("block_type", "backbone", "method", "num_stu", "optimizer", "scheduler", "data", "augment", "seed", "select")
# Options in the name of a network, with the values at which they are left out.
NAMING_OPTIONS = {"depth": None, "expansion": 1, "width": 16, "name": None, "groups": None}
CARD = """# {network}

{accuracy}

{speed}

```
python predict.py IMAGE_OR_FOLDER...   # needs onnxruntime, numpy, pillow
python predict.py --evaluate FOLDER    # accuracy on your own images, in FOLDER/<class>/
```

The input of `student.onnx` is {kind} in [0, 1], {graph}; the
normalization is part of the graph. `preprocess.json` says how an image file becomes this input, and `labels.json` names
the classes.

{snippets}

## Accuracy by class

{classes}

## Training data

{training}

## Limits of use

{limits}

## Size and speed

{sizes}

Times are in milliseconds, median (95th percentile), measured alternately on {cpu}, with one thread or with all,
whichever is faster.{mark} **Measure again on the target**: `python predict.py --bench`.

<details><summary>All timings</summary>

{timings}

</details>

## Checks

{checks}

## Origin

{origin}

## Checksums

`grep -E '^[0-9a-f]{{64}} ' README.md | sha256sum -c` checks the files.

```
{checksums}
```
"""


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
        folder: The exported files; their checksums are computed.
        files: The networks in the files that were timed, by the names of the files.
        timings: The times of the files, of the student and of the standard network.
        verification: The results of the checks.
        cpu: The name of the CPU on which the times were measured.
        graph: A text about the ONNX file's input and operators; see `export.command.describe_graph`.
    """
    sections = {
        "accuracy": card_accuracy.describe_accuracy(run, verification),
        "speed": [*describe_speed(run, timings), *describe_further_speeds(timings)],
        "classes": card_accuracy.tabulate_classes(run, verification),
        "training": card_accuracy.describe_training_data(run),
        "limits": card_accuracy.describe_limits(run, verification),
        "sizes": size_table(run, folder, files, timings),
        "checks": describe_checks(verification, read_int8_origin(folder)),
        "origin": describe_origin(run, verification),
        "checksums": checksum_lines(folder),
    }
    rows = [(k.name, k.runtime, k.batch, k.threads or "all", format_timing(t)) for k, t in timings.items()]
    table = to_markdown(pd.DataFrame(rows, columns=["", "runtime", "images", "threads", "ms"]))
    text = {name: "\n".join(lines) for name, lines in sections.items()}
    names, shape = {path.name for path in folder.iterdir()}, (min(sizes(timings), default=1), *run.image_size)
    snippets = list_snippets(names, shape, uses_openvino(verification))
    return CARD.format(
        mark=mark_times(run, timings),
        snippets="\n\n".join(snippets),
        network=format_code(name_network(run)),
        graph=graph,
        kind="gray" if run.image_size[0] == 1 else "RGB",
        cpu=escape_markdown(cpu),
        timings=table,
        **text,
    )


def extract_opening(text: str) -> str:
    """Returns the text of a card between its title and its first block of code, as plain text for a terminal."""
    return text.partition("\n")[2].partition("```")[0].strip().replace("**", "").replace("\n\n", "\n")


def name_network(run: RunStudent) -> str:
    """Returns the name of a network: its block type, its backbone, and options such as depth."""
    block_type, backbone = run.settings["block_type"], run.settings["backbone"]
    shown = {key: value for key, value in (backbone | block_type).items() if key in NAMING_OPTIONS}
    options = [f"{key} {value}" for key, value in shown.items() if value != NAMING_OPTIONS[key]]
    parts = [str(part["part"]) for part in (block_type, backbone) if part]
    return ", ".join([*parts, *options])


def describe_speed(run: RunStudent, timings: Timings) -> list[str]:
    """Returns lines of Markdown that compare the student with the standard network in ONNX Runtime.

    A slower student is stated in bold. If it is the opposite in PyTorch, that is stated too. If the measurement is
    uncertain, the lines say why, and they have the multiply-accumulates in place of ratios of times.
    """
    if str(run.network) == str(run.standard):
        return ["This is the standard network itself."]
    compared = compare_with_standard(timings)
    reason = describe_disturbance([speedup for speedups in compared.values() for speedup in speedups.values()], timings)
    if reason:
        return describe_unmeasured_speed(run, reason)
    own = compared["student.onnx"]
    opening = "Compared with the standard network of the same architecture,"
    if min(speedup.value for speedup in own.values()) < 1:
        opening = "**Not faster than the standard network here**:"
    text = f"{opening} in ONNX Runtime on this CPU the student {format_speedups(own)}"
    for runtime, opposite in compared.items():
        if runtime not in ("student.onnx", DENSE):
            place = runtime if "GPU" in runtime else f"{runtime} on this CPU"
            text += f". **In {place} it is the opposite**: it {format_speedups(opposite)}"
    rounds = max(len(timing.rounds) for timing in timings.values())
    text += f" (ranges: quartiles of {rounds} rounds)" if rounds > 1 else ""
    lines = [f"{text}."]
    if DENSE in compared:
        lines.append(f"{format_code(DENSE)}, which computes the same, {format_speedups(compared[DENSE])}.")
    return lines


def describe_further_speeds(timings: Timings) -> list[str]:
    """Returns lines of Markdown about 8-bit integers, OpenVINO and ExecuTorch; none if the machine was busy.

    That the machine was busy is said elsewhere in the card, for all times.
    """
    is_busy = bool(describe_disturbance((), timings))
    describers = (describe_int8_speed, describe_openvino_speed, describe_executorch_speed)
    return [] if is_busy else [line for describe in describers for line in describe(timings)]


def describe_int8_speed(timings: Timings) -> list[str]:
    """Returns lines of Markdown that compare the file with 8-bit integers with `student.onnx`, for each runtime.

    If 8-bit integers are slower, the line says so in bold. There is no line if the file was not timed.
    """
    lines = []
    for runtime in dict.fromkeys(key.runtime for key in timings if key.name == INT8):
        speedups = compute_speedups(timings, INT8, "student.onnx", runtime)
        reason = describe_disturbance(speedups.values(), timings)
        if reason:
            lines.append(f"**The speed of 8-bit integers in {runtime} could not be measured**: {reason}.")
            continue
        is_slower = any(speedup.is_resolved and speedup.value < 1 for speedup in speedups.values())
        opening = f"**8-bit integers are slower than floats in {runtime} here**: compared" if is_slower else "Compared"
        text = f"with `student.onnx`, in {runtime} on this CPU `{INT8}` {format_speedups(speedups)}"
        lines.append(f"{opening} {text}.")
    return lines


def describe_executorch_speed(timings: Timings) -> list[str]:
    """Returns lines of Markdown about the files for ExecuTorch: their times beside ONNX Runtime's, and speedups.

    There is no line if they were not timed.
    """
    lines = []
    timed = {key.name: key.batch for key in timings if key.runtime == EXECUTORCH}
    pairs = [pair for pair in ((PTE, STANDARD), (PTE_INT8, PTE)) if pair[0] in timed]
    names = {STANDARD: STANDARD, PTE: format_code(PTE), PTE_INT8: format_code(PTE_INT8)}
    for name, other in pairs:
        speedups = compute_speedups(timings, name, other, EXECUTORCH)
        reason = describe_disturbance(speedups.values(), timings)
        if reason:
            return [f"**The speed in ExecuTorch could not be measured**: {reason}."]
        is_slower = any(speedup.is_resolved and speedup.value < 1 for speedup in speedups.values())
        opening = f"**Slower than {names[other]} in ExecuTorch here**: compared" if is_slower else "Compared"
        lines.append(f"{opening} with {names[other]}, in ExecuTorch {names[name]} {format_speedups(speedups)}.")
    if pairs:
        batch = timed[PTE]
        sources = [(names[name], name, EXECUTORCH) for name in names if name in timed]
        sources += [(f"{format_code('student.onnx')} in ONNX Runtime", "student.onnx", ONNX_RUNTIME)]
        times = (f"{1000 * fastest(timings, n, runtime, batch).p50:.3g} ms for {text}" for text, n, runtime in sources)
        note = f"Times of {count_images(batch)} in ExecuTorch, with the number of threads that it takes by itself"
        lines.append(f"{note}: {', '.join(times)}.")
    return lines


def describe_openvino_speed(timings: Timings) -> list[str]:
    """Returns a line of Markdown that compares OpenVINO with ONNX Runtime; empty if OpenVINO was not timed."""
    speedups = {}
    for key in timings:
        if (key.name, key.runtime) == ("student.onnx", OPENVINO):
            pair = (fastest(timings, key.name, runtime, key.batch) for runtime in (ONNX_RUNTIME, OPENVINO))
            speedups[key.batch] = compare_timings(*pair)
    if not speedups:
        return []
    reason = describe_disturbance(speedups.values(), timings)
    if reason:
        return [f"**OpenVINO could not be compared with ONNX Runtime**: {reason}."]
    return [f"Compared with ONNX Runtime on this CPU, `student.onnx` in OpenVINO {format_speedups(speedups)}."]


def compare_with_standard(timings: Timings) -> dict[str, dict[int, Speedup]]:
    """Returns how many times as fast as the standard network the student is, for all figures that a card states.

    Returns:
        For "student.onnx" and "student-dense.onnx", if they were timed, the speedups by the number of images in a call.
        The same for each other runtime, such as "PyTorch", in which another network is faster than in ONNX Runtime.
    """
    own = compute_speedups(timings, "student.onnx", STANDARD, ONNX_RUNTIME)
    compared = {"student.onnx": own}
    for runtime in sorted({key.runtime for key in timings} - {ONNX_RUNTIME}):
        name = "student.onnx" if runtime == OPENVINO else STUDENT
        compared[runtime] = find_opposites(own, compute_speedups(timings, name, STANDARD, runtime))
    compared[DENSE] = compute_speedups(timings, DENSE, STANDARD, ONNX_RUNTIME)
    return {name: speedups for name, speedups in compared.items() if speedups}


def describe_unmeasured_speed(run: RunStudent, reason: str) -> list[str]:
    """Returns lines that say why there is no speedup, how many multiply-accumulates there are, and what to do.

    Args:
        run: The exported student.
        reason: Why no speedup could be measured, as part of a sentence; see `speedup.describe_disturbance`.
    """
    standard, student = (flops.count_macs(network, run.image_size) for network in (run.standard, run.network))
    ratio = f"{standard / student:.1f} times fewer" if student <= standard else f"{student / standard:.1f} times more"
    again = "`odcheap export JOB_DIR --overwrite`" if run.job_dir else "`export_student` with `overwrite=True`"
    return [
        f"**The speed could not be measured**: {reason}.",
        f"The student needs {ratio} multiply-accumulates than the standard network ({student / 1e6:.2f} M and "
        f"{standard / 1e6:.2f} M), but fewer do not always take less time.",
        f"On a quiet machine, {again} measures the speed, and `python predict.py --bench` the times of the files here.",
    ]


def mark_times(run: RunStudent, timings: Timings) -> str:
    """Returns a sentence that says that the times in the tables are uncertain; empty if they are not."""
    if str(run.network) == str(run.standard):
        speedups = []
    else:
        speedups = [speedup for part in compare_with_standard(timings).values() for speedup in part.values()]
    reason = describe_disturbance(speedups, timings)
    return f" **The times are uncertain**: {reason}." if reason else ""


def sizes(timings: Timings) -> list[int]:
    """Returns the numbers of images in a call that were timed, sorted."""
    return sorted({key.batch for key in timings})


def format_speedups(speedups: Mapping[int, Speedup]) -> str:
    """Returns speedups, by the number of images, as text: "is 2.9 (2.8 to 3.0) times as fast with one image"."""
    return " and ".join(f"{format_speedup(speedup)} with {count_images(batch)}" for batch, speedup in speedups.items())


def count_images(batch: int) -> str:
    """Returns a number of images as text, such as "one image" or "64 images"."""
    return "one image" if batch == 1 else f"{batch} images"


def size_table(run: RunStudent, folder: Path, files: Mapping[str, nn.Module], timings: Timings) -> list[str]:
    """Returns lines of Markdown with a table of the files and of both networks: size, costs and times.

    Args:
        run: The exported student.
        folder: The folder of the exported files.
        files: The networks in the files that were timed, by the names of the files.
        timings: The times of the files, of the student and of the standard network.
    """
    both = {STANDARD: run.standard, STUDENT: run.network}
    programs = [name for name in files if name.endswith(".pte")]
    costs = {
        name: (flops.count_params(network), flops.count_macs(network, run.image_size))
        for name, network in {**files, **both}.items()
    }
    in_onnx = [*((format_code(name), name) for name in files if name not in programs), (STANDARD, STANDARD)]
    sources = [(title, name, ONNX_RUNTIME) for title, name in in_onnx]
    if any(key.runtime == OPENVINO for key in timings):
        sources += [(f"{title}, in {OPENVINO}", name, OPENVINO) for title, name in in_onnx]
    sources += [(format_code(name), name, EXECUTORCH) for name in programs]
    sources += [(f"{STANDARD}, in ExecuTorch", STANDARD, EXECUTORCH)] * bool(programs)
    sources += [(f"{name}, in PyTorch", name, PYTORCH) for name in both]
    rows = []
    for title, name, runtime in sources:
        (params, macs), path = costs[name], folder / name
        size = f"{path.stat().st_size / 1e6:.2f} MB" if path.is_file() else ""
        row = {"": title, "size": size, "parameters": f"{params:,}", "MACs": f"{macs / 1e6:.2f} M"}
        timed = {key.batch for key in timings if (key.name, key.runtime) == (name, runtime)}
        times = {b: format_timing(fastest(timings, name, runtime, b)) for b in timed}
        rows.append(row | {count_images(b): times.get(b, "") for b in sizes(timings)})
    lines = [to_markdown(pd.DataFrame(rows))]
    note = getattr(run.standard, "standard_note", None)
    if note and costs[STANDARD][1] != costs[STUDENT][1]:
        lines += ["", f"{escape_markdown(note[0].upper() + note[1:])}."]
    return lines


def format_timing(timing: Timing) -> str:
    """Returns a timing in milliseconds as text, such as "1.52 (1.71)": the median and the 95th percentile."""
    return f"{1000 * timing.p50:.3g} ({1000 * timing.p95:.3g})"


def describe_checks(verification: Verification, int8_origin: str = "") -> list[str]:
    """Returns lines of Markdown: on which images each file was checked, and the largest differences.

    Args:
        verification: The results of the checks.
        int8_origin: How the file with 8-bit integers was made; see `read_int8_origin`.
    """
    what = "test images, from their files" if verification.on_data else "images of noise"
    lines = [f"Each of these files ran in its own runtime on {verification.images:,} {what},"]
    lines += ["prepared as above; the largest difference of a logit from the trained network's was", ""]
    lines += [f"- {format_file(name)}: {difference:.1e}" for name, difference in verification.differences.items()]
    lines += describe_int8(verification, int8_origin)
    if not verification.on_data:
        lines += ["", f"**Not verified on data**: {format_code(verification.reason)}."]
    return lines


def format_file(name: str) -> str:
    """Returns the name of a file as code, also if the name of a runtime follows; see `name_in_openvino`."""
    file, _, runtime = name.partition(" ")
    return f"{format_code(file)} {runtime}".rstrip()


def read_int8_origin(folder: Path) -> str:
    """Returns how the file with 8-bit integers was made, see `quantize.describe_origin`; empty if there is no file."""
    path = folder / INT8
    return quantize.describe_origin(path.read_bytes()) if path.is_file() else ""


def describe_int8(verification: Verification, origin: str = "") -> list[str]:
    """Returns a line of Markdown for each file with 8-bit integers, which says how much accuracy they lose.

    There is none if no file has 8-bit integers, or if there are no labels. The logits of 8-bit integers differ by
    design, so no largest difference is stated.

    Args:
        verification: The results of the checks.
        origin: How the file with 8-bit integers was made; see `read_int8_origin`.
    """
    lines = []
    for name, float_file in FLOAT_FILES.items():
        int8, top1 = verification.top1.get(name), verification.top1.get(float_file)
        if int8 is None or top1 is None:
            continue
        line = f"- {format_code(name)}{f' ({origin})' if origin and name == INT8 else ''}: accuracy "
        line += f"{format_accuracy(int8)} %, {format_accuracy(int8 - top1, '+')} percentage points against "
        line += format_code(float_file)
        if name in verification.changes:
            line += f" ({card_accuracy.describe_change(*verification.changes[name], verification.images)})"
        if name in verification.agreement:
            same = format_accuracy(verification.agreement[name])
            line += f"; the same class as the trained network for {same} % of them"
        lines.append(line)
    name = name_in_openvino(INT8)
    if (top1 := verification.top1.get(name)) is not None:
        lines.append(f"- {format_file(name)}: accuracy {format_accuracy(top1)} %")
    return lines


def uses_openvino(verification: Verification) -> bool:
    """Returns whether the ONNX files were checked in OpenVINO."""
    return name_in_openvino("student.onnx") in verification.differences


def describe_origin(run: RunStudent, verification: Verification) -> list[str]:
    """Returns lines of Markdown with the run, its options and the versions of packages."""
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
    """Returns a node of a config as one line: the name of the part, then its options, without the images' folder."""
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
    """Returns a line with the checksum of each file in a folder, as `sha256sum` writes it."""
    names = sorted(path.name for path in folder.iterdir())
    return [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}" for name in names]
