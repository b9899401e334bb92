"""The interface of data sets that training and export use, and the order of training batches."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from odcheap.data.transforms import Normalization
from odcheap.utils.arguments import check_arguments
from odcheap.utils.errors import OptionError
from odcheap.utils.seeds import make_generator

MIN_IMAGES = 2  # of a batch in each process, since batch norm needs two
SELECT_BY = {"top1": "top1", "balanced": "balanced_accuracy"}  # the option's value -> the metric's name


class Batch(NamedTuple):
    """Images and labels of one process.

    Attributes:
        images: (N, C, H, W), or views of them (S, N, C, H, W).
        target: Labels (N,).
        share: N times the number of processes, divided by the size of the global batch. A process multiplies its mean
            loss by it. The average of the processes' gradients is then exactly that of the global batch's mean loss,
            even if the last batch divides unevenly.
    """

    images: Tensor
    target: Tensor
    share: float = 1.0


class Process(NamedTuple):
    """The process that loads data: its device, its rank, the number of all processes and of those on its machine."""

    device: torch.device = torch.device("cpu")
    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1


class LabeledImage(NamedTuple):
    """An image (C, H, W) uint8 as evaluation sees it, its label, and its file; None if it is not read from one."""

    image: Tensor
    label: int
    path: Path | None


class BatchOrder:
    """The order of the training images on one process, which depends on (seed, epoch) only.

    The last batch of an epoch is left out if it has fewer than two images for each process.

    Args:
        count: Number of training images.
        batch_size: Images of a batch, of all processes together.
        seed: The run's seed.
        rank: The rank of this process.
        world_size: Number of processes.

    Raises:
        OptionError: The batch is too small for so many processes.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        if not isinstance(batch_size, int) or batch_size < MIN_IMAGES * world_size:
            allowed = f"must be a whole number and give each of {world_size} processes {MIN_IMAGES} images or more"
            raise OptionError("data.batch_size", batch_size, allowed)
        self.count, self.batch_size, self.seed, self.rank, self.world_size = count, batch_size, seed, rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch; Lightning calls it before each one."""
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self.count, self.batch_size)
        return whole + (rest >= MIN_IMAGES * self.world_size)

    def batches(self) -> list[tuple[Tensor, float]]:
        """Returns the image numbers of each batch on this process, and its share (see `Batch`)."""
        order = torch.randperm(self.count, generator=make_generator(self.seed, "order", self.epoch))
        whole = order.split(self.batch_size)[: len(self)]
        own = [batch[self.rank :: self.world_size] for batch in whole]
        return [(part, len(part) * self.world_size / len(batch)) for part, batch in zip(own, whole, strict=True)]


class ResumableBatches(ABC):
    """Training batches whose position in the epoch is saved, so that a resumed run continues there.

    Attributes:
        sampler: The order of the images. Lightning calls `set_epoch` of an attribute with this name.
    """

    def __init__(self, order: BatchOrder):
        self.sampler = order
        self.done = self.start = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        start, self.start = self.start, 0
        for k, batch in enumerate(self.batches_from(start)):
            self.done = start + k + 1
            yield batch

    @abstractmethod
    def batches_from(self, start: int) -> Iterator[Batch]:
        """Yields the epoch's batches from this number (from 0) on."""

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["done"] % len(self)


