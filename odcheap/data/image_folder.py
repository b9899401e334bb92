"""Data sets of image files: decoded and augmented by loader processes, normalized on the training device."""

import multiprocessing.queues
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from odcheap.data.base import Batch, BatchOrder, ImageData, LabeledImage, Process, ResumableBatches
from odcheap.data.folder_trees import Files, Tree, find_duplicates, hash_ends, hash_files
from odcheap.data.splits import hash_split, split_stratified
from odcheap.data.transforms import LARGEST_SIDE, Normalization, augmentation_stream, stack_views
from odcheap.predict import ImageError, decode_image, escape_control_chars, measure_16_bits
from odcheap.utils.arguments import check_arguments
from odcheap.utils.console import say
from odcheap.utils.errors import Failure, OptionError
from odcheap.utils.seeds import temporary_seed
from odcheap.utils.signals import STOP_SIGNALS

MAX_TRIES = 20  # if so many successive images are unreadable, the batch fails
SAMPLED_FILES = 200  # files of which the kind of pixels is looked at before the training
NO_TARGET = -1  # label of an image that cannot be read
BATCH_TIMEOUT = 600  # seconds without a batch after which the run ends


class Sample(NamedTuple):
    """An image (C, H, W) uint8 or a batch of them, with labels, and the (file, reason) of each that cannot be read."""

    image: Tensor
    target: Tensor
    broken: list[tuple[str, str]]


def training_transform(size: int, min_scale: float, flip: bool) -> v2.Transform:
    """Returns a random crop of at least `min_scale` of the area, resized to `size` x `size`, and perhaps a flip."""
    flips = [v2.RandomHorizontalFlip()] if flip else []
    return v2.Compose([v2.RandomResizedCrop(size, scale=(min_scale, 1.0)), *flips, v2.PILToTensor()])


def evaluation_transform(size: int, shorter_side: int) -> v2.Transform:
    """Returns a resize of the shorter side to `shorter_side`, then a center crop of `size` x `size`."""
    return v2.Compose([v2.Resize(shorter_side), v2.CenterCrop(size), v2.PILToTensor()])


class TrainImages(Dataset):
    """Augmented images by (epoch, index); the augmentation depends on (seed, epoch, index) only.

    The next readable image replaces one that cannot be read. If 20 in a row cannot be read, the sample has the label
    -1. With more than one view a sample has so many augmentations of an image, (S, C, H, W).
    """

    def __init__(
        self,
        files: Files,
        transform: v2.Transform,
        seed: int,
        size: int,
        views: int = 1,
        bit_depth: int | None = None,
    ):
        self.files, self.transform, self.seed, self.size, self.views = files, transform, seed, size, views
        self.bit_depth = bit_depth

    def __getitem__(self, index: tuple[int, int]) -> Sample:
        epoch, number = index
        broken = []
        for k in range(min(MAX_TRIES, len(self.files.names))):
            i = (number + k) % len(self.files.names)
            try:
                image = decode_image(self.files.path(i), self.bit_depth)
            except ImageError as error:
                broken.append((str(self.files.path(i)), str(error)))
                continue
            views = [self.augment(image, epoch, number, view) for view in range(self.views)]
            return Sample(
                torch.stack(views) if self.views > 1 else views[0], torch.tensor(self.files.target[i]), broken
            )
        return empty_sample(self.size, broken, self.views)

    def augment(self, image: Image.Image, epoch: int, index: int, view: int) -> Tensor:
        with temporary_seed(self.seed, *augmentation_stream(epoch, index, view)):
            return self.transform(image)


class EvalImages(Dataset):
    """Images by index, resized and cropped. An image that cannot be read is black and has the label -1."""

    def __init__(self, files: Files, transform: v2.Transform, size: int, bit_depth: int | None = None):
        self.files, self.transform, self.size, self.bit_depth = files, transform, size, bit_depth

    def __getitem__(self, index: int) -> Sample:
        try:
            image = decode_image(self.files.path(index), self.bit_depth)
        except ImageError as error:
            return empty_sample(self.size, [(str(self.files.path(index)), str(error))])
        return Sample(self.transform(image), torch.tensor(self.files.target[index]), [])


