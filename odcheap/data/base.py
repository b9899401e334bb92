"""The interface of data sets that training and export use, and the order of training batches."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from odcheap.data.policies import Policy
from odcheap.data.splits import Split, hash_split, limit_parts, split_stratified
from odcheap.data.transforms import Normalization
from odcheap.utils.arguments import check_arguments
from odcheap.utils.console import say
from odcheap.utils.errors import OptionError
from odcheap.utils.seeds import make_generator

DIGEST_BYTES = 8  # of a hash in `ImageDigests`
MIN_IMAGES = 2  # of a batch in each process, since batch norm needs two
SELECT_BY = {"top1": "top1", "balanced": "balanced_accuracy"}  # the option's value -> the metric's name


class Batch(NamedTuple):
    """A batch of images and labels on one process.

    Attributes:
        images: (N, C, H, W), float32, augmented in training and normalized; or (S, N, C, H, W) with S independent
            augmentations of each image.
        target: Labels (N,), int64; in training with mixup or cutmix the probabilities of the classes (N, K), float32.
        share: The factor by which the process multiplies its mean loss: N times the number of processes, divided by the
            size of the global batch. With it the mean of the gradients of all processes is exactly the gradient of the
            global batch's mean loss, even if the images of the batch cannot be divided evenly among the processes.
    """

    images: Tensor
    target: Tensor
    share: float = 1.0


class Process(NamedTuple):
    """One of the processes that train together: a process loads its own part of each batch, to its own device.

    Attributes:
        device: The device on which the process trains.
        rank: The number of the process among all processes, from 0.
        world_size: The number of all processes.
        local_world_size: The number of processes on the same machine.
    """

    device: torch.device = torch.device("cpu")
    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1


class LabeledImage(NamedTuple):
    """An image as it is evaluated, before normalization.

    Attributes:
        image: (C, H, W), uint8.
        label: The number of its class, from 0.
        path: The file from which it was read; None if the data set has no image files.
    """

    image: Tensor
    label: int
    path: Path | None


def limit_batches(count: int, limit: float | None) -> int:
    """Returns the number of batches that an epoch of `count` batches has under `trainer.limit_train_batches`.

    Args:
        count: The number of batches of all images.
        limit: The number of batches if it is an `int`, and a fraction of all batches if it is a `float`, as in
            Lightning; None for all. At least one batch stays.

    Example:
        >>> limit_batches(10, 1), limit_batches(10, 1.0), limit_batches(10, 0.25), limit_batches(10, None)
        (1, 10, 2, 10)
    """
    if limit is None:
        return count
    return min(count, limit) if isinstance(limit, int) else min(count, max(1, int(limit * count)))


class ImageDigests(NamedTuple):
    """Short hashes of the images that a run uses, with which these images are recognized later.

    Attributes:
        kind: "files" for hashes of the contents of files (`folder_trees.hash_files`), "pixels" for hashes of pixels
            (`splits.hash_pixels`).
        key: The key of the hash function, which is the option `data.split_seed` of the run.
        train: The first 8 bytes of the hash of each training image, joined.
        val: The same for the held-out images.
    """

    kind: Literal["files", "pixels"]
    key: int
    train: bytes
    val: bytes


def join_digests(digests: Iterable[bytes]) -> bytes:
    """Returns the first 8 bytes of each hash, joined; see `ImageDigests`."""
    return b"".join(digest[:DIGEST_BYTES] for digest in digests)


class BatchOrder:
    """Chooses the images of each training batch of one process, in an order that depends on (seed, epoch) only.

    The last batch of an epoch is left out if it has fewer than two images for each process.

    Attributes:
        limit: The number of batches of an epoch, see `limit_batches`.

    Args:
        count: The number of training images.
        batch_size: The number of images in a batch, on all processes together.
        seed: The seed of the run.
        rank: The number of this process among all processes, from 0.
        world_size: The number of processes.

    Raises:
        OptionError: The batch has fewer than two images for each process.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        if not isinstance(batch_size, int) or batch_size < MIN_IMAGES * world_size:
            allowed = f"must be a whole number and give each of {world_size} processes {MIN_IMAGES} images or more"
            raise OptionError("data.batch_size", batch_size, allowed)
        self.count, self.batch_size, self.seed, self.rank, self.world_size = count, batch_size, seed, rank, world_size
        self.epoch = 0
        self.limit: float | None = None

    def set_epoch(self, epoch: int) -> None:
        """Sets the number of the epoch, from 0; Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self.count, self.batch_size)
        return limit_batches(whole + (rest >= MIN_IMAGES * self.world_size), self.limit)

    def batches(self) -> list[tuple[Tensor, float]]:
        """Returns which images this process trains on in each batch of the epoch.

        Returns:
            For each batch the positions (N,) of this process's images among all training images, and the factor of its
            mean loss; see `Batch.share`.
        """
        # All processes draw the same order, and each takes every world_size-th image of a batch.
        order = torch.randperm(self.count, generator=make_generator(self.seed, "order", self.epoch))
        whole = order.split(self.batch_size)[: len(self)]
        own = [batch[self.rank :: self.world_size] for batch in whole]
        return [(part, len(part) * self.world_size / len(batch)) for part, batch in zip(own, whole, strict=True)]


class ResumableBatches(ABC):
    """The base class of loaders of training batches, which can continue in the middle of an epoch.

    Iterating yields the `Batch` objects of one epoch, with images and labels. The state dict contains the number of
    batches that were yielded in this epoch. After it is loaded, the next iteration begins with the batch that follows.

    Args:
        order: The sampler that chooses the images of each batch.

    Attributes:
        sampler: The same sampler. Lightning calls `set_epoch` of an attribute with this name.
        done: The number of batches of this epoch that have been yielded.
        start: The number of batches that the next iteration skips.
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
        """Yields the `Batch` objects of the epoch from batch number `start` (from 0) on."""

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["done"] % len(self)


