"""The held-out split: stratified, and a function of the images alone, not of their names, order or source."""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from odcheap.utils.errors import OptionError


@dataclass(frozen=True)
class Split:
    """Indices of the images to train on and of those held out, in an order that every source of the data shares."""

    train: np.ndarray
    val: np.ndarray
    fingerprint: str


def pixel_digests(images: Tensor, split_seed: int) -> list[bytes]:
    """A keyed 16-byte hash of each image's pixels."""
    key = str(split_seed).encode()
    return [hashlib.blake2b(image.tobytes(), digest_size=16, key=key).digest() for image in images.numpy()]


def stratified(digests: list[bytes], target: Tensor, val_size: float, name: str = "data.val_size") -> Split:
    """Holds out `val_size` images (a fraction below 1, else a count), each class by its share.

    In each class the images with the smallest digests are held out. Raises `OptionError` where too few are left.
    """
    labels = target.numpy()
    total = held_out_count(val_size, len(labels), name)
    order = np.array(sorted(range(len(digests)), key=lambda i: (digests[i], labels[i])), dtype=np.int64)
    counts = np.bincount(labels)
    quota = shares(counts, total)
    rank = np.empty(len(labels), dtype=np.int64)  # an image's place among its class, in the order of the digests
    for label in range(len(counts)):
        members = order[labels[order] == label]
        rank[members] = np.arange(len(members))
    held_out = rank < quota[labels]
    train, val = order[~held_out[order]], order[held_out[order]]
    return Split(train, val, fingerprint(digests, labels, val))


def held_out_count(val_size: float, available: int, name: str) -> int:
    if not isinstance(val_size, int | float) or not math.isfinite(val_size):
        raise OptionError(name, val_size, "must be a count of images, or a fraction below 1")
    count = round(val_size * available) if 0 < val_size < 1 else int(val_size)
    if val_size < 0 or (count != val_size and val_size >= 1):
        raise OptionError(name, val_size, "must be a count of images, or a fraction below 1")
    if count >= available:
        raise OptionError(name, val_size, f"must leave images to train on: there are {available}")
    return count


def shares(counts: np.ndarray, total: int) -> np.ndarray:
    """`total` divided in proportion to `counts`, rounded by largest remainder (ties to the lower class).

    Each class keeps one image at least, as far as that is possible.
    """
    exact = counts * total / counts.sum()
    most = np.maximum(counts - 1, 0) if total <= np.maximum(counts - 1, 0).sum() else counts
    quota = np.minimum(np.floor(exact).astype(np.int64), most)
    for _ in range(total - quota.sum()):
        quota[np.argmax(np.where(quota < most, exact - quota, -np.inf))] += 1
    return quota


def fingerprint(digests: list[bytes], labels: np.ndarray, val: np.ndarray) -> str:
    """16 hexadecimal digits that differ wherever the data or what is held out of them differ."""
    whole = hashlib.blake2b(digest_size=8)
    held_out = set(val.tolist())
    for entry in sorted(digest + bytes([i in held_out]) + str(labels[i]).encode() for i, digest in enumerate(digests)):
        whole.update(entry)
    return whole.hexdigest()
