"""Splits images into a training and a held-out part.

From each class, images are held out in proportion to the size of the class. Which images are held out depends on the
images only, not on their names, order or source.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from odcheap.utils.errors import OptionError


@dataclass(frozen=True)
class Split:
    """The positions of the images to train on, and of those that are held out.

    Attributes:
        train: The positions of the training images, in an order that depends on the images only.
        val: The positions of the held-out images.
        fingerprint: A hash (16 hexadecimal digits) of the images, their labels, and which of them are held out.
    """

    train: np.ndarray
    val: np.ndarray
    fingerprint: str


def hash_pixels(images: Tensor, split_seed: int) -> list[bytes]:
    """Returns a hash (16 bytes) of the pixels of each image.

    Args:
        images: (N, C, H, W), uint8.
        split_seed: The key of the hash function. With another key, all hashes are different.
    """
    key = str(split_seed).encode()
    return [hashlib.blake2b(image.tobytes(), digest_size=16, key=key).digest() for image in images.numpy()]


def split_stratified(digests: list[bytes], labels: np.ndarray, val_size: float, name: str = "data.val_size") -> Split:
    """Holds out the images with the smallest hashes, from each class in proportion to its size.

    Args:
        digests: A hash of each image, such as `hash_pixels` returns.
        labels: The label of each image, (N,).
        val_size: The number of images to hold out; a value below 1 is a fraction of all images.
        name: The name of the option with the value `val_size`, for messages.

    Raises:
        OptionError: `val_size` leaves no training images, or is neither a whole number nor a fraction below 1.
    """
    # The images in the order of their hashes, and the number to hold out in each class.
    total = count_held_out(val_size, len(labels), name)
    order = sort_by_digest(digests, labels)
    held_out = mark_smallest(order, labels, total)
    train, val = order[~held_out[order]], order[held_out[order]]
    return Split(train, val, hash_split(digests, labels, val))


def limit_parts(
    labels: dict[str, np.ndarray], hash_part: Callable[[str], list[bytes]], limit: int | None
) -> dict[str, np.ndarray]:
    """Chooses the images of a short run, which uses at most `limit` training images.

    All parts are reduced by the same factor, and so are all classes of a part. Each part keeps at least one image, and
    each class does so if that is possible. Which images are used depends on the images and on the key of their hashes.

    Args:
        labels: The labels (N,) of the images in each part, such as "train", "val" and "test"; "train" must be there.
        hash_part: A function that takes the name of a part, and returns a hash of each of its images. It is called only
            if images of the part are left out.
        limit: The largest number of training images; None for all.

    Returns:
        A dict from the name of each part to the positions of the images that are used.

    Example:
        >>> labels = {"train": np.array([0, 0, 0, 1, 1, 1]), "test": np.array([1, 0])}
        >>> kept = limit_parts(labels, lambda part: [bytes([k]) for k in range(len(labels[part]))], 2)
        >>> {part: index.tolist() for part, index in kept.items()}
        {'train': [2, 5], 'test': [0]}
    """
    share = 1.0 if limit is None else min(1.0, limit / len(labels["train"]))
    kept = {}
    for part, target in labels.items():
        count = max(1, round(share * len(target)))
        kept[part] = np.arange(len(target))
        if count < len(target):
            order = sort_by_digest(hash_part(part), target)
            kept[part] = np.flatnonzero(~mark_smallest(order, target, len(target) - count))
    return kept


def sort_by_digest(digests: list[bytes], labels: np.ndarray) -> np.ndarray:
    """Returns the positions of the images in the order of their hashes; equal hashes are ordered by the labels.

    Args:
        digests: A hash of each image, such as `hash_pixels` returns.
        labels: The label of each image, (N,).
    """
    return np.array(sorted(range(len(digests)), key=lambda i: (digests[i], labels[i])), dtype=np.int64)


def mark_smallest(order: np.ndarray, labels: np.ndarray, total: int) -> np.ndarray:
    """Returns a boolean mask (N,) that marks the first images of each class, in proportion to its size.

    Args:
        order: The positions of the images in the order of their hashes.
        labels: The label of each image, (N,).
        total: The number of images to mark.
    """
    counts = np.bincount(labels)
    quota = divide_proportionally(counts, total)
    # The position of each image among those of its class, in the order of the hashes: the first ones are held out.
    rank = np.empty(len(labels), dtype=np.int64)
    for label in range(len(counts)):
        members = order[labels[order] == label]
        rank[members] = np.arange(len(members))
    return rank < quota[labels]


def count_held_out(val_size: float, available: int, name: str) -> int:
    """Returns the number of images to hold out.

    Args:
        val_size: The number of images to hold out; a value below 1 is a fraction of all images.
        available: The number of all images.
        name: The name of the option with the value `val_size`, for messages.

    Raises:
        OptionError: `val_size` leaves no training images, or is neither a whole number nor a fraction below 1.
    """
    is_number = isinstance(val_size, int | float) and math.isfinite(val_size) and val_size >= 0
    if not is_number or (val_size >= 1 and val_size != int(val_size)):
        raise OptionError(name, val_size, "must be a count of images, or a fraction below 1")
    count = round(val_size * available) if val_size < 1 else int(val_size)
    if count >= available:
        raise OptionError(name, val_size, f"must leave images to train on: there are {available}")
    return count


def divide_proportionally(counts: np.ndarray, total: int) -> np.ndarray:
    """Returns how many images to take from each class, in proportion to its size, `total` in all.

    Numbers are rounded by the method of the largest remainder; if two remainders are equal, the class with the lower
    label gets the image. In each class at least one image is not taken, if `total` allows that.

    Args:
        counts: The number of images of each class, (K,).
        total: The number of images to take.
    """
    # Round down, then give what is left, one image after the other, to the class that is farthest below its share.
    exact = counts * total / counts.sum()
    most = np.maximum(counts - 1, 0) if total <= np.maximum(counts - 1, 0).sum() else counts
    quota = np.minimum(np.floor(exact).astype(np.int64), most)
    for _ in range(total - quota.sum()):
        quota[np.argmax(np.where(quota < most, exact - quota, -np.inf))] += 1
    return quota


def hash_split(digests: list[bytes], labels: np.ndarray, val: np.ndarray) -> str:
    """Returns a hash (16 hexadecimal digits) of the images, their labels, and which of them are held out.

    Args:
        digests: A hash of each image.
        labels: The label of each image, (N,).
        val: The positions of the held-out images.
    """
    # Sorted, so that the order of the images does not matter.
    whole = hashlib.blake2b(digest_size=8)
    held_out = set(val.tolist())
    for entry in sorted(digest + bytes([i in held_out]) + str(labels[i]).encode() for i, digest in enumerate(digests)):
        whole.update(entry)
    return whole.hexdigest()