@check_arguments("data")
class ImageData(ABC):
    """A data set for classification with three parts: "train", "val" (held out for validation) and "test".

    A new data set is a subclass whose method `read` reads the images, sets the attributes `classes`, `image_size` and
    `shorter_side`, and calls `divide`, which sets most others.

    Args:
        name: The name of the data set.
        seed: The seed of the run, for the order and the augmentation of training images.
        select: The part on which the best student and epoch are selected: "val" or "test"; or "last" to select nothing.
        select_by: The metric by which they are selected: "top1", or "balanced", which is the mean recall of the
            classes.
        batch_size: The number of images in a training batch, on all processes together.
        eval_batch_size: The number of images in an evaluation batch on each process.
        val_size: The number of training images that are held out as "val", or a fraction of them below 1.
        split_seed: The seed that decides which images are held out.
        mean: The mean of each channel of images in [0, 1], for normalization.
        std: The standard deviation of each channel, for the same images.
        limit: The number of training images of a short run, see `splits.limit_parts`; None for all.
        policy: The operations that follow the crop and the flip of training images; None for none.

    Attributes:
        classes: The names of the classes; the position of a name is the label.
        labels: The labels (N,) of the images in each part of the data: a dict with the keys "train", "val" and "test".
        index: The positions of the images of each part: for "train" and "val" among the images to train on, before
            some of them were held out; for "test" among the test images.
        fingerprint: A hash (hexadecimal) of the training images, their labels, and which of them are held out.
        image_size: (C, H, W) of the images.
        shorter_side: The number of pixels to which the shorter side of an image is resized before its center is
            cropped.
        bit_depth: The number of bits that are used in images with 16 bits a channel; None if there are no such images.
        digests: Hashes of the training and the held-out images; None if the data set does not compute them.

    Raises:
        OptionError: The options do not suit the images.
    """

    classes: list[str]
    labels: dict[str, np.ndarray]
    index: dict[str, np.ndarray]
    fingerprint: str
    image_size: tuple[int, int, int]
    shorter_side: int
    bit_depth: int | None = None
    digests: ImageDigests | None = None

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
        limit: Annotated[int, Field(ge=MIN_IMAGES)] | None = None,
        policy: Policy | None = None,
    ):
        self.name, self.seed, self.select, self.select_by = name, seed, select, select_by
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.val_size, self.split_seed, self.limit = val_size, split_seed, limit
        self.norm = Normalization(tuple(mean), tuple(std))
        self.policy = policy or Policy()

    @abstractmethod
    def read(self) -> None:
        """Reads the images or lists their files, and holds out some of them; a second call does nothing."""

    def divide(
        self,
        digests: list[bytes],
        target: np.ndarray,
        test_target: np.ndarray,
        hash_test: Callable[[], list[bytes]],
        held_out: int | None = None,
    ) -> None:
        """Holds out training images, and leaves out images of all parts if the run is limited (`limit`).

        It sets the attributes `index`, `labels` and `fingerprint`.

        Args:
            digests: A hash of each training image; it decides which of them are held out.
            target: The labels (N,) of the training images.
            test_target: The labels (M,) of the test images.
            hash_test: A function that returns a hash of each test image; it is called only if the run is limited.
            held_out: The number of training images at the end of the list that are the held-out ones; None to hold out
                as many as `val_size` says.
        """
        if held_out is None:
            split = split_stratified(digests, target, self.val_size)
        else:
            # The order of the images depends on their contents, so that the run does not change if files are renamed.
            count = len(digests) - held_out
            order, val = sorted(range(count), key=digests.__getitem__), np.arange(count, len(digests))
            split = Split(np.array(order), val, hash_split(digests, target, val))
        self.fingerprint = split.fingerprint
        index = {"train": split.train, "val": split.val, "test": np.arange(len(test_target))}

        def hash_part(part: str) -> list[bytes]:
            return hash_test() if part == "test" else [digests[k] for k in index[part]]

        own = {"train": target, "val": target, "test": test_target}
        kept = limit_parts({part: own[part][index[part]] for part in index}, hash_part, self.limit)
        self.index = {part: index[part][kept[part]] for part in index}
        self.labels = {part: own[part][self.index[part]] for part in index}

    def keep_digests(self, kind: Literal["files", "pixels"], digests: list[bytes]) -> None:
        """Sets the attribute `digests`, by which training images and held-out images are recognized later.

        Args:
            kind: What was hashed, see `ImageDigests`.
            digests: A hash of each training image, as for `divide`.
        """
        used = (join_digests(digests[k] for k in self.index[part]) for part in ("train", "val"))
        self.digests = ImageDigests(kind, self.split_seed, *used)

    def warn_of_duplicates(self, twice: Sequence[object], unit: str) -> None:
        """Prints a warning if test images are also training images, which makes the test accuracy too high.

        Args:
            twice: The names of these test images.
            unit: What is equal, "byte" or "pixel".
        """
        if twice:
            what = f"test images are also training images, {unit} for {unit}, such as {twice[0]}"
            say(f"warning: {len(twice):,} {what}")

    @abstractmethod
    def train_loader(self, process: Process, views: int = 1) -> ResumableBatches:
        """Returns the loader of the training batches of one process; iterating over it yields `Batch` objects.

        Args:
            process: The process that trains on the batches.
            views: The number of independent augmentations of each image, S. If it is above 1, images are
                (S, N, C, H, W).
        """

    @abstractmethod
    def eval_loader(self, part: str, process: Process) -> Iterable[Batch]:
        """Returns an iterable of the `Batch` objects that one process evaluates, without augmentation.

        Args:
            part: "train", "val" or "test". Each image of this part is in a batch of exactly one process.
            process: The process that evaluates the batches.
        """

    @abstractmethod
    def iterate_images(self, part: str, index: Iterable[int]) -> Iterator[LabeledImage]:
        """Yields single images as `LabeledImage` objects; images that cannot be read are skipped.

        Args:
            part: "train", "val" or "test".
            index: The positions (from 0) of the images in this part.
        """

    def val_loader(self, process: Process) -> Iterable[Batch]:
        """Returns the batches of "val", or of "test" with select="test", which are evaluated after each epoch.

        Args:
            process: The process that evaluates the batches; see `eval_loader`.
        """
        return self.eval_loader(self.watched_part, process)

    def test_loader(self, process: Process) -> Iterable[Batch]:
        """Returns the batches of "test" that one process evaluates; see `eval_loader`."""
        return self.eval_loader("test", process)

    @property
    def watched_part(self) -> str:
        """The part of the data that is evaluated after each epoch: "test" with select=test, otherwise "val"."""
        return "test" if self.select == "test" else "val"

    def train_order(self, process: Process) -> BatchOrder:
        """Returns the sampler that chooses the images of each training batch of one process."""
        count = len(self.labels["train"])
        return BatchOrder(count, self.batch_size, self.seed, process.rank, process.world_size)

    def steps_per_epoch(self, world_size: int = 1) -> int:
        """Returns the number of training batches in an epoch with `world_size` processes."""
        return len(self.train_order(Process(world_size=world_size)))

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Yields a tuple of texts for each image file: its path, the name of its class, and "train", "val" or "test".

        It yields nothing if the data set has no image files.
        """
        yield from ()

    def unreadable(self) -> list[str]:
        """Returns the image files that could not be read so far on any of the processes; all processes must call this.

        The list is empty if the data set has no image files.
        """
        return []

    def check(self, world_size: int = 1) -> None:
        """Raises `OptionError` if there are too few images for the options or for `world_size` processes."""
        # Batch norm needs two training images in each process, and each process evaluates an image at least.
        labels = self.labels
        if len(labels["train"]) < MIN_IMAGES * world_size:
            allowed = f"must leave {MIN_IMAGES * world_size} images or more to train on ({MIN_IMAGES} a process)"
            if self.limit is not None and self.limit < MIN_IMAGES * world_size:
                raise OptionError("data.limit", self.limit, allowed)
            raise OptionError("data.val_size", self.val_size, allowed)
        few = [part for part in ("val", "test") if 0 < len(labels[part]) < world_size]
        if few:
            allowed = f"each process needs an image to evaluate; there are {len(labels[few[0]])} ({few[0]})"
            raise OptionError("trainer.devices", world_size, allowed)
        self.steps_per_epoch(world_size)  # refuses a batch that is too small for so many processes
        if self.select == "val" and not len(labels["val"]):
            # Without held-out images nothing can be selected on them.
            allowed = "select=val needs held-out images; select=last selects nothing and trains on all images"
            raise OptionError("data.val_size", self.val_size, allowed)
