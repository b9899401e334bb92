"""Loads the model that is evaluated: the student of a run in PyTorch, or a file of an export in ONNX Runtime."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from odcheap import predict
from odcheap.data.base import ImageDigests
from odcheap.data.transforms import Normalization
from odcheap.export.load_run import describe_preprocessing, load_run_student
from odcheap.runs.folder import CONFIG
from odcheap.runs.training_images import read_digests
from odcheap.utils.errors import OptionError

OPTION = "RUN_OR_EXPORT"


class Model(NamedTuple):
    """A model that classifies images.

    Attributes:
        title: A text that says which model it is.
        classes: The names of its classes, in the order of the logits.
        preprocess: The content of `preprocess.json`, which says how images are prepared.
        predictor: A function that maps prepared images (n, C, H, W) in [0, 1] to logits (n, K).
        digests: The hashes of the run's training images; None if they are not known.
        reason: Why they are not known.
        test_top1: The accuracy on the run's own test images; None if it is not known.
    """

    title: str
    classes: list[str]
    preprocess: dict[str, Any]
    predictor: predict.Predictor
    digests: ImageDigests | None
    reason: str
    test_top1: float | None


def load_export(folder: Path, name: str) -> Model:
    """Loads an ONNX file of an export for ONNX Runtime.

    Args:
        folder: The folder of the export.
        name: The name of the ONNX file.

    Raises:
        PredictError: A file of the export is missing or was changed.
    """
    preprocess, classes = predict.read_export(folder)
    session = predict.create_session(predict.read_verified(folder, name))
    predict.check_input_size(session, preprocess)
    title, predictor = f"{name} in ONNX Runtime", predict.create_predictor(session)
    return Model(title, classes, preprocess, predictor, None, predict.NO_TRAINING_LIST, None)


def load_run(job_dir: Path, number: int | None, config_dirs: Sequence[Path]) -> Model:
    """Loads a student of a run for PyTorch.

    Args:
        job_dir: The run's folder.
        number: The number of the student, from 0; None for the selected student.
        config_dirs: Further `conf` directories, with parts that odcheap does not have.

    Raises:
        OptionError: The folder contains no run, or no student with this number.
    """
    if not (job_dir / CONFIG).is_file():
        raise OptionError(OPTION, job_dir, "is neither the folder of a run nor that of an export")
    run = load_run_student(job_dir, number, config_dirs)
    reason = "this run has not finished, or it is of an earlier version: it has no list of its training images"
    norm = Normalization(tuple(run.settings["mean"]), tuple(run.settings["std"]))
    return Model(
        f"{run.title}, in PyTorch",
        list(run.settings["classes"]),
        describe_preprocessing(run.settings),
        create_predictor(run.network, norm),
        read_digests(job_dir, OPTION),
        reason,
        run.test_top1,
    )


def create_predictor(network: nn.Module, norm: Normalization) -> predict.Predictor:
    """Returns a function that normalizes images and runs the network: (n, C, H, W) in [0, 1] -> logits (n, K)."""

    # The images are converted to uint8 and normalized as in the training, so that all bits are the same.
    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network(norm.apply(torch.from_numpy(to_bytes(images)))).numpy()

    return run


def to_bytes(images: np.ndarray) -> np.ndarray:
    """Returns images in [0, 1], which were made from 8 bits a channel, as uint8."""
    return np.rint(images * np.float32(255)).astype(np.uint8)


def load_model(path: Path, student: int | None, file: str | None, config_dirs: Sequence[Path]) -> Model:
    """Loads the model that the user has named.

    Args:
        path: The folder of a run or of an export.
        student: The number of a student of the run, from 0; None for the selected student.
        file: The name of an ONNX file of the export; None for `student.onnx`.
        config_dirs: Further `conf` directories, with parts that odcheap does not have.

    Raises:
        OptionError: An option does not suit the folder, or the folder is neither.
    """
    if predict.is_export(path):
        if student is not None:
            raise OptionError("--student", student, f"must not be given: {path} is an export of one student")
        return load_export(path, file or "student.onnx")
    if file is not None:
        raise OptionError("--model", file, f"must not be given: {path} is not an export")
    return load_run(path, student, config_dirs)
