"""The held-out split, which is stratified and depends on the images only, not on their names, order or source."""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from odcheap.utils.errors import OptionError


@dataclass(frozen=True)
class Split:
    """The images to train on and those held out.

    Attributes:
        train, val: Indices, in an order that depends on the images only.
        fingerprint: Hash of the data and of which images are held out.
    """

    train: np.ndarray
    val: np.ndarray
    fingerprint: str


def hash_pixels(images: Tensor, split_seed: int) -> list[bytes]:
    """Returns a keyed 16-byte hash of the pixels of each image (N, C, H, W)."""
    key = str(split_seed).encode()
    return [hashlib.blake2b(image.tobytes(), digest_size=16, key=key).digest() for image in images.numpy()]


def split_stratified(digests: list[bytes], target: Tensor, val_size: float, name: str = "data.val_size") -> Split:
    """Holds out the images with the smallest digests, of each class in proportion to its size.

    Args:
        digests: A hash of each image.
        target: Labels (N,).
        val_size: A count of images, or a fraction below 1.
        name: The option that `val_size` is the value of, for messages.

    Raises:
        OptionError: `val_size` leaves no training images, or is not a number of images.
    """
    labels = target.numpy()
    total = count_held_out(val_size, len(labels), name)
    order = np.array(sorted(range(len(digests)), key=lambda i: (digests[i], labels[i])), dtype=np.int64)
    counts = np.bincount(labels)
    quota = divide_proportionally(counts, total)
    rank = np.empty(len(labels), dtype=np.int64)  # an image's position in its class, in the order of the digests
    for label in range(len(counts)):
        members = order[labels[order] == label]
        rank[members] = np.arange(len(members))
    held_out = rank < quota[labels]
    train, val = order[~held_out[order]], order[held_out[order]]
    return Split(train, val, hash_split(digests, labels, val))


def count_held_out(val_size: float, available: int, name: str) -> int:
    """Returns the number of images that `val_size` stands for; see `split_stratified` for the arguments."""
    if not isinstance(val_size, int | float) or not math.isfinite(val_size):
        raise OptionError(name, val_size, "must be a count of images, or a fraction below 1")
    count = round(val_size * available) if 0 < val_size < 1 else int(val_size)
    if val_size < 0 or (count != val_size and val_size >= 1):
        raise OptionError(name, val_size, "must be a count of images, or a fraction below 1")
    if count >= available:
        raise OptionError(name, val_size, f"must leave images to train on: there are {available}")
    return count


def divide_proportionally(counts: np.ndarray, total: int) -> np.ndarray:
    """Divides `total` in proportion to `counts`, rounded by largest remainder (ties to the lower class).

    Each class keeps at least one image if the total allows it.
    """
    exact = counts * total / counts.sum()
    most = np.maximum(counts - 1, 0) if total <= np.maximum(counts - 1, 0).sum() else counts
    quota = np.minimum(np.floor(exact).astype(np.int64), most)
    for _ in range(total - quota.sum()):
        quota[np.argmax(np.where(quota < most, exact - quota, -np.inf))] += 1
    return quota


def hash_split(digests: list[bytes], labels: np.ndarray, val: np.ndarray) -> str:
    """Returns 16 hexadecimal digits that identify the data and the held-out images."""
    whole = hashlib.blake2b(digest_size=8)
    held_out = set(val.tolist())
    for entry in sorted(digest + bytes([i in held_out]) + str(labels[i]).encode() for i, digest in enumerate(digests)):
        whole.update(entry)
    return whole.hexdigest()
