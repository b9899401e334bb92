"""The student of a run that is to be shipped, read back from the run's folder."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from yaml import YAMLError

from odcheap.layers.cheap_conv import Standard
from odcheap.models.build import build_network, load_network, read_student_settings
from odcheap.runs.checkpoint_io import epoch_path, newest_usable, read_run
from odcheap.runs.load import STUDENT, below
from odcheap.runs.resume import summary_of
from odcheap.utils.console import say
from odcheap.utils.errors import OptionError, first_line
from odcheap.utils.files import read_safetensors

OPTION = "JOB_DIR"
AVERAGE = "method.averages.members."


class Product(NamedTuple):
    """`name` says which student of which epoch; `summary` is None for a run that has not finished."""

    job_dir: Path
    name: str
    network: nn.Module
    standard: nn.Module
    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    config: dict[str, Any]
    summary: dict[str, Any] | None
    test_top1: float | None

    @property
    def image_size(self) -> tuple[int, int, int]:
        return tuple(self.settings["image_size"])


def of_run(job_dir: Path, number: int | None = None) -> Product:
    """The chosen student, or student `number` of the same epoch. `OptionError` where the folder has none."""
    if not job_dir.is_dir():
        raise OptionError(OPTION, job_dir, "no such folder")
    config, summary = config_of(job_dir), summary_of(job_dir)
    try:
        if summary is not None and number is None:
            tensors, metadata = read_safetensors(job_dir / "student.safetensors", OPTION)
            settings, chosen = read_student_settings(metadata, OPTION, job_dir), summary["selected"]
            name = called(int(chosen["student"]), int(chosen["epoch"]), bool(chosen["averaged"]))
        else:
            tensors, settings, name = of_checkpoint(job_dir, number)
        figures = summary and (summary["selected"] if number is None else summary["students"][number])
        test_top1 = figures and float(figures["test_top1"])
    except OptionError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise OptionError(OPTION, job_dir, f"its files are not as odcheap writes them ({error!r})") from error
    network = load_network(settings, tensors, OPTION, str(job_dir)).eval()
    standard = build_network(settings, OPTION, str(job_dir), Standard()).eval()
    return Product(job_dir, name, network, standard, tensors, settings, config, summary, test_top1)


def config_of(job_dir: Path) -> dict[str, Any]:
    """A run's config as plain containers; what is written in it is read and nothing else."""
    path = job_dir / "config.yaml"
    if not path.is_file():
        raise OptionError(OPTION, job_dir, "holds no run of odcheap (config.yaml is missing)")
    try:
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OmegaConfBaseException, YAMLError, ValueError, OSError, RecursionError) as error:
        raise OptionError(OPTION, path, f"cannot be read ({first_line(error)})") from error
    if not isinstance(config, dict) or not isinstance(config.get("data"), dict):
        raise OptionError(OPTION, path, "is no run's config")
    return config


def of_checkpoint(job_dir: Path, number: int | None) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Weights and settings at the selected epoch, so far where the run has not finished."""
    newest = newest_usable(job_dir, say)
    if newest is None or not newest[1]["callbacks"]["Record"]["history"]:
        raise OptionError(OPTION, job_dir, "no epoch of this run has finished, or its checkpoints are gone")
    selected = newest[1]["callbacks"]["Record"]["selected"]
    content = read_run(epoch_path(job_dir, selected["epoch"]), OPTION)
    state, settings = content["state_dict"], content["odcheap"]["student"]
    read_student_settings({"odcheap": json.dumps(settings)}, OPTION, job_dir)
    count = len({name.split(".")[3] for name in state if name.startswith(STUDENT)})
    k = selected["candidate"] if number is None else number
    if number is not None and not 0 <= number < count:
        raise OptionError("--student", number, f"must be 0 to {count - 1}")
    averaged = k >= count
    tensors = below(state, f"{AVERAGE if averaged else STUDENT}{k % count}.")
    return tensors, settings, called(k % count, selected["epoch"], averaged)


def called(student: int, epoch: int, averaged: bool) -> str:
    return f"{'the average of ' if averaged else ''}student {student} of epoch {epoch}"
