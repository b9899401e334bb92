"""The training loop of torchdistill, and one in the way of lightning-hydra-template, for comparison with odcheap's.

One student learns from a standard network, by the method `kd`, which torchdistill has too. The standard network has
random weights, since the speed does not depend on them.
"""

import tempfile
import threading
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from odcheap.bench.loops import LOADER_WORKERS, LR, NUM_CLASSES, CreateLoop, Step, make_dataset
from odcheap.data.in_memory import Images
from odcheap.layers.cheap_conv import Standard
from odcheap.methods.base import Method
from odcheap.methods.kd import OfflineDistillation
from odcheap.methods.students import RunStudents, Students, run_auto
from odcheap.methods.teacher import Teacher

PEERS = {"torchdistill": "torchdistill", "lightning_template": "Lightning template", "trainer": "odcheap"}
TEMPERATURE, ALPHA = 4.0, 0.9  # alpha is the weight of the teacher's term


def has_torchdistill() -> bool:
    """Returns whether the package `torchdistill` is installed."""
    return find_spec("torchdistill") is not None


def build_distillation(cfg: DictConfig, run: RunStudents = run_auto) -> OfflineDistillation:
    """Builds a student, and as its teacher the same network with standard convolutions.

    Args:
        cfg: The config of a run, of which `backbone`, `block_type`, `data` and `seed` are used.
        run: The function that runs all students on a batch.
    """
    backbone, conv = instantiate(cfg.backbone), instantiate(cfg.block_type)
    students = Students(lambda: backbone(conv=conv, num_classes=NUM_CLASSES), 1, cfg.seed, run)
    network = backbone(conv=Standard(), num_classes=NUM_CLASSES)
    norm = list(cfg.data.mean), list(cfg.data.std)
    return OfflineDistillation(students, Teacher(network, norm, *norm, network.native_size), TEMPERATURE, ALPHA)


def create_torchdistill_loop(cfg: DictConfig, method: Method, images: Images, device: torch.device) -> Step:
    """Returns a function that takes one training step of torchdistill's `DistillationBox`, in float32.

    Args:
        cfg: The config of a run, of which the options of `data` are used.
        method: The networks to train and their loss, which `build_distillation` has built.
        images: The images; only the training images are used.
        device: The device on which it is trained.
    """
    from torchdistill.core.distillation import DistillationBox  # an extra

    kd = cast(OfflineDistillation, method)
    data = make_dataset(cfg, images)
    # The settings of its own examples: SGD, `KDLoss` on the outputs of both networks, a loader with shuffled images.
    logits = {"student_module_path": ".", "student_module_io": "output"}
    logits |= {"teacher_module_path": ".", "teacher_module_io": "output"}
    loss = {"key": "KDLoss", "kwargs": {**logits, "temperature": TEMPERATURE, "alpha": 1 - ALPHA}}
    network = {"forward_proc": "forward_batch_only"}
    loading = {"batch_size": cfg.data.batch_size, "num_workers": LOADER_WORKERS[device.type], "drop_last": True}
    training = {
        "num_epochs": 1,
        "train_data_loader": {"dataset_id": "train", "sampler": {"class_or_func": RandomSampler}, "kwargs": loading},
        "val_data_loader": {"dataset_id": None},
        "teacher": {**network, "requires_grad": False},
        "student": {**network, "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": {"lr": LR, "momentum": 0.9, "weight_decay": 2e-4}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"criterion": loss, "weight": 1.0}}}},
    }
    student, teacher = kd.students.members[0].to(device), kd.teacher.network.to(device)
    box: Any = DistillationBox(teacher, student, {"train": data}, training, device, None, False, 1)

    def steps() -> Iterator[None]:
        for epoch in count():
            box.pre_epoch_process(epoch=epoch)
            for batch, target, extra in box.train_data_loader:
                batch, target = batch.to(device), target.to(device)
                box.post_forward_process(box.forward_process(batch, target, extra))
                yield

    running = steps()
    return lambda: next(running)


class TemplateModule(pl.LightningModule):
    """A Lightning module in the style of lightning-hydra-template, for comparison.

    Its metrics are modules of torchmetrics, and they are logged in each step.

    Args:
        method: The networks to train and their loss, a `Method`.
    """

    def __init__(self, method: Method):
        super().__init__()
        self.method = method
        self.train_loss, self.train_acc = MeanMetric(), MulticlassAccuracy(NUM_CLASSES)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, target = batch
        outputs = self.method(images)
        loss = self.method.loss(outputs, target)["loss"]
        self.train_loss(loss)
        self.train_acc(outputs["student_logits"][0].argmax(1), target)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.method.parameters(), LR, momentum=0.9, weight_decay=2e-4)


class StepOnDemand(pl.Callback):
    """A callback that lets a training, which runs in another thread, take one step for each call of `step`."""

    def __init__(self) -> None:
        self.asked, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.asked.acquire()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.done.release()

    def step(self) -> None:
        """Waits until the training has taken one step; if the training has failed, raises its error."""
        self.asked.release()
        self.done.acquire()
        if self.error is not None:
            raise self.error


def create_template_loop(cfg: DictConfig, method: Method, images: Images, device: torch.device) -> Step:
    """Returns a function without arguments that takes one training step in the way of lightning-hydra-template.

    A `Trainer` cannot be interrupted between two steps. So it runs in a thread of its own and waits before each step.
    Each call of the function lets it take one step. The thread ends with the process.

    Args:
        cfg: The config of a run.
        method: The networks to train and their loss, which `build_distillation` has built.
        images: The images; only the training images are used.
        device: The device on which the networks are trained.
    """
    folder = tempfile.TemporaryDirectory()
    workers = LOADER_WORKERS[device.type]
    loader = DataLoader(make_dataset(cfg, images), cfg.data.batch_size, True, num_workers=workers, drop_last=True)
    on_demand = StepOnDemand()
    checkpoints = ModelCheckpoint(Path(folder.name), save_last=True)
    callbacks: list[pl.Callback] = [checkpoints, EarlyStopping("train/acc", mode="max"), on_demand]
    trainer = pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        max_epochs=-1,
        precision=cfg.trainer.precision,
        callbacks=callbacks,
        logger=CSVLogger(folder.name),
        default_root_dir=folder.name,
        enable_progress_bar=False,
        enable_model_summary=False,
    )

    def train() -> None:
        try:
            with folder, warnings.catch_warnings():  # Python removes the folder at its end, since the fit has none
                warnings.simplefilter("ignore")  # advice on the number of loader workers
                trainer.fit(TemplateModule(method), loader)
        except BaseException as error:  # `step` raises it in the thread that waits
            on_demand.error = error
            on_demand.done.release()

    threading.Thread(target=train, daemon=True).start()
    return on_demand.step


PEER_LOOPS: dict[str, CreateLoop] = {
    "torchdistill": create_torchdistill_loop,
    "lightning_template": create_template_loop,
}
