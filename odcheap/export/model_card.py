"""The model card of an export, its README.md: accuracy, speed, checks, origin, and checksums of the files.

Others read the card, so it names no folder of the machine, and text of other people is no markup in it.
"""

import datetime
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnxruntime
import pandas as pd
from torch import nn

from odcheap.export.latency import ONNX_RUNTIME, PYTORCH, Timings, fastest
from odcheap.export.load_run import RunStudent
from odcheap.export.verify import INT8, Verification
from odcheap.models import flops
from odcheap.predict import Timing
from odcheap.training.summary import list_versions
from odcheap.utils.text import escape_markdown, format_accuracy, format_code, hide_folders

STANDARD, STUDENT, DENSE = "the standard network", "the student", "student-dense.onnx"
OPTIONS = ("block_type", "backbone", "method", "num_stu", "optimizer", "scheduler", "data", "seed", "select")
STUDENT_FILE = "student.safetensors"
WITH_ODCHEAP = """```python
from odcheap import load_student
student = load_student("student.safetensors")
logits = student(images)
```

`torch.export.load("student.pt2").module()` gives the same with PyTorch alone."""
WITH_PYTORCH = """```python
import torch
student = torch.export.load("student.pt2").module()
logits = student(images)
```"""
CARD = """# {network}

{speed}

{accuracy}

```
python predict.py IMAGE_OR_FOLDER...   # needs onnxruntime, numpy, pillow
```

The input is RGB in [0, 1], {shape}; the normalization is part of the graph. `preprocess.json` says how an image file
becomes this input, and `labels.json` names the classes.

{python}

## Size and speed

{sizes}

Times are in milliseconds, median (95th percentile), measured alternately on {cpu}, with one thread or with all,
whichever is faster. **Measure again on the target**: `python predict.py --bench`.

<details><summary>All timings</summary>

{timings}

</details>

## Checks

{checks}

## Origin

{origin}

## Checksums

`sha256sum -c` reads them.

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
    shape: str,
) -> str:
    """Returns the model card in Markdown.

    Args:
        run: The exported student.
        folder: The exported files; their checksums are computed.
        files: The ONNX files' names, with the networks that they hold.
        timings: Times of the files, of the student and of the standard network.
        verification: What the checks have shown.
        cpu: Name of the CPU of the timings.
        shape: Shape of the ONNX file's input.
    """
    sections = {
        "speed": describe_speed(run, timings),
        "accuracy": describe_accuracy(run, verification),
        "sizes": size_table(run, folder, files, timings),
        "checks": describe_checks(verification),
        "origin": describe_origin(run),
        "checksums": checksum_lines(folder),
    }
    rows = [(k.name, k.runtime, k.batch, k.threads or "all", format_timing(t)) for k, t in timings.items()]
    table = to_markdown(pd.DataFrame(rows, columns=["", "runtime", "images", "threads", "ms"]))
    text = {name: "\n".join(lines) for name, lines in sections.items()}
    python = WITH_ODCHEAP if run.has_settings else WITH_PYTORCH
    return CARD.format(
        python=python,
        network=format_code(name_network(run)),
        shape=shape,
        cpu=escape_markdown(cpu),
        timings=table,
        **text,
    )


def extract_opening(text: str) -> str:
    """Returns a card's text between its title and its first block of code, as plain text for a terminal."""
    return text.partition("\n")[2].partition("```")[0].strip().replace("**", "").replace("\n\n", "\n")


def name_network(run: RunStudent) -> str:
    """Returns the block type, the backbone, and what distinguishes its variants."""
    block_type, backbone = run.settings["block_type"], run.settings["backbone"]
    options = [f"{key} {value}" for key, value in (backbone | block_type).items() if key in ("depth", "name", "groups")]
    parts = [str(part["part"]) for part in (block_type, backbone) if part]
    return ", ".join([*parts, *options])


def describe_speed(run: RunStudent, timings: Timings) -> list[str]:
    """Compares the student with the standard network in ONNX Runtime; a slower student is stated in bold."""
    if str(run.network) == str(run.standard):
        return ["This is the standard network itself."]
    speedups = compute_speedups(timings, "student.onnx")
    if min(speedups.values()) >= 1:
        return [f"Compared with the standard network of the same architecture its speed is {format_speed(speedups)}."]
    lines = [f"**Not faster than the standard network here**: its speed is {format_speed(speedups)}."]
    if any(key.name == DENSE for key in timings):
        dense = format_speed(compute_speedups(timings, DENSE))
        lines.append(f"As {format_code(DENSE)}, which computes the same, it is {dense}.")
    return lines


def compute_speedups(timings: Timings, name: str) -> dict[int, float]:
    """Returns the standard network's time divided by this file's time, by number of images."""
    return {
        batch: fastest(timings, STANDARD, ONNX_RUNTIME, batch).p50 / fastest(timings, name, ONNX_RUNTIME, batch).p50
        for batch in sizes(timings)
    }


