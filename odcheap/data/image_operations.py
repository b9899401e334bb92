"""Image operations of augmentation policies, each with a value of its own for every image of a batch.

Images are (N, H, W, C), uint8. An image's result does not depend on the other images of the batch: sums are computed in
whole numbers, which have no rounding. The operations are those of `torchvision.transforms.v2`, where a call has one
value for all images.
"""

import torch
from torch import Tensor
from torchvision.transforms import v2

GRAY = (2989, 5870, 1140)  # ITU-R BT.601, in 1/10,000: the parts of red, green and blue in the brightness


def resample(images: Tensor, values: Tensor) -> Tensor:
    """Moves the pixels of each image by an affine map; pixels from outside of the image are 0.

    Args:
        images: (N, H, W, C), uint8.
        values: (N, 6): a, b, c, d, e, f for each image. The pixel at (x, y), counted from the center of the image, is
            read from the nearest pixel to (a x + b y + c, d x + e y + f).
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
    """Returns `values * images + (1 - values) * others`, limited to 0 to 255 and rounded down.

    Args:
        images: (N, H, W, C), uint8.
        others: Images of the same shape or one that can be broadcast to it, or one number for all pixels.
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
    """Returns the brightness of each pixel: a weighted mean of red, green and blue.

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
        values: (N, ...); the first value of each image is the factor: 0 for gray, 1 for no change.
    """
    return blend(images, to_gray(images), values[:, :1]) if images.shape[-1] == 3 else images


def adjust_contrast(images: Tensor, values: Tensor) -> Tensor:
    """Changes the contrast of each image.

    Args:
        images: (N, H, W, C), uint8.
        values: (N, ...); the first value of each image is the factor: 0 for the mean brightness at all pixels, 1 for no
            change.
    """
    gray = to_gray(images)
    mean = gray.sum((1, 2, 3), keepdim=True) / gray[0].numel()
    return blend(images, mean, values[:, :1])


def adjust_sharpness(images: Tensor, values: Tensor) -> Tensor:
    """Changes the sharpness of each image; the pixels at its edges do not change.

    Args:
        images: (N, H, W, C), uint8.
        values: (N, ...); the first value of each image is the factor: 0 for a blurred image, 1 for no change.
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
        boxes: (N, 4): top, left, bottom and right edge of each rectangle in pixels, the last two exclusive; an empty
            rectangle leaves the image as it is.
        color: (C,), uint8.
    """
    top, left, bottom, right = boxes.T[:, :, None, None]
    row = torch.arange(images.shape[1], device=images.device)[:, None]
    column = torch.arange(images.shape[2], device=images.device)
    is_erased = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    return torch.where(is_erased[..., None], color, images)
