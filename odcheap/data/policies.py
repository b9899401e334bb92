"""Augmentation policies, whose random operations follow the crop and the flip, and are drawn for each image.

The operations, such as `adjust_contrast`, take a batch of images (N, H, W, C), uint8, and a value for each image. An
image's result does not depend on the other images of the batch, since sums are computed in whole numbers, which have no
rounding. `torchvision.transforms.v2` has the same operations, but each call has one value for all images.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torchvision.transforms import v2

from odcheap.utils.arguments import check_arguments

Probability = Annotated[float, Field(ge=0, le=1)]
Alpha = Annotated[float, Field(ge=0, le=100)]
Operation = Callable[[Tensor, Tensor], Tensor]

GRAY = (2989, 5870, 1140)  # ITU-R BT.601, in 1/10,000: the parts of red, green and blue in the brightness
LEVELS = 31  # of an operation's strength, from 0 to the strongest
ERASED_AREA = (0.02, 0.33)  # of an image: the smallest and the largest share
ERASED_SHAPE = (0.3, 3.3)  # height / width
TRIES = 10  # draws of a rectangle that fits into the image


def resample(images: Tensor, values: Tensor) -> Tensor:
    """Moves the pixels of each image by an affine map, such as a rotation; pixels from outside of the image are 0.

    Args:
        images: (N, H, W, C), uint8.
        values: (N, 6), six numbers a, b, c, d, e, f for each image. The pixel at (x, y), counted from the center of the
            image, is read from the nearest pixel to (a x + b y + c, d x + e y + f).
    """
    count, height, width, channels = images.shape
    across = torch.arange(width, device=images.device) - (width - 1) / 2
    down = (torch.arange(height, device=images.device) - (height - 1) / 2)[:, None]
    a, b, c, d, e, f = values.T[:, :, None, None]
    column = (a * across + b * down + c + (width - 1) / 2).round().long()
    row = (d * across + e * down + f + (height - 1) / 2).round().long()
    is_inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    first = torch.arange(count, device=images.device)[:, None, None] * (height * width)
    index = first + row.clamp_(0, height - 1) * width + column.clamp_(0, width - 1)
    return images.reshape(-1, channels)[index] * is_inside[..., None]


def blend(images: Tensor, others: Tensor | int, values: Tensor) -> Tensor:
    """Returns `values * images + (1 - values) * others`, clamped to the range 0 to 255 and rounded down.

    Args:
        images: (N, H, W, C), uint8.
        others: Images of a shape that can be broadcast to that of `images`, or one number for all pixels.
        values: (N, 1), the factor for each image.
    """
    # In this form pixels that are equal in both images stay as they are.
    share = (1 - values).view(-1, 1, 1, 1)
    return ((others - images.int()) * share + images).clamp_(0, 255).to(torch.uint8)


def adjust_brightness(images: Tensor, values: Tensor) -> Tensor:
    """Changes the brightness of each image.

    Args:
        images: (N, H, W, C), uint8.
        values: (N, ...); the first value of each image is the factor by which its pixels are multiplied.
    """
    return blend(images, 0, values[:, :1])


def to_gray(images: Tensor) -> Tensor:
    """Returns the brightness of each pixel, which is a weighted mean of red, green and blue.

    For images with another number of channels than three, it is the plain mean of the channels.

    Args:
        images: (N, H, W, C), uint8.

    Returns:
        (N, H, W, 1), int32.
    """
    if images.shape[-1] == 1:
        return images.int()
    if images.shape[-1] != 3:
        return images.sum(-1, keepdim=True, dtype=torch.int32) // images.shape[-1]
    red, green, blue = images.int().split(1, dim=-1)
    return (GRAY[0] * red + GRAY[1] * green + GRAY[2] * blue) // 10_000


def adjust_color(images: Tensor, values: Tensor) -> Tensor:
    """Changes the saturation of each image; images without three channels are returned unchanged.

    Args:
        images: (N, H, W, C), uint8.
        values: (N, ...); the first value of each image is the factor. A gray image results from 0, no change from 1.
    """
    return blend(images, to_gray(images), values[:, :1]) if images.shape[-1] == 3 else images


def adjust_contrast(images: Tensor, values: Tensor) -> Tensor:
    """Changes the contrast of each image.

    Args:
        images: (N, H, W, C), uint8.
        values: (N, V), the values that were drawn for each image. Only the first one is used, as the factor. With the
            factor 0 all pixels have the mean brightness of the image; with the factor 1 the image is unchanged.
    """
    gray = to_gray(images)
    mean = gray.sum((1, 2, 3), keepdim=True) / gray[0].numel()
    return blend(images, mean, values[:, :1])


def adjust_sharpness(images: Tensor, values: Tensor) -> Tensor:
    """Changes the sharpness of each image; the pixels at its edges do not change.

    Args:
        images: (N, H, W, C), uint8.
        values: (N, ...); the first value of each image is the factor. A blurred image results from 0, no change from 1.
    """
    if min(images.shape[1:3]) <= 2:
        return images
    # The blurred pixel is the mean of its 3 x 3 neighbors, in which it counts five times: a sum over 13, rounded.
    whole = images.int()
    rows = whole[:, :-2] + whole[:, 1:-1] + whole[:, 2:]
    inner = whole[:, 1:-1, 1:-1]
    blurred = (2 * (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * inner) + 13) // 26
    result = images.clone()
    result[:, 1:-1, 1:-1] = blend(inner, blurred, values[:, :1])
    return result


def posterize(images: Tensor, values: Tensor) -> Tensor:
    """Keeps the upper bits of the pixels of each image, and sets the others to 0.

    Args:
        images: (N, H, W, C), uint8.
        values: (N, ...); the first value of each image is the number of bits to keep, 1 to 8.
    """
    mask = 256 - 2 ** (8 - values[:, 0])
    return images & mask.to(torch.uint8).view(-1, 1, 1, 1)


def solarize(images: Tensor, values: Tensor) -> Tensor:
    """Inverts the pixels of each image that are not below a threshold.

    Args:
        images: (N, H, W, C), uint8.
        values: (N, ...); the first value of each image is the threshold, 0 to 255.
    """
    return torch.where(images >= values[:, :1, None, None], 255 - images, images)


def auto_contrast(images: Tensor, values: Tensor) -> Tensor:
    """Stretches each channel of each image to the range 0 to 255; a channel with a single value does not change.

    Args:
        images: (N, H, W, C), uint8.
        values: Not used; all operations have this argument.
    """
    least, most = images.amin((1, 2), keepdim=True).int(), images.amax((1, 2), keepdim=True).int()
    stretched = (images.int() - least) * 255 // (most - least).clamp_(min=1)
    return torch.where(most > least, stretched, images).to(torch.uint8)


def equalize(images: Tensor, values: Tensor) -> Tensor:
    """Makes the histogram of each channel of each image nearly uniform.

    Args:
        images: (N, H, W, C), uint8.
        values: Not used; all operations have this argument.
    """
    return v2.functional.equalize(images.permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1)


def erase(images: Tensor, boxes: Tensor, color: Tensor) -> Tensor:
    """Fills a rectangle of each image with a color.

    Args:
        images: (N, H, W, C), uint8.
        boxes: (N, 4), the top, left, bottom and right edge of each rectangle in pixels; bottom and right are exclusive.
            With an empty rectangle, the image does not change.
        color: The color, (C,), uint8.
    """
    top, left, bottom, right = boxes.T[:, :, None, None]
    row = torch.arange(images.shape[1], device=images.device)[:, None]
    column = torch.arange(images.shape[2], device=images.device)
    is_erased = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    return torch.where(is_erased[..., None], color, images)


# The operations in the order of the papers: the name, the function, whether the strength has a random sign.
OPERATIONS: tuple[tuple[str, Operation | None, bool], ...] = (
    ("Identity", None, False),
    ("ShearX", resample, True),
    ("ShearY", resample, True),
    ("TranslateX", resample, True),
    ("TranslateY", resample, True),
    ("Rotate", resample, True),
    ("Brightness", adjust_brightness, True),
    ("Color", adjust_color, True),
    ("Contrast", adjust_contrast, True),
    ("Sharpness", adjust_sharpness, True),
    ("Posterize", posterize, False),
    ("Solarize", solarize, False),
    ("AutoContrast", auto_contrast, False),
    ("Equalize", equalize, False),
)
NAMES = [name for name, _, _ in OPERATIONS]
FACTORS = ("Brightness", "Color", "Contrast", "Sharpness")  # their strength is the difference of a factor from 1
# The functions, in the order in which the images of a batch are sorted by them; operations may share a function.
KERNELS = list(dict.fromkeys(function for _, function, _ in OPERATIONS))
KERNEL_NUMBERS = torch.tensor([KERNELS.index(function) for _, function, _ in OPERATIONS])
IS_SIGNED = torch.tensor([is_signed for _, _, is_signed in OPERATIONS])


class Draws(NamedTuple):
    """The operations, their strengths and the erased rectangles that a policy has drawn for N images, on the CPU.

    Attributes:
        kernels: (N, R), for each of R successive operations the position of its function in the list `KERNELS`.
        values: (N, R, 6), float32, the argument `values` of each of these functions.
        boxes: (N, 4), the argument `boxes` of `erase`; (N, 0) if the policy never erases rectangles.
    """

    kernels: Tensor
    values: Tensor
    boxes: Tensor

    def for_batches(self, batches: list[Tensor], device: torch.device) -> list["BatchDraws"]:
        """Returns what was drawn for the images of each batch, as a `BatchDraws`, which `Policy.apply` takes.

        Args:
            batches: For each batch the positions (B,) of its images among the N images.
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
        orders: (B, R), for each of R successive operations the positions of the images in the batch. They are sorted by
            the function that is called for the image.
        counts: For each of R operations a list with the number of images for each function in `KERNELS`.
        values: (B, R, 6), float32, the argument `values` of the functions, in the order of the images in the batch.
        boxes: (B, 4), the argument `boxes` of `erase`; (B, 0) if the policy never erases rectangles.
    """

    orders: Tensor
    counts: list[list[int]]
    values: Tensor
    boxes: Tensor


class Strengths(NamedTuple):
    """The strength of each kind of operation at level 30, the highest; it falls to 0 at level 0.

    Attributes:
        shear: The number of pixels by which a row or column is moved further than the row or column before it.
        shift: The shift in x as a fraction of the width, and the shift in y as a fraction of the height.
        most_pixels: A limit of the shift, in pixels.
        angle: The angle of a rotation, in degrees.
        factor: The difference between 1 and the factor of brightness, color, contrast or sharpness.
        lost_bits: The number of bits that `Posterize` sets to 0.
    """

    shear: float = 0.0
    shift: float = 0.0
    most_pixels: float = math.inf
    angle: float = 0.0
    factor: float = 0.0
    lost_bits: int = 0

    def tabulate(self, size: tuple[int, int]) -> Tensor:
        """Returns the strength of each of the 14 operations in `OPERATIONS` at each of the 31 levels, (14, 31).

        Args:
            size: The height and the width of the images in pixels.
        """

        def rise(most: float) -> Tensor:
            return torch.linspace(0.0, most, LEVELS)

        down, across = (rise(min(self.most_pixels, self.shift * side)).trunc() for side in size)
        strengths = dict.fromkeys(NAMES, torch.zeros(LEVELS))
        strengths |= dict.fromkeys(FACTORS, rise(self.factor))
        strengths |= {"ShearX": rise(self.shear), "ShearY": rise(self.shear), "Rotate": rise(self.angle)}
        strengths |= {"TranslateX": across, "TranslateY": down}
        strengths["Posterize"] = 8 - (torch.arange(LEVELS) * self.lost_bits / (LEVELS - 1)).round()
        strengths["Solarize"] = 255 * torch.linspace(1.0, 0.0, LEVELS)
        return torch.stack([strengths[name] for name in NAMES])


@check_arguments("augment")
class Policy:
    """The augmentation policy `standard`, which only erases random rectangles after the crop and the flip.

    It is the base class of all policies. A policy also stores the options of mixup and cutmix, which
    `data.mixing.Mixing` applies to whole batches.

    Args:
        erasing: The probability with which a random rectangle of an image is filled with the mean color. Its area is
            2 to 33 % of the image, its height 0.3 to 3.3 times its width. Source: Zhong et al., "Random erasing data
            augmentation", 2020.
        mixup: The parameter alpha of the Beta distribution of mixup's weights; 0 for no mixup.
        cutmix: The parameter alpha of the Beta distribution of cutmix's areas; 0 for no cutmix.
    """

    operations = 0  # of each image, R
    magnitude: int | None = 0  # the level of all operations, from 0 to 30; None to draw a level for each of them
    strongest = Strengths()

    def __init__(self, erasing: Probability = 0.0, mixup: Alpha = 0.0, cutmix: Alpha = 0.0):
        self.erasing, self.mixup, self.cutmix = erasing, mixup, cutmix

    @property
    def is_empty(self) -> bool:
        """Whether the policy has no operations and erases no rectangles, so that `apply` changes no image."""
        return not (self.operations or self.erasing)

    def draw(self, count: int, size: tuple[int, int], generator: torch.Generator) -> Draws:
        """Draws the random operations, their strengths and the erased rectangles for N images.

        Args:
            count: The number of images, N.
            size: The height and the width of the images in pixels.
            generator: The generator of random numbers.
        """
        shape = (count, self.operations)
        operation = torch.randint(len(OPERATIONS), shape, generator=generator)
        fixed = self.magnitude
        level = torch.randint(LEVELS, shape, generator=generator) if fixed is None else torch.tensor(fixed)
        sign = 2 * torch.randint(2, shape, generator=generator) - 1
        strength = self.strongest.tabulate(size)[operation, level]
        values = compute_values(operation, torch.where(IS_SIGNED[operation], sign * strength, strength), size)
        boxes = draw_boxes(count, size, self.erasing, generator) if self.erasing else torch.zeros(count, 0).long()
        return Draws(KERNEL_NUMBERS[operation], values, boxes)

    def apply(self, images: Tensor, drawn: BatchDraws, color: Tensor) -> Tensor:
        """Returns the augmented images, (N, C, H, W) uint8, in channels-last memory format.

        Args:
            images: (N, C, H, W), uint8.
            drawn: What `draw` has drawn for these images, as `Draws.for_batches` returns it.
            color: The color of erased rectangles, (C,), uint8.
        """
        # The images are sorted by the function of their operation, so that each function is called once.
        pixels = images.permute(0, 2, 3, 1)
        for order, counts, values in zip(drawn.orders.T, drawn.counts, drawn.values.unbind(1), strict=True):
            groups = zip(KERNELS, pixels[order].split(counts), values[order].split(counts), strict=True)
            done = [function(*group) if function and len(group[0]) else group[0] for function, *group in groups]
            pixels = torch.empty_like(pixels, memory_format=torch.contiguous_format)
            pixels[order] = torch.cat(done)
        if drawn.boxes.shape[1]:
            pixels = erase(pixels, drawn.boxes, color)
        return pixels.permute(0, 3, 1, 2)


class TrivialAugment(Policy):
    """The augmentation policy `trivial`, which applies one of 14 operations to each image, at one of 31 strengths.

    The operation and the strength are drawn with equal probability. Images are shifted by up to 32 pixels, and by at
    most their side. The arguments are those of `Policy`. Source: Müller, Hutter, "TrivialAugment: tuning-free yet
    state-of-the-art data augmentation", 2021, table 6 (wide).
    """

    operations, magnitude = 1, None
    strongest = Strengths(shear=0.99, shift=1.0, most_pixels=32.0, angle=135.0, factor=0.99, lost_bits=6)


@check_arguments("augment")
class RandAugment(Policy):
    """The augmentation policy `randaugment`, which applies several operations to each image, at one strength.

    Each operation is drawn from 14, with equal probability. The ranges of the strengths are those of torchvision.
    Source: Cubuk et al., "RandAugment: practical automated data augmentation with a reduced search space", 2020,
    section 3.

    Args:
        num_ops: The number of operations that are applied to each image, one after the other; N in the paper.
        magnitude: The strength of all operations, from 0 to 30; M in the paper.
        **options: The arguments of `Policy`.
    """

    strongest = Strengths(shear=0.3, shift=150 / 331, angle=30.0, factor=0.9, lost_bits=4)

    def __init__(
        self,
        num_ops: Annotated[int, Field(ge=1, le=14)] = 2,
        magnitude: Annotated[int, Field(ge=0, lt=LEVELS)] = 9,
        **options: Any,
    ):
        super().__init__(**options)
        self.operations, self.magnitude = num_ops, magnitude


def compute_values(operation: Tensor, strength: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns, for each drawn operation, the six numbers that its function takes as the argument `values`.

    Args:
        operation: The positions of the drawn operations in the list `OPERATIONS`, of any shape (...).
        strength: The strength of each drawn operation, with its sign, of the same shape.
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
    rows |= dict.fromkeys(FACTORS, (1 + strength, zero, zero, zero, zero, zero))
    rows |= {name: (strength, zero, zero, zero, zero, zero) for name in NAMES if name not in rows}
    table = torch.stack([torch.stack(rows[name], dim=-1) for name in NAMES])  # (14, ..., 6)
    return table.gather(0, operation[None, ..., None].expand(1, *operation.shape, 6))[0].float()


def draw_boxes(count: int, size: tuple[int, int], probability: float, generator: torch.Generator) -> Tensor:
    """Draws the rectangles that random erasing fills, (N, 4), as `erase` takes them in its argument `boxes`.

    Args:
        count: The number of images, N.
        size: The height and the width of the images in pixels.
        probability: The probability with which an image is erased; all other images get an empty rectangle.
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
