"""Loads CIFAR-10 and CIFAR-100 from the official files, which it can download, or from folders of image files."""

import hashlib
import os
import socket
import urllib.error
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import save
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from odcheap.data.folder_trees import Files, list_parts
from odcheap.data.in_memory import Images
from odcheap.predict import ImageError, decode_image, escape_control_chars
from odcheap.utils.errors import OptionError
from odcheap.utils.files import read_safetensors, write_atomic

CLASSES = {"cifar10": CIFAR10, "cifar100": CIFAR100}
NETWORK_TIMEOUT = 60  # seconds without a byte received
READ_ONLY = "data.load.read_only is true"
CACHE_FORMAT = "1"  # must change if decoding changes


def load_cifar(
    name: str,
    data_dir: str,
    train_images: Annotated[int, Field(ge=1)],
    test_images: Annotated[int, Field(ge=1)],
    download: bool = True,
    read_only: bool = False,
) -> Images:
    """Loads CIFAR-10 or CIFAR-100.

    Args:
        name: "cifar10" or "cifar100".
        data_dir: The folder that contains the official files, or image files in `<name>/{train,test}/<class>/*`.
        train_images: The number of image files that must be in the folder `train`, if there are image files.
        test_images: The number of image files that must be in the folder `test`, if there are image files.
        download: Whether to download the official files if the folder contains neither these nor image files.
        read_only: True to write nothing to the folder, neither a download nor a cache of decoded images.

    Raises:
        OptionError: The name is unknown, or the images are missing, incomplete or damaged.
    """
    if name not in CLASSES:
        raise OptionError("data.load.name", name, f"must be one of {', '.join(CLASSES)}")
    dataset = CLASSES[name]
    root = Path(data_dir)
    if root.exists() and not root.is_dir():
        raise OptionError("data_dir", data_dir, "must be a folder")
    try:
        return load_official(dataset, data_dir)
    except RuntimeError as error:  # torchvision raises it for files that are missing or fail their md5
        if (root / dataset.base_folder).exists():
            why = f"{dataset.base_folder} is incomplete or damaged; delete it to have it downloaded again"
            raise missing_error(data_dir, name, why) from error
    if (root / name).is_dir():
        return load_tree(root / name, train_images, test_images, read_only)
    if not download or read_only:
        reason = "data.load.download is false" if not download else READ_ONLY
        raise missing_error(data_dir, name, f"and {reason}")
    print(f"downloading {name} to {escape_control_chars(data_dir)}", flush=True)
    return download_official(dataset, data_dir, name)


def load_official(dataset: type[CIFAR10], data_dir: str) -> Images:
    """Loads CIFAR from the official files with torchvision.

    Args:
        dataset: torchvision's class of the data set, such as `CIFAR10`.
        data_dir: The folder that contains the official files.

    Raises:
        RuntimeError: A file is missing, or its MD5 checksum is wrong.
    """
    train, test = dataset(data_dir, train=True), dataset(data_dir, train=False)
    pixels = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in (train, test)]
    targets = [torch.tensor(part.targets) for part in (train, test)]
    return Images(pixels[0], targets[0], pixels[1], targets[1], list(train.classes))


def download_official(dataset: type[CIFAR10], data_dir: str, name: str) -> Images:
    """Downloads the official files of CIFAR with torchvision, and loads them.

    Args:
        dataset: torchvision's class of the data set, such as `CIFAR10`.
        data_dir: The folder to which the files are downloaded.
        name: The name of the data set, for messages.

    Raises:
        OptionError: The download fails, or the files cannot be used.
    """
    # torchvision has no option for a timeout, so it is set for all sockets and restored.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        dataset(data_dir, train=True, download=True)
        return load_official(dataset, data_dir)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        why = f"and the download failed ({getattr(error, 'reason', error)})"
        raise missing_error(data_dir, name, why) from error
    except (OSError, RuntimeError, EOFError) as error:
        raise missing_error(data_dir, name, f"and the downloaded files cannot be used ({error})") from error
    finally:
        socket.setdefaulttimeout(before)


def missing_error(data_dir: str, name: str, why: str) -> OptionError:
    """Returns the error for a folder that does not contain the images of CIFAR; the caller raises it.

    Args:
        data_dir: The folder, for the message.
        name: "cifar10" or "cifar100".
        why: The end of the message, such as why nothing was downloaded.
    """
    return OptionError(
        "data_dir", data_dir, f"must hold {name}'s official files or a tree {name}/{{train,test}}/<class>/*; {why}"
    )


