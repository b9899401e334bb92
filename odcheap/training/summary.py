"""The results of a run: as dictionaries for `summary.json`, as a table on the screen, and as `student.safetensors`.

The members of a method are the networks that are evaluated: the students, the moving averages of their weights, the
teacher, and the ensemble of the students. The candidates are those of them that may be selected: students and moving
averages.
"""

import json
import platform
from pathlib import Path
from typing import Any, cast

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
from odcheap.data.base import ImageData
from odcheap.layers.spatial import keep_branches
from odcheap.methods.base import Method
from odcheap.methods.teacher import Teacher, TeacherEnsemble
from odcheap.models.flops import count_macs, count_params
from odcheap.predict import describe_guessing, summarize_counts
from odcheap.runs.settings import RunConfig
from odcheap.training.module import Figures
from odcheap.utils.files import write_atomic
from odcheap.utils.text import escape_control_chars, format_accuracy, format_macs, hide_folders

PARTS = ("backbone", "block_type")  # what is built from the settings of a student
FIGURES = ("top1", "top5", "balanced_accuracy")
FINAL_FIGURES = ("val_top1", "test_top1", "test_top5", "test_balanced_accuracy")


def name_figures(stage: str, members: list[str], figures: Figures) -> dict[str, float | None]:
    """Returns the metrics of all networks that are evaluated, with names such as `val/student_0/top1`.

    Args:
        stage: "train", "val" or "test".
        members: The names of the networks, such as "student_0", "teacher" and "ensemble".
        figures: Their metrics.
    """
    return {f"{stage}/{who}/{f}": getattr(figures, f)[k] for f in FIGURES for k, who in enumerate(members)}


def summarize_members(
    members: list[str], test: Figures, val: dict[str, Any], teacher_kind: str | None
) -> dict[str, Any]:
    """Returns the entries of `summary.json` about the networks that are evaluated: students, teacher and so on.

    Args:
        members: The names of the networks, such as "student_0", "average_0", "teacher" and "ensemble".
        test: Their metrics on the test images.
        val: The metrics on the held-out images with the same weights, with names such as `val/student_0/top1`.
        teacher_kind: What the teacher is, such as "head" or "frozen"; None if the method has none. See `Method`.

    Returns:
        `students` and `averages`, with a dict for each; `teacher` and `ensemble`, a dict each. `averages` and `teacher`
        are None if the method has none. The keys of each dict are `val_top1`, `val_balanced_accuracy` (on the held-out
        images), `test_top1`, `test_top5` and `test_balanced_accuracy`; that of the teacher also has its `kind`.
    """

    def summarize(k: int, name: str) -> dict[str, Any]:
        return {
            "val_top1": val.get(f"val/{name}/top1"),
            "val_balanced_accuracy": val.get(f"val/{name}/balanced_accuracy"),
            "test_top1": test.top1[k],
            "test_top5": test.top5[k],
            "test_balanced_accuracy": test.balanced_accuracy[k],
        }

    # The kind of member is in its name; averages and teacher may be missing.
    by_name = {name: summarize(k, name) for k, name in enumerate(members)}
    teacher = by_name.get("teacher")
    return {
        "students": [value for name, value in by_name.items() if name.startswith("student_")],
        "averages": [value for name, value in by_name.items() if name.startswith("average_")] or None,
        "teacher": teacher and teacher | {"kind": teacher_kind},
        "ensemble": by_name["ensemble"],
    }


def count_images(labels: dict[str, np.ndarray], classes: list[str]) -> dict[str, Any]:
    """Returns the number of images of each part ("train", "val", "test").

    Args:
        labels: The labels (N,) of each part.
        classes: The names of the classes.

    Returns:
        `images`: a dict from the part to its number of images. `classes`: for each class, by its name, such a dict.
    """
    by_class = {part: np.bincount(target, minlength=len(classes)).tolist() for part, target in labels.items()}
    return {
        "images": {part: len(target) for part, target in labels.items()},
        "classes": {name: {part: counts[k] for part, counts in by_class.items()} for k, name in enumerate(classes)},
    }


