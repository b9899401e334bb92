"""Pictures from files, one by one: decoding, augmentation, and what stands in for those that cannot be read."""

import os
import signal
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from odcheap.data.transforms import stacked, stream_of
from odcheap.predict import IMAGE_SUFFIXES, ImageError, decode_image
from odcheap.utils.seeds import temporary_seed

TRIES = 20  # successive pictures that may be broken before that is the end
NO_TARGET = -1


class Files(NamedTuple):
    """`names` below `root`, as bytes (a million Python strings would be copied into every worker), and labels."""

    root: str
    names: np.ndarray
    target: np.ndarray

    def path(self, index: int) -> Path:
        return Path(self.root, os.fsdecode(self.names[index]))

    def subset(self, index: np.ndarray) -> "Files":
        return Files(self.root, self.names[index], self.target[index])


class Sample(NamedTuple):
    """One picture (C, H, W) uint8 or a batch of them, its label, and what could not be read instead, with reasons."""

    image: Tensor
    target: Tensor
    broken: list[tuple[str, str]]


def is_named_so(name: str) -> bool:
    """Whether a file is a picture by its name; hidden ones are not."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def training_transform(size: int, min_scale: float, flip: bool) -> v2.Transform:
    """A random part of at least `min_scale` of the area, at `size` x `size`; flipped every second time."""
    steps = [v2.RandomResizedCrop(size, scale=(min_scale, 1.0))]
    return v2.Compose([*steps, *([v2.RandomHorizontalFlip()] if flip else []), v2.PILToTensor()])


def evaluation_transform(size: int, shorter_side: int) -> v2.Transform:
    """The shorter side at `shorter_side`, then the `size` x `size` in the middle."""
    return v2.Compose([v2.Resize(shorter_side), v2.CenterCrop(size), v2.PILToTensor()])


class TrainingPictures(Dataset):
    """Asked for (epoch, index): what is random about a picture is a function of (seed, epoch, index).

    The next readable picture takes a broken one's place. Where 20 in a row are broken the sample has the label -1.
    With more `views` than one a sample has so many augmentations, (S, C, H, W).
    """

    def __init__(self, files: Files, transform: v2.Transform, seed: int, size: int, views: int = 1):
        self.files, self.transform, self.seed, self.size, self.views = files, transform, seed, size, views

    def __getitem__(self, where: tuple[int, int]) -> Sample:
        epoch, index = where
        broken = []
        for k in range(min(TRIES, len(self.files.names))):
            i = (index + k) % len(self.files.names)
            try:
                picture = decode_image(self.files.path(i))
            except ImageError as error:
                broken.append((str(self.files.path(i)), str(error)))
                continue
            seen = [self.view(picture, epoch, index, view) for view in range(self.views)]
            return Sample(torch.stack(seen) if self.views > 1 else seen[0], torch.tensor(self.files.target[i]), broken)
        return without_picture(self.size, broken, self.views)

    def view(self, picture: Image.Image, epoch: int, index: int, view: int) -> Tensor:
        with temporary_seed(self.seed, *stream_of(epoch, index, view)):
            return self.transform(picture)


class EvaluationPictures(Dataset):
    """Asked for an index. A broken picture comes black, with the label -1: evaluation leaves it out."""

    def __init__(self, files: Files, transform: v2.Transform, size: int):
        self.files, self.transform, self.size = files, transform, size

    def __getitem__(self, index: int) -> Sample:
        try:
            picture = decode_image(self.files.path(index))
        except ImageError as error:
            return without_picture(self.size, [(str(self.files.path(index)), str(error))])
        return Sample(self.transform(picture), torch.tensor(self.files.target[index]), [])


def without_picture(size: int, broken: list[tuple[str, str]], views: int = 1) -> Sample:
    shape = (views, 3, size, size) if views > 1 else (3, size, size)
    return Sample(torch.zeros(shape, dtype=torch.uint8), torch.tensor(NO_TARGET), broken)


def leave_signals(_: int) -> None:
    """In a loader's process: what tells a whole group to end (Slurm, Ctrl-C) is for the run, which saves and then ends
    this process too. Only the run's own signal, multiprocessing's at exit, ends it.
    """
    those, run = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}, os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, those)

    def wait() -> None:
        while signal.sigwaitinfo(those).si_pid != run:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def collate(samples: list[Sample]) -> Sample:
    """A batch, (N, C, H, W) or (S, N, C, H, W), channels last in memory."""
    images = torch.stack([sample.image for sample in samples], dim=-4)
    views = images.view(-1, *images.shape[-4:])
    images = stacked([view.contiguous(memory_format=torch.channels_last) for view in views])
    broken = [entry for sample in samples for entry in sample.broken]
    return Sample(images, torch.stack([sample.target for sample in samples]), broken)
