"""The Lightning data module for pictures that lie in files: decoded by workers, normalised on the training device."""

import os
from collections.abc import Callable, Iterator

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from odcheap.data.folders import Tree, digests
from odcheap.data.image_files import (
    NO_TARGET,
    TRIES,
    EvaluationPictures,
    Files,
    TrainingPictures,
    collate,
    evaluation_transform,
    leave_signals,
    training_transform,
)
from odcheap.data.in_memory import Batch, BatchOrder, check_batches
from odcheap.data.splits import fingerprint, stratified
from odcheap.data.transforms import LARGEST_SIDE, Normalisation, stacked
from odcheap.utils.text import escape_control_chars
from odcheap.utils.errors import Failure, OptionError


class Broken:
    """Names each unreadable file once; `Failure` where there are more than `limit`."""

    def __init__(self, limit: int):
        self.limit, self.seen, self.last = limit, set(), ""

    def report(self, found: list[tuple[str, str]]) -> None:
        for path, reason in found:
            if path in self.seen:
                continue
            self.seen.add(path)
            self.last = path
            print(f"warning: {escape_control_chars(reason)}; left out ({len(self.seen)} of data.max_broken={self.limit})", flush=True)
            if len(self.seen) > self.limit:
                allowed = f"more pictures cannot be read, the last one {path}; the last checkpoint is kept"
                raise OptionError("data.max_broken", self.limit, allowed)

    def everywhere(self) -> list[str]:
        """What all processes together could not read; each of them must ask."""
        seen = [sorted(self.seen)]
        if torch.distributed.is_initialized():
            seen *= torch.distributed.get_world_size()
            torch.distributed.all_gather_object(seen, sorted(self.seen))
        return sorted(set().union(*seen))


class Stream:
    """The readable ones of the planned pictures as batches on the device; the plan is set anew before each pass."""

    def __init__(self, pictures: Dataset, norm: Normalisation, device: torch.device, workers: int, broken: Broken):
        self.norm, self.device, self.broken = norm, device, broken
        self.plan: list[list] = []
        self.loader = DataLoader(
            pictures,
            batch_sampler=self.plan,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=leave_signals,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
        )

    def batches(self, plan: list[list]) -> Iterator[Batch]:
        self.plan[:] = plan
        for sample in self.loader:
            self.broken.report(sample.broken)
            images, target = sample.image, sample.target
            readable = target != NO_TARGET  # asked on the CPU: the device need not be waited for
            if not readable.all():
                images, target = images[..., readable, :, :, :], target[readable]
            images, target = (t.to(self.device, non_blocking=True) for t in (images, target))
            views = images if images.ndim == 5 else images[None]
            yield Batch(stacked([self.norm.apply(view) for view in views]), target, 1.0)


class TrainStream:
    """Training batches; their place within the epoch is state, so that a resumed run goes on there.

    Raises `Failure` where nothing stands in for an unreadable picture.
    """

    def __init__(self, stream: Stream, order: BatchOrder):
        self.stream, self.sampler = stream, order  # the name under which Lightning looks for `set_epoch`
        self.done = self.start = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        start, self.start = self.start, 0
        planned = self.sampler.batches()[start:]
        plan = [[(self.sampler.epoch, i) for i in index.tolist()] for index, _ in planned]
        for k, batch in enumerate(self.stream.batches(plan)):
            if len(batch.target) < len(plan[k]):
                raise Failure(f"data_dir: no picture in {TRIES} can be read; the last one {self.stream.broken.last}")
            self.done = start + k + 1
            yield batch._replace(share=planned[k][1])

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["done"] % len(self)


class EvalStream:
    """Every readable picture once over all processes; `Failure` where this process has none."""

    def __init__(self, stream: Stream, count: int, batch_size: int, rank: int, world: int):
        self.stream, self.count = stream, count
        mine = list(range(rank, count, world))
        self.plan = [mine[k : k + batch_size] for k in range(0, len(mine), batch_size)]

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        readable = 0
        for batch in self.stream.batches(self.plan):
            readable += len(batch.target)
            if len(batch.target):
                yield batch
        if not readable:
            raise Failure(f"data_dir: none of {self.count} pictures to evaluate can be read: {self.stream.broken.last}")


