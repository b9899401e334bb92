"""Augmentation policies: operations that follow the crop and the flip, with a draw of their own for each image."""

import math
from collections.abc import Callable
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from odcheap.data import image_operations as ops
from odcheap.utils.arguments import check_arguments

Probability = Annotated[float, Field(ge=0, le=1)]
Alpha = Annotated[float, Field(ge=0, le=100)]
Operation = Callable[[Tensor, Tensor], Tensor]

LEVELS = 31  # of an operation's strength, from 0 to the strongest
# The operations in the order of the papers: the name, the function, whether the strength has a random sign.
OPERATIONS: tuple[tuple[str, Operation | None, bool], ...] = (
    ("Identity", None, False),
    ("ShearX", ops.resample, True),
    ("ShearY", ops.resample, True),
    ("TranslateX", ops.resample, True),
    ("TranslateY", ops.resample, True),
    ("Rotate", ops.resample, True),
    ("Brightness", ops.adjust_brightness, True),
    ("Color", ops.adjust_color, True),
    ("Contrast", ops.adjust_contrast, True),
    ("Sharpness", ops.adjust_sharpness, True),
    ("Posterize", ops.posterize, False),
    ("Solarize", ops.solarize, False),
    ("AutoContrast", ops.auto_contrast, False),
    ("Equalize", ops.equalize, False),
)
NAMES = [name for name, _, _ in OPERATIONS]
# The functions, in the order in which the images of a batch are sorted by them; operations may share a function.
KERNELS = list(dict.fromkeys(function for _, function, _ in OPERATIONS))
KERNEL_NUMBERS = torch.tensor([KERNELS.index(function) for _, function, _ in OPERATIONS])
IS_SIGNED = torch.tensor([is_signed for _, _, is_signed in OPERATIONS])

ERASED_AREA = (0.02, 0.33)  # of an image: the smallest and the largest share
ERASED_SHAPE = (0.3, 3.3)  # height / width
TRIES = 10  # draws of a rectangle that fits into the image


class Draws(NamedTuple):
    """The operations, their strengths and the erased rectangles that a policy has drawn for N images, on the CPU.

    Attributes:
        kernels: (N, R), the position in `KERNELS` of the function of each of R successive operations.
        values: (N, R, 6), float32, the values that the function takes.
        boxes: (N, 4), the erased rectangles, see `image_operations.erase`; (N, 0) if nothing is ever erased.
    """

    kernels: Tensor
    values: Tensor
    boxes: Tensor

    def for_batches(self, batches: list[Tensor], device: torch.device) -> list["BatchDraws"]:
        """Returns, for each batch, what was drawn for its images, in the form that `Policy.apply` takes, on a device.

        Args:
            batches: For each batch the positions (B,) of its images among the N.
            device: The device of the images.
        """
        # All batches are copied to the device together: a copy for each batch would make the GPU wait each time.
        sizes = [len(batch) for batch in batches]
        sorted_kernels = [self.kernels[batch].sort(dim=0, stable=True) for batch in batches]
        counts = [
            [torch.bincount(column, minlength=len(KERNELS)).tolist() for column in kernels.T]
            for kernels, _ in sorted_kernels
        ]
        everything = torch.cat(batches)
        orders = torch.cat([order for _, order in sorted_kernels]).to(device).split(sizes)
        values = self.values[everything].to(device).split(sizes)
        boxes = self.boxes[everything].to(device).split(sizes)
        return [BatchDraws(*parts) for parts in zip(orders, counts, values, boxes, strict=True)]


class BatchDraws(NamedTuple):
    """The operations, their strengths and the erased rectangles that a policy has drawn for the B images of a batch.

    Attributes:
        orders: (B, R): for each operation the positions of the images, sorted by the function.
        counts: For each operation the number of images of each function in `KERNELS`.
        values: (B, R, 6), see `Draws`.
        boxes: (B, 4) or (B, 0), see `Draws`.
    """

    orders: Tensor
    counts: list[list[int]]
    values: Tensor
    boxes: Tensor


