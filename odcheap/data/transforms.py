"""Augmentation and normalization of whole batches on the device of the images."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from odcheap.utils.errors import OptionError
from odcheap.utils.seeds import make_generator

LARGEST_SIDE = 4096  # pixels; a mistyped number would fill the memory


@dataclass(frozen=True)
class Augmentation:
    """Random crops and flips of images in a batch.

    Each image is padded with zeros, cropped to its old size at a random position, and flipped horizontally with
    probability 1/2.

    Args:
        flip: Whether images are flipped at random.
        crop_padding: The number of pixels of zeros on each side; with 0, images are not cropped.
    """

    flip: bool
    crop_padding: int

    def draw(self, count: int, seed: int, epoch: int, view: int = 0) -> Tensor:
        """Draws the random numbers for all images of an epoch; they depend on the arguments only.

        Args:
            count: The number of images, N.
            seed: The seed of the run.
            epoch: The number of the epoch, from 0.
            view: The number (from 0) of the augmentation, if each image has several.

        Returns:
            (N, 3), integers. The row of an image has the top and the left edge of the crop in the padded image, in
            pixels, and 1 if the image is flipped, otherwise 0.
        """
        random = make_generator(seed, *augmentation_stream(epoch, view))
        corner = torch.randint(2 * self.crop_padding + 1, (count, 2), generator=random)
        flipped = torch.randint(2, (count, 1), generator=random) * self.flip
        return torch.cat([corner, flipped], dim=1)

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Returns the augmented images, (N, C, H, W), in channels-last memory format.

        Args:
            images: (N, C, H, W), uint8.
            drawn: The rows for these images of the result of `draw`, (N, 3).
        """
        n, _, height, width = images.shape
        pad = self.crop_padding
        padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
        # One indexing operation for all images: `rows` and `columns` are the positions in the padded image from which
        # the pixels of the result are read.
        across = torch.arange(width, device=images.device)
        columns = torch.where(drawn[:, 2:] == 1, across.flip(0), across) + drawn[:, 1:2]
        rows = torch.arange(height, device=images.device) + drawn[:, :1]
        sample = torch.arange(n, device=images.device)[:, None, None]
        return padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def augmentation_stream(*place: int, purpose: str = "augment") -> tuple[str | int, ...]:
    """Returns the arguments, after the seed, of `make_generator` for the random numbers of an augmentation.

    Args:
        *place: Numbers that identify the augmentation, such as the epoch and the position of the image. The last one
            counts the augmentations of the same image, from 0.
        purpose: "augment" for crop and flip, "policy" for the operations of `data.policies`.
    """
    # View 0 has no number in the name, so that it is the same for methods with one view and with several.
    return (purpose, *(place if place[-1] else place[:-1]))


def stack_views(views: list[Tensor]) -> Tensor:
    """Joins several augmentations of the images of a batch (called views) to one tensor.

    Args:
        views: S tensors (N, C, H, W).

    Returns:
        (S, N, C, H, W), in which each view has channels-last memory format. A single view is returned unchanged,
        (N, C, H, W).
    """
    # The channels are moved to the end before: stacking the views as they are would change the memory format.
    if len(views) == 1:
        return views[0]
    return torch.stack([view.permute(0, 2, 3, 1) for view in views]).permute(0, 1, 4, 2, 3)


@dataclass(frozen=True)
class Normalization:
    """The normalization of images, which maps a pixel x to (x / 255 - mean) / std in each channel.

    Args:
        mean: The mean of each channel, in [0, 1].
        std: The standard deviation of each channel, above 0.

    Raises:
        OptionError: There are not as many means as standard deviations, or a standard deviation is not above 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if min(self.std, default=0) <= 0:
            raise OptionError("data.std", list(self.std), "must be one number above 0 for each channel")
        if len(self.mean) != len(self.std):
            allowed = f"must be one number for each channel; data.std has {len(self.std)}"
            raise OptionError("data.mean", list(self.mean), allowed)

    def check_channels(self, channels: int) -> None:
        """Raises `OptionError` if there is not one mean and one standard deviation for each channel of the images."""
        for option, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels:
                numbers = "one number" if channels == 1 else f"{channels} numbers"
                allowed = f"must be {numbers}: the images have {channels} channel{'s' * (channels > 1)} (data.channels)"
                raise OptionError(f"data.{option}", list(values), allowed)

    def mean_color(self, device: torch.device) -> Tensor:
        """Returns the mean color, (C,) uint8, on a device. Pixels of this color are nearly zero when normalized."""
        return torch.tensor([round(255 * value) for value in self.mean], dtype=torch.uint8, device=device)

    def apply(self, images: Tensor) -> Tensor:
        """Normalizes images (N, C, H, W) uint8, and returns them in float32 and channels-last memory format."""
        # Rows of pixels with the channels of each pixel side by side: the operations on such long rows are several
        # times as fast as with the mean and the deviation broadcast over the last dimension of three channels.
        n, channels, height, width = images.shape
        rows = images.permute(0, 2, 3, 1).reshape(n, height, width * channels)
        mean, std = (scale_to_bytes(values, width, images.device) for values in (self.mean, self.std))
        return (rows - mean).div_(std).view(n, height, width, channels).permute(0, 3, 1, 2)


@functools.lru_cache
def scale_to_bytes(values: tuple[float, ...], width: int, device: torch.device) -> Tensor:
    """Returns 255 times the given values, repeated for each pixel of a row of an image.

    Args:
        values: C numbers, such as the mean of each channel of images in [0, 1].
        width: The number of pixels of a row, W.
        device: The device of the result.

    Returns:
        (W * C,).
    """
    # The result is cached, since a copy from the CPU in each batch would make the GPU wait.
    return (255 * torch.tensor(values, device=device)).repeat(width)
