"""The inputs of an evaluation: a model (a student of a run, or a file of an export), and images of known classes."""

import argparse
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from odcheap import predict
from odcheap.data.base import ImageDigests
from odcheap.data.cifar import READ_ONLY
from odcheap.data.in_memory import InMemoryData
from odcheap.data.transforms import Normalization
from odcheap.export.load_run import describe_preprocessing, load_run_student
from odcheap.runs.folder import CONFIG
from odcheap.runs.training_images import read_digests
from odcheap.utils.errors import Failure, OptionError
from odcheap.utils.parts import build_part, import_target, list_parts, read_part

MODEL_OPTION, IMAGES_OPTION = "RUN_OR_EXPORT", "FOLDER_OR_DATASET"


class Model(NamedTuple):
    """A model that classifies images.

    Attributes:
        title: A text that says which model it is.
        classes: The names of its classes, in the order of the logits.
        preprocess: The content of `preprocess.json`, which says how images are prepared.
        predictor: A function that maps prepared images (n, C, H, W) in [0, 1] to logits (n, K).
        digests: The hashes of the run's training images and held-out images; None if they are not known.
        reason: The text to print if the hashes are not known, which says why.
        test_top1: The accuracy on the run's own test images; None if it is not known.
    """

    title: str
    classes: list[str]
    preprocess: dict[str, Any]
    predictor: predict.Predictor
    digests: ImageDigests | None
    reason: str
    test_top1: float | None


def load_model(options: argparse.Namespace) -> Model:
    """Loads the model that the user has named, which is an export in ONNX Runtime or a run's student in PyTorch.

    Args:
        options: The parsed arguments of the command.

    Raises:
        OptionError: An option does not suit the folder, or the folder is neither a run nor an export.
        PredictError: A file of the export is missing or was changed.
    """
    folder = options.model
    if predict.is_export(folder):
        if options.student is not None:
            raise OptionError("--student", options.student, f"must not be given: {folder} is an export of one student")
        name = options.file or "student.onnx"
        preprocess, classes, predictor, _ = predict.load_export(folder, name)
        title = f"{name} in ONNX Runtime"
        return Model(title, classes, preprocess, predictor, None, predict.NO_TRAINING_LIST, None)
    if options.file is not None:
        raise OptionError("--model", options.file, f"must not be given: {folder} is not an export")
    if not (folder / CONFIG).is_file():
        raise OptionError(MODEL_OPTION, folder, "is neither the folder of a run nor that of an export")
    run = load_run_student(folder, options.student, options.config_dir)
    norm = Normalization(tuple(run.settings["mean"]), tuple(run.settings["std"]))
    return Model(
        f"{run.title}, in PyTorch",
        list(run.settings["classes"]),
        describe_preprocessing(run.settings),
        create_predictor(run.network, norm),
        read_digests(folder, MODEL_OPTION),
        "this run has not finished, or it is of an earlier version: it has no list of its training images",
        run.test_top1,
    )


def create_predictor(network: nn.Module, norm: Normalization) -> predict.Predictor:
    """Returns a function that maps images (n, C, H, W) in [0, 1], which it normalizes, to a network's logits (n, K)."""

    # The images are converted to uint8 and normalized as in the training, so that all bits are the same.
    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network(norm.apply(torch.from_numpy(to_bytes(images)))).numpy()

    return run


def to_bytes(images: np.ndarray) -> np.ndarray:
    """Converts images from floats in [0, 1] back to uint8, from which they were made."""
    return np.rint(images * np.float32(255)).astype(np.uint8)


class EvaluatedImages(NamedTuple):
    """The images that a model is evaluated on, whose classes are known.

    Attributes:
        title: A text that says which images they are.
        names: The path of each image relative to the folder, or the number of each image in the data set, as text.
        files: The image files; None for a data set that is not read from files.
        target: The label of each image, which is the position of its class among the classes of the model.
        remarks: Lines of text about images that were left out.
        data: The data set; None for a folder.
    """

    title: str
    names: list[str]
    files: list[Path] | None
    target: list[int]
    remarks: list[str]
    data: InMemoryData | None = None

    def iterate_prepared(self, preprocess: dict[str, Any]) -> Iterator[tuple[str, np.ndarray | predict.ImageError]]:
        """Yields pairs of an image's name and the image (C, H, W) in [0, 1], or an `ImageError` if it cannot be read.

        Args:
            preprocess: The content of `preprocess.json`, which says how an image is prepared.
        """
        if self.data is None:
            for name, path in zip(self.names, self.files or [], strict=True):
                yield name, predict.try_preprocess(path, preprocess)
            return
        samples = self.data.iterate_images("test", map(int, self.names))
        for name, sample in zip(self.names, samples, strict=True):
            image = Image.fromarray(sample.image.permute(1, 2, 0).squeeze(-1).numpy())
            yield name, predict.resize_image(image, preprocess, f"test image {name}")


