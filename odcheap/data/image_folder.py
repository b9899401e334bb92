"""Data sets of image files. Loader processes decode and augment them; the training device normalizes them."""

import multiprocessing.queues
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL.Image import Transpose
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from odcheap.data.base import Batch, BatchOrder, ImageData, LabeledImage, Process, ResumableBatches
from odcheap.data.folder_trees import Files, Tree, find_duplicates, hash_ends, hash_files
from odcheap.data.policies import Policy
from odcheap.data.transforms import LARGEST_SIDE, Normalization, augmentation_stream, stack_views
from odcheap.predict import (
    ImageError,
    convert_channels,
    decode_image,
    escape_control_chars,
    find_rotation,
    measure_16_bits,
)
from odcheap.utils.arguments import check_arguments
from odcheap.utils.console import say
from odcheap.utils.errors import Failure, OptionError
from odcheap.utils.seeds import make_generator, temporary_seed
from odcheap.utils.signals import STOP_SIGNALS

MAX_TRIES = 20  # if so many successive images are unreadable, the batch fails
SAMPLED_FILES = 200  # files of which the kind of pixels is looked at before the training
NO_TARGET = -1  # label of an image that cannot be read
BATCH_TIMEOUT = 600  # seconds without a batch after which the run ends
REDUCTIONS = (1, 2, 4, 8)  # factors by which the sides of a JPEG can be reduced in decoding
# Rotations that exchange width and height.
QUARTER_TURNS = (Transpose.TRANSPOSE, Transpose.TRANSVERSE, Transpose.ROTATE_90, Transpose.ROTATE_270)


class Sample(NamedTuple):
    """An image, or a batch of images, from a loader process.

    Attributes:
        image: (S, C, H, W), uint8, with S augmentations of an image; (S, N, C, H, W) for a batch of N images. If images
            are not augmented, S is 1.
        target: The label, or the labels (N,) of a batch. The label of an image that cannot be read is -1.
        broken: A pair of the path and the reason for each image that could not be read.
    """

    image: Tensor
    target: Tensor
    broken: list[tuple[str, str]]


class Crop(NamedTuple):
    """A random crop of an image, and whether the crop is flipped.

    The edges and sizes are in pixels of the upright image at its full size, even if it is decoded at a reduced size.
    """

    left: int
    top: int
    width: int
    height: int
    flipped: bool


class TrainingTransform:
    """The augmentation of training images, which takes a random crop, resizes it to a square, and flips it at random.

    Args:
        size: The side of the square in pixels.
        min_scale: The smallest fraction of the image's area that the random crop may have.
        flip: Whether images are flipped horizontally with probability 1/2.
    """

    def __init__(self, size: int, min_scale: float, flip: bool):
        self.size, self.flip = size, flip
        self.random_crop = v2.RandomResizedCrop(size, scale=(min_scale, 1.0))

    def draw(self, image_size: tuple[int, int]) -> Crop:
        """Draws a random crop with PyTorch's global CPU generator, for an upright image of the size (width, height)."""
        width, height = image_size
        image = torch.empty(1, height, width, device="meta")  # it has a size and no memory
        box = self.random_crop.make_params([image])
        return Crop(**box, flipped=self.flip and torch.rand(1).item() < 0.5)

    def choose_reduction(self, crops: list[Crop]) -> int:
        """Returns the factor (1, 2, 4 or 8) by which the sides of an image can be divided when it is decoded.

        It is the largest factor with which each side of each crop keeps at least `size` pixels; 1 if none does.

        Args:
            crops: The crops of this image.
        """
        smallest = min(min(crop.width, crop.height) for crop in crops)
        return max(factor for factor in REDUCTIONS if factor == 1 or smallest >= factor * self.size)

    def apply(self, image: Image.Image, crop: Crop, reduction: int = 1) -> Tensor:
        """Crops, resizes and flips an image.

        Args:
            image: The image, upright, RGB or gray.
            crop: The crop, in pixels of the image at its full size.
            reduction: The factor by which the sides of `image` were divided when it was decoded.

        Returns:
            (C, size, size), uint8.
        """
        # A crop has whole pixels of the reduced image, so its edges move by at most one of them.
        width, height = (round(side / reduction) for side in (crop.width, crop.height))
        left = min(round(crop.left / reduction), image.width - width)
        top = min(round(crop.top / reduction), image.height - height)
        pixels = v2.functional.pil_to_tensor(image.crop((left, top, left + width, top + height)))
        # PyTorch's resizing is several times as fast as Pillow's, and its pixels differ by 1 at most.
        resized = v2.functional.resize(pixels, [self.size, self.size], antialias=True)
        return resized.flip(-1) if crop.flipped else resized