@check_arguments("augment")
class Policy:
    """The policy `standard`: no operations after the crop and the flip, except random erasing.

    A policy also has the options of mixup and cutmix, which `data.mixing.Mixing` applies to whole batches.

    Args:
        erasing: The probability with which a random rectangle of an image is filled with the mean color. Its area is
            2 to 33 % of the image, its height 0.3 to 3.3 times its width. Source: Zhong et al., "Random erasing data
            augmentation", 2020.
        mixup: The parameter alpha of the Beta distribution of mixup's weights; 0 for no mixup.
        cutmix: The parameter alpha of the Beta distribution of cutmix's areas; 0 for no cutmix.
    """

    operations = 0  # of each image, R

    def __init__(self, erasing: Probability = 0.0, mixup: Alpha = 0.0, cutmix: Alpha = 0.0):
        self.erasing, self.mixup, self.cutmix = erasing, mixup, cutmix

    @property
    def is_empty(self) -> bool:
        """Whether the policy neither has operations nor erases rectangles, so that `apply` changes no image."""
        return not (self.operations or self.erasing)

    def draw(self, count: int, size: tuple[int, int], generator: torch.Generator) -> Draws:
        """Draws the operations, their values and the erased rectangles.

        Args:
            count: The number of images, N.
            size: The height and the width of the images in pixels.
            generator: The generator of random numbers.
        """
        operation = torch.randint(len(OPERATIONS), (count, self.operations), generator=generator)
        level = self.draw_levels(operation.shape, generator)
        sign = 2 * torch.randint(2, operation.shape, generator=generator) - 1
        strength = self.list_strengths(size)[operation, level]
        values = compute_values(operation, torch.where(IS_SIGNED[operation], sign * strength, strength), size)
        boxes = draw_boxes(count, size, self.erasing, generator) if self.erasing else torch.zeros(count, 0).long()
        return Draws(KERNEL_NUMBERS[operation], values, boxes)

    def draw_levels(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Returns how strong each operation is, as a level from 0 (weakest) to 30; this default returns zeros.

        Args:
            shape: (N, R) for R operations of each of N images, the shape of the result.
            generator: The generator of random numbers.
        """
        return torch.zeros(shape, dtype=torch.long)

    def list_strengths(self, size: tuple[int, int]) -> Tensor:
        """Returns the strength of each of the 14 operations at each of the 31 levels, (14, 31).

        Args:
            size: The height and the width of the images in pixels.
        """
        return torch.zeros(len(OPERATIONS), LEVELS)

    def apply(self, images: Tensor, drawn: BatchDraws, color: Tensor) -> Tensor:
        """Returns the augmented images, (N, C, H, W) uint8, in channels-last memory format.

        Args:
            images: (N, C, H, W), uint8.
            drawn: What was drawn for these images; see `draw` and `Draws.for_batches`.
            color: (C,), uint8: the color of erased rectangles.
        """
        # The images are sorted by the function of their operation, so that each function is called once.
        pixels = images.permute(0, 2, 3, 1)
        for order, counts, values in zip(drawn.orders.T, drawn.counts, drawn.values.unbind(1), strict=True):
            groups = zip(KERNELS, pixels[order].split(counts), values[order].split(counts), strict=True)
            done = [function(*group) if function and len(group[0]) else group[0] for function, *group in groups]
            pixels = torch.empty_like(pixels, memory_format=torch.contiguous_format)
            pixels[order] = torch.cat(done)
        if drawn.boxes.shape[1]:
            pixels = ops.erase(pixels, drawn.boxes, color)
        return pixels.permute(0, 3, 1, 2)


@check_arguments("augment")
class TrivialAugment(Policy):
    """The policy `trivial`: one operation, drawn from 14 with equal probability, at one of 31 strengths.

    Source: Müller, Hutter, "TrivialAugment: tuning-free yet state-of-the-art data augmentation", 2021, table 6 (wide).
    Images are moved by up to 32 pixels, and by at most their side.

    Args:
        erasing: The probability with which a random rectangle of an image is filled with the mean color.
        mixup: The parameter alpha of the Beta distribution of mixup's weights; 0 for no mixup.
        cutmix: The parameter alpha of the Beta distribution of cutmix's areas; 0 for no cutmix.
    """

    operations = 1

    def __init__(self, erasing: Probability = 0.0, mixup: Alpha = 0.0, cutmix: Alpha = 0.0):
        super().__init__(erasing, mixup, cutmix)

    def draw_levels(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randint(LEVELS, shape, generator=generator)

    def list_strengths(self, size: tuple[int, int]) -> Tensor:
        height, width = size
        return strength_table(0.99, (min(32.0, width), min(32.0, height)), angle=135.0, blend=0.99, lost_bits=6)


@check_arguments("augment")
class RandAugment(Policy):
    """The policy `randaugment`: some operations in turn, drawn from 14 with equal probability, at one strength.

    Source: Cubuk et al., "RandAugment: practical automated data augmentation with a reduced search space", 2020,
    section 3. The ranges of the strengths are those of torchvision.

    Args:
        num_ops: The number of operations of each image, N in the paper.
        magnitude: The strength of all operations, 0 to 30, M in the paper.
        erasing: The probability with which a random rectangle of an image is filled with the mean color.
        mixup: The parameter alpha of the Beta distribution of mixup's weights; 0 for no mixup.
        cutmix: The parameter alpha of the Beta distribution of cutmix's areas; 0 for no cutmix.
    """

    def __init__(
        self,
        num_ops: Annotated[int, Field(ge=1, le=14)] = 2,
        magnitude: Annotated[int, Field(ge=0, lt=LEVELS)] = 9,
        erasing: Probability = 0.0,
        mixup: Alpha = 0.0,
        cutmix: Alpha = 0.0,
    ):
        super().__init__(erasing, mixup, cutmix)
        self.operations, self.magnitude = num_ops, magnitude

    def draw_levels(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.full(shape, self.magnitude)

    def list_strengths(self, size: tuple[int, int]) -> Tensor:
        height, width = size
        shift = 150 / 331
        return strength_table(0.3, (shift * width, shift * height), angle=30.0, blend=0.9, lost_bits=4)


def strength_table(shear: float, shift: tuple[float, float], angle: float, blend: float, lost_bits: int) -> Tensor:
    """Returns the strength of each operation at each level, (14, 31).

    Args:
        shear: The largest shear: how many pixels a row or column is moved further than the one before.
        shift: The largest shifts in x and y, in pixels.
        angle: The largest angle of a rotation, in degrees.
        blend: The largest difference of the factors of brightness, color, contrast and sharpness from 1.
        lost_bits: The largest number of bits that `Posterize` leaves out.
    """

    def rise(most: float) -> Tensor:
        return torch.linspace(0.0, most, LEVELS)

    strengths = dict.fromkeys(NAMES, torch.zeros(LEVELS))
    strengths |= {"ShearX": rise(shear), "ShearY": rise(shear), "Rotate": rise(angle)}
    strengths |= {"TranslateX": rise(shift[0]).trunc(), "TranslateY": rise(shift[1]).trunc()}
    strengths |= dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), rise(blend))
    strengths |= {"Posterize": 8 - (torch.arange(LEVELS) / ((LEVELS - 1) / lost_bits)).round()}
    strengths |= {"Solarize": 255 * torch.linspace(1.0, 0.0, LEVELS)}
    return torch.stack([strengths[name] for name in NAMES])


def compute_values(operation: Tensor, strength: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns the argument `values` of the functions of `image_operations`, six numbers for each operation.

    Args:
        operation: The positions of the operations in the list `OPERATIONS`, (...).
        strength: Their strengths, with signs, (...).
        size: The height and the width of the images in pixels.

    Returns:
        (..., 6), float32.
    """
    # Affine maps, from a pixel of the result to that of the image; shears keep the upper left corner where it is.
    height, width = size
    one, zero, strength = torch.ones_like(strength).double(), torch.zeros_like(strength).double(), strength.double()
    cos, sin = (strength * math.pi / 180).cos(), (strength * math.pi / 180).sin()
    rows = {
        "ShearX": (one, strength, strength * height / 2, zero, one, zero),
        "ShearY": (one, zero, zero, strength, one, strength * width / 2),
        "TranslateX": (one, zero, -strength, zero, one, zero),
        "TranslateY": (one, zero, zero, zero, one, -strength),
        "Rotate": (cos, -sin, zero, sin, cos, zero),
    }
    # All other functions take one value: factors around 1, bits, or a threshold.
    factors = ("Brightness", "Color", "Contrast", "Sharpness")
    rows |= dict.fromkeys(factors, (1 + strength, zero, zero, zero, zero, zero))
    rows |= {name: (strength, zero, zero, zero, zero, zero) for name in NAMES if name not in rows}
    table = torch.stack([torch.stack(rows[name], dim=-1) for name in NAMES])  # (14, ..., 6)
    return table.gather(0, operation[None, ..., None].expand(1, *operation.shape, 6))[0].float()


def draw_boxes(count: int, size: tuple[int, int], probability: float, generator: torch.Generator) -> Tensor:
    """Draws the rectangles that random erasing fills, (N, 4); see `image_operations.erase`.

    Args:
        count: The number of images, N.
        size: The height and the width of the images in pixels.
        probability: The probability of a rectangle that is not empty.
        generator: The generator of random numbers.
    """
    height, width = size
    uniform = torch.rand((5, count, TRIES), generator=generator, dtype=torch.double)
    area = height * width * (ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * uniform[0])
    low, high = map(math.log, ERASED_SHAPE)
    shape = (low + (high - low) * uniform[1]).exp()
    rows, columns = (area * shape).sqrt().round(), (area / shape).sqrt().round()
    top = (uniform[2] * (height - rows + 1)).floor()
    left = (uniform[3] * (width - columns + 1)).floor()
    boxes = torch.stack([top, left, top + rows, left + columns], dim=-1).long()
    # The first rectangle that fits; an empty one if none fits, and for images that are not erased.
    fits = (rows < height) & (columns < width)
    boxes = boxes[torch.arange(count), fits.int().argmax(1)]
    is_erased = (uniform[4, :, 0] < probability) & fits.any(1)
    return boxes * is_erased[:, None]