def empty_sample(size: int, broken: list[tuple[str, str]], views: int = 1) -> Sample:
    shape = (views, 3, size, size) if views > 1 else (3, size, size)
    return Sample(torch.zeros(shape, dtype=torch.uint8), torch.tensor(NO_TARGET), broken)


def collate(samples: list[Sample]) -> Sample:
    """Stacks samples into a batch, (N, C, H, W) or (S, N, C, H, W), channels last in memory."""
    images = torch.stack([sample.image for sample in samples], dim=-4)
    views = images.view(-1, *images.shape[-4:])
    images = stack_views([view.contiguous(memory_format=torch.channels_last) for view in views])
    broken = [entry for sample in samples for entry in sample.broken]
    return Sample(images, torch.stack([sample.target for sample in samples]), broken)


def refuse_16_bits(files: Files) -> None:
    """Raises `OptionError` if some of the files have 16 bits a channel; it looks at up to 200 of them."""
    count = len(files.names)
    sample = [files.path(k) for k in np.unique(np.linspace(0, count - 1, SAMPLED_FILES).astype(int))] if count else []
    found = {path: largest for path in sample if (largest := measure_16_bits(path)) is not None}
    if found:
        largest = max(found.values())
        bits = next(bits for bits in (8, 10, 12, 14, 16) if largest < 1 << bits)
        seen = f"{len(found)} of {len(sample)} files, such as {next(iter(found))}, have 16 bits a channel"
        hint = f"the largest value is {largest}, which {bits} bits can hold" if largest else "they are no gray images"
        raise OptionError("data.bit_depth", None, f"must say how many bits are used: {seen}; {hint}")


def prepare_loader_process(_: int) -> None:
    """Prepares a loader process: for signals, and for an error at the end of its work.

    Signals to the whole process group (from Slurm or Ctrl-C) are ignored. The run handles them: it saves a checkpoint,
    for which it needs its loader processes, and ends them afterwards. Only a signal from the run itself, which
    multiprocessing sends at exit, ends a loader process.

    A batch that cannot be handed over, because the shared memory is full, ends the process, which the run notices.
    Without this, Python would print a traceback, drop the batch, and the run would wait for it forever.
    """
    # With the start method forkserver, `os.getppid()` is the server and not the run.
    parent = multiprocessing.parent_process()
    run = parent.pid if parent is not None else os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def wait() -> None:
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != run:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda *_: os._exit(1))  # type: ignore


class BrokenImages:
    """The image files that could not be read so far.

    Args:
        limit: The number of files that may be unreadable.
    """

    def __init__(self, limit: int):
        self.limit, self.seen, self.last = limit, set(), ""

    def report(self, found: list[tuple[str, str]]) -> None:
        """Prints a warning for each new (file, reason); raises `OptionError` if there are more than `limit`."""
        for path, reason in found:
            if path in self.seen:
                continue
            self.seen.add(path)
            self.last = path
            count = f"{len(self.seen)} of data.max_broken={self.limit}"
            print(f"warning: {escape_control_chars(reason)}; left out ({count})", flush=True)
            if len(self.seen) > self.limit:
                allowed = f"more images cannot be read, the last one is {path}; the last checkpoint is kept"
                raise OptionError("data.max_broken", self.limit, allowed)

    def gather(self) -> list[str]:
        """Returns the files of all processes; every process must call it."""
        seen = [sorted(self.seen)]
        if torch.distributed.is_initialized():
            seen *= torch.distributed.get_world_size()
            torch.distributed.all_gather_object(seen, sorted(self.seen))
        return sorted(set().union(*seen))