def evaluation_transform(size: int, shorter_side: int) -> v2.Transform:
    """Returns the transform for evaluation, which takes a PIL image and returns a tensor (C, size, size), uint8.

    Args:
        size: The side, in pixels, of the square that is cropped from the center.
        shorter_side: The number of pixels to which the shorter side is resized before the crop.
    """
    return v2.Compose([v2.Resize(shorter_side), v2.CenterCrop(size), v2.PILToTensor()])


class TrainImages(Dataset):
    """A map-style data set of augmented training images; indexing it with (epoch, image_index) returns a `Sample`.

    The augmentation depends on (seed, epoch, image_index) only. A JPEG is decoded with 1/2, 1/4 or 1/8 of its width and
    height if the crops are still large enough then. An image that cannot be read is replaced by the next readable one.
    If 20 images in a row cannot be read, the sample is black and has the label -1.

    Args:
        files: The training files and their labels.
        transform: The random crop and flip.
        seed: The seed of the run.
        views: The number of independent augmentations of each image, S.
        bit_depth: In images with 16 bits a channel, the number of bits that are used; None without such images.
        policy: Further augmentation, after the crop and the flip; None for none.
        color: The color (C,), uint8, with which the policy fills erased rectangles; None for black.
        channels: The number of channels of the images: 3 for RGB, 1 for gray.
    """

    def __init__(
        self,
        files: Files,
        transform: TrainingTransform,
        seed: int,
        views: int = 1,
        bit_depth: int | None = None,
        policy: Policy | None = None,
        color: Tensor | None = None,
        channels: int = 3,
    ):
        self.files, self.transform, self.seed, self.views = files, transform, seed, views
        self.bit_depth, self.policy, self.channels = bit_depth, policy or Policy(), channels
        self.color = torch.zeros((), dtype=torch.uint8) if color is None else color

    def __getitem__(self, index: tuple[int, int]) -> Sample:
        # Try this image, then those that follow it. The random numbers are those of `image_index` in each case.
        epoch, image_index = index
        broken, count, size = [], len(self.files.names), self.transform.size
        for i in range(image_index, image_index + min(MAX_TRIES, count)):
            path = self.files.path(i % count)
            try:
                views = self.load_views(path, epoch, image_index)
            except ImageError as error:
                broken.append((str(path), str(error)))
                continue
            return Sample(torch.stack(views), torch.tensor(self.files.target[i % count]), broken)
        return empty_sample((self.views, self.channels, size, size), broken)

    def load_views(self, path: Path, epoch: int, image_index: int) -> list[Tensor]:
        """Decodes an image file, and returns S random augmentations of the image, (C, size, size) uint8 each.

        S is the argument `views` of the class.

        Args:
            path: The image file.
            epoch: The number of the epoch, from 0.
            image_index: The number of the image in the data set, from 0. The random numbers depend on it, on the seed
                and on the epoch, but not on `path`.
        """
        crops: list[Crop] = []
        reduction = 1

        def reduce(opened: Image.Image) -> None:
            # Of other formats, the size of the upright image is known only after decoding.
            nonlocal crops, reduction
            if opened.format not in ("JPEG", "MPO"):
                return
            width, height = opened.size
            upright = (height, width) if find_rotation(opened) in QUARTER_TURNS else (width, height)
            crops = self.draw_crops(upright, epoch, image_index)
            reduction = self.transform.choose_reduction(crops)
            if reduction > 1:
                opened.draft(None, (width // reduction, height // reduction))

        image = convert_channels(decode_image(path, self.bit_depth, reduce), self.channels)
        crops = crops or self.draw_crops(image.size, epoch, image_index)
        views = [self.transform.apply(image, crop, reduction) for crop in crops]
        if self.policy.is_empty:
            return views
        # The policy takes a batch: each view is one of a single image, with random numbers of its own.
        for view, pixels in enumerate(views):
            random = make_generator(self.seed, *augmentation_stream(epoch, image_index, view, purpose="policy"))
            drawn = self.policy.draw(1, (self.transform.size, self.transform.size), random)
            (batch,) = drawn.for_batches([torch.arange(1)], pixels.device)
            views[view] = self.policy.apply(pixels[None], batch, self.color)[0]
        return views

    def draw_crops(self, image_size: tuple[int, int], epoch: int, image_index: int) -> list[Crop]:
        """Draws a random crop for each of the S augmentations of an image.

        Args:
            image_size: The width and the height of the image in pixels.
            epoch: The number of the epoch, from 0.
            image_index: The number of the image in the data set, from 0.
        """
        crops = []
        for view in range(self.views):
            with temporary_seed(self.seed, *augmentation_stream(epoch, image_index, view)):
                crops.append(self.transform.draw(image_size))
        return crops


class EvalImages(Dataset):
    """A map-style data set of images for evaluation; indexing it with the number of an image returns a `Sample`.

    An image that cannot be read is black and has the label -1.

    Args:
        files: The image files and their labels.
        transform: The transform that `evaluation_transform` returns.
        image_size: (C, H, W) of the images, with three channels for RGB and one for gray.
        bit_depth: In images with 16 bits a channel, the number of bits that are used; None without such images.
    """

    def __init__(
        self, files: Files, transform: v2.Transform, image_size: tuple[int, int, int], bit_depth: int | None = None
    ):
        self.files, self.transform, self.image_size, self.bit_depth = files, transform, image_size, bit_depth

    def __getitem__(self, index: int) -> Sample:
        path = self.files.path(index)
        try:
            image = convert_channels(decode_image(path, self.bit_depth), self.image_size[0])
        except ImageError as error:
            return empty_sample((1, *self.image_size), [(str(path), str(error))])
        return Sample(self.transform(image)[None], torch.tensor(self.files.target[index]), [])


def empty_sample(shape: tuple[int, int, int, int], broken: list[tuple[str, str]]) -> Sample:
    """Returns a sample with a black image and the label -1, in place of an image that cannot be read.

    Args:
        shape: (S, C, H, W) for S augmentations of the image.
        broken: A pair of the path and the reason for each image that could not be read.
    """
    return Sample(torch.zeros(shape, dtype=torch.uint8), torch.tensor(NO_TARGET), broken)


def collate(samples: list[Sample]) -> Sample:
    """Joins samples of single images to one sample with a batch of images; it is the `collate_fn` of the loader.

    Args:
        samples: N samples with images (S, C, H, W), for S augmentations of each image.

    Returns:
        A sample with images (S, N, C, H, W), in which each augmentation (N, C, H, W) has channels-last memory format.
    """
    # The channels are moved to the end before, so that the result is channels-last after one copy.
    images = torch.stack([sample.image.movedim(1, -1) for sample in samples], dim=1).movedim(-1, 2)
    broken = [entry for sample in samples for entry in sample.broken]
    return Sample(images, torch.stack([sample.target for sample in samples]), broken)


def refuse_16_bits(files: Files) -> None:
    """Raises `OptionError` if one of up to 200 files, spread over the whole list, has 16 bits a channel."""
    # The message suggests a bit depth: the smallest usual one that holds the largest value found.
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
    """Prepares a loader process for signals and for full shared memory; it is the `worker_init_fn` of the loader.

    Slurm and Ctrl-C send signals to all processes of a run. The loader process ignores these signals, because the run
    then saves a checkpoint, for which it needs its loader processes. Only a signal from the run itself, which
    multiprocessing sends at exit, ends the loader process.

    If the shared memory is full, a batch cannot be passed to the run. The loader process then ends, and the run notices
    that.
    """
    # With the start method forkserver, `os.getppid()` is the server and not the run.
    parent = multiprocessing.parent_process()
    run = parent.pid if parent is not None else os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    # A thread takes the blocked signals, one after the other, and looks who has sent them.
    def wait() -> None:
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != run:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
    # Python would print a traceback and drop the batch, and the run would wait for the batch forever.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda *_: os._exit(1))  # type: ignore


class BrokenImages:
    """Collects the image files that could not be read so far on this process, and ends the run if there are too many.

    Args:
        limit: The number of files that may be unreadable. With one more, `report` raises `OptionError`.
    """

    def __init__(self, limit: int):
        self.limit, self.seen, self.last = limit, set(), ""

    def report(self, found: list[tuple[str, str]]) -> None:
        """Adds files that could not be read, and prints a warning for each new one.

        Args:
            found: A pair of the path and the reason for each image that could not be read.

        Raises:
            OptionError: There are now more than `limit` files.
        """
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
        """Returns the files that one of the processes could not read, sorted; all processes must call this together."""
        seen = [sorted(self.seen)]
        if torch.distributed.is_initialized():
            seen *= torch.distributed.get_world_size()
            torch.distributed.all_gather_object(seen, sorted(self.seen))
        return sorted(set().union(*seen))


class Stream:
    """Loads batches of images with loader processes, moves them to the device, and normalizes them there.

    Images that the data set marks as unreadable (label -1) are left out of their batch.

    Args:
        images: The data set, `TrainImages` or `EvalImages`.
        norm: The normalization.
        device: The device of the batches.
        workers: The number of loader processes; 0 to load in this process.
        broken: The object to which files that cannot be read are reported.
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
        """Yields normalized batches.

        Args:
            plan: For each batch a list of the indices of its images in the data set. An index of `TrainImages` is
                (epoch, image_index), and one of `EvalImages` is the number of the image.
        """
        self.plan[:] = plan
        for sample in self.loader:
            self.broken.report(sample.broken)
            images, target = sample.image, sample.target
            readable = target != NO_TARGET  # on the CPU, so that nothing waits for the GPU
            if not readable.all():
                images, target = images[:, readable], target[readable]
            images, target = (t.to(self.device, non_blocking=True) for t in (images, target))
            yield Batch(stack_views([self.norm.apply(view) for view in images]), target)


class TrainStream(ResumableBatches):
    """The training batches of an epoch, which are loaded from image files.

    Iterating yields `Batch` objects with normalized images (N, C, H, W), or (S, N, C, H, W) with S augmentations of
    each image. Iterating raises `Failure` if 20 images in a row cannot be read.

    Args:
        stream: The `Stream` that loads the batches.
        order: The sampler that chooses the images of each batch.
    """

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
    """The evaluation batches of one process, which are loaded from image files.

    Iterating yields `Batch` objects with normalized images (N, C, H, W). All processes together yield each readable
    image once. Iterating raises `Failure` if this process can read none of its images.

    Args:
        stream: The `Stream` that loads the batches.
        count: The number of images that all processes evaluate together.
        batch_size: The number of images in a batch of this process.
        process: The process that evaluates the batches.
    """

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
    """A data set of image files in class folders; the files are decoded again in each epoch.

    Args:
        load: A function without arguments that returns the `Tree` of the files, such as a partial of
            `list_class_folders`. If the tree has no held-out files, as many training files as `val_size` says are held
            out; which ones depends on the contents of the files.
        image_size: The side of the images in pixels.
        crop_ratio: For evaluation the shorter side of an image is resized to `image_size / crop_ratio` pixels, and then
            the center is cropped.
        min_scale: The smallest fraction of an image's area that the random crop of training images may have.
        flip: Whether training images are flipped horizontally with probability 1/2.
        workers: The number of loader processes of each training process; None to divide all CPU cores among these.
        max_broken: The number of files that may be unreadable; one more raises `OptionError` and so ends the run.
        bit_depth: In images with 16 bits a channel, the number of bits that are used. A file does not say this; with
            None such images raise `OptionError`.
        channels: The number of channels of the images for the network: 3 for RGB, 1 for gray.
        **options: The arguments of `ImageData`.

    Raises:
        OptionError: The value of an argument is not allowed.
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
        channels: Literal[1, 3] = 3,
        **options: Any,
    ):
        super().__init__(**options)
        self.load, self.workers = load, workers
        self.image_size, self.shorter_side = (channels, image_size, image_size), round(image_size / crop_ratio)
        self.norm.check_channels(channels)
        self.train_transform = TrainingTransform(image_size, min_scale, flip)
        self.eval_transform = evaluation_transform(image_size, self.shorter_side)
        self.broken, self.bit_depth = BrokenImages(max_broken), bit_depth
        self.parts: dict[str, Files] = {}

    def read(self) -> None:
        if self.parts:
            return
        # List the files, and say what was skipped.
        tree = self.load()
        self.classes = tree.classes
        folders = [name for name in tree.skipped if name.endswith("/")]
        others = [name for name in tree.skipped if not name.endswith("/")]
        if others:
            say(f"skipped {len(others):,} files whose names are not those of images, such as {others[0]}")
        if folders:
            what = "folders of thumbnails, copies, or images without labels"
            say(f"skipped {len(folders):,} {what}, such as {', '.join(folders[:3])}")

        # Hold out some training files, unless there is a folder of held-out files. Test files are hashed as a whole
        # only if the run is limited.
        ends = hash_ends(tree.train, self.split_seed)
        digests, files, held_out = hash_files(tree.train, self.split_seed, ends), tree.train, None
        if tree.val is not None:
            digests += hash_files(tree.val, self.split_seed)
            files, held_out = tree.train.join(tree.val), len(tree.val.names)
        self.divide(digests, files.target, tree.test.target, lambda: hash_files(tree.test, self.split_seed), held_out)
        own = {"train": files, "val": files, "test": tree.test}
        self.parts = {part: own[part].subset(index) for part, index in self.index.items()}
        self.keep_digests("files", digests)
        twice = find_duplicates(tree.train, tree.test, (ends, hash_ends(tree.test, self.split_seed)))
        self.warn_of_duplicates([os.fsdecode(tree.test.names[k]) for k in twice], "byte")
        if self.bit_depth is None:
            refuse_16_bits(self.parts["train"])
        self.check()

    def unreadable(self) -> list[str]:
        return self.broken.gather()

    def rows(self) -> Iterator[tuple[str, str, str]]:
        for part, files in self.parts.items():
            for name, label in zip(files.names, files.target, strict=True):
                yield os.fsdecode(name), self.classes[label], part

    def train_loader(self, process: Process, views: int = 1) -> TrainStream:
        color = self.norm.mean_color(torch.device("cpu"))
        files, transform = self.parts["train"], self.train_transform
        channels = self.image_size[0]
        images = TrainImages(files, transform, self.seed, views, self.bit_depth, self.policy, color, channels)
        return TrainStream(self.stream(images, process), self.train_order(process))

    def eval_loader(self, part: str, process: Process) -> EvalStream:
        stream = self.stream(self.eval_images(part), process)
        return EvalStream(stream, len(self.parts[part].names), self.eval_batch_size, process)

    def eval_images(self, part: str) -> EvalImages:
        return EvalImages(self.parts[part], self.eval_transform, self.image_size, self.bit_depth)

    def stream(self, images: Dataset, process: Process) -> Stream:
        # The cores that this process may use, divided among the training processes on this machine.
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
                yield LabeledImage(sample.image[0], int(sample.target), files.path(k))
