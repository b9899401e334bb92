"""The card of an exported student: what it is, how good, how fast, how it was proven, and its files' checksums."""

import datetime
import hashlib
from pathlib import Path
from typing import NamedTuple

import onnx
import onnxruntime

from odcheap.export import latency
from odcheap.export.latency import ONNX_RUNTIME, PYTORCH, Timings
from odcheap.export.product import Product
from odcheap.export.verify import Proven
from odcheap.models import flops
from odcheap.predict import Timing
from odcheap.training.summary import list_versions
from odcheap.utils.text import escape_control_chars

STANDARD, DENSE = "the standard network", "student-dense.onnx"
RECIPE = ("block_type", "backbone", "method", "num_stu", "optimizer", "data", "seed", "select")


class File(NamedTuple):
    """A file that runs: its network's parameters and MACs are counted for the form that it has."""

    name: str
    params: int
    macs: int


def card(
    product: Product,
    folder: Path,
    files: list[File],
    found: Timings,
    batches: tuple[int, ...],
    proven: Proven,
    cpu: str,
    shape: str,
) -> str:
    """The text in Markdown; the checksums are those of the files that lie in `folder` now."""
    lines = [
        f"# {format_code(title(product))}",
        "",
        *verdict(product, found, batches),
        "",
        *accuracy(product, proven),
        "",
    ]
    lines += [*usage(shape), "", "## Size and speed", "", *table(product, folder, files, found, batches), ""]
    lines += [f"Measured side by side on {cpu}: milliseconds, median (95 % stay below), with one thread or with all,"]
    lines += ["whichever is faster. **Measure again on the target**: `python predict.py --bench`.", ""]
    lines += [*every(found), "", "## Checks", "", *checks(proven), "", "## Origin", "", *origin(product), ""]
    lines += ["## Checksums", "", "`sha256sum -c` reads them.", "", "```", *sums(folder), "```"]
    return "\n".join(lines) + "\n"


def first_words(text: str) -> str:
    """What stands between a card's title and its first block of code, for a terminal."""
    return text.partition("\n")[2].partition("```")[0].strip().replace("**", "").replace("\n\n", "\n")


def format_code(text: object) -> str:
    """Somebody's text as it is: no markup, no line ends, no escapes of terminals."""
    return f"`{escape_control_chars(text).replace('`', chr(39))}`"


def title(product: Product) -> str:
    parts = (product.settings[part]["part"] for part in ("block_type", "backbone"))
    own = {**product.settings["backbone"], **product.settings["block_type"]}
    numbers = [f"{k} {v}" for k, v in own.items() if k in ("depth", "name", "groups")]
    return ", ".join([*parts, *numbers])


def verdict(product: Product, found: Timings, batches: tuple[int, ...]) -> list[str]:
    """How the student compares with the standard network in ONNX Runtime; bad news comes in bold."""
    if str(product.network) == str(product.standard):
        return ["This is the standard network itself."]
    times = ratios(found, "student.onnx", batches)
    if min(times.values()) >= 1:
        return [f"Against the standard network of the same architecture its speed is {told(times)}."]
    lines = [f"**Not faster than the standard network here**: its speed is {told(times)}."]
    if any(key.name == DENSE for key in found):
        lines.append(f"As {format_code(DENSE)}, which computes the same, it is {told(ratios(found, DENSE, batches))}.")
    return lines


def ratios(found: Timings, name: str, batches: tuple[int, ...]) -> dict[int, float]:
    times = {batch: [latency.fastest(found, n, ONNX_RUNTIME, batch).p50 for n in (STANDARD, name)] for batch in batches}
    return {batch: standard / ours for batch, (standard, ours) in times.items()}


def told(times: dict[int, float]) -> str:
    text = ", ".join(f"{ratio:.2f} times with {images(batch)}" for batch, ratio in times.items())
    return f"{text} (ONNX Runtime on this CPU)"


def images(batch: int) -> str:
    return "one picture" if batch == 1 else f"{batch} pictures"


def accuracy(product: Product, proven: Proven) -> list[str]:
    lines = []
    if proven.of_data:
        precision = escape_control_chars(product.config.get("trainer", {}).get("precision"))
        own = f"; {product.test_top1:.4f} by the run's summary, in {precision}" if product.test_top1 is not None else ""
        lines.append(f"Test accuracy {proven.top1['student.onnx']:.4f} on {proven.pictures:,} pictures{own}.")
    elif product.test_top1 is not None:
        lines.append(f"Test accuracy {product.test_top1:.4f} by the run's summary; **not verified on data** here.")
    else:
        lines.append("**Not verified on data**, and its run has not finished: no test accuracy is known.")
    whole = proven.top1.get("student.onnx")
    if proven.top1.get("student-int8.onnx") is not None:
        lost = whole - proven.top1["student-int8.onnx"]
        lines.append(f"In 8-bit integers {proven.top1['student-int8.onnx']:.4f}: {lost:+.4f} is lost.")
    return lines