class Stream:
    """Loads batches of images onto the device with worker processes.

    Images that the data set marks as unreadable are left out of their batch.
    """

    def __init__(self, images: Dataset, norm: Normalization, device: torch.device, workers: int, broken: BrokenImages):
        self.norm, self.device, self.broken = norm, device, broken
        self.plan: list[list] = []  # the images of each batch; `batches` fills it, so that workers can live on
        self.loader = DataLoader(
            images,
            batch_sampler=self.plan,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=prepare_loader_process,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            timeout=BATCH_TIMEOUT if workers else 0,
        )

    def batches(self, plan: list[list]) -> Iterator[Batch]:
        """Yields the batches whose images a plan lists."""
        self.plan[:] = plan
        for sample in self.loader:
            self.broken.report(sample.broken)
            images, target = sample.image, sample.target
            readable = target != NO_TARGET  # on the CPU, so that nothing waits for the GPU
            if not readable.all():
                images, target = images[..., readable, :, :, :], target[readable]
            images, target = (t.to(self.device, non_blocking=True) for t in (images, target))
            views = images if images.ndim == 5 else images[None]
            yield Batch(stack_views([self.norm.apply(view) for view in views]), target)


class TrainStream(ResumableBatches):
    """Training batches of an epoch; raises `Failure` if no image can replace an unreadable one."""

    def __init__(self, stream: Stream, order: BatchOrder):
        super().__init__(order)
        self.stream = stream

    def batches_from(self, start: int) -> Iterator[Batch]:
        planned = self.sampler.batches()[start:]
        plan = [[(self.sampler.epoch, i) for i in index.tolist()] for index, _ in planned]
        for batch, indices, (_, share) in zip(self.stream.batches(plan), plan, planned, strict=True):
            if len(batch.target) < len(indices):
                last = self.stream.broken.last
                raise Failure(f"data_dir: no image of {MAX_TRIES} can be read; the last one is {last}")
            yield batch._replace(share=share)


class EvalStream:
    """Every readable image once over all processes; raises `Failure` if this process has none."""

    def __init__(self, stream: Stream, count: int, batch_size: int, process: Process):
        self.stream, self.count = stream, count
        own = list(range(process.rank, count, process.world_size))
        self.plan = [own[k : k + batch_size] for k in range(0, len(own), batch_size)]

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        readable = 0
        for batch in self.stream.batches(self.plan):
            readable += len(batch.target)
            if len(batch.target):
                yield batch
        if not readable:
            raise Failure(f"data_dir: none of {self.count} images to evaluate can be read: {self.stream.broken.last}")


