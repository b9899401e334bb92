"""Lists the image files of ImageNet, or of a data set of your own, in which each class is a folder.

A part of a data set is "train", "val" or "test". Several functions have an argument `root`, the folder of the data set;
the paths of files are relative to it.
"""

import hashlib
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field
from torchvision.datasets import imagenet as archives

from odcheap.data.splits import split_stratified
from odcheap.predict import (
    JUNK_FOLDERS,
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    escape_control_chars,
    list_folders,
    list_images,
    open_regular,
    read_regular,
)
from odcheap.utils.errors import OptionError, first_line

PARTS = ("train", "val", "test")
LAYOUTS = "<class>/*, or train/<class>/* with val/, test/ or both beside it"
UNPACKING = ".unpacking"
HASHED_BYTES = 4096  # at each end of a file, by which most files differ
MANY_FILES = 50_000  # for so many files a line says why it takes time
PART_WORDS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev"}
TINY_LABELS, KAGGLE_LABELS = "val_annotations.txt", "LOC_val_solution.csv"  # of tiny-imagenet-200, of ImageNet
READER_THREADS = 16  # a disk serves several threads at once


class Files(NamedTuple):
    """A list of image files with their labels.

    Attributes:
        root: The folder of the data set.
        names: The paths of the files, relative to `root`, as an array of bytes (N,).
        target: Labels (N,).
    """

    # One array of bytes, since a million Python strings would be copied into every loader process.
    root: str
    names: np.ndarray
    target: np.ndarray

    def path(self, index: int) -> Path:
        """Returns the path of a file, by its position (from 0) in the list."""
        return Path(self.root, os.fsdecode(self.names[index]))

    def subset(self, index: np.ndarray) -> "Files":
        """Returns the files at some positions (from 0) in the list, with their labels."""
        return Files(self.root, self.names[index], self.target[index])

    def join(self, other: "Files") -> "Files":
        """Returns a list of these files, followed by the files of `other`, which has the same `root`."""
        names, target = (np.concatenate(pair) for pair in zip(self[1:], other[1:], strict=True))
        return Files(self.root, names, target)


@dataclass(frozen=True)
class Tree:
    """The image files of a data set, for training, validation and testing.

    Attributes:
        classes: The names of the classes; the position of a name is the label.
        train: The files to train on.
        val: The held-out files for validation. None if the data set has none; some files of `train` are held out later.
        test: The files to test on.
        skipped: The paths of files that are no images or have no label, and of skipped folders, which end with "/".
    """

    classes: list[str]
    train: Files
    val: Files | None
    test: Files
    skipped: list[str]


def list_imagenet(data_dir: str, read_only: bool = False) -> Tree:
    """Lists the images of ImageNet (ILSVRC-2012). The images in its folder `val` are used as test images.

    Args:
        data_dir: The folder that contains the images in `train/<wnid>/*` and `val/<wnid>/*`. If it contains the
            official archives instead, they are unpacked there.
        read_only: True not to unpack archives.

    Raises:
        OptionError: The folder contains neither images nor archives, or `train` and `val` have different classes.
    """
    root = Path(data_dir)
    if not (root / "train").is_dir() and (root / archives.ARCHIVE_META["train"][0]).is_file() and not read_only:
        unpack_imagenet(root)
    if not all((root / part).is_dir() for part in ("train", "val")):
        names = ", ".join(name for name, _ in archives.ARCHIVE_META.values())
        raise OptionError("data_dir", data_dir, f"must hold train/<wnid>/* and val/<wnid>/*, or the archives {names}")
    found, classes, skipped = list_parts(root, ("train", "val"))
    return Tree(classes, found["train"], None, found["val"], skipped)


def list_class_folders(data_dir: str, test_size: Annotated[float, Field(ge=0)], split_seed: int) -> Tree:
    """Lists the images of a data set of your own, in which each class is a folder of images.

    Args:
        data_dir: The folder that contains the class folders. Or it contains a folder `train`, and beside it `val`,
            `test` or both, each with the same class folders. If there is `val` and no `test`, `val` is the test set.
        test_size: The number of images that are taken as test images, from each class in proportion to its size; a
            value below 1 is a fraction. It is used only if there is neither `val` nor `test`.
        split_seed: The seed that decides which images become test images.

    Raises:
        OptionError: The folder has another layout.
    """
    root = Path(data_dir)
    if not root.is_dir():
        raise OptionError("data_dir", data_dir, f"no such folder; {LAYOUTS} is expected")
    there = [part for part in PARTS if (root / part).is_dir()]
    check_folder_names(root, there)
    unlabeled = "test" in there and "val" in there and is_flat(root / "test") and read_labels(root, "test") is None
    if unlabeled:
        there.remove("test")  # as in tiny-imagenet-200

    # With `val` or `test`, nothing has to be taken from the training images to test on.
    found, classes, skipped = list_parts(root, there)
    skipped += ["test/"] if unlabeled else []
    if len(there) > 1:
        test = found.pop("test" if "test" in found else "val")
        return Tree(classes, found["train"], found.get("val"), test, skipped)

    # Take the test images from the training images, or from all images.
    whole = found["train" if there else "."]
    split = split_stratified(hash_files(whole, split_seed), whole.target, test_size, "data.load.test_size")
    if not len(split.val):
        allowed = "there is no test folder, and no images are split off for testing"
        raise OptionError("data.load.test_size", test_size, allowed)
    return Tree(classes, whole.subset(split.train), None, whole.subset(split.val), skipped)