def load_tree(tree: Path, train_images: int, test_images: int, read_only: bool = False) -> Images:
    """Loads CIFAR from image files in `{train,test}/<class>/*`.

    The decoded images are written to a cache file beside the folder, which later calls read.

    Args:
        tree: The folder that contains `train` and `test`.
        train_images: The number of image files that must be in `train`.
        test_images: The number of image files that must be in `test`.
        read_only: True not to write the cache file.

    Raises:
        OptionError: A folder or a class is missing, the number of files is wrong, or an image cannot be decoded.
    """
    # A tree with another number of files is often half unpacked or half copied.
    parts, classes, _ = list_parts(tree, ("train", "test"))
    paths = {part: [files.path(k) for k in range(len(files.names))] for part, files in parts.items()}
    for part, expected in (("train", train_images), ("test", test_images)):
        found = len(paths[part])
        if found != expected:
            allowed = f"data.load.{part}_images={expected} images are expected, {found} are there (half unpacked?)"
            raise OptionError("data_dir", tree / part, allowed)

    # The cache is used as long as no file has been added, removed or written.
    key = hash_file_stats(paths["train"] + paths["test"])
    cache = tree.parent / f".{tree.name}.safetensors"
    tensors = read_cache(cache, key, {part: torch.from_numpy(files.target) for part, files in parts.items()})
    if tensors is None:
        count = train_images + test_images
        print(f"reading {count:,} images below {escape_control_chars(tree)}, once", flush=True)  # takes 20 s for CIFAR
        train, train_target = decode_images(parts["train"])
        test, test_target = decode_images(parts["test"])
        tensors = {"train": train, "train_target": train_target, "test": test, "test_target": test_target}
        if not read_only:
            write_cache(cache, key, tensors)
    return Images(**tensors, classes=classes, test_files=paths["test"])


def decode_images(files: Files) -> tuple[Tensor, Tensor]:
    """Decodes image files, which must all have the same size.

    Args:
        files: The files and their labels.

    Returns:
        The images (N, 3, H, W), uint8, and their labels (N,), int64.

    Raises:
        OptionError: A file cannot be decoded, or its image has another size than the first one.
    """
    pixels = []
    for path in map(files.path, range(len(files.names))):
        try:
            pixels.append(np.asarray(decode_image(path)))
        except ImageError as error:
            raise OptionError("data_dir", path, str(error).removeprefix(f"{path} ")) from error
        if pixels[-1].shape != pixels[0].shape:
            raise OptionError("data_dir", path, f"all images must have one size, {pixels[0].shape[:2]}")
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(files.target)


def hash_file_stats(paths: list[Path]) -> str:
    """Returns a hash of the names, sizes and modification times of files.

    The hash changes if a file is added, removed or written. It does not change if the whole folder is moved, because
    only the last three names of each path are used, such as `train/cat/1.png`.
    """
    whole = hashlib.blake2b(CACHE_FORMAT.encode(), digest_size=16)
    for path in paths:
        stat = os.stat(path)
        name = os.fsencode("/".join(path.parts[-3:]))  # part, class, file
        whole.update(name + f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return whole.hexdigest()


def is_valid_cache(tensors: dict[str, Tensor], target: dict[str, Tensor]) -> bool:
    """Returns whether a cache contains images (N, 3, H, W), uint8, all of the same size, and the expected labels.

    Args:
        tensors: The tensors in the cache by name, which must be "train", "train_target", "test" and "test_target".
        target: The expected labels, a dict with the keys "train" and "test". A cache with other labels is damaged.
    """
    if tensors.keys() != {"train", "train_target", "test", "test_target"}:
        return False
    sizes = set()
    for part in ("train", "test"):
        images, labels = tensors[part], tensors[f"{part}_target"]
        if images.dtype != torch.uint8 or images.dim() != 4 or len(images) != len(target[part]) or 0 in images.shape:
            return False
        if labels.dtype != torch.int64 or not torch.equal(labels, target[part]):
            return False
        sizes.add(images.shape[1:])
    return len(sizes) == 1 and sizes.pop()[0] == 3


def read_cache(path: Path, key: str, target: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Reads a cache file of decoded images; returns None if the file is missing, outdated or damaged.

    Args:
        path: The cache file, in safetensors format.
        key: The hash of the image files (`hash_file_stats`). A cache that was written with another key is outdated.
        target: The expected labels, a dict with the keys "train" and "test".

    Returns:
        A dict with the images "train" and "test" and their labels "train_target" and "test_target".
    """
    if not path.is_file():
        return None
    try:
        tensors, metadata = read_safetensors(path)
    except OptionError as error:  # a damaged cache is not the user's fault
        print(f"decoding again: {error}", flush=True)
        return None
    return tensors if metadata.get("key") == key and is_valid_cache(tensors, target) else None


def write_cache(path: Path, key: str, tensors: dict[str, Tensor]) -> None:
    """Writes a cache file for `read_cache`. If it cannot be written, a line is printed and nothing is raised.

    Args:
        path: The cache file.
        key: The hash of the image files (`hash_file_stats`), which the file stores.
        tensors: The images "train" and "test", and their labels "train_target" and "test_target".
    """
    content = save(tensors, metadata={"key": key})
    try:
        write_atomic(path, lambda file: file.write(content))
    except OSError as error:
        print(f"not cached for the next start: {path} cannot be written ({error.strerror})", flush=True)