def sizes(timings: Timings) -> list[int]:
    """Returns the numbers of images that were timed."""
    return sorted({key.batch for key in timings})


def format_speed(speedups: Mapping[int, float]) -> str:
    text = ", ".join(f"{ratio:.2f} times with {count_images(batch)}" for batch, ratio in speedups.items())
    return f"{text} (ONNX Runtime on this CPU)"


def count_images(batch: int) -> str:
    return "one image" if batch == 1 else f"{batch} images"


def describe_accuracy(run: RunStudent, verification: Verification) -> list[str]:
    """States the test accuracy and where it was measured."""
    lines, top1 = [], verification.top1.get("student.onnx")
    by_summary = f"{format_accuracy(run.test_top1)} % by the run's summary"
    if verification.on_data:
        precision = escape_markdown(run.config.get("trainer", {}).get("precision"))
        own = f"; {by_summary}, in {precision}" if run.test_top1 is not None else ""
        lines.append(f"Test accuracy {format_accuracy(top1)} % on {verification.images:,} images{own}.")
    elif run.test_top1 is not None:
        lines.append(f"Test accuracy {by_summary}; **not verified on data** here.")
    else:
        cause = ", and its run has not finished" if run.job_dir is not None else ""
        lines.append(f"**Not verified on data**{cause}: no test accuracy is known.")
    if top1 is not None and (int8 := verification.top1.get(INT8)) is not None:
        change = format_accuracy(int8 - top1, "+")
        lines.append(f"In 8-bit integers {format_accuracy(int8)} %: a change of {change} percentage points.")
    return lines


def size_table(run: RunStudent, folder: Path, files: Mapping[str, nn.Module], timings: Timings) -> list[str]:
    """Returns a table of size, costs and times of the files and of both networks."""
    both = {STANDARD: run.standard, STUDENT: run.network}
    costs = {
        name: (flops.count_params(network), flops.count_macs(network, run.image_size))
        for name, network in {**files, **both}.items()
    }
    sources = [(format_code(name), name, ONNX_RUNTIME) for name in files]
    sources += [(STANDARD, STANDARD, ONNX_RUNTIME), *((f"{name}, in PyTorch", name, PYTORCH) for name in both)]
    rows = []
    for title, name, runtime in sources:
        (params, macs), path = costs[name], folder / name
        size = f"{path.stat().st_size / 1e6:.2f} MB" if path.is_file() else ""
        row = {"": title, "size": size, "parameters": f"{params:,}", "MACs": f"{macs / 1e6:.2f} M"}
        times = {count_images(b): format_timing(fastest(timings, name, runtime, b)) for b in sizes(timings)}
        rows.append(row | times)
    lines = [to_markdown(pd.DataFrame(rows))]
    note = getattr(run.standard, "standard_note", None)
    if note and costs[STANDARD][1] != costs[STUDENT][1]:
        lines += ["", f"{escape_markdown(note[0].upper() + note[1:])}."]
    return lines


def format_timing(timing: Timing) -> str:
    return f"{1000 * timing.p50:.3g} ({1000 * timing.p95:.3g})"


def to_markdown(table: pd.DataFrame) -> str:
    return table.to_markdown(index=False, tablefmt="github", disable_numparse=True)


def describe_checks(verification: Verification) -> list[str]:
    """States on what each file was checked, and the differences."""
    what = "test images, from their files" if verification.on_data else "images of noise"
    lines = [f"Each of these files ran in its own runtime on {verification.images:,} {what},"]
    lines += ["prepared as above; the largest difference of a logit from the trained network's was", ""]
    lines += [f"- {format_code(name)}: {difference:.1e}" for name, difference in verification.differences.items()]
    if not verification.on_data:
        lines += ["", f"**Not verified on data**: {format_code(verification.reason)}."]
    return lines


def describe_origin(run: RunStudent) -> list[str]:
    """States the run, its options and the versions of packages."""
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
    facts |= {name: format_options(run.config[name]) for name in OPTIONS if name in run.config}
    tools = list_versions() | {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    facts |= {"exported with": format_options(tools), "trained with": format_options(summary.get("versions") or "")}
    if run.job_dir is None:
        lines = [f"- {escape_markdown(run.title)}, exported with `odcheap.export_student`"]
    else:
        job_name = os.path.basename(os.path.abspath(run.job_dir))
        lines = [f"- {escape_markdown(run.title)} of the run {format_code(job_name)}{unfinished}"]
    return [*lines, *(f"- {name}: {format_code(value)}" for name, value in facts.items() if value not in (None, ""))]


def format_options(node: object) -> str:
    """Returns a part of a config in one line: its name, then its options."""
    if not isinstance(node, dict):
        return hide_folders(node)
    options = (f"{key}={format_options(value)}" for key, value in node.items() if key != "part")
    return " ".join([*filter(None, [str(node.get("part", ""))]), *options])


def checksum_lines(folder: Path) -> list[str]:
    """Returns a line for each file as `sha256sum` writes it."""
    names = sorted(path.name for path in folder.iterdir())
    return [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}" for name in names]