def check_folder_names(root: Path, there: list[str]) -> None:
    """Raises `OptionError` if a folder is named almost like "train", "val" or "test", and would be read as a class.

    It also does so if "train" is missing beside the others, or if one of the three contains no class folders.

    Args:
        root: The folder of the data set.
        there: The names of those folders in `root` that are exactly "train", "val" or "test".
    """
    if there and "train" not in there:
        raise OptionError("data_dir", root, f"has {' and '.join(there)} but no train; {LAYOUTS} is expected")
    # "seg_train" beside "seg_test" are parts; a lone "crash test" is a class.
    has_part_words = sum(map(is_part_name, list_folders(root))) > 1
    for entry in sorted(root.iterdir()):
        holds_folders = entry.is_dir() and any(inner.is_dir() for inner in entry.iterdir())
        if entry.name in there and not holds_folders and read_labels(root, entry.name) is None:
            allowed = f"is read as the {entry.name} images, not as a class, and has no class folders; {LAYOUTS}"
            raise OptionError("data_dir", entry, f"{allowed} is expected")
        near = entry.name.lower().startswith(("train", "val", "test", "dev"))
        near |= has_part_words and is_part_name(entry.name)
        if near and entry.name not in PARTS and holds_folders:
            twice = (entry / entry.name).is_dir()
            what = f"put what is in {entry.name}/{entry.name} into a folder of such a name" if twice else "rename it"
            raise OptionError("data_dir", entry, f"folders of classes are called train, val and test: {what}")


def is_part_name(name: str) -> bool:
    """Returns whether the name of a folder contains a word such as "train", "valid" or "test", as in "seg_train"."""
    return bool(PART_WORDS.intersection(re.split(r"[^a-z]+", name.lower())))


def list_parts(root: Path, parts: Iterable[str]) -> tuple[dict[str, Files], list[str], list[str]]:
    """Lists the image files in each part of a data set, such as "train", "val" and "test".

    Args:
        root: The folder of the data set.
        parts: The names of the folders in `root` that contain the class folders; empty if `root` itself contains them.

    Returns:
        A tuple of three elements: a dict with the `Files` of each part, by the part's name ("." if `parts` is empty);
        the names of the classes, whose positions are the labels; and the paths of skipped files and folders.

    Raises:
        OptionError: A part is missing, its classes differ from those of another part, or a class has no image.
    """
    skipped: list[str] = []
    by_part = {part: list_classes(root, part, skipped) for part in parts or (".",)}
    first, *others = by_part
    classes = list(by_part[first])
    for other in others:
        if by_part[other].keys() != by_part[first].keys():
            odd = sorted(by_part[first].keys() ^ by_part[other].keys())
            only = first if odd[0] in by_part[first] else other
            allowed = f"{first} and {other} must have the same classes: {odd[0]} is only in {only}"
            raise OptionError("data_dir", root, allowed)

    # One class only: perhaps the real classes are one level deeper.
    if len(classes) < 2:
        allowed = f"needs two classes or more; {LAYOUTS} is expected"
        folders = list_folders(root / first / classes[0]) if classes else []
        if len(folders) > 1:
            place = os.path.normpath(os.path.join(first, classes[0]))
            allowed += f" (are the {len(folders)} folders in {place} the classes, one level too deep?)"
        raise OptionError("data_dir", root, allowed)

    # From names by class to two arrays for each part.
    found = {}
    for part, files in by_part.items():
        names = np.array([os.fsencode(name) for names in files.values() for name in names])
        target = np.repeat(np.arange(len(files)), [len(names) for names in files.values()])
        found[part] = Files(str(root), names, target)
    return found, classes, skipped


