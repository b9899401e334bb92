"""The results of a run: as dictionaries for `summary.json`, as a table on the screen, and as `student.safetensors`.

The members of a method are the networks that are evaluated: the students, the moving averages of their weights, the
teacher, and the ensemble of the students. The candidates are the members that may be selected as the result of the run:
students and moving averages.
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
    """Returns the metrics of networks as a flat dict with keys such as "val/student_0/top1".

    Args:
        stage: The first part of the keys: "train", "val" or "test".
        members: The names of the networks, such as "student_0", "teacher" and "ensemble".
        figures: The metrics of these networks, in the same order.
    """
    return {f"{stage}/{who}/{f}": getattr(figures, f)[k] for f in FIGURES for k, who in enumerate(members)}


def summarize_members(
    members: list[str], test: Figures, val: dict[str, Any], teacher_kind: str | None
) -> dict[str, Any]:
    """Returns the accuracies of all networks that are evaluated, in the form that `summary.json` has.

    Args:
        members: The names of the networks, such as "student_0", "average_0", "teacher" and "ensemble".
        test: The metrics of these networks on the test images.
        val: The metrics on the held-out images with the same weights, by keys such as "val/student_0/top1".
        teacher_kind: What the teacher is, such as "head" or "frozen"; None if there is no teacher.

    Returns:
        A dict with these keys:

        - `students`: a list with a dict of accuracies for each student;
        - `averages`: such a list for the moving averages of the students' weights; None if there are none;
        - `teacher`: the accuracies of the teacher, and its `kind`; None if there is no teacher;
        - `ensemble`: the accuracies of the ensemble of the students.

        A dict of accuracies has the keys `val_top1` and `val_balanced_accuracy` (on the held-out images), `test_top1`,
        `test_top5` and `test_balanced_accuracy`.
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
    """Counts the images of each part of the data ("train", "val", "test"), in total and by class.

    Args:
        labels: The labels (N,) of each part, by its name.
        classes: The names of the classes.

    Returns:
        A dict with two keys: `images` maps each part to its number of images, and `classes` maps the name of each class
        to a dict from each part to the number of images of this class.
    """
    by_class = {part: np.bincount(target, minlength=len(classes)).tolist() for part, target in labels.items()}
    return {
        "images": {part: len(target) for part, target in labels.items()},
        "classes": {name: {part: counts[k] for part, counts in by_class.items()} for k, name in enumerate(classes)},
    }


def summarize_costs(
    method: Method, standard: nn.Module, image_size: tuple[int, int, int], images_trained: int, number: int = 0
) -> dict[str, Any]:
    """Returns parameters and multiply-accumulates (MACs) of a student, of the networks around it, and of the training.

    Args:
        method: The training method with its students and its teacher, if it has one.
        standard: The standard network: the student's architecture with standard convolutions.
        image_size: (C, H, W) of the images.
        images_trained: The number of images in all epochs together.
        number: The index of the student in `method`; students may have different architectures.

    Returns:
        A dict with these keys at the top level:

        - `params`, `macs`: the student's number of parameters, and its MACs for one image;
        - `standard`: a dict with `params` and `macs` of the standard network, and a `note` about it or None;
        - `teacher`: a dict with `params`, `macs`, `train_seconds` and `training_macs` of a frozen teacher; None if
          `method` has no frozen teacher;
        - `training_macs`: the MACs of the whole training; a backward pass counts as two forward passes;
        - `training_macs_with_teacher`: `training_macs` plus the MACs with which the frozen teacher was trained; None if
          these are not known.
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
    """Returns a dict with `params`, a network's parameters, and `macs`, its multiply-accumulates for one image."""
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

    Returns:
        A dict with these keys:

        - `cpu`: the name of the CPU's model;
        - `threads`: the number of CPU threads that PyTorch uses;
        - `bf16_on_cpu`: whether the CPU has instructions for bfloat16;
        - `gpu`: the name of the GPU; None if `device` is not a CUDA device;
        - `device`: the type of `device`, such as "cuda".
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
    """Returns the description of a run that is stored in each of its checkpoints.

    Args:
        config: The config of the run.
        data: The data set; its method `read` has been called.

    Returns:
        A dict with these keys:

        - `overrides`: the options that the user has given;
        - `config`: the resolved config, as nested dicts;
        - `classes`: the names of the classes;
        - `split`: the fingerprint of the images and of how they are divided into parts;
        - `student`: the settings from which a student can be built, a dict with the keys of `StudentSettings`;
        - `students`: a list with such settings for each student; only if the students have different architectures.
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
    """Writes the weights of a student to a safetensors file, which also has the settings to build it as metadata.

    Args:
        path: The file to write.
        student: The network.
        settings: The settings to build the network, a dict with the keys of `StudentSettings`. Paths in them, such as
            that of pretrained weights, are written as file names only, since users share the file.
    """
    settings = {name: hide_paths(value) if name in PARTS else value for name, value in settings.items()}
    tensors = {name: tensor.contiguous() for name, tensor in student.state_dict().items()}
    content = save(tensors, metadata={"odcheap": json.dumps(settings)})
    write_atomic(path, lambda file: file.write(content))


def hide_paths(value: Any) -> Any:
    """Returns the settings of a backbone or block type, in which each path is shortened to the name of the file."""
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
    """Returns a table of the accuracies of students, teacher and ensemble, in which the selected student is marked.

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
    """Returns the name of the selected network: "student K", or "average of student K" for a moving average.

    Args:
        choice: The entry `selected` of `summary.json`. Its `student` is the index K, and its `averaged` says whether
            the moving average of the student's weights was selected.
    """
    return f"{'average of ' if choice['averaged'] else ''}student {choice['student']}"


def build_caption(summary: dict[str, Any]) -> str:
    """Returns the text below the table of a run's results.

    It says which network was selected on which images, how accurate guessing would be, and what the student costs.

    Args:
        summary: The content of `summary.json` or `test.json`.
    """
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
