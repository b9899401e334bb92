"""The Lightning data module: splits and loaders over images that lie in memory on the training device."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from odcheap.data.cifar import Images
from odcheap.data.splits import pixel_digests, stratified
from odcheap.data.transforms import Augmentation, Normalisation, stacked
from odcheap.utils.errors import OptionError
from odcheap.utils.seeds import make_generator

TOO_FEW = 2  # images a process: batch norm needs two


class Batch(NamedTuple):
    """Images (n, C, H, W), or views of them (S, n, C, H, W); labels (n,); and `share`.

    `share` is n times the processes over the images of the global batch.

    Each process multiplies its mean loss by its share, so that gradients averaged over processes are exactly those of
    the global batch's mean, also where the last batch divides unevenly.
    """

    images: Tensor
    target: Tensor
    share: float = 1.0


class BatchOrder:
    """Which images make the batches of an epoch, on this process: a function of (seed, epoch).

    A last batch with fewer than two images a process is left out.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int = 0, world: int = 1):
        if not isinstance(batch_size, int) or batch_size < TOO_FEW * world:
            allowed = f"must be a whole number and give each of {world} processes {TOO_FEW} images or more"
            raise OptionError("data.batch_size", batch_size, allowed)
        self.count, self.batch_size, self.seed, self.rank, self.world = count, batch_size, seed, rank, world
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self.count, self.batch_size)
        return whole + (rest >= TOO_FEW * self.world)

    def batches(self) -> list[tuple[Tensor, float]]:
        """For each batch this process's sample numbers and its share."""
        order = torch.randperm(self.count, generator=make_generator(self.seed, "order", self.epoch))
        together = order.split(self.batch_size)[: len(self)]
        mine = [batch[self.rank :: self.world] for batch in together]
        return [(part, len(part) * self.world / len(batch)) for part, batch in zip(mine, together, strict=True)]


class TrainBatches:
    """Augmented, normalised batches; its place within the epoch is state, so that a resumed run goes on there."""

    def __init__(
        self,
        images: Tensor,
        target: Tensor,
        order: BatchOrder,
        augment: Augmentation,
        norm: Normalisation,
        views: int = 1,
    ):
        self.images, self.target, self.augment, self.norm, self.views = images, target, augment, norm, views
        self.sampler = order  # the name under which Lightning looks for `set_epoch`
        self.done = self.start = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        start, self.start = self.start, 0
        epoch, device = self.sampler.epoch, self.images.device
        count, seed = len(self.images), self.sampler.seed
        drawn = [self.augment.draw(count, seed, epoch, view).to(device) for view in range(self.views)]
        parts, shares = zip(*self.sampler.batches(), strict=True)
        # At once: a copy to a GPU for each batch would make it wait each time.
        order = torch.cat(parts).to(device).split([len(part) for part in parts])
        for k in range(start, len(order)):
            images = self.images[order[k]]
            seen = [self.norm.apply(self.augment.apply(images, view[order[k]])) for view in drawn]
            self.done = k + 1
            yield Batch(stacked(seen), self.target[order[k]], shares[k])

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["done"] % len(self)


class EvalBatches:
    """Every image once over all processes, normalised only."""

    def __init__(self, images: Tensor, target: Tensor, batch_size: int, norm: Normalisation, rank: int, world: int):
        self.images, self.target = images[rank::world], target[rank::world]
        self.batch_size, self.norm = batch_size, norm

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        parts = zip(self.images.split(self.batch_size), self.target.split(self.batch_size), strict=True)
        for images, target in parts:
            yield Batch(self.norm.apply(images), target, 1.0)


SELECT_BY = {"top1": "top1", "balanced": "balanced_accuracy"}  # option -> figure


def watched(data: pl.LightningDataModule) -> int:
    """How many images are evaluated after each epoch."""
    return len(data.labels["test" if data.select == "test" else "val"])


