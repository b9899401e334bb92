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
        images: Normalized images (N, C, H, W), float32; training images are augmented. If each image has S independent
            augmentations, the shape is (S, N, C, H, W).
        target: Labels (N,), int64. In training with mixup or cutmix they are class probabilities (N, K), float32.
        share: The factor by which the process multiplies its mean loss. It is N times the number of processes, divided
            by the number of images in the batches of all processes together. With this factor the mean of all
            processes' gradients is exactly the gradient of all images' mean loss, even if processes have different N.
    """

    images: Tensor
    target: Tensor
    share: float = 1.0


class Process(NamedTuple):
    """One of the processes that train together; each of them loads its own part of a batch to its own device.

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
    """An image for evaluation, which is not normalized yet.

    Attributes:
        image: (C, H, W), uint8.
        label: The number of the image's class, from 0.
        path: The file from which it was read; None if the data set has no image files.
    """

    image: Tensor
    label: int
    path: Path | None


def limit_batches(count: int, limit: float | None) -> int:
    """Returns how many batches of an epoch are used with the option `trainer.limit_train_batches`.

    Args:
        count: The number of batches without the option.
        limit: The value of the option. An `int` is a number of batches, and a `float` is a fraction of all batches, of
            which at least one is used. None stands for all batches.

    Example:
        >>> limit_batches(10, 1), limit_batches(10, 1.0), limit_batches(10, 0.25), limit_batches(10, None)
        (1, 10, 2, 10)
    """
    if limit is None:
        return count
    return min(count, limit) if isinstance(limit, int) else min(count, max(1, int(limit * count)))


class ImageDigests(NamedTuple):
    """Short hashes of a run's training images and held-out images, by which `odcheap evaluate` recognizes them later.

    Attributes:
        kind: "files" if the contents of image files were hashed (`folder_trees.hash_files`), "pixels" if the pixels of
            the images were (`splits.hash_pixels`).
        key: The key of the hash function, which is the option `data.split_seed` of the run.
        train: The first 8 bytes of the hash of each training image, joined.
        val: The first 8 bytes of the hash of each held-out image, joined.
    """

    kind: Literal["files", "pixels"]
    key: int
    train: bytes
    val: bytes


def join_digests(digests: Iterable[bytes]) -> bytes:
    """Returns the first 8 bytes of each hash, joined to one `bytes` object."""
    return b"".join(digest[:DIGEST_BYTES] for digest in digests)


class BatchOrder:
    """Chooses the images of each training batch of one process, in an order that only depends on seed and epoch.

    If the last batch of an epoch has fewer than two images for each process, it is left out.

    Attributes:
        limit: The largest number of batches of an epoch (`int`), or the fraction of its batches that is used (`float`);
            None to use all.

    Args:
        count: The number of training images.
        batch_size: The number of images in a batch, on all processes together.
        seed: The seed of the run.
        rank: The number of this process among all processes, from 0.
        world_size: The number of processes.

    Raises:
        OptionError: `batch_size` is less than two images for each process.
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
            A list with a pair for each batch. The first element has the positions (N,) of this process's images among
            all training images. The second is the factor of the process's mean loss (`Batch.share`).
        """
        # All processes draw the same order, and each takes every world_size-th image of a batch.
        order = torch.randperm(self.count, generator=make_generator(self.seed, "order", self.epoch))
        whole = order.split(self.batch_size)[: len(self)]
        own = [batch[self.rank :: self.world_size] for batch in whole]
        return [(part, len(part) * self.world_size / len(batch)) for part, batch in zip(own, whole, strict=True)]