class StreamedData(pl.LightningDataModule):
    """Pictures in folders of classes, decoded anew each epoch; `load()` lists them.

    `batch_size` is global: the processes divide it. `workers` are a process's own; None gives each core one. Without
    `val` pictures of their own `val_size` are held out of the training ones, stratified, by their files' contents.
    Raises `OptionError`.
    """

    def __init__(
        self,
        load: Callable[[], Tree],
        name: str,
        seed: int,
        select: str,
        select_by: str,
        batch_size: int,
        eval_batch_size: int,
        val_size: float,
        split_seed: int,
        image_size: int,
        crop_ratio: float,
        min_scale: float,
        flip: bool,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        workers: int | None,
        max_broken: int,
    ):
        super().__init__()
        self.load, self.name, self.seed = load, name, seed
        self.select, self.select_by = select, select_by
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.val_size, self.split_seed = val_size, split_seed
        self.pixels, self.norm, self.workers = image_size, Normalisation(tuple(mean), tuple(std)), workers
        ranges = {"crop_ratio": (crop_ratio, 0.1, 1), "min_scale": (min_scale, 1e-6, 1)}
        ranges |= {"image_size": (image_size, 1, LARGEST_SIDE), "workers": (workers or 0, 0, 1024)}
        for option, (value, least, most) in ranges.items():
            if not least <= value <= most:
                raise OptionError(f"data.{option}", value, f"must be from {least} to {most}")
        self.augment = training_transform(image_size, min_scale, flip)
        self.shorter_side = round(image_size / crop_ratio)
        self.centre = evaluation_transform(image_size, self.shorter_side)
        self.broken = Broken(max_broken)
        self.parts: dict[str, Files] = {}
        self.views = 1  # augmentations of each picture in a training batch

    def read(self) -> None:
        """Lists the pictures and makes the split, once."""
        if self.parts:
            return
        tree = self.load()
        if tree.passed_over:
            count, first = len(tree.passed_over), tree.passed_over[0]
            names = f"files that are no pictures by their names, {escape_control_chars(first)} among them"
            print(f"passed over {count:,} {names}", flush=True)
        self.classes = tree.classes
        found = digests(tree.train, self.split_seed)
        if tree.val is None:
            split = stratified(found, torch.from_numpy(tree.train.target), self.val_size)
            self.fingerprint = split.fingerprint
            self.parts = {"train": tree.train.subset(split.train), "val": tree.train.subset(split.val)}
        else:
            order = np.array(sorted(range(len(found)), key=found.__getitem__))
            both = found + digests(tree.val, self.split_seed)
            target = np.concatenate([tree.train.target, tree.val.target])
            self.fingerprint = fingerprint(both, target, np.arange(len(found), len(both)))
            self.parts = {"train": tree.train.subset(order), "val": tree.val}
        self.parts["test"] = tree.test
        check_batches(self)

    @property
    def labels(self) -> dict[str, np.ndarray]:
        """The labels of the pictures to train on ("train"), held out ("val") and to test on ("test")."""
        return {part: files.target for part, files in self.parts.items()}

    def unreadable(self) -> list[str]:
        """Files that no process could read so far; all processes must ask together."""
        return self.broken.everywhere()

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """File, class and part of each picture."""
        for part, files in self.parts.items():
            for name, label in zip(files.names, files.target, strict=True):
                yield os.fsdecode(name), self.classes[label], part

    @property
    def image_size(self) -> tuple[int, int, int]:
        return 3, self.pixels, self.pixels

    def steps_per_epoch(self, world: int = 1) -> int:
        """Returns the number of batches in an epoch of so many processes."""
        return len(BatchOrder(len(self.parts["train"].names), self.batch_size, self.seed, 0, world))

    def order(self) -> BatchOrder:
        t = self.trainer
        return BatchOrder(len(self.parts["train"].names), self.batch_size, self.seed, t.global_rank, t.world_size)

    def train_dataloader(self) -> TrainStream:
        pictures = TrainingPictures(self.parts["train"], self.augment, self.seed, self.pixels, self.views)
        return TrainStream(self.stream(pictures), self.order())

    def val_dataloader(self) -> EvalStream:
        return self.evaluation("test" if self.select == "test" else "val")

    def test_dataloader(self) -> EvalStream:
        return self.evaluation("test")

    def evaluation(self, part: str) -> EvalStream:
        files, t = self.parts[part], self.trainer
        stream = self.stream(EvaluationPictures(files, self.centre, self.pixels))
        return EvalStream(stream, len(files.names), self.eval_batch_size, t.global_rank, t.world_size)

    def stream(self, pictures: Dataset) -> Stream:
        workers = self.workers
        if workers is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            workers = max(1, cores // self.trainer.num_devices)
        return Stream(pictures, self.norm, self.trainer.strategy.root_device, workers, self.broken)
