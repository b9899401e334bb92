"""The file `training_images.json` of a run, which contains hashes of the training images and of the held-out images.

An evaluation of other images reads it, to tell which of these images the run has been trained on.
"""

import base64
import binascii
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from odcheap.data.base import DIGEST_BYTES, ImageDigests
from odcheap.data.folder_trees import Files, hash_ends, hash_whole
from odcheap.data.splits import hash_pixels
from odcheap.runs.folder import TRAINING_IMAGES
from odcheap.runs.schemas import Schema, validate
from odcheap.utils.errors import OptionError
from odcheap.utils.files import read_json, write_json


class SavedDigests(Schema):
    """The content of `training_images.json`: the fields of `ImageDigests`, with the hashes as texts in base64."""

    kind: Literal["files", "pixels"]
    key: int
    train: str
    val: str
    digest_bytes: int = Field(ge=DIGEST_BYTES, le=DIGEST_BYTES)


def write_digests(job_dir: Path, digests: ImageDigests) -> None:
    """Writes hashes of the training images and the held-out images to `training_images.json` in a run's folder."""
    train, val = (base64.b64encode(part).decode() for part in (digests.train, digests.val))
    content = {"kind": digests.kind, "key": digests.key, "digest_bytes": DIGEST_BYTES, "train": train, "val": val}
    write_json(job_dir / TRAINING_IMAGES, content)


def read_digests(job_dir: Path, option: str) -> ImageDigests | None:
    """Reads the hashes of a run's training images and held-out images from `training_images.json`.

    Args:
        job_dir: The run's folder.
        option: The name of the option that gave the folder, for messages.

    Returns:
        The hashes; None if there is no such file, because the run has not finished or an earlier version wrote it.

    Raises:
        OptionError: The file is damaged, or another program has written it.
    """
    path = job_dir / TRAINING_IMAGES
    if not os.path.lexists(path):
        return None
    saved = validate(SavedDigests, read_json(path, option), path, option)
    try:
        train, val = (base64.b64decode(part, validate=True) for part in (saved.train, saved.val))
    except (binascii.Error, ValueError) as error:
        raise OptionError(option, path, "its hashes are not in base64") from error
    if len(train) % DIGEST_BYTES or len(val) % DIGEST_BYTES:
        raise OptionError(option, path, f"its hashes do not have {DIGEST_BYTES} bytes each")
    return ImageDigests(saved.kind, saved.key, train, val)


def hash_file_contents(files: Sequence[Path], key: int) -> list[set[bytes]]:
    """Returns two hashes (8 bytes) for each image file: of its size, beginning and end, and of its whole content.

    A run that has used the same file has stored one of the two in `training_images.json`; see `find_known_images`.

    Args:
        files: The image files.
        key: The key of the hash function; `ImageDigests.key` of the run with which the files are compared.
    """
    # A run has stored the hash of a file's size and ends, or that of its whole content if several of its files have the
    # same first hash; see `hash_files`.
    listed = Files("", np.array([os.fsencode(path.absolute()) for path in files]), np.zeros(len(files), np.int64))
    both = hash_ends(listed, key), hash_whole(listed, range(len(files)), key)
    return [{digest[:DIGEST_BYTES] for digest in digests} for digests in zip(*both, strict=True)]


def hash_image(image: np.ndarray, key: int) -> set[bytes]:
    """Returns the hash of an image's pixels, as a set with one entry, for `find_known_images`.

    Args:
        image: The image, (C, H, W), uint8.
        key: The key of the hash function; `ImageDigests.key` of the run with which the image is compared.
    """
    return {hash_pixels(torch.from_numpy(image[None]), key)[0][:DIGEST_BYTES]}


def find_known_images(digests: ImageDigests, hashes: Sequence[set[bytes]]) -> tuple[list[int], list[int]]:
    """Finds the images that a run has been trained on, or has held out, by their hashes.

    Args:
        digests: The hashes of the run's images; see `read_digests`.
        hashes: A set of hashes for each image to look for, from `hash_file_contents` or `hash_image`.

    Returns:
        Two sorted lists of positions in `hashes`: those of the run's training images, and those of its held-out images.
    """
    known = [
        {part[k : k + DIGEST_BYTES] for k in range(0, len(part), DIGEST_BYTES)} for part in (digests.train, digests.val)
    ]
    trained, held_out = ([k for k, own in enumerate(hashes) if own & part] for part in known)
    return trained, sorted(set(held_out) - set(trained))