def usage(shape: str) -> list[str]:
    return [
        "```",
        "python predict.py PICTURE_OR_FOLDER...   # needs onnxruntime, numpy, pillow",
        "```",
        "",
        f"The input is RGB in [0, 1], {shape}; normalisation is inside the graph. `preprocess.json` says how a picture",
        "becomes that, `labels.json` names the classes.",
        "",
        "```python",
        "from odcheap import load_student",
        'student = load_student("student.safetensors")',
        "logits = student(images)",
        "```",
        "",
        '`torch.export.load("student.pt2").module()` is the same for whoever has PyTorch alone.',
    ]


def table(product: Product, folder: Path, files: list[File], found: Timings, batches: tuple[int, ...]) -> list[str]:
    head = ["", "size", "parameters", "MACs", *(images(batch) for batch in batches)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for file in files:
        size = f"{(folder / file.name).stat().st_size / 1e6:.2f} MB"
        lines.append(row(format_code(file.name), size, file.params, file.macs, found, file.name, ONNX_RUNTIME, batches))
    standard, student = product.standard, product.network
    macs = [flops.count_macs(network, product.image_size) for network in (standard, student)]
    lines.append(row(STANDARD, "", flops.count_params(standard), macs[0], found, STANDARD, ONNX_RUNTIME, batches))
    for name, network, own in ((STANDARD, standard, macs[0]), ("the student", student, macs[1])):
        lines.append(row(f"{name}, in PyTorch", "", flops.count_params(network), own, found, name, PYTORCH, batches))
    note = getattr(standard, "standard_note", None)
    return [*lines, *(["", f"{note[0].upper()}{note[1:]}."] if note and macs[0] != macs[1] else [])]


def row(
    title: str, size: str, params: int, macs: int, found: Timings, name: str, runtime: str, batches: tuple[int, ...]
) -> str:
    times = [format_timing(latency.fastest(found, name, runtime, batch)) for batch in batches]
    return "| " + " | ".join([title, size, f"{params:,}", f"{macs / 1e6:.2f} M", *times]) + " |"


def format_timing(time: Timing) -> str:
    return f"{1000 * time.p50:.3g} ({1000 * time.p95:.3g})"


def every(found: Timings) -> list[str]:
    lines = [
        "<details><summary>Every timing</summary>",
        "",
        "| | where | pictures | threads | ms |",
        "|---|---|---|---|---|",
    ]
    for key, time in found.items():
        lines.append(f"| {key.name} | {key.runtime} | {key.batch} | {key.threads or 'all'} | {format_timing(time)} |")
    return [*lines, "", "</details>"]


def checks(proven: Proven) -> list[str]:
    what = "test pictures, from their files" if proven.of_data else "pictures of noise"
    lines = [f"Each of these was loaded by its own runtime and run on {proven.pictures:,} {what},"]
    lines += ["prepared as above; the largest difference of a logit from the trained network's was", ""]
    lines += [f"- {format_code(name)}: {difference:.1e}" for name, difference in proven.differences.items()]
    return lines if proven.of_data else [*lines, "", f"**Not verified on data**: {format_code(proven.reason)}."]


def origin(product: Product) -> list[str]:
    summary, config = product.summary or {}, product.config
    lines = [
        f"- {escape_control_chars(product.name)} of the run {format_code(product.job_dir)}"
        + ("" if summary else " (which has not finished)")
    ]
    known = {"data": summary.get("data"), "epochs": summary.get("epochs"), "split": product.settings["split"]}
    seconds = summary.get("train_seconds")
    known |= {"training time": f"{seconds / 3600:.2f} h" if isinstance(seconds, int | float) else None}
    known |= {"classes": len(product.settings["classes"]), "exported": datetime.datetime.now(datetime.UTC).date()}
    lines += [f"- {name}: {format_code(value)}" for name, value in known.items() if value]
    lines += [f"- {part}: {format_code(compact(config[part]))}" for part in RECIPE if part in config]
    tools = {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    made_by = {"exported with": list_versions() | tools, "trained with": summary.get("versions")}
    return [*lines, *(f"- {what}: {format_code(compact(which))}" for what, which in made_by.items() if which)]


def compact(part: object) -> str:
    """A part of a config in one line: its class's name, then its options."""
    if not isinstance(part, dict):
        return str(part)
    options = (f"{k}={compact(v)}" for k, v in part.items() if not str(k).startswith("_"))
    return " ".join([*filter(None, [str(part.get("_target_", "")).rpartition(".")[2]]), *options])


def sums(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir())
    return [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}" for name in names]