def summarize_costs(
    method: Method, standard: nn.Module, image_size: tuple[int, int, int], images_trained: int, number: int = 0
) -> dict[str, Any]:
    """Returns the costs of a student, of the standard network, of a frozen teacher, and of the training.

    Args:
        method: The method.
        standard: The network with standard convolutions.
        image_size: (C, H, W) of the images.
        images_trained: The number of images in all epochs together.
        number: The number of the student, from 0; its architecture may differ from that of other students.

    Returns:
        For the student: `params` and, for one image, `macs` (multiply-accumulates). `standard` and `teacher` have the
        same entries; `teacher` is None if the method has no frozen one. `training_macs`: those of the whole training,
        in which a backward pass counts as two forward passes. `training_macs_with_teacher`: the same plus the training
        of the frozen teacher; None if that is not known.
    """
    # Frozen networks have a forward pass only: one third of what the others need.
    student = method.students.members[number]
    with keep_branches(nn.ModuleList(method.candidates())):  # a training computes the branches of RepDW
        frozen = [count_macs(network, image_size) for network in method.frozen_networks()]
        training = (3 * count_macs(method, image_size) - 2 * sum(frozen)) * images_trained
    teacher, before = None, 0
    if method.teacher_kind == "frozen":
        frozen_teacher = cast(Teacher | TeacherEnsemble, method.teacher)
        teacher = {"params": count_params(frozen_teacher.network), "macs": frozen[0], **frozen_teacher.history}
        before = teacher["training_macs"]
    return {
        **count_costs(student, image_size),
        "standard": count_costs(standard, image_size) | {"note": getattr(standard, "standard_note", None)},
        "teacher": teacher,
        "training_macs": training,
        "training_macs_with_teacher": training + before if before is not None else None,
    }


def count_costs(network: nn.Module, image_size: tuple[int, int, int]) -> dict[str, int]:
    """Returns `params`, the number of parameters, and `macs`, that of multiply-accumulates for an image (C, H, W)."""
    return {"params": count_params(network), "macs": count_macs(network, image_size)}


