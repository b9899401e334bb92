"""The student that is to be exported, and how it is loaded from a run's folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from odcheap.layers.cheap_conv import Standard
from odcheap.models.build import build_network, load_network, read_student_settings
from odcheap.runs import folder
from odcheap.runs.checkpoint_io import epoch_path, find_newest_usable, read_checkpoint
from odcheap.runs.load import STUDENT, strip_prefix
from odcheap.utils.errors import OptionError
from odcheap.utils.files import read_safetensors

OPTION = "JOB_DIR"
AVERAGED = "method.averages.members."  # names of the averaged students' weights in a checkpoint
READ_ERRORS = (KeyError, TypeError, IndexError, AttributeError, ValueError)  # of files that were edited by hand


class RunStudent(NamedTuple):
    """A student of a run, or a network that odcheap has not trained.

    Attributes:
        job_dir: The run's folder; None without a run.
        title: Which student of which epoch, or which network.
        network: The student in eval mode; its input is normalized.
        standard: The same architecture with standard convolutions and fresh weights, in eval mode.
        settings: What builds the student and prepares its images, see `StudentSettings`. Without a run nothing builds
            it again: `backbone` and `block_type` only describe it.
        config: The run's `config.yaml` as plain containers; empty without a run.
        summary: The run's `summary.json`; None if it has not finished.
        test_top1: The student's test accuracy in the summary; None if it has not finished.
        config_dirs: `conf` directories of the user, in which parts of the run were found.
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

    @property
    def has_settings(self) -> bool:
        """Whether the settings build the student again, so that `load_student` can load its weights."""
        return self.job_dir is not None

    @property
    def image_size(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of the input."""
        channels, height, width = self.settings["image_size"]
        return channels, height, width


def load_run_student(job_dir: Path, number: int | None = None, config_dirs: Sequence[Path] = ()) -> RunStudent:
    """Loads a student of a finished run, or of an unfinished one that has completed an epoch.

    Args:
        job_dir: The run's folder.
        number: The student's number, from 0; None is the selected student.
        config_dirs: `conf` directories with parts that odcheap does not have.

    Raises:
        OptionError: The folder holds no run, no completed epoch, or not this student.
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
        test_top1 = None
        if summary is not None:
            figures = summary["selected"] if number is None else summary["students"][number]
            test_top1 = float(figures["test_top1"])
    except OptionError:
        raise
    except READ_ERRORS as error:
        raise OptionError(OPTION, job_dir, f"its files are not as odcheap writes them ({error!r})") from error
    network = load_network(settings, tensors, OPTION, job_dir, config_dirs).eval()
    standard = build_network(settings, OPTION, job_dir, Standard(), config_dirs).eval()
    return RunStudent(job_dir, title, network, standard, settings, config, summary, test_top1, config_dirs)


def read_config(job_dir: Path) -> dict[str, Any]:
    """Reads a run's `config.yaml` as plain containers; interpolations in it stay text.

    Raises:
        OptionError: There is no config, or it is not that of a run.
    """
    path = job_dir / "config.yaml"
    if not path.is_file():
        raise OptionError(OPTION, job_dir, "holds no run of odcheap (config.yaml is missing)")
    config = folder.read_config(path, OPTION)
    if not isinstance(config.get("data"), dict):
        raise OptionError(OPTION, path, "is not the config of a run")
    return config


def read_checkpoint_student(job_dir: Path, number: int | None) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Returns weights, settings and title of a student at the epoch selected so far."""
    newest = find_newest_usable(job_dir)
    if newest is None or not newest[1]["callbacks"]["Record"]["history"]:
        raise OptionError(OPTION, job_dir, "no epoch of this run has finished, or its checkpoints are gone")
    selected = newest[1]["callbacks"]["Record"]["selected"]
    content = read_checkpoint(epoch_path(job_dir, selected["epoch"]), OPTION)
    state, settings = content["state_dict"], content["odcheap"]["student"]
    read_student_settings({"odcheap": json.dumps(settings)}, OPTION, job_dir)
    count = len({name.split(".")[3] for name in state if name.startswith(STUDENT)})
    if number is not None and not 0 <= number < count:
        raise OptionError("--student", number, f"must be 0 to {count - 1}")
    # Candidates are the students, then the averages of their weights.
    candidate = selected["candidate"] if number is None else number
    is_averaged = candidate >= count
    tensors = strip_prefix(state, f"{AVERAGED if is_averaged else STUDENT}{candidate % count}.")
    return tensors, settings, describe_student(candidate % count, selected["epoch"], is_averaged)


def describe_student(student: int, epoch: int, is_averaged: bool) -> str:
    """Describes a student to the user, who counts epochs from 1; files count them from 0."""
    return f"{'the average of ' if is_averaged else ''}student {student} of epoch {epoch + 1}"


def describe_preprocessing(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of `preprocess.json` from the settings of a student."""
    return {
        "input": "images: RGB, float32 in [0, 1], channels first; mean and std are applied inside the graph",
        "shorter_side": settings["shorter_side"],
        "size": settings["image_size"][1:],
        "interpolation": "bilinear",
        "bit_depth": settings.get("bit_depth"),
        "mean": settings["mean"],
        "std": settings["std"],
    }
