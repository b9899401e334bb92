"""Folders of classes on the disk: ImageNet's, and anybody's own in four layouts."""

import hashlib
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import imagenet as archives

from odcheap.data.image_files import Files, is_named_so
from odcheap.data.splits import stratified
from odcheap.utils.text import escape_control_chars
from odcheap.utils.errors import OptionError

PARTS = ("train", "val", "test")
LAYOUTS = "<class>/*, or train/<class>/* with val/, test/ or both beside it"
UNPACKING = ".unpacking"
READ = 4096  # bytes at each end of a file that tell most files from others
MANY = 50_000  # files that are worth a line before the silence
READERS = 16  # threads: the disk answers several at once


@dataclass(frozen=True)
class Tree:
    """Files to train on, to watch (None: to be held out of `train`) and to test on; others are `passed_over`."""

    classes: list[str]
    train: Files
    val: Files | None
    test: Files
    passed_over: list[str]


def imagenet(data_dir: str) -> Tree:
    """ILSVRC-2012: `train/<wnid>/*` and `val/<wnid>/*`, which is the test; unpacks torchvision's archives once.

    Raises `OptionError` where neither is there, or the class folders differ.
    """
    root = Path(data_dir)
    if not (root / "train").is_dir() and (root / archives.ARCHIVE_META["train"][0]).is_file():
        unpack(root)
    if not all((root / part).is_dir() for part in ("train", "val")):
        names = ", ".join(name for name, _ in archives.ARCHIVE_META.values())
        raise OptionError("data_dir", data_dir, f"must hold train/<wnid>/* and val/<wnid>/*, or the archives {names}")
    found, classes, passed_over = listed(root, ("train", "val"))
    return Tree(classes, found["train"], None, found["val"], passed_over)


def folders(data_dir: str, test_size: float, split_seed: int) -> Tree:
    """Anybody's pictures: one folder a class, or these in `train` with `val`, `test` or both beside it.

    A lone `val` is the test. Where there is none, `test_size` pictures (a fraction below 1, else a count) are split
    off, stratified. Raises `OptionError`.
    """
    root = Path(data_dir)
    if not root.is_dir():
        raise OptionError("data_dir", data_dir, f"no such folder; {LAYOUTS} is expected")
    there = [part for part in PARTS if (root / part).is_dir()]
    refuse_near_names(root, there)
    found, classes, passed_over = listed(root, there)
    if len(there) > 1:
        val = found["val"] if "test" in found and "val" in found else None
        return Tree(classes, found["train"], val, found.get("test", found.get("val")), passed_over)
    whole = found["train" if there else "."]
    split = stratified(digests(whole, split_seed), torch.from_numpy(whole.target), test_size, "data.load.test_size")
    if not len(split.val):
        raise OptionError("data.load.test_size", test_size, "there is no test folder, and nothing is split off for one")
    return Tree(classes, whole.subset(split.train), None, whole.subset(split.val), passed_over)


def refuse_near_names(root: Path, there: list[str]) -> None:
    """A folder "valid" beside "train" would silently not be used, and a "Train" would be taken for a class."""
    if there and "train" not in there:
        raise OptionError("data_dir", root, f"has {' and '.join(there)} but no train; {LAYOUTS} is expected")
    for entry in sorted(root.iterdir()):
        holds_folders = entry.is_dir() and any(inner.is_dir() for inner in entry.iterdir())
        if entry.name in there and not holds_folders:
            allowed = f"is taken for pictures to {entry.name}, not for a class, and holds no class folders; {LAYOUTS}"
            raise OptionError("data_dir", entry, f"{allowed} is expected")
        near = entry.name not in PARTS and entry.name.lower().startswith(("train", "val", "test", "dev"))
        if near and holds_folders:
            raise OptionError("data_dir", entry, "folders of classes are called train, val and test: rename it")