def list_images(options: argparse.Namespace, classes: Sequence[str]) -> EvaluatedImages:
    """Lists the images that the user has named, which are those of a folder or the test images of a data set.

    A name such as `cifar10` stands for the data set. A folder with this name must be given as `./cifar10`.

    Args:
        options: The parsed arguments of the command.
        classes: The names of the model's classes, in the order of the logits.

    Raises:
        OptionError: There are no such images, or the model does not have one of the classes of a data set.
        PredictError: The folder has no images of the model's classes, or a folder in it is none of these classes.
        Failure: The data set is not in the folder `--data-dir`.
    """
    name, config_dirs = options.images, options.config_dir
    data_sets = list_parts("data", config_dirs)
    if name in data_sets:
        return list_data_set(options, classes)
    if not Path(name).is_dir():
        known = ", ".join(part for part in data_sets if is_in_memory(part, config_dirs))
        allowed = f"must be a folder with a folder of images for each class, or one of {known}"
        raise OptionError(IMAGES_OPTION, name, allowed)
    images = predict.list_labeled_images(name, classes, options.known_only)
    names = [str(path.relative_to(images.folder)) for path in images.files]
    return EvaluatedImages(str(images.folder), names, images.files, images.target, images.left_out)


def is_in_memory(name: str, config_dirs: Sequence[Path]) -> bool:
    """Returns whether a data set is an `InMemoryData`. Only the test images of such data sets can be listed by name."""
    try:
        target = import_target(read_part("data", name, config_dirs)["_target_"])
    except (ImportError, AttributeError, KeyError, OptionError):  # a file of the user that is wrong
        return False
    return inspect.isclass(target) and issubclass(target, InMemoryData)


def list_data_set(options: argparse.Namespace, classes: Sequence[str]) -> EvaluatedImages:
    """Lists the test images of a data set, with labels for the classes of the model; nothing is downloaded.

    Args:
        options: The parsed arguments of the command; `images` is the name of the data set.
        classes: The names of the model's classes, in the order of the logits.

    Raises:
        OptionError: The name is that of a kind of data set whose images the user brings, such as `imagefolder`, or the
            model does not have one of the data set's classes.
        Failure: The data set is not in the folder `--data-dir`.
    """
    # Nothing is downloaded, and nothing is held out. Classes are matched by their names.
    name = options.images
    own = read_part("data", name, options.config_dir).get("load") or {}
    load = {"data_dir": options.data_dir, "read_only": True, "split_seed": 0}
    settings = {"part": name, "load": {option: value for option, value in load.items() if option in own}}
    data = build_part("data", settings | {"seed": 0, "select": "last"}, config_dirs=options.config_dir)
    if not isinstance(data, InMemoryData):
        raise OptionError(IMAGES_OPTION, name, "is read from folders: give the folder of its test images instead")
    try:
        data.read()
    except OptionError as error:  # of which `read_only` is no part that the user has given
        line = str(error).replace(f"; and {READ_ONLY}", "")
        raise Failure(f"{line}; --data-dir says where it is") from error
    labels = {known: label for label, known in enumerate(classes)}
    unknown = [entry for entry in data.classes if entry not in labels]
    if len(unknown) == len(data.classes) or (unknown and not options.known_only):
        allowed = f"its class {unknown[0]} is none of the {len(classes)} classes ({predict.list_names(classes)})"
        hint = "; --known-only leaves such classes out" if len(unknown) < len(data.classes) else ""
        raise OptionError(IMAGES_OPTION, name, allowed + hint)
    true = {k: labels.get(data.classes[label]) for k, label in enumerate(data.labels["test"])}
    target = {str(k): label for k, label in true.items() if label is not None}
    remarks = [f"left out {len(unknown)} classes: {predict.list_names(unknown)}"] if unknown else []
    return EvaluatedImages(f"the test images of {name}", list(target), None, list(target.values()), remarks, data)
