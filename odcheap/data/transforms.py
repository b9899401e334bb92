"""Images as one uint8 tensor: crop, flip and normalisation for a whole batch on the device where it lies."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from odcheap.utils.errors import OptionError
from odcheap.utils.seeds import make_generator

LARGEST_SIDE = 4096  # pixels; a slip of the hand would fill the memory


@dataclass(frozen=True)
class Augmentation:
    """Zero padding, then a random crop of the old size, then a horizontal flip for every second image."""

    flip: bool
    crop_padding: int

    def draw(self, count: int, seed: int, epoch: int, view: int = 0) -> Tensor:
        """(count, 3) integers: top, left, flipped for each sample, a function of (seed, epoch, sample, view) alone."""
        random = make_generator(seed, *stream_of(epoch, view))
        corner = torch.randint(2 * self.crop_padding + 1, (count, 2), generator=random)
        flipped = torch.randint(2, (count, 1), generator=random) * self.flip
        return torch.cat([corner, flipped], dim=1)

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """(N, C, H, W) uint8 and the (N, 3) drawn for them -> (N, C, H, W) uint8, channels last in memory."""
        n, _, height, width = images.shape
        pad = self.crop_padding
        padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
        across = torch.arange(width, device=images.device)
        columns = torch.where(drawn[:, 2:] == 1, across.flip(0), across) + drawn[:, 1:2]
        rows = torch.arange(height, device=images.device) + drawn[:, :1]
        which = torch.arange(n, device=images.device)[:, None, None]
        return padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def stream_of(*place: int) -> tuple[str | int, ...]:
    """The random stream of an augmentation at this place, whose last number is the view.

    The first view is the one that all methods see, so its stream does not name it.
    """
    return ("augment", *(place if place[-1] else place[:-1]))


def stacked(views: list[Tensor]) -> Tensor:
    """(N, C, H, W) each -> the one, or all as (S, N, C, H, W), each view with its channels last in memory."""
    if len(views) == 1:
        return views[0]
    return torch.stack([view.permute(0, 2, 3, 1) for view in views]).permute(0, 1, 4, 2, 3)


@dataclass(frozen=True)
class Normalisation:
    """(x / 255 - mean) / std, channel by channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self):
        for option, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or (option == "std" and min(values) <= 0):
                raise OptionError(f"data.{option}", list(values), "must be three numbers, and std's above zero")

    def apply(self, images: Tensor) -> Tensor:
        """(N, C, H, W) uint8 -> float32, channels last in memory."""
        mean, std = constants(self.mean, images.device), constants(self.std, images.device)
        return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


@functools.lru_cache
def constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """255 times the values, (1, C, 1, 1). Kept, since bringing them to a GPU anew would stop it at every batch."""
    return 255 * torch.tensor(values, device=device).view(1, -1, 1, 1)
