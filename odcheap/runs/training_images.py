"""The file `training_images.json` of a run, with which an evaluation recognizes images that the run was trained on.

It contains hashes of the training images and of the held-out images.
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
    """The content of `training_images.json`: an `ImageDigests` with its hashes in base64."""

    kind: Literal["files", "pixels"]
    key: int
    train: str
    val: str
    digest_bytes: int = Field(ge=DIGEST_BYTES, le=DIGEST_BYTES)


def write_digests(job_dir: Path, digests: ImageDigests) -> None:
    """Writes `training_images.json` into a run's folder."""
    train, val = (base64.b64encode(part).decode() for part in (digests.train, digests.val))
    content = {"kind": digests.kind, "key": digests.key, "digest_bytes": DIGEST_BYTES, "train": train, "val": val}
    write_json(job_dir / TRAINING_IMAGES, content)


def read_digests(job_dir: Path, option: str) -> ImageDigests | None:
    """Reads `training_images.json` from a run's folder.

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
    """Returns two hashes for each image file; a run that has used the file has stored one of them.

    Args:
        files: The image files.
        key: The key of the hashes, see `ImageDigests`.
    """
    # A run has stored the hash of a file's size and ends, or that of its whole content if several of its files have the
    # same first hash; see `hash_files`.
    listed = Files("", np.array([os.fsencode(path.absolute()) for path in files]), np.zeros(len(files), np.int64))
    both = hash_ends(listed, key), hash_whole(listed, range(len(files)), key)
    return [{digest[:DIGEST_BYTES] for digest in digests} for digests in zip(*both, strict=True)]


def hash_image(image: np.ndarray, key: int) -> set[bytes]:
    """Returns a set with the hash of an image, for `ImageDigests` of the kind "pixels".

    Args:
        image: The image, (C, H, W), uint8.
        key: The key of the hash, see `ImageDigests`.
    """
    return {hash_pixels(torch.from_numpy(image[None]), key)[0][:DIGEST_BYTES]}


def find_known_images(digests: ImageDigests, hashes: Sequence[set[bytes]]) -> tuple[list[int], list[int]]:
    """Returns which of some images are training images of a run, and which are held-out images.

    Args:
        digests: The hashes of the run's images.
        hashes: The hashes of each image to look for; see `hash_file_contents` and `hash_image`.

    Returns:
        The positions of the training images, and the positions of the held-out images, in `hashes`.
    """
    known = [
        {part[k : k + DIGEST_BYTES] for k in range(0, len(part), DIGEST_BYTES)} for part in (digests.train, digests.val)
    ]
    trained, held_out = ([k for k, own in enumerate(hashes) if own & part] for part in known)
    return trained, sorted(set(held_out) - set(trained))