def listed(root: Path, parts: Iterable[str]) -> tuple[dict[str, Files], list[str], list[str]]:
    """Files of each part ("." where there are none), class names, and what is no picture by its name."""
    passed_over: list[str] = []
    by_part = {part: by_class(root, part, passed_over) for part in parts or (".",)}
    first, *others = by_part
    classes = list(by_part[first])
    for other in others:
        if by_part[other].keys() != by_part[first].keys():
            odd = sorted(by_part[first].keys() ^ by_part[other].keys())
            only = first if odd[0] in by_part[first] else other
            raise OptionError(
                "data_dir", root, f"{first} and {other} must have the same classes: {odd[0]} is only in {only}"
            )
    if len(classes) < 2:
        raise OptionError("data_dir", root, f"needs two classes or more; {LAYOUTS} is expected")
    found = {}
    for part, files in by_part.items():
        names = np.array([os.fsencode(name) for names in files.values() for name in names])
        target = np.repeat(np.arange(len(files)), [len(names) for names in files.values()])
        found[part] = Files(str(root), names, target)
    return found, classes, passed_over


def by_class(root: Path, part: str, passed_over: list[str]) -> dict[str, list[str]]:
    """Class -> names below `root`, both in alphabetical order; `OptionError` where a class is empty."""
    names = sorted(entry.name for entry in (root / part).iterdir() if entry.is_dir() and entry.name[0] != ".")
    found = {name: pictures_below(root, os.path.normpath(os.path.join(part, name)), passed_over) for name in names}
    empty = [name for name, files in found.items() if not files]
    if empty:
        raise OptionError("data_dir", root / part / empty[0], "this class has no pictures: fill or remove the folder")
    return found


def pictures_below(root: Path, folder: str, passed_over: list[str]) -> list[str]:
    found = []
    for where, inner, names in os.walk(root / folder):  # a link to a folder may lead round in a circle
        below = os.path.relpath(where, root)
        passed_over += [os.path.join(below, name) for name in inner if os.path.islink(os.path.join(where, name))]
        inner[:] = [name for name in inner if name[0] != "."]
        for name in names:
            if is_named_so(name):
                found.append(os.path.join(below, name))
            elif name[0] != ".":
                passed_over.append(os.path.join(below, name))
    return sorted(found)


def digests(files: Files, split_seed: int) -> list[bytes]:
    """A keyed 16-byte hash of each file: of its length and its ends, and of all of it where those are not its own."""
    key = str(split_seed).encode()

    def digest(index: int) -> bytes:
        whole = hashlib.blake2b(digest_size=16, key=key)
        try:
            with open(files.path(index), "rb") as file:
                length = os.fstat(file.fileno()).st_size
                whole.update(length.to_bytes(8, "big") + file.read(READ))
                file.seek(max(0, length - READ))
                whole.update(file.read(READ))
        except OSError:  # decoding will name it
            whole.update(files.names[index])
        return whole.digest()

    if len(files.names) > MANY:
        print(f"looking into {len(files.names):,} files below {escape_control_chars(files.root)}", flush=True)

    def whole_digest(index: int) -> bytes:
        with open(files.path(index), "rb") as file:
            return hashlib.blake2b(hashlib.file_digest(file, "blake2b").digest(), digest_size=16, key=key).digest()

    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(digest, range(len(files.names))))
        times = Counter(found)
        tied = [index for index, value in enumerate(found) if times[value] > 1]
        for index, value in zip(tied, pool.map(whole_digest, tied), strict=True):
            found[index] = value
    return found


def unpack(root: Path) -> None:
    """Torchvision's ImageNet archives into `train` and `val`, which appear when they are whole."""
    beside = root / UNPACKING
    if (root / "val").exists():
        raise OptionError("data_dir", root / "val", "is there and train is not: remove it to have both unpacked")
    try:
        beside.mkdir()
    except FileExistsError:
        allowed = "another process unpacks here, or one was interrupted: then delete this folder and start again"
        raise OptionError("data_dir", beside, allowed) from None
    print(f"unpacking ImageNet's archives in {escape_control_chars(root)}, once", flush=True)
    try:
        archives.parse_devkit_archive(root)
        archives.parse_train_archive(root, folder=f"{UNPACKING}/train")
        archives.parse_val_archive(root, folder=f"{UNPACKING}/val")
    except (RuntimeError, OSError, EOFError, tarfile.TarError) as error:
        shutil.rmtree(beside)
        allowed = f"an archive is missing or damaged, or cannot be unpacked ({error})"
        raise OptionError("data_dir", root, allowed) from error
    for part in ("val", "train"):
        (beside / part).rename(root / part)
    beside.rmdir()
