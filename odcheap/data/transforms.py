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
    """Pads with zeros, crops a random part of the old size, and flips every second image horizontally.

    Args:
        flip: Whether images are flipped.
        crop_padding: Pixels of zeros on each side; 0 crops nothing.
    """

    flip: bool
    crop_padding: int

    def draw(self, count: int, seed: int, epoch: int, view: int = 0) -> Tensor:
        """Draws (count, 3) integers for all samples: top, left, flipped; they depend on (seed, epoch, sample, view)."""
        random = make_generator(seed, *augmentation_stream(epoch, view))
        corner = torch.randint(2 * self.crop_padding + 1, (count, 2), generator=random)
        flipped = torch.randint(2, (count, 1), generator=random) * self.flip
        return torch.cat([corner, flipped], dim=1)

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Augments (N, C, H, W) uint8 by the (N, 3) drawn for them; returns the same shape, channels last in memory."""
        n, _, height, width = images.shape
        pad = self.crop_padding
        padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
        # One gather for all images: the row and the column in the padded image that each pixel is read from.
        across = torch.arange(width, device=images.device)
        columns = torch.where(drawn[:, 2:] == 1, across.flip(0), across) + drawn[:, 1:2]
        rows = torch.arange(height, device=images.device) + drawn[:, :1]
        sample = torch.arange(n, device=images.device)[:, None, None]
        return padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def augmentation_stream(*place: int) -> tuple[str | int, ...]:
    """Returns the random stream of an augmentation; the last number is the view.

    The stream of view 0 does not contain the view, so that it is the same for methods with one view and with several.
    """
    return ("augment", *(place if place[-1] else place[:-1]))


def stack_views(views: list[Tensor]) -> Tensor:
    """Returns one view as it is, (N, C, H, W), and several as (S, N, C, H, W), each with channels last in memory."""
    if len(views) == 1:
        return views[0]
    return torch.stack([view.permute(0, 2, 3, 1) for view in views]).permute(0, 1, 4, 2, 3)


@dataclass(frozen=True)
class Normalization:
    """(x / 255 - mean) / std for each channel.

    Args:
        mean: Three means in [0, 1].
        std: Three standard deviations.

    Raises:
        OptionError: There are not three numbers, or a standard deviation is not above 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for option, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or (option == "std" and min(values) <= 0):
                raise OptionError(f"data.{option}", list(values), "must be three numbers, those of std above 0")

    def apply(self, images: Tensor) -> Tensor:
        """Normalizes (N, C, H, W) uint8; returns float32, channels last in memory."""
        mean, std = scale_to_bytes(self.mean, images.device), scale_to_bytes(self.std, images.device)
        return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


@functools.lru_cache
def scale_to_bytes(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Returns 255 times the values, (1, C, 1, 1); cached, since a copy in each batch would make a GPU wait."""
    return 255 * torch.tensor(values, device=device).view(1, -1, 1, 1)