@check_arguments("data")
class ImageData(ABC):
    """A data set for classification, with three parts: "train", "val" (held out) and "test".

    A subclass reads its images in `read`, and sets the attributes.

    Args:
        name: Name of the data set.
        seed: The run's seed, for order and augmentation.
        select: The images on which the student is selected: "val", "test", or "last" for no selection.
        select_by: The metric that selects: "top1", or "balanced", the mean of the classes' recalls.
        batch_size: Images of a training batch, of all processes together.
        eval_batch_size: Images of an evaluation batch, of each process.
        val_size: Held-out images: a count, or a fraction below 1.
        split_seed: Seed of the held-out split.
        mean: Means of the channels in [0, 1].
        std: Standard deviations of the channels.

    Attributes:
        classes: Names of the classes by label.
        fingerprint: Hash of the data and of which images are held out.
        image_size: (C, H, W).
        shorter_side: Pixels to which an image's shorter side is resized before its center is cropped.
        bit_depth: Bits that are used in images with 16 bits a channel; None if there are no such images.

    Raises:
        OptionError: The options do not suit the images.
    """

    classes: list[str]
    fingerprint: str
    image_size: tuple[int, int, int]
    shorter_side: int
    bit_depth: int | None = None

    def __init__(
        self,
        name: str,
        seed: int,
        select: Literal["val", "last", "test"],
        select_by: Literal["top1", "balanced"],
        batch_size: Annotated[int, Field(ge=1)],
        eval_batch_size: Annotated[int, Field(ge=1)],
        val_size: Annotated[float, Field(ge=0)],
        split_seed: int,
        mean: Iterable[float],
        std: Iterable[float],
    ):
        self.name, self.seed, self.select, self.select_by = name, seed, select, select_by
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.val_size, self.split_seed = val_size, split_seed
        self.norm = Normalization(tuple(mean), tuple(std))

    @abstractmethod
    def read(self) -> None:
        """Reads or lists the images and splits them; does nothing if that has been done."""

    @property
    @abstractmethod
    def labels(self) -> dict[str, np.ndarray]:
        """The labels of each part."""

    @abstractmethod
    def train_loader(self, process: Process, views: int = 1) -> ResumableBatches:
        """Returns training batches with `views` independent augmentations of each image."""

    @abstractmethod
    def eval_loader(self, part: str, process: Process) -> Iterable[Batch]:
        """Returns a part's images, each once over all processes, without augmentation."""

    @abstractmethod
    def iterate_images(self, part: str, index: Iterable[int]) -> Iterator[LabeledImage]:
        """Yields the images of a part at these positions (from 0). Images that cannot be read are skipped."""

    def val_loader(self, process: Process) -> Iterable[Batch]:
        """Returns the images that are evaluated after each epoch."""
        return self.eval_loader(self.watched_part, process)

    def test_loader(self, process: Process) -> Iterable[Batch]:
        return self.eval_loader("test", process)

    @property
    def watched_part(self) -> str:
        """The part that is evaluated after each epoch."""
        return "test" if self.select == "test" else "val"

    def train_order(self, process: Process) -> BatchOrder:
        count = len(self.labels["train"])
        return BatchOrder(count, self.batch_size, self.seed, process.rank, process.world_size)

    def steps_per_epoch(self, world_size: int = 1) -> int:
        """Returns the number of batches in an epoch."""
        return len(self.train_order(Process(world_size=world_size)))

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Yields file, class and part of each image; nothing if the images are not files."""
        yield from ()

    def unreadable(self) -> list[str]:
        """Returns the files that no process could read so far; every process must call it."""
        return []

    def check(self, world_size: int = 1) -> None:
        """Raises `OptionError` if the images cannot be divided among batches and processes as the options say."""
        labels = self.labels
        if len(labels["train"]) < MIN_IMAGES * world_size:
            allowed = f"must leave {MIN_IMAGES * world_size} images or more to train on ({MIN_IMAGES} a process)"
            raise OptionError("data.val_size", self.val_size, allowed)
        few = [part for part in ("val", "test") if 0 < len(labels[part]) < world_size]
        if few:
            allowed = f"each process needs an image to evaluate; there are {len(labels[few[0]])} ({few[0]})"
            raise OptionError("trainer.devices", world_size, allowed)
        self.steps_per_epoch(world_size)  # refuses a batch that is too small for so many processes
        if self.select == "val" and not len(labels["val"]):
            allowed = "select=val needs held-out images; select=last selects nothing and trains on all images"
            raise OptionError("data.val_size", self.val_size, allowed)