class ResumableBatches(ABC):
    """The base class of loaders of training batches, which can continue in the middle of an epoch.

    Iterating yields the `Batch` objects of one epoch, with images and labels. The state dict contains the number of
    batches that were yielded in this epoch. After it is loaded, the next iteration skips this number of batches.
    A subclass implements `batches_from`.

    Args:
        order: The sampler that chooses the images of each batch.

    Attributes:
        sampler: The argument `order`. Lightning calls `set_epoch` of a loader's `sampler` before each epoch.
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
        """Yields the `Batch` objects of the epoch without the first `start` ones."""

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["done"] % len(self)


@check_arguments("data")
class ImageData(ABC):
    """The base class of data sets. The parts of a data set are "train", "val" (held out for validation) and "test".

    A new data set is a subclass whose method `read` reads the images, sets the attributes `classes`, `image_size` and
    `shorter_side`, and calls `divide`, which sets `labels`, `index` and `fingerprint`.

    Args:
        name: The name of the data set.
        seed: The seed of the run, for the order and the augmentation of training images.
        select: The part on which the best student and the best epoch are selected, "val" or "test". With "last" nothing
            is selected, and student 0 of the last epoch is used.
        select_by: The metric of this selection: "top1" is the accuracy, "balanced" is the mean recall of the classes.
        batch_size: The number of images in a training batch, on all processes together.
        eval_batch_size: The number of images in an evaluation batch on each process.
        val_size: The number of training images to hold out as "val"; a value below 1 is a fraction of all of them.
        split_seed: The seed that decides which images are held out.
        mean: The mean of each channel, for normalization. Pixels are in [0, 1].
        std: The standard deviation of each channel, for normalization. Pixels are in [0, 1].
        limit: The largest number of training images; "val" and "test" are reduced by the same factor. None for all.
        policy: Further augmentation of training images, after the random crop and flip; None for none.

    Attributes:
        classes: The names of the classes; the position of a name is the label.
        labels: A dict with the keys "train", "val" and "test", and the labels (N,) of the images in each part.
        index: A dict with the same keys, and the positions of the part's images. Those of "train" and "val" are
            positions among all training images, before some were held out; those of "test" among all test images.
        fingerprint: A hash (hexadecimal) of the training images, their labels, and which of them are held out.
        image_size: (C, H, W) of the images.
        shorter_side: The number of pixels to which the shorter side of an image is resized before its center is
            cropped.
        bit_depth: In images with 16 bits a channel, the number of bits that are used, such as 12; None without such
            images.
        digests: Hashes of the training and the held-out images; None if the data set does not compute them.

    Raises:
        OptionError: The value of an argument is not allowed.
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
        """Reads the images or lists their files, and holds out training images; a second call does nothing."""

    def divide(
        self,
        digests: list[bytes],
        target: np.ndarray,
        test_target: np.ndarray,
        hash_test: Callable[[], list[bytes]],
        held_out: int | None = None,
    ) -> None:
        """Chooses the images of each part, and sets the attributes `index`, `labels` and `fingerprint`.

        Some training images are held out. If the argument `limit` of the class is given, images of all parts are left
        out.

        Args:
            digests: A hash of each training image. Which images are held out or left out depends on these hashes.
            target: The labels (N,) of the training images.
            test_target: The labels (M,) of the test images.
            hash_test: A function that returns a hash of each test image; it is called only if `limit` is given.
            held_out: If the last training images of the list must be held out, their number; None to choose the
                held-out images by their hashes, as many as `val_size` says.
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
            kind: "files" if the contents of image files were hashed, "pixels" if the pixels were.
            digests: A hash of each training image, in the same order as for `divide`.
        """
        used = (join_digests(digests[k] for k in self.index[part]) for part in ("train", "val"))
        self.digests = ImageDigests(kind, self.split_seed, *used)

    def warn_of_duplicates(self, twice: Sequence[object], unit: str) -> None:
        """Prints a warning if test images are also training images, which makes the test accuracy too high.

        Args:
            twice: The names of the test images that are also training images; empty for no warning.
            unit: The unit that was compared, "byte" or "pixel", for the message.
        """
        if twice:
            what = f"test images are also training images, {unit} for {unit}, such as {twice[0]}"
            say(f"warning: {len(twice):,} {what}")

    @abstractmethod
    def train_loader(self, process: Process, views: int = 1) -> ResumableBatches:
        """Returns the loader of the training batches of one process; iterating over it yields `Batch` objects.

        Args:
            process: The process that trains on the batches.
            views: The number of independent augmentations of each image, S. If it is above 1, the images of a batch
                have the shape (S, N, C, H, W).
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
            index: The positions (from 0) in this part of the images to yield.
        """

    def val_loader(self, process: Process) -> Iterable[Batch]:
        """Returns an iterable of the `Batch` objects that one process evaluates after each epoch.

        Their images are from "test" if `select` is "test", otherwise from "val".
        """
        return self.eval_loader(self.watched_part, process)

    def test_loader(self, process: Process) -> Iterable[Batch]:
        """Returns an iterable of the `Batch` objects with test images that one process evaluates."""
        return self.eval_loader("test", process)

    @property
    def watched_part(self) -> str:
        """The part that is evaluated after each epoch, which is "test" if `select` is "test", and otherwise "val"."""
        return "test" if self.select == "test" else "val"

    def train_order(self, process: Process) -> BatchOrder:
        """Returns the sampler that chooses the images of each training batch of one process."""
        count = len(self.labels["train"])
        return BatchOrder(count, self.batch_size, self.seed, process.rank, process.world_size)

    def steps_per_epoch(self, world_size: int = 1) -> int:
        """Returns the number of training batches in an epoch with `world_size` processes."""
        return len(self.train_order(Process(world_size=world_size)))

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Yields a tuple (path, class name, part) for each image file; the part is "train", "val" or "test".

        It yields nothing if the data set has no image files.
        """
        yield from ()

    def unreadable(self) -> list[str]:
        """Returns the paths of the image files that one of the processes could not read so far.

        All processes must call this together. The list is empty if the data set has no image files.
        """
        return []

    def check(self, world_size: int = 1) -> None:
        """Raises `OptionError` if there are too few images for `world_size` processes, or for the option `select`."""
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
