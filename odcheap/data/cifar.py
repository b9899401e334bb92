"""Where small images come from: the official CIFAR files, folders of images, a download, scikit-learn's digits."""

import socket
import urllib.error
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from odcheap.data import cache, image_files
from odcheap.utils.text import escape_control_chars
from odcheap.utils.errors import OptionError

CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}
NETWORK_TIMEOUT = 60  # seconds without a byte


@dataclass(frozen=True)
class Images:
    """uint8 (N, 3, H, W) with labels, to train on and to test on; `classes` are the labels' names.

    `test_files` are the test images' own files, None where they have none.
    """

    train: Tensor
    train_target: Tensor
    test: Tensor
    test_target: Tensor
    classes: list[str]
    test_files: list[Path] | None = None


def digits() -> Images:
    """scikit-learn's 1,797 hand-written digits, 8 x 8, grey repeated to RGB; every fifth image (360) is the test."""
    raw = load_digits()
    grey = torch.from_numpy(np.round(raw.images * 255 / 16).astype(np.uint8))
    images = grey[:, None].expand(-1, 3, -1, -1).contiguous()
    target = torch.from_numpy(raw.target.astype(np.int64))
    test = torch.arange(len(target)) % 5 == 0
    return Images(images[~test], target[~test], images[test], target[test], [str(name) for name in raw.target_names])


def cifar(name: str, data_dir: str, train_images: int, test_images: int, download: bool) -> Images:
    """CIFAR-10 or -100 from the official files, a tree `<data_dir>/<name>/{train,test}/<class>/*`, or a download.

    Raises `OptionError` where none of these is there and whole, or the name is neither.
    """
    if name not in CIFAR:
        raise OptionError("data.load.name", name, f"must be one of {', '.join(CIFAR)}")
    official = CIFAR[name]
    root = Path(data_dir)
    if root.exists() and not root.is_dir():
        raise OptionError("data_dir", data_dir, "must be a folder")
    try:
        return from_official(official, data_dir)
    except RuntimeError as error:  # torchvision's word for files that are missing or fail their md5
        if (root / official.base_folder).exists():
            why = f"{official.base_folder} is incomplete or damaged; delete it to have it downloaded again"
            raise missing(data_dir, name, why) from error
    if (root / name).is_dir():
        return from_tree(root / name, train_images, test_images)
    if not download:
        raise missing(data_dir, name, "and data.load.download is false")
    print(f"downloading {name} to {escape_control_chars(data_dir)}", flush=True)
    return from_download(official, data_dir, name)


def from_official(official: type[CIFAR10], data_dir: str) -> Images:
    train, test = official(data_dir, train=True), official(data_dir, train=False)
    pixels = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in (train, test)]
    targets = [torch.tensor(part.targets) for part in (train, test)]
    return Images(pixels[0], targets[0], pixels[1], targets[1], list(train.classes))


def from_download(official: type[CIFAR10], data_dir: str, name: str) -> Images:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        official(data_dir, train=True, download=True)
        return from_official(official, data_dir)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise missing(data_dir, name, f"and the download failed ({getattr(error, 'reason', error)})") from error
    except (OSError, RuntimeError, EOFError) as error:
        raise missing(data_dir, name, f"and the download came to nothing ({error})") from error
    finally:
        socket.setdefaulttimeout(before)


def missing(data_dir: str, name: str, why: str) -> OptionError:
    return OptionError(
        "data_dir", data_dir, f"must hold {name}'s official files or a tree {name}/{{train,test}}/<class>/*; {why}"
    )


def from_tree(tree: Path, train_images: int, test_images: int) -> Images:
    """Decodes an `ImageFolder` tree, once; `OptionError` where a part, a class or a picture is missing."""
    parts = {part: listing(tree / part) for part in ("train", "test")}
    if parts["train"].keys() != parts["test"].keys():
        odd = sorted(parts["train"].keys() ^ parts["test"].keys())
        raise OptionError("data_dir", tree, f"train and test must have the same classes; only one has {', '.join(odd)}")
    for part, expected in (("train", train_images), ("test", test_images)):
        found = sum(len(files) for files in parts[part].values())
        if found != expected:
            allowed = f"half unpacked? data.load.{part}_images={expected} images are expected, {found} are there"
            raise OptionError("data_dir", tree / part, allowed)
    every = [path for part in parts.values() for paths in part.values() for path in paths]

    def decoded() -> tuple[dict[str, Tensor], list[str]]:
        print(f"reading {len(every):,} pictures below {escape_control_chars(tree)}, once", flush=True)  # CIFAR's take 20 s
        train, train_target = decode(parts["train"])
        test, test_target = decode(parts["test"])
        tensors = {"train": train, "train_target": train_target, "test": test, "test_target": test_target}
        return tensors, list(parts["train"])

    tensors, classes = cache.recalled(tree.parent / f".{tree.name}.safetensors", cache.key_of(every), decoded)
    return Images(**tensors, classes=classes, test_files=[file for files in parts["test"].values() for file in files])


def listing(folder: Path) -> dict[str, list[Path]]:
    """Image files by class, classes and files in alphabetical order."""
    if not folder.is_dir():
        raise OptionError("data_dir", folder, "no such folder; train/<class>/* and test/<class>/* are expected")
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    files = {c.name: sorted(f for f in c.iterdir() if image_files.is_named_so(f.name)) for c in classes}
    empty = [name for name, found in files.items() if not found]
    if empty or not files:
        raise OptionError("data_dir", folder, f"no images in {', '.join(empty) or 'it'}")
    return files


def decode(files: dict[str, list[Path]]) -> tuple[Tensor, Tensor]:
    pixels, target = [], []
    for label, paths in enumerate(files.values()):
        for path in paths:
            pixels.append(decode_one(path))
            target.append(label)
            if pixels[-1].shape != pixels[0].shape:
                raise OptionError("data_dir", path, f"all images must have one size, {pixels[0].shape[:2]}")
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), torch.tensor(target)


def decode_one(path: Path) -> np.ndarray:
    """(H, W, 3) uint8."""
    try:
        return np.asarray(image_files.decode_image(path))
    except image_files.ImageError as error:
        raise OptionError("data_dir", path, str(error).removeprefix(f"{path} ")) from error