def list_classes(root: Path, part: str, skipped: list[str]) -> dict[str, list[str]]:
    """Lists the image files of each class in one folder of class folders, such as "train".

    Args:
        root: The folder of the data set.
        part: The folder that contains the class folders, relative to `root`.
        skipped: A list to which this function adds the paths of skipped files and folders.

    Returns:
        A dict from the name of each class, in alphabetical order, to its files, as paths relative to `root`.

    Raises:
        OptionError: The folder does not exist, or a class has no image.
    """
    # Some data sets have the images of a part in one folder, and a file with their labels.
    if not (root / part).is_dir():
        raise OptionError("data_dir", root / part, f"no such folder; {part}/<class>/* is expected")
    if is_flat(root / part):
        flat = list_images_below(root, part, skipped)
        if flat:
            return group_by_label(root, part, flat, skipped)
    names = list_folders(root / part)
    # A folder that holds all other classes once more, as some archives do, would be a class with all their images.
    copies = [name for name in names if len(names) > 2 and {*names} - {name} <= {*list_folders(root / part / name)}]
    junk = [entry for entry in JUNK_FOLDERS if (root / part / entry).is_dir()]
    skipped += [os.path.normpath(os.path.join(part, name)) + "/" for name in copies + junk]
    names = [name for name in names if name not in copies]

    # A class without images is an error; the message says what is in its folder instead.
    found = {name: list_images_below(root, os.path.normpath(os.path.join(part, name)), skipped) for name in names}
    empty = [name for name, files in found.items() if not files]
    if empty:
        folder = os.path.normpath(os.path.join(part, empty[0]))
        others = [name for name in skipped if name.startswith(f"{folder}/")]
        what = ": fill or remove the folder"
        if others:
            is_heic = others[0].lower().endswith((".heic", ".heif"))
            what = f" that can be read, but {len(others):,} other files, such as {others[0]}"
            what += ": convert HEIC to JPEG or PNG" if is_heic else ""
        raise OptionError("data_dir", root / folder, f"this class has no images{what}")
    return found


def is_flat(folder: Path) -> bool:
    """Returns whether a folder has no class folders; a single folder with the name "images" is no class."""
    return list_folders(folder) in ([], ["images"])


def group_by_label(root: Path, part: str, names: list[str], skipped: list[str]) -> dict[str, list[str]]:
    """Groups images that are not in class folders by their classes, which are read from a file of the data set.

    Args:
        root: The folder of the data set.
        part: The folder of the images, relative to `root`.
        names: The paths of the images, relative to `root`.
        skipped: A list to which this function adds the paths of images without a label.

    Returns:
        A dict from the name of each class to its images, as paths relative to `root`.

    Raises:
        OptionError: There is no file with labels.
    """
    labels = read_labels(root, part)
    if labels is None:
        allowed = f"has {len(names):,} images outside folders of classes, such as {names[0]}: sort them into "
        allowed += f"{part}/<class>/, or add {KAGGLE_LABELS} of ImageNet or {TINY_LABELS} of tiny-imagenet-200"
        raise OptionError("data_dir", root / part, allowed)
    found: dict[str, list[str]] = {}
    for name in names:
        label = labels.get(Path(name).stem)
        if label is None:
            skipped.append(name)
        else:
            found.setdefault(label, []).append(name)
    return dict(sorted(found.items()))


def read_labels(root: Path, part: str) -> dict[str, str] | None:
    """Reads the classes of images from the file of labels that ImageNet or tiny-imagenet-200 has.

    Args:
        root: The folder of the data set.
        part: The folder of the images, relative to `root`, such as "val".

    Returns:
        A dict from the file name of each image, without suffix, to the name of its class; None if there is no file of
        labels.

    Raises:
        OptionError: The file with the labels cannot be read.
    """
    # The files of labels of two data sets, and what separates their columns.
    lists = [(root / part / TINY_LABELS, "\t")]
    if part == "val":
        lists += [(root / KAGGLE_LABELS, ","), (root / part / KAGGLE_LABELS, ",")]
    for path, separator in lists:
        if path.is_file():
            try:
                text = read_regular(path, MAX_TEXT_BYTES).decode()
            except (OSError, UnicodeDecodeError) as error:
                raise OptionError("data_dir", path, f"cannot be read ({first_line(error)})") from error
            rows = [line.split(separator) for line in text.splitlines()]
            # The second column of ImageNet's list has the class and then boxes: "n03995372 85 1 499 272".
            return {Path(row[0]).stem: row[1].split()[0] for row in rows if len(row) > 1 and row[1].strip()}
    return None


