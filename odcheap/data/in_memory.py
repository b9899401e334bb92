"""Data sets that fit in memory. All images are on the training device, and are augmented and normalized there."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from odcheap.data.base import Batch, BatchOrder, ImageData, LabeledImage, Process, ResumableBatches
from odcheap.data.policies import BatchDraws, Policy
from odcheap.data.splits import hash_pixels
from odcheap.data.transforms import Augmentation, Normalization, augmentation_stream, stack_views
from odcheap.utils.arguments import check_arguments
from odcheap.utils.errors import OptionError
from odcheap.utils.seeds import make_generator


@dataclass(frozen=True)
class Images:
    """The images of a data set in memory.

    Attributes:
        train: The training images, (N, C, H, W) uint8; some of them will be held out for validation.
        train_target: The labels (N,) of the training images, int64.
        test: The test images, (M, C, H, W) uint8.
        test_target: The labels (M,) of the test images, int64.
        classes: The names of the classes; the position of a name is the label.
        test_files: The file of each test image; None if the test images were not read from image files.
    """

    train: Tensor
    train_target: Tensor
    test: Tensor
    test_target: Tensor
    classes: list[str]
    test_files: list[Path] | None = None


class TrainBatches(ResumableBatches):
    """The training batches of an epoch, which are augmented and normalized on the device of the images.

    Iterating yields `Batch` objects with images (B, C, H, W), float32 and normalized, or (S, B, C, H, W) with S
    augmentations of each image.

    Args:
        images: All training images, (N, C, H, W) uint8, on the training device.
        target: The labels (N,) of these images, on the same device.
        order: The sampler that chooses the images of each batch.
        augment: The random crop and flip.
        norm: The normalization.
        views: The number of independent augmentations of each image, S.
        policy: Further augmentation, after the crop and the flip; None for none.
    """

    def __init__(
        self,
        images: Tensor,
        target: Tensor,
        order: BatchOrder,
        augment: Augmentation,
        norm: Normalization,
        views: int = 1,
        policy: Policy | None = None,
    ):
        super().__init__(order)
        self.images, self.target, self.augment, self.norm, self.views = images, target, augment, norm, views
        self.policy, self.color = policy or Policy(), norm.mean_color(images.device)

    def batches_from(self, start: int) -> Iterator[Batch]:
        # The random numbers of all images: they do not depend on how images are divided into batches and processes.
        epoch, device = self.sampler.epoch, self.images.device
        count, seed = len(self.images), self.sampler.seed
        drawn = [self.augment.draw(count, seed, epoch, view).to(device) for view in range(self.views)]
        parts, shares = zip(*self.sampler.batches(), strict=True)
        # One copy to the device for all batches: a copy for each batch would make the GPU wait each time.
        order = torch.cat(parts).to(device).split([len(part) for part in parts])
        operations = [self.draw_operations(list(parts), view) for view in range(self.views)]
        for k in range(start, len(order)):
            images = self.images[order[k]]
            views = []
            for crops, policy in zip(drawn, operations, strict=True):
                cropped = self.augment.apply(images, crops[order[k]])
                views.append(self.norm.apply(self.policy.apply(cropped, policy[k], self.color) if policy else cropped))
            yield Batch(stack_views(views), self.target[order[k]], shares[k])

    def draw_operations(self, batches: list[Tensor], view: int) -> list[BatchDraws]:
        """Draws the random operations of the augmentation policy for each batch of the epoch.

        Args:
            batches: For each batch the positions of its images among all training images.
            view: The number (from 0) of the augmentation, if each image has several; each gets its own operations.

        Returns:
            The drawn operations of each batch; an empty list if the policy changes no image.
        """
        if self.policy.is_empty:
            return []
        stream = augmentation_stream(self.sampler.epoch, view, purpose="policy")
        random, (height, width) = make_generator(self.sampler.seed, *stream), self.images.shape[-2:]
        drawn = self.policy.draw(len(self.images), (height, width), random)
        return drawn.for_batches(batches, self.images.device)


class EvalBatches:
    """The evaluation batches of one process, with normalized images that are not augmented.

    Iterating yields `Batch` objects with images (B, C, H, W), float32. All processes together yield each image once.

    Args:
        images: The images that all processes evaluate together, (N, C, H, W) uint8.
        target: The labels (N,) of these images.
        batch_size: The number of images in a batch, B.
        norm: The normalization.
        process: The process that evaluates the batches.
    """

    def __init__(self, images: Tensor, target: Tensor, batch_size: int, norm: Normalization, process: Process):
        own = slice(process.rank, None, process.world_size)
        self.images, self.target = images[own].to(process.device), target[own].to(process.device)
        self.batch_size, self.norm = batch_size, norm

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        parts = zip(self.images.split(self.batch_size), self.target.split(self.batch_size), strict=True)
        for images, target in parts:
            yield Batch(self.norm.apply(images), target)


def convert_channels(images: Tensor, channels: int | None) -> Tensor:
    """Converts RGB images to gray ones, or gray images to RGB ones, with the weights and the rounding of Pillow.

    Args:
        images: (N, C, H, W), uint8.
        channels: The number of channels of the result; None to return the images unchanged.

    Raises:
        OptionError: There is no such conversion; images with one channel can get three, and those with three can get
            one.
    """
    own = images.shape[1]
    if channels is None or channels == own:
        return images
    if (own, channels) == (1, 3):
        return images.expand(-1, 3, -1, -1).contiguous()
    if (own, channels) != (3, 1):
        allowed = "must be 1 (gray) or 3 (RGB)" if own in (1, 3) else f"must be {own}, the channels of the images"
        raise OptionError("data.channels", channels, allowed)
    gray = []
    for part in images.split(1000):  # whole numbers need four times the memory
        red, green, blue = part.int().split(1, dim=1)
        gray.append(((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).to(torch.uint8))
    return torch.cat(gray)


@check_arguments("data")
class InMemoryData(ImageData):
    """A data set that fits in memory.

    Args:
        load: A function without arguments that returns the `Images`, such as a partial of `load_cifar`.
        flip: Whether training images are flipped horizontally with probability 1/2.
        crop_padding: The number of pixels of zeros that are added on each side of a training image before it is cropped
            to its old size at a random position.
        channels: The number of channels of the images for the network. With 1, RGB images are converted to gray; with
            3, gray images are converted to RGB. With None, the images keep their channels.
        **options: The arguments of `ImageData`.

    Raises:
        OptionError: The value of an argument is not allowed.
    """

    def __init__(
        self,
        load: Callable[[], Images],
        flip: bool,
        crop_padding: Annotated[int, Field(ge=0)],
        channels: Annotated[int, Field(ge=1)] | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        self.load, self.augment, self.channels = load, Augmentation(flip, crop_padding), channels
        self.images: Images

    def read(self) -> None:
        if hasattr(self, "images"):
            return
        images = self.load()
        train, test = (convert_channels(part, self.channels) for part in (images.train, images.test))
        self.images, self.classes = dataclasses.replace(images, train=train, test=test), images.classes
        channels, height, width = train.shape[1:]
        self.image_size = (channels, height, width)
        self.norm.check_channels(channels)
        # The images are not resized: what other images must be resized to is the size of these.
        self.shorter_side = side = min(self.image_size[1:])
        if self.augment.crop_padding >= side:
            allowed = f"must be 0 or more, below the images' {side} pixels a side"
            raise OptionError("data.crop_padding", self.augment.crop_padding, allowed)

        # Hold out images by the hashes of their pixels, before their channels are converted: the split stays the same.
        digests, test_digests = (hash_pixels(part, self.split_seed) for part in (images.train, images.test))
        self.divide(digests, images.train_target.numpy(), images.test_target.numpy(), lambda: test_digests)
        self.keep_digests("pixels", digests if train is images.train else hash_pixels(train, self.split_seed))
        names = images.test_files or [f"number {k} (from 0)" for k in range(len(test_digests))]
        trained_on = set(digests)
        twice = [name for name, digest in zip(names, test_digests, strict=True) if digest in trained_on]
        self.warn_of_duplicates(twice, "pixel")
        self.check()

    def select_part(self, part: str) -> tuple[Tensor, Tensor]:
        """Returns the images (N, C, H, W) uint8 and the labels (N,) of "train", "val" or "test"."""
        index = torch.from_numpy(self.index[part])
        if part == "test":
            return self.images.test[index], self.images.test_target[index]
        return self.images.train[index], self.images.train_target[index]

    def train_loader(self, process: Process, views: int = 1) -> TrainBatches:
        images, target = (tensor.to(process.device) for tensor in self.select_part("train"))
        order = self.train_order(process)
        return TrainBatches(images, target, order, self.augment, self.norm, views, self.policy)

    def eval_loader(self, part: str, process: Process) -> EvalBatches:
        return EvalBatches(*self.select_part(part), self.eval_batch_size, self.norm, process)

    def iterate_images(self, part: str, index: Iterable[int]) -> Iterator[LabeledImage]:
        images, target = self.select_part(part)
        files = self.images.test_files if part == "test" else None
        for k in index:
            yield LabeledImage(images[k], int(target[k]), files[self.index[part][k]] if files else None)


def load_digits() -> Images:
    """Returns the 1,797 images of handwritten digits that scikit-learn contains; nothing is downloaded.

    The images have 8 x 8 pixels and three equal channels. Every fifth of them (360 images) is a test image.
    """
    from sklearn.datasets import load_digits as load  # here, since no other data set needs scikit-learn

    raw = load()
    gray = torch.from_numpy(np.round(raw.images * 255 / 16).astype(np.uint8))
    images = gray[:, None].expand(-1, 3, -1, -1).contiguous()
    target = torch.from_numpy(raw.target.astype(np.int64))
    test = torch.arange(len(target)) % 5 == 0
    return Images(images[~test], target[~test], images[test], target[test], [str(name) for name in raw.target_names])