def check_batches(data: pl.LightningDataModule, world: int = 1) -> None:
    """`OptionError` where the images cannot be divided among batches and processes as the options say."""
    labels = data.labels
    if len(labels["train"]) < TOO_FEW * world:
        allowed = f"must leave {TOO_FEW * world} images or more to train on ({TOO_FEW} a process)"
        raise OptionError("data.val_size", data.val_size, allowed)
    few = [part for part in ("val", "test") if 0 < len(labels[part]) < world]
    if few:
        allowed = f"each process needs an image to evaluate; there are {len(labels[few[0]])} ({few[0]})"
        raise OptionError("trainer.devices", world, allowed)
    if not isinstance(data.eval_batch_size, int) or data.eval_batch_size < 1:
        raise OptionError("data.eval_batch_size", data.eval_batch_size, "must be a whole number, 1 or more")
    if data.select_by not in SELECT_BY:
        raise OptionError("data.select_by", data.select_by, f"must be one of {', '.join(SELECT_BY)}")
    # Refuses what cannot be divided into batches.
    BatchOrder(len(labels["train"]), data.batch_size, data.seed, 0, world)
    if data.select == "val" and not len(labels["val"]):
        allowed = "select=val needs held-out images; select=last picks nothing and uses all images"
        raise OptionError("data.val_size", data.val_size, allowed)


class InMemoryData(pl.LightningDataModule):
    """A set that fits in memory. `load()` gives its images; the split, the order and the augmentation are made here.

    `batch_size` is global: the processes divide it. `select="test"` watches the test images during training, as the
    2019 code does. Raises `OptionError`.
    """

    def __init__(
        self,
        load: Callable[[], Images],
        name: str,
        seed: int,
        select: str,
        select_by: str,
        batch_size: int,
        eval_batch_size: int,
        val_size: float,
        split_seed: int,
        flip: bool,
        crop_padding: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ):
        super().__init__()
        self.load, self.name, self.seed = load, name, seed
        self.select, self.select_by = select, select_by
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.val_size, self.split_seed = val_size, split_seed
        self.augment, self.norm = Augmentation(flip, crop_padding), Normalisation(tuple(mean), tuple(std))
        self.images: Images | None = None
        self.views = 1  # augmentations of each image in a training batch

    def read(self) -> None:
        """Loads the images and makes the split, once."""
        if self.images is None:
            self.images = self.load()
            side = self.shorter_side
            if not 0 <= self.augment.crop_padding < side:
                allowed = f"must be 0 or more, below the images' {side} pixels a side"
                raise OptionError("data.crop_padding", self.augment.crop_padding, allowed)
            digests = pixel_digests(self.images.train, self.split_seed)
            self.split = stratified(digests, self.images.train_target, self.val_size)
            self.fingerprint = self.split.fingerprint
            check_batches(self)

    @property
    def labels(self) -> dict[str, np.ndarray]:
        """The labels of the images to train on ("train"), held out ("val") and to test on ("test")."""
        target = self.images.train_target.numpy()
        parts = {"train": target[self.split.train], "val": target[self.split.val]}
        return parts | {"test": self.images.test_target.numpy()}

    def unreadable(self) -> list[str]:
        """Images that could not be read: none, or there would be no run."""
        return []

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """File, class and part of each image: none, for these images are not files of their own."""
        yield from ()

    @property
    def classes(self) -> list[str]:
        return self.images.classes

    @property
    def image_size(self) -> tuple[int, int, int]:
        return tuple(self.images.train.shape[1:])

    @property
    def shorter_side(self) -> int:
        """Pixels that a picture's shorter side is brought to before its middle is cut out."""
        return min(self.image_size[1:])

    def train_dataloader(self) -> TrainBatches:
        index = torch.from_numpy(self.split.train)
        images, target = self.on_device(self.images.train, self.images.train_target, index)
        return TrainBatches(images, target, self.order(), self.augment, self.norm, self.views)

    def steps_per_epoch(self, world: int = 1) -> int:
        """Returns the number of batches in an epoch of so many processes."""
        return len(BatchOrder(len(self.split.train), self.batch_size, self.seed, 0, world))

    def order(self) -> BatchOrder:
        t = self.trainer
        return BatchOrder(len(self.split.train), self.batch_size, self.seed, t.global_rank, t.world_size)

    def val_dataloader(self) -> EvalBatches:
        if self.select == "test":
            return self.test_dataloader()
        index = torch.from_numpy(self.split.val)
        return self.eval_batches(*self.on_device(self.images.train, self.images.train_target, index))

    def test_dataloader(self) -> EvalBatches:
        return self.eval_batches(*self.on_device(self.images.test, self.images.test_target, slice(None)))

    def on_device(self, images: Tensor, target: Tensor, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        device = self.trainer.strategy.root_device
        return images[index].to(device), target[index].to(device)

    def eval_batches(self, images: Tensor, target: Tensor) -> EvalBatches:
        t = self.trainer
        return EvalBatches(images, target, self.eval_batch_size, self.norm, t.global_rank, t.world_size)
