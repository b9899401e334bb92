"""The student that is exported, and how it is loaded from the folder of a run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from odcheap.layers.cheap_conv import Standard
from odcheap.layers.fuse import fold_branches, has_branches
from odcheap.models.build import build_network, load_network, read_student_settings
from odcheap.runs import folder
from odcheap.runs.folder import epoch_path, find_newest_usable, read_checkpoint
from odcheap.runs.load import STUDENT, strip_prefix
from odcheap.runs.settings import select_student_settings
from odcheap.utils.errors import OptionError
from odcheap.utils.files import read_safetensors

OPTION = "JOB_DIR"
AVERAGED = "method.averages.members."  # names of the averaged students' weights in a checkpoint


class RunStudent(NamedTuple):
    """A network to export: a student of a run, or a network that odcheap has not trained.

    Attributes:
        job_dir: The run's folder; None if there is no run.
        title: A text for users that names the network, such as "student 0 of epoch 15".
        network: The network in eval mode, which takes normalized images. Each `RepDepthwise` in it is already replaced
            by the equal depth-wise convolution.
        standard: The same architecture with standard convolutions and random weights, in eval mode. The costs of
            `network` are compared with it.
        settings: The settings from which the student is built and its images are prepared, a dict with the keys of
            `StudentSettings`. If there is no run, `backbone` and `block_type` only describe the network, which cannot
            be built from them.
        config: The content of the run's `config.yaml`; empty if there is no run.
        summary: The content of the run's `summary.json`; None if there is no run, or the run has not finished.
        test_top1: The student's test accuracy in `summary`, as a fraction; None if `summary` is None.
        config_dirs: The user's own `conf` directories, if the run needs config files that odcheap does not have.
        recall: The recall of each class in `summary`, by the name of the class. None if `summary` does not have it for
            this student, which is so for all students but the selected one.
    """

    job_dir: Path | None
    title: str
    network: nn.Module
    standard: nn.Module
    settings: dict[str, Any]
    config: dict[str, Any]
    summary: dict[str, Any] | None
    test_top1: float | None
    config_dirs: Sequence[Path] = ()
    recall: dict[str, float | None] | None = None

    @property
    def image_size(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of the images that the network takes."""
        channels, height, width = self.settings["image_size"]
        return channels, height, width


def load_run_student(job_dir: Path, number: int | None = None, config_dirs: Sequence[Path] = ()) -> RunStudent:
    """Loads a student of a run, which must be finished or have completed at least one epoch.

    Args:
        job_dir: The run's folder.
        number: The index of the student in the run, from 0. None loads the student that the run has selected.
        config_dirs: The user's own `conf` directories, if the run needs config files that odcheap does not have.

    Raises:
        OptionError: The folder contains no run, no completed epoch, or no student with this number.
    """
    if not job_dir.is_dir():
        raise OptionError(OPTION, job_dir, "no such folder")
    config, summary = read_config(job_dir), folder.read_summary(job_dir)
    try:
        # A finished run has the selected student in a file of its own; all others are in checkpoints.
        if summary is not None and number is None:
            tensors, metadata = read_safetensors(job_dir / "student.safetensors", OPTION)
            settings, selected = read_student_settings(metadata, OPTION, job_dir), summary["selected"]
            title = describe_student(int(selected["student"]), int(selected["epoch"]), bool(selected["averaged"]))
        else:
            tensors, settings, title = read_checkpoint_student(job_dir, number)
        test_top1 = recall = None
        if summary is not None:
            figures = summary["selected"] if number is None else summary["students"][number]
            test_top1, recall = float(figures["test_top1"]), figures.get("recall")
    except OptionError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError) as error:  # of files that were edited by hand
        raise OptionError(OPTION, job_dir, f"its files are not as odcheap writes them ({error!r})") from error
    network = load_network(settings, tensors, OPTION, job_dir, config_dirs).eval()
    if has_branches(network):
        network, settings = fold_branches(network), settings | {"folded": True}
    standard = build_network(settings, OPTION, job_dir, Standard(), config_dirs).eval()
    return RunStudent(job_dir, title, network, standard, settings, config, summary, test_top1, config_dirs, recall)


def read_config(job_dir: Path) -> dict[str, Any]:
    """Returns the content of a run's `config.yaml`; interpolations such as `${seed}` in it are not resolved.

    Raises:
        OptionError: There is no such file, or another program has written it.
    """
    path = job_dir / "config.yaml"
    if not path.is_file():
        raise OptionError(OPTION, job_dir, "holds no run of odcheap (config.yaml is missing)")
    config = folder.read_config(path, OPTION)
    if not isinstance(config.get("data"), dict):
        raise OptionError(OPTION, path, "is not the config of a run")
    return config


def read_checkpoint_student(job_dir: Path, number: int | None) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Reads a student from the checkpoint of the epoch that the run has selected so far.

    Args:
        job_dir: The run's folder.
        number: The index of the student, from 0. None for what the run has selected, which is a student or the moving
            average of its weights.

    Returns:
        The student's weights by name, its settings (a dict with the keys of `StudentSettings`), and a title such as
        "student 0 of epoch 15".

    Raises:
        OptionError: The run has no usable checkpoint, or no student with this number.
    """
    newest = find_newest_usable(job_dir)
    if newest is None or not newest[1]["callbacks"]["Record"]["history"]:
        raise OptionError(OPTION, job_dir, "no epoch of this run has finished, or its checkpoints are gone")
    selected = newest[1]["callbacks"]["Record"]["selected"]
    content = read_checkpoint(epoch_path(job_dir, selected["epoch"]), OPTION)
    state = content["state_dict"]
    count = len({name.split(".")[3] for name in state if name.startswith(STUDENT)})
    if number is not None and not 0 <= number < count:
        raise OptionError("--student", number, f"must be 0 to {count - 1}")
    # The candidates are the students, then the moving averages of their weights.
    candidate = selected["candidate"] if number is None else number
    is_averaged = candidate >= count
    settings = select_student_settings(content["odcheap"], candidate % count)
    read_student_settings({"odcheap": json.dumps(settings)}, OPTION, job_dir)
    tensors = strip_prefix(state, f"{AVERAGED if is_averaged else STUDENT}{candidate % count}.")
    return tensors, settings, describe_student(candidate % count, selected["epoch"], is_averaged)


def describe_student(student: int, epoch: int, is_averaged: bool) -> str:
    """Returns a text that names a student and its epoch, such as "student 0 of epoch 15".

    Args:
        student: The number of the student, from 0.
        epoch: The number of the epoch, from 0; the text counts epochs from 1.
        is_averaged: Whether the text is about the moving average of the student's weights.
    """
    return f"{'the average of ' if is_averaged else ''}student {student} of epoch {epoch + 1}"


def describe_preprocessing(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of `preprocess.json`, which says how an image file becomes the input of a student.

    Args:
        settings: The settings of the student, a dict with the keys of `StudentSettings`.

    Raises:
        OptionError: The student takes neither RGB nor gray images, so image files cannot be its input.
    """
    channels = settings["image_size"][0]
    if channels not in (1, 3):
        allowed = "an export reads image files, which are RGB or gray: data.channels must be 3 or 1"
        raise OptionError("data.channels", channels, allowed)
    kind = "gray" if channels == 1 else "RGB"
    return {
        "input": f"images: {kind}, float32 in [0, 1], channels first; mean and std are applied inside the graph",
        "channels": channels,
        "shorter_side": settings["shorter_side"],
        "size": settings["image_size"][1:],
        "interpolation": "bilinear",
        "bit_depth": settings.get("bit_depth"),
        "mean": settings["mean"],
        "std": settings["std"],
    }
