"""The images of an evaluation: those in a folder with a folder for each class, or the test images of a data set."""

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from odcheap import predict
from odcheap.data.cifar import READ_ONLY
from odcheap.data.in_memory import InMemoryData
from odcheap.utils.errors import Failure, OptionError
from odcheap.utils.parts import build_part, import_target, list_parts, read_part

OPTION = "FOLDER_OR_DATASET"


class EvaluatedImages(NamedTuple):
    """The images of an evaluation, whose classes are known.

    Attributes:
        title: A text that says which images they are.
        names: A name for each image: the path of its file relative to the folder, or its number in the data set.
        files: The image files; None for a data set that is not read from files.
        target: The label of each image: the position of its class among the classes of the model.
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
        """Yields the name of each image, and the prepared image (C, H, W) in [0, 1], or the error if it cannot be read.

        Args:
            preprocess: The content of `preprocess.json`, which says how an image is prepared.
        """
        if self.data is None:
            for name, path in zip(self.names, self.files or [], strict=True):
                yield name, predict.try_preprocess(path, preprocess)
            return
        for name, sample in zip(
            self.names, self.data.iterate_images("test", [int(name) for name in self.names]), strict=True
        ):
            image = Image.fromarray(sample.image.permute(1, 2, 0).squeeze(-1).numpy())
            yield name, predict.resize_image(image, preprocess, f"test image {name}")


def list_images(
    name: str, classes: Sequence[str], data_dir: str, known_only: bool, config_dirs: Sequence[Path]
) -> EvaluatedImages:
    """Lists the images that the user has named.

    Args:
        name: The name of a data set, or a folder. If a folder has the name of a data set, it must be given as
            `./cifar10`.
        classes: The names of the model's classes, in the order of the logits.
        data_dir: The folder in which data sets are.
        known_only: Whether images of classes that the model does not have are left out; otherwise they are an error.
        config_dirs: Further `conf` directories, with data sets that odcheap does not have.

    Raises:
        OptionError: There are no such images, or the model does not have one of the classes.
        PredictError: The same, if `name` is a folder.
        Failure: `name` is a data set that is not in `data_dir`.
    """
    if name in list_parts("data", config_dirs):
        return list_data_set(name, classes, data_dir, known_only, config_dirs)
    if not Path(name).is_dir():
        known = ", ".join(part for part in list_parts("data", config_dirs) if is_in_memory(part, config_dirs))
        raise OptionError(OPTION, name, f"must be a folder with a folder of images for each class, or one of {known}")
    images = predict.list_labeled_images(name, classes, known_only)
    names = [str(path.relative_to(images.folder)) for path in images.files]
    remarks = predict.describe_left_out(images)
    return EvaluatedImages(str(images.folder), names, images.files, images.target, remarks)


def is_in_memory(name: str, config_dirs: Sequence[Path]) -> bool:
    """Returns whether a data set is not read from folders, so that its test images can be evaluated by its name."""
    try:
        target = import_target(read_part("data", name, config_dirs)["_target_"])
    except (ImportError, AttributeError, KeyError, OptionError):  # a file of the user that is wrong
        return False
    return inspect.isclass(target) and issubclass(target, InMemoryData)


def list_data_set(
    name: str, classes: Sequence[str], data_dir: str, known_only: bool, config_dirs: Sequence[Path]
) -> EvaluatedImages:
    """Lists the test images of a data set, with labels for the classes of the model; nothing is downloaded.

    Args:
        name: The name of the data set.
        classes: The names of the model's classes, in the order of the logits.
        data_dir: The folder in which data sets are.
        known_only: Whether images of classes that the model does not have are left out; otherwise they are an error.
        config_dirs: Further `conf` directories, with data sets that odcheap does not have.

    Raises:
        OptionError: The data set is read from folders, or the model does not have one of its classes.
        Failure: The data set is not in `data_dir`.
    """
    # Nothing is downloaded, and nothing is held out. Classes are matched by their names.
    known = read_part("data", name, config_dirs)
    load = {"data_dir": data_dir, "read_only": True} | {"split_seed": 0}
    own = known.get("load") or {}
    settings = {"part": name, "load": {option: value for option, value in load.items() if option in own}}
    data = build_part("data", settings | {"seed": 0, "select": "last"}, config_dirs=config_dirs)
    if not isinstance(data, InMemoryData):
        raise OptionError(OPTION, name, "is read from folders: give the folder of its test images instead")
    try:
        data.read()
    except OptionError as error:  # of which `read_only` is no part that the user has given
        line = str(error).replace(f"; and {READ_ONLY}", "")
        raise Failure(f"{line}; --data-dir says where it is") from error
    labels = {known: label for label, known in enumerate(classes)}
    unknown = [entry for entry in data.classes if entry not in labels]
    if len(unknown) == len(data.classes) or (unknown and not known_only):
        allowed = f"its class {unknown[0]} is none of the {len(classes)} classes ({predict.list_names(classes)})"
        hint = "; --known-only leaves such classes out" if len(unknown) < len(data.classes) else ""
        raise OptionError(OPTION, name, allowed + hint)
    true = [labels.get(data.classes[label]) for label in data.labels["test"]]
    kept = [k for k, label in enumerate(true) if label is not None]
    remarks = [f"left out {len(unknown)} classes: {predict.list_names(unknown)}"] if unknown else []
    target = [label for label in true if label is not None]
    return EvaluatedImages(f"the test images of {name}", [str(k) for k in kept], None, target, remarks, data)
