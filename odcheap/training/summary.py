"""A finished run in one dictionary, `summary.json`, and in one table."""

import csv
import io
import json
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torchmetrics
import torchvision
from rich.console import Console
from rich.table import Table
from safetensors.torch import save
from torch import nn

from odcheap import __version__
from odcheap.models import flops
from odcheap.training.callbacks import Record
from odcheap.training.module import DistillationModule, Figures
from odcheap.utils.files import write_atomic, write_text
from odcheap.utils.parts import part_settings
from odcheap.utils.text import escape_control_chars, format_accuracy


def results(module: DistillationModule, row: dict[str, Any], test: Figures) -> dict[str, Any]:
    """`students`, `averages` (of their weights, or None), `teacher` and `ensemble` at one epoch.

    Val figures are those of its record, test figures were just computed.
    """

    def of(k: int, name: str) -> dict[str, Any]:
        return {
            "val_top1": row.get(f"val/{name}/top1"),
            "val_balanced_accuracy": row.get(f"val/{name}/balanced_accuracy"),
            "test_top1": test.top1[k],
            "test_top5": test.top5[k],
            "test_balanced_accuracy": test.balanced_accuracy[k],
        }

    named = {name: of(k, name) for k, name in enumerate(module.members)}
    teacher = named.get("teacher")
    return {
        "students": [value for name, value in named.items() if name.startswith("student_")],
        "averages": [value for name, value in named.items() if name.startswith("average_")] or None,
        "teacher": teacher and teacher | {"kind": module.method.teacher_kind},
        "ensemble": named["ensemble"],
    }


def selected(
    record: Record, at_selected: dict[str, Any], confused: list[list[int]], classes: list[str]
) -> dict[str, Any]:
    """The chosen student; `recall` by class on the test images, None for a class that has none there."""
    candidates, count = at_selected["students"] + (at_selected["averages"] or []), len(at_selected["students"])
    chosen = candidates[record.selected["candidate"]]
    recall = [counts[k] / sum(counts) if sum(counts) else None for k, counts in enumerate(confused)]
    return {
        "student": record.selected["candidate"] % count,
        "averaged": record.selected["candidate"] >= count,
        "epoch": record.selected["epoch"],
        "selected_on": record.select,
        "selected_by": record.figure,
        **chosen,
        "balanced_accuracy": chosen["test_balanced_accuracy"],
        "recall": dict(zip(classes, recall, strict=True)),
    }


def counted(labels: dict[str, np.ndarray], classes: list[str]) -> dict[str, Any]:
    """Images of each part: in all, and by class."""
    by_class = {part: np.bincount(target, minlength=len(classes)).tolist() for part, target in labels.items()}
    return {
        "images": {part: len(target) for part, target in labels.items()},
        "classes": {name: {part: counts[k] for part, counts in by_class.items()} for k, name in enumerate(classes)},
    }


def costs(
    module: DistillationModule, standard: nn.Module, image_size: tuple[int, int, int], images_trained: int
) -> dict[str, Any]:
    """Of one student, of the standard network, and of a teacher from elsewhere with what its own training took.

    `training_macs` counts a backward pass as two forward passes; `training_macs_with_teacher` has the teacher's own
    training besides, None where that is not known.
    """
    method = module.method
    student, frozen = (
        method.students.members[0],
        [flops.count_macs(network, image_size) for network in method.frozen_networks()],
    )
    training = (3 * flops.count_macs(method, image_size) - 2 * sum(frozen)) * images_trained
    teacher, before = None, 0
    if method.teacher_kind == "frozen":
        teacher = {"params": flops.count_params(method.teacher.network), "macs": frozen[0], **method.teacher.history}
        before = teacher["training_macs"]
    return {
        "params": flops.count_params(student),
        "macs": flops.count_macs(student, image_size),
        "standard": {
            "params": flops.count_params(standard),
            "macs": flops.count_macs(standard, image_size),
            "note": getattr(standard, "standard_note", None),
        },
        "teacher": teacher,
        "training_macs": training,
        "training_macs_with_teacher": training + before if before is not None else None,
    }


