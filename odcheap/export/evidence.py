"""The pictures that an export is proven with, and what the trained network answers to them."""

import functools
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor, nn

from odcheap.data.base import ImageData, LabeledImage
from odcheap.data.image_folder import evaluation_transform
from odcheap.data.transforms import Normalization
from odcheap.predict import decode_image
from odcheap.utils.console import console
from odcheap.utils.errors import Failure, OptionError, first_line

DATA = {"odcheap.data.in_memory.InMemoryData", "odcheap.data.image_folder.ImageFolderData"}
DATA |= {
    "odcheap.data.cifar.load_cifar",
    "odcheap.data.digits.load_digits",
    "odcheap.data.folder_trees.list_class_folders",
    "odcheap.data.folder_trees.list_imagenet",
}
NOISE = 64  # pictures where there are none
BATCH = 250


class Pictures(NamedTuple):
    """Files, their labels (None for noise), and the trained network's logits on the pixels that training sees."""

    files: list[Path]
    target: np.ndarray | None
    logits: np.ndarray

    def top1(self, logits: np.ndarray) -> float | None:
        return None if self.target is None else float((logits.argmax(1) == self.target).mean())


def data_of(config: dict[str, Any], data_dir: str | None) -> ImageData:
    """The run's own images, read from `data_dir` (None: where the run had them); nothing is downloaded.

    Raises `OptionError` where they are not there.
    """
    try:
        load = dict(config["data"]["load"])
        own = {"data_dir": data_dir or load.get("data_dir"), "download": False}
        load |= {option: value for option, value in own.items() if option in load}
        data = called(config["data"] | {"load": load}, DATA.__contains__)
        data.read()
    except OptionError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise OptionError("JOB_DIR", "config.yaml", f"describes no data of odcheap's ({first_line(error)})") from error
    return data


def samples(data: ImageData, part: str, limit: int | None = None) -> Iterator[LabeledImage]:
    """The readable images of "train" or "test" as evaluation sees them; `limit` of them from all over the part."""
    count = len(data.labels[part])
    return data.iterate_images(part, range(count) if limit is None else range(0, count, -(-count // limit)))


@torch.inference_mode()
def of_data(data: ImageData, network: nn.Module, beside: Path) -> Pictures:
    """The test images, with the logits of the network as training evaluates it; those without files are written."""
    files, target, logits, waiting = [], [], [], []
    for image, label, path in watched(samples(data, "test"), len(data.labels["test"]), "the trained network"):
        files.append(path or written(image, beside / f"{len(files):06d}.png"))
        target.append(label)
        waiting.append(image)
        if len(waiting) == BATCH:
            logits.append(network(data.norm.apply(torch.stack(waiting))))
            waiting = []
    if waiting:
        logits.append(network(data.norm.apply(torch.stack(waiting))))
    if not files:
        raise Failure("data_dir: none of the test pictures can be read")
    return Pictures(files, np.array(target), torch.cat(logits).numpy())


@torch.inference_mode()
def of_noise(settings: dict[str, Any], network: nn.Module, beside: Path) -> Pictures:
    """Pictures of noise, soft and hard, for a proof without data."""
    random, size = torch.Generator().manual_seed(0), settings["image_size"]
    contrast = torch.linspace(0.1, 1, NOISE)[:, None, None, None]
    images = (127.5 + 127.5 * contrast * (2 * torch.rand(NOISE, *size, generator=random) - 1)).round().byte()
    files = [written(image, beside / f"{k:06d}.png") for k, image in enumerate(images)]
    middle = evaluation_transform(size[-1], settings["shorter_side"])
    seen = torch.stack([middle(decode_image(file)) for file in files])
    norm = Normalization(tuple(settings["mean"]), tuple(settings["std"]))
    return Pictures(files, None, network(norm.apply(seen)).numpy())


def written(image: Tensor, path: Path) -> Path:
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return path


def watched(items: Iterator, count: int, what: str) -> Iterator:
    """The same, with progress on a terminal."""
    shown = console()
    return track(items, what, total=count, console=shown, transient=True, disable=not shown.is_terminal)


def called(settings: dict[str, Any], allowed: Callable[[str], bool]) -> Any:
    """What Hydra would make of a `_target_` with its options, for our own classes and functions that are allowed.

    Raises `KeyError` for any other, also deep within the options.
    """
    target = settings["_target_"]
    room, _, name = target.rpartition(".")
    if not allowed(target):
        raise KeyError(target)
    made = getattr(importlib.import_module(room), name)  # here, so that a network asks only for what it is made of
    if name.startswith("_") or not callable(made) or getattr(made, "__module__", None) != room:
        raise KeyError(target)
    options = {key: value for key, value in settings.items() if not key.startswith("_")}
    options = {key: called(v, allowed) if isinstance(v, dict) and "_target_" in v else v for key, v in options.items()}
    return functools.partial(made, **options) if settings.get("_partial_") else made(**options)