def list_versions() -> dict[str, str]:
    """Returns the versions of odcheap, of Python and of the packages on which results may depend, by their names."""
    return {
        "odcheap": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pytorch_lightning": pl.__version__,
        "torchmetrics": torchmetrics.__version__,
    }


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Returns the properties of this machine on which speed depends.

    Args:
        device: The device of the training.

    Returns:
        `cpu` (the name of its model), `threads` (the number that PyTorch uses), `bf16_on_cpu` (whether the CPU computes
        in bfloat16), `gpu` (its name; None if `device` is not a CUDA device) and `device` (such as "cuda").
    """
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "bf16_on_cpu": "avx512_bf16" in text,
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "device": device.type,
    }


def describe_run(config: RunConfig, data: ImageData) -> dict[str, Any]:
    """Returns the description of a run that each checkpoint contains.

    Args:
        config: The config of the run.
        data: The data set; its method `read` has been called.

    Returns:
        `overrides` (the options that the user has given), `config` (the resolved config), `split` (the fingerprint of
        the data), `classes` (their names), and `student`, the settings from which a student can be built (see
        `StudentSettings`). If the students have different shapes, there is also `students`, a list with the settings of
        each; see `select_student_settings`.
    """
    settings = config.to_settings()
    known = {"classes": data.classes, "split": data.fingerprint}
    images = {"image_size": list(data.image_size), "shorter_side": data.shorter_side, "bit_depth": data.bit_depth}
    norm = {"mean": list(data.norm.mean), "std": list(data.norm.std)}
    student = {group: settings[group] for group in PARTS} | known | images | norm
    about = {"overrides": config.overrides, "config": settings, **known, "student": student}
    shapes = settings.get("students")
    return about if shapes is None else about | {"students": [student | shape for shape in shapes]}


def write_student(path: Path, student: nn.Module, settings: dict[str, Any]) -> None:
    """Writes the weights of a network as safetensors, with the settings from which it can be built as metadata (JSON).

    Args:
        path: The file to write.
        student: The network.
        settings: The settings; see `StudentSettings`. Users share the file, so paths in the settings, such as that of
            pretrained weights, are shortened to file names.
    """
    settings = {name: hide_paths(value) if name in PARTS else value for name, value in settings.items()}
    tensors = {name: tensor.contiguous() for name, tensor in student.state_dict().items()}
    content = save(tensors, metadata={"odcheap": json.dumps(settings)})
    write_atomic(path, lambda file: file.write(content))


def hide_paths(value: Any) -> Any:
    """Returns the settings of a backbone or block type with each path shortened to its last name."""
    if isinstance(value, dict):
        return {name: hide_paths(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [hide_paths(entry) for entry in value]
    return hide_folders(value) if isinstance(value, str) else value


def print_summary(console: Console, summary: dict[str, Any], title: str) -> None:
    """Prints the results of a run as a title, a table and a caption.

    Args:
        console: The console to print on.
        summary: The content of `summary.json` or `test.json`.
        title: The title.
    """
    console.print(escape_control_chars(title), soft_wrap=True)
    console.print(build_table(summary))
    console.print(build_caption(summary), soft_wrap=True)


def build_table(summary: dict[str, Any]) -> Table:
    """Returns a table of the accuracies of students, teacher and ensemble; it marks the student that was selected.

    Args:
        summary: The content of `summary.json` or `test.json`.
    """
    choice = summary["selected"]
    table = Table()
    for column in ("", "val\ntop-1 %", "test\ntop-1 %", "test\ntop-5 %", "test\nbalanced %"):
        table.add_column(column, justify="left" if not column else "right")
    # A row for each student, each moving average, the teacher and the ensemble.
    members = [(f"student {k}", value) for k, value in enumerate(summary["students"])]
    members += [(f"average of student {k}", value) for k, value in enumerate(summary["averages"] or [])]
    if summary["teacher"]:
        members.append((f"teacher ({summary['teacher']['kind']})", summary["teacher"]))
    for name, value in [*members, ("ensemble of the students", summary["ensemble"])]:
        figures = [format_accuracy(value[figure]) for figure in FINAL_FIGURES]
        shown = f"{name} ({value['network']})" if value.get("network") else name
        if name == name_candidate(choice):
            table.add_row(f"{shown} <- chosen", *figures, style="bold")
        else:
            table.add_row(shown, *figures)
    return table


def name_candidate(choice: dict[str, Any]) -> str:
    """Returns the name of the selected network.

    Args:
        choice: The entry `selected` of `summary.json`: `student` is the index of the student, and `averaged` says
            whether the moving average of its weights was selected.

    Returns:
        "student K", or "average of student K" for the average of the weights, where K is the index.
    """
    return f"{'average of ' if choice['averaged'] else ''}student {choice['student']}"


def build_caption(summary: dict[str, Any]) -> str:
    """Returns the text below the table of a run's results: what was selected and how, guessing, and costs."""
    choice, cost = summary["selected"], summary.get("cost")
    on = {"val": "held-out images", "last": "nothing: the last epoch", "test": "the TEST images (the 2019 code's way)"}
    text = f"{name_candidate(choice)} of epoch {choice['epoch'] + 1}, selected on {on[choice['selected_on']]}"
    of_class = [counts["test"] for counts in summary.get("classes", {}).values()]
    if any(of_class):  # `test.json` does not have the numbers
        recalls = zip(of_class, choice["recall"].values(), strict=True)
        right = [round((recall or 0) * count) for count, recall in recalls]
        guessing = describe_guessing(summarize_counts(of_class, right, list(summary["classes"])))
        text += f"\non the test images, {escape_control_chars(guessing)}"
    if cost:
        standard = cost["standard"]
        text += f"\n{cost['params']:,} parameters (standard network {standard['params']:,}), "
        text += f"{format_macs(cost['macs'])} MACs (standard {format_macs(standard['macs'])})"
        text += f"\n{standard['note']}" if standard.get("note") else ""
        is_larger = cost["macs"] > standard["macs"] or cost["params"] > standard["params"]
        text += "\nwarning: this student costs more than the standard network" if is_larger else ""
    return text