def versions() -> dict[str, str]:
    return {
        "odcheap": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pytorch_lightning": pl.__version__,
        "torchmetrics": torchmetrics.__version__,
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures of a measurement depend on."""
    found = [line for line in lines("/proc/cpuinfo") if line.startswith("model name")]
    name = found[0].partition(":")[2].strip() if found else platform.processor()
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    native = "avx512_bf16" in " ".join(lines("/proc/cpuinfo"))
    return {"cpu": name, "threads": torch.get_num_threads(), "bf16_on_cpu": native, "gpu": gpu, "device": device.type}


def lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def write_confusion(path: Path, counts: list[list[int]], classes: list[str]) -> None:
    """Rows are the true classes, columns the predicted ones."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["true \\ predicted", *classes])
    writer.writerows([name, *row] for name, row in zip(classes, counts, strict=True))
    write_text(path, text.getvalue())


def write_split(path: Path, rows: Iterable[tuple[str, str, str]]) -> None:
    """Which file is in which part of the data; nothing where the images are no files."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "class", "part"])
    head = text.tell()
    writer.writerows(rows)
    if text.tell() > head:
        write_text(path, text.getvalue())


def student_settings(about: dict[str, Any], data: pl.LightningDataModule, choices: Mapping[str, str]) -> dict[str, Any]:
    """What rebuilds a student of this run and prepares pictures for it; `choices` are the parts' option names."""
    found = {key: part_settings(about["config"][key], choices[key]) for key in ("backbone", "block_type")}
    found |= {key: about[key] for key in ("classes", "split")}
    found |= {"image_size": list(data.image_size), "shorter_side": data.shorter_side}
    return found | {"mean": list(data.norm.mean), "std": list(data.norm.std)}


def write_student(path: Path, student: nn.Module, settings: dict[str, Any]) -> None:
    """The network's plain weights with the settings that rebuild it."""
    tensors = {name: tensor.contiguous() for name, tensor in student.state_dict().items()}
    content = save(tensors, metadata={"odcheap": json.dumps(settings)})
    write_atomic(path, lambda file: file.write(content))


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def show(console: Console, summary: dict[str, Any], title: str) -> None:
    """What became of a run, as a title, a table and a few words below it."""
    console.print(escape_control_chars(title), soft_wrap=True)
    console.print(table(summary))
    console.print(caption(summary), soft_wrap=True)


def table(summary: dict[str, Any]) -> Table:
    """Every member at the selected epoch; the chosen student is marked."""
    choice = summary["selected"]
    made = Table()
    for column in ("", "val top-1", "test top-1", "test top-5", "test balanced"):
        made.add_column(column, justify="left" if not column else "right")
    members = [(f"student {k}", value) for k, value in enumerate(summary["students"])]
    members += [(f"average of student {k}", value) for k, value in enumerate(summary["averages"] or [])]
    if summary["teacher"]:
        members.append((f"teacher ({summary['teacher']['kind']})", summary["teacher"]))
    for name, value in [*members, ("ensemble of the students", summary["ensemble"])]:
        chosen = name == named(choice)
        figures = [
            format_accuracy(value[figure])
            for figure in ("val_top1", "test_top1", "test_top5", "test_balanced_accuracy")
        ]
        made.add_row(f"{name} <- chosen" if chosen else name, *figures, style="bold" if chosen else None)
    return made


def named(choice: dict[str, Any]) -> str:
    return f"{'average of ' if choice['averaged'] else ''}student {choice['student']}"


def caption(summary: dict[str, Any]) -> str:
    choice, spent = summary["selected"], summary.get("cost")
    on = {"val": "held-out images", "last": "nothing: the last epoch", "test": "the TEST images (the 2019 code's way)"}
    text = f"{named(choice)} of epoch {choice['epoch']}, selected on {on[choice['selected_on']]}"
    if spent:
        standard = spent["standard"]
        text += f"\n{spent['params']:,} parameters (standard network {standard['params']:,}), "
        text += f"{spent['macs'] / 1e6:.2f} M MACs (standard {standard['macs'] / 1e6:.2f} M)"
        text += f"\n{standard['note']}" if standard.get("note") else ""
        dearer = spent["macs"] > standard["macs"] or spent["params"] > standard["params"]
        text += "\nwarning: this student is dearer than the standard network" if dearer else ""
    return text