def list_images_below(root: Path, folder: str, skipped: list[str]) -> list[str]:
    """Lists the image files in a folder and in all folders below it.

    Args:
        root: The folder of the data set.
        folder: The folder to list, relative to `root`.
        skipped: A list to which this function adds the paths of other files, and of folders such as `__MACOSX`.

    Returns:
        The paths of the image files, relative to `root`, sorted.

    Raises:
        OptionError: A folder cannot be read.
    """
    try:
        images, others = list_images(str(root / folder))
    except OSError as error:
        raise OptionError("data_dir", Path(error.filename), f"cannot be read ({error.strerror})") from error
    skipped += [os.path.join(folder, name) for name in others]
    return [os.path.join(folder, name) for name in images]


def hash_ends(files: Files, split_seed: int) -> list[bytes]:
    """Returns a hash (16 bytes) of each file, made from its size and from its first and last 4,096 bytes.

    Args:
        files: The files.
        split_seed: The key of the hash function. With another key, all hashes are different.
    """
    # Reading whole files would take minutes for a large data set.
    key = str(split_seed).encode()

    def digest(index: int) -> bytes:
        whole = hashlib.blake2b(digest_size=16, key=key)
        try:
            with open_regular(files.path(index), MAX_IMAGE_BYTES) as file:
                length = os.fstat(file.fileno()).st_size
                whole.update(length.to_bytes(8, "big") + file.read(HASHED_BYTES))
                file.seek(max(0, length - HASHED_BYTES))
                whole.update(file.read(HASHED_BYTES))
        except OSError:  # decoding will report the file
            whole.update(files.names[index])
        return whole.digest()

    if len(files.names) > MANY_FILES:
        print(f"reading the ends of {len(files.names):,} files below {escape_control_chars(files.root)}", flush=True)

    with ThreadPoolExecutor(READER_THREADS) as pool:
        return list(pool.map(digest, range(len(files.names))))


def hash_whole(files: Files, index: Sequence[int], split_seed: int) -> list[bytes]:
    """Returns a hash (16 bytes) of the whole content of each file at the positions `index`.

    Args:
        files: The files.
        index: The positions of the files to hash.
        split_seed: The key of the hash function. With another key, all hashes are different.
    """
    key = str(split_seed).encode()

    def digest(number: int) -> bytes:
        with open_regular(files.path(number), MAX_IMAGE_BYTES) as file:
            return hashlib.blake2b(hashlib.file_digest(file, "blake2b").digest(), digest_size=16, key=key).digest()

    with ThreadPoolExecutor(READER_THREADS) as pool:
        return list(pool.map(digest, index))


def hash_files(files: Files, split_seed: int, ends: list[bytes] | None = None) -> list[bytes]:
    """Returns a hash (16 bytes) of each file; files with the same content have the same hash.

    It is made from the size and the ends of a file (`hash_ends`). If several files have the same such hash, the whole
    contents of these files are hashed instead.

    Args:
        files: The files.
        split_seed: The key of the hash function. With another key, all hashes are different.
        ends: The result of `hash_ends` for these files; None to compute it.
    """
    found = list(ends or hash_ends(files, split_seed))
    times = Counter(found)
    tied = [index for index, value in enumerate(found) if times[value] > 1]
    for index, value in zip(tied, hash_whole(files, tied, split_seed), strict=True):
        found[index] = value
    return found


def find_duplicates(train: Files, test: Files, ends: tuple[list[bytes], list[bytes]]) -> list[int]:
    """Returns the positions of the test files that have the same content as a training file.

    Args:
        train: The training files.
        test: The test files.
        ends: The results of `hash_ends` for the training and the test files.
    """
    # Only files whose ends are the same are read as a whole.
    common = set(ends[0]) & set(ends[1])
    index = [[k for k, value in enumerate(part) if value in common] for part in ends]
    trained_on = set(hash_whole(train, index[0], 0))
    return [k for k, value in zip(index[1], hash_whole(test, index[1], 0), strict=True) if value in trained_on]


def unpack_imagenet(root: Path) -> None:
    """Unpacks the official archives of ImageNet in the folder `root` into its folders `train` and `val`.

    Raises:
        OptionError: `val` exists already, another process is unpacking, or an archive is missing or damaged.
    """
    # The images are unpacked into a folder beside, so that `train` and `val` exist only when they are complete. The
    # folder also tells other processes that this one is unpacking.
    beside = root / UNPACKING
    if (root / "val").exists():
        raise OptionError("data_dir", root / "val", "exists and train does not: remove it to have both unpacked")
    try:
        beside.mkdir()
    except FileExistsError:
        allowed = "another process is unpacking here; if none is, delete this folder and start again"
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
