"""Mixup and cutmix: each image of a batch is mixed with another image of the batch, and so are their labels."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from odcheap.data.base import Batch
from odcheap.data.policies import Policy
from odcheap.utils.seeds import derive_seed


@dataclass(frozen=True)
class Mixing:
    """Mixes the images of a batch, by mixup or by cutmix.

    Sources: Zhang et al., "mixup: beyond empirical risk minimization", 2018; Yun et al., "CutMix: regularization
    strategy to train strong classifiers with localizable features", 2019.

    All images of a batch are mixed with the same weight (mixup) or the same rectangle (cutmix), which depend only on
    the seed, the epoch and the number of the batch in the epoch. So all processes draw the same. Image n is mixed with
    image n - 1 of the same process. If each image has several augmentations, all of them are mixed in the same way.

    Args:
        mixup: The parameter alpha of the Beta distribution of mixup's weights; 0 for no mixup.
        cutmix: The parameter alpha of the Beta distribution of cutmix's areas; 0 for no cutmix. If neither is 0, one of
            them is drawn for each batch, with equal probability.
        classes: The number of classes, K.
        seed: The seed of the run.
    """

    mixup: float
    cutmix: float
    classes: int
    seed: int

    def __call__(self, batch: Batch, epoch: int, position: int) -> Batch:
        """Returns the mixed batch, whose labels are probabilities (N, K), float32.

        Args:
            batch: A batch with images (N, C, H, W), or (S, N, C, H, W) with S augmentations of each image, and with
                labels (N,).
            epoch: The number of the epoch, from 0.
            position: The number of the batch in the epoch, from 0.
        """
        # Pixel by pixel, so that the result has channels-last memory format as well.
        random = np.random.default_rng(derive_seed(self.seed, "mix", epoch, position))
        pixels = batch.images.movedim(-3, -1)
        partners = pixels.roll(1, dims=-4)
        if self.cutmix and (not self.mixup or random.random() < 0.5):
            top, left, bottom, right = draw_rectangle(random, self.cutmix, pixels.shape[-3], pixels.shape[-2])
            weight = 1 - (bottom - top) * (right - left) / (pixels.shape[-3] * pixels.shape[-2])
            mixed = pixels.clone(memory_format=torch.contiguous_format)
            mixed[..., top:bottom, left:right, :] = partners[..., top:bottom, left:right, :]
        else:
            weight = random.beta(self.mixup, self.mixup)
            mixed = pixels * weight + partners * (1 - weight)
        labels = (batch.target[:, None] == torch.arange(self.classes, device=batch.target.device)).float()
        return batch._replace(
            images=mixed.movedim(-1, -3), target=labels * weight + labels.roll(1, dims=0) * (1 - weight)
        )


def build_mixing(policy: Policy, classes: int, seed: int) -> Mixing | None:
    """Returns a `Mixing` with the options `mixup` and `cutmix` of an augmentation policy; None if both are 0.

    Args:
        policy: The augmentation policy.
        classes: The number of classes, K.
        seed: The seed of the run.
    """
    return Mixing(policy.mixup, policy.cutmix, classes, seed) if policy.mixup or policy.cutmix else None


def draw_rectangle(random: np.random.Generator, alpha: float, height: int, width: int) -> tuple[int, int, int, int]:
    """Draws the rectangle of an image that cutmix replaces.

    Its area is the fraction 1 - w of the image's area, with w from a Beta distribution. Parts of it
    that lie outside of the image are cut off.

    Args:
        random: The generator of random numbers.
        alpha: The parameter of the Beta distribution.
        height: The height of the images in pixels.
        width: The width of the images in pixels.

    Returns:
        The top, left, bottom and right edge in pixels; bottom and right are exclusive.
    """
    half = 0.5 * math.sqrt(1 - random.beta(alpha, alpha))
    row, column = int(random.integers(height)), int(random.integers(width))
    rows, columns = int(half * height), int(half * width)
    return max(row - rows, 0), max(column - columns, 0), min(row + rows, height), min(column + columns, width)


def to_labels(target: Tensor) -> Tensor:
    """Returns labels (N,), given labels (N,) or probabilities of the classes (N, K).

    Labels are returned unchanged. For probabilities the label of an image is its most probable class.
    """
    return target if target.ndim == 1 else target.argmax(-1)
