"""What is evaluated: the student of a run in PyTorch, or a file of an export in ONNX Runtime."""

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
    """A classifier of prepared images.

    Attributes:
        title: What it is, for the user.
        classes: Names of the classes by label.
        preprocess: The content of `preprocess.json`.
        predictor: Images (n, 3, H, W) in [0, 1] -> logits (n, K).
        digests: The run's list of training images; None if it is not known.
        reason: Why it is not known.
        test_top1: The accuracy on the run's own test images; None if it is not known.
    """

    title: str
    classes: list[str]
    preprocess: dict[str, Any]
    predictor: predict.Predictor
    digests: ImageDigests | None
    reason: str
    test_top1: float | None


def is_export(folder: Path) -> bool:
    """Returns whether a folder is an export."""
    return all((folder / name).is_file() for name in (predict.PREPROCESS_FILE, predict.CARD_FILE))


def load_export(folder: Path, name: str) -> Model:
    """Loads an ONNX file of an export; PyTorch is not used.

    Raises:
        PredictError: The export lacks a file, or one was changed.
    """
    preprocess, classes = predict.read_export(folder)
    session = predict.create_session(predict.read_verified(folder, name))
    predict.check_input_size(session, preprocess)
    title, predictor = f"{name} in ONNX Runtime", predict.create_predictor(session)
    return Model(title, classes, preprocess, predictor, None, predict.NO_TRAINING_LIST, None)


def load_run(job_dir: Path, number: int | None, config_dirs: Sequence[Path]) -> Model:
    """Loads a student of a run, for arguments see `load_run_student`.

    Raises:
        OptionError: The folder holds no run, or not this student.
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
    """Returns a function that normalizes images as the training does, to the last bit, and runs the network."""

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network(norm.apply(torch.from_numpy(to_bytes(images)))).numpy()

    return run


def to_bytes(images: np.ndarray) -> np.ndarray:
    """Returns images in [0, 1], which were prepared from 8 bits a channel, as uint8 again."""
    return np.rint(images * np.float32(255)).astype(np.uint8)


def load_model(path: Path, student: int | None, file: str | None, config_dirs: Sequence[Path]) -> Model:
    """Loads the model that the user names.

    Args:
        path: A run's folder, or the folder of an export.
        student: The number of a run's student; None for the selected one.
        file: The name of an export's ONNX file; None for `student.onnx`.
        config_dirs: `conf` directories with parts that odcheap does not have.

    Raises:
        OptionError: An option does not suit the folder, or the folder is neither.
    """
    if is_export(path):
        if student is not None:
            raise OptionError("--student", student, f"must not be given: {path} is an export of one student")
        return load_export(path, file or "student.onnx")
    if file is not None:
        raise OptionError("--model", file, f"must not be given: {path} is not an export")
    return load_run(path, student, config_dirs)