@check_arguments("data")
class ImageFolderData(ImageData):
    """Image files in folders of classes, which are decoded again in each epoch.

    Args:
        load: A function that lists the files, such as `list_class_folders` or `list_imagenet` with its options. If it
            lists no held-out files, `val_size` of the training files are held out, stratified, by their contents.
        image_size: Side of the images in pixels.
        crop_ratio: Evaluation resizes the shorter side to `image_size / crop_ratio` and crops the center.
        min_scale: Training crops a random part of at least this share of the area.
        flip: Whether training images are flipped horizontally at random.
        workers: Loader processes of each process; None for one on each core.
        max_broken: The number of files that may be unreadable; more of them end the run.
        bit_depth: The number of bits that are used in images with 16 bits a channel. With None there may be no such
            images, since a file does not say whether its values end at 4,095 or at 65,535.
        **options: The arguments of `ImageData`.

    Raises:
        OptionError: The options do not suit the images.
    """

    def __init__(
        self,
        load: Callable[[], Tree],
        image_size: Annotated[int, Field(ge=1, le=LARGEST_SIDE)],
        crop_ratio: Annotated[float, Field(ge=0.1, le=1)],
        min_scale: Annotated[float, Field(ge=1e-6, le=1)],
        flip: bool,
        workers: Annotated[int, Field(ge=0, le=1024)] | None,
        max_broken: Annotated[int, Field(ge=0)],
        bit_depth: Annotated[int, Field(ge=8, le=16)] | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        self.load, self.workers = load, workers
        self.image_size, self.shorter_side = (3, image_size, image_size), round(image_size / crop_ratio)
        self.train_transform = training_transform(image_size, min_scale, flip)
        self.eval_transform = evaluation_transform(image_size, self.shorter_side)
        self.broken, self.bit_depth = BrokenImages(max_broken), bit_depth
        self.parts: dict[str, Files] = {}

    def read(self) -> None:
        if self.parts:
            return
        tree = self.load()
        self.classes = tree.classes
        folders = [name for name in tree.skipped if name.endswith("/")]
        skipped = [name for name in tree.skipped if not name.endswith("/")]
        if skipped:
            say(f"skipped {len(skipped):,} files whose names are not those of images, such as {skipped[0]}")
        if folders:
            listed = ", ".join(folders[:3])
            say(f"skipped {len(folders):,} folders of thumbnails, copies, or images without labels, such as {listed}")

        # Hold out training files, unless the folders name held-out files.
        ends = hash_ends(tree.train, self.split_seed)
        digests = hash_files(tree.train, self.split_seed, ends)
        if tree.val is None:
            split = split_stratified(digests, torch.from_numpy(tree.train.target), self.val_size)
            self.fingerprint = split.fingerprint
            self.parts = {"train": tree.train.subset(split.train), "val": tree.train.subset(split.val)}
        else:
            # In the order of the contents, so that renamed files give the same run.
            order = np.array(sorted(range(len(digests)), key=digests.__getitem__))
            both = digests + hash_files(tree.val, self.split_seed)
            target = np.concatenate([tree.train.target, tree.val.target])
            self.fingerprint = hash_split(both, target, np.arange(len(digests), len(both)))
            self.parts = {"train": tree.train.subset(order), "val": tree.val}
        self.parts["test"] = tree.test
        twice = find_duplicates(tree.train, tree.test, (ends, hash_ends(tree.test, self.split_seed)))
        if twice:
            first = os.fsdecode(tree.test.names[twice[0]])
            say(f"warning: {len(twice):,} test images are also training images, byte for byte, such as {first}")
        if self.bit_depth is None:
            refuse_16_bits(self.parts["train"])
        self.check()

    @property
    def labels(self) -> dict[str, np.ndarray]:
        return {part: files.target for part, files in self.parts.items()}

    def unreadable(self) -> list[str]:
        return self.broken.gather()

    def rows(self) -> Iterator[tuple[str, str, str]]:
        for part, files in self.parts.items():
            for name, label in zip(files.names, files.target, strict=True):
                yield os.fsdecode(name), self.classes[label], part

    def train_loader(self, process: Process, views: int = 1) -> TrainStream:
        options = self.seed, self.image_size[-1], views, self.bit_depth
        images = TrainImages(self.parts["train"], self.train_transform, *options)
        return TrainStream(self.stream(images, process), self.train_order(process))

    def eval_loader(self, part: str, process: Process) -> EvalStream:
        stream = self.stream(self.eval_images(part), process)
        return EvalStream(stream, len(self.parts[part].names), self.eval_batch_size, process)

    def eval_images(self, part: str) -> EvalImages:
        return EvalImages(self.parts[part], self.eval_transform, self.image_size[-1], self.bit_depth)

    def stream(self, images: Dataset, process: Process) -> Stream:
        workers = self.workers
        if workers is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            workers = max(1, cores // process.local_world_size)
        return Stream(images, self.norm, process.device, workers, self.broken)

    def iterate_images(self, part: str, index: Iterable[int]) -> Iterator[LabeledImage]:
        images, files = self.eval_images(part), self.parts[part]
        for k in index:
            sample = images[k]
            if int(sample.target) != NO_TARGET:
                yield LabeledImage(sample.image, int(sample.target), files.path(k))
