"""One run from its parts to its folder: fit, test, write."""

import logging
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import Logger
from torch import nn

from odcheap.data.in_memory import SELECT_BY, watched
from odcheap.distributed import launch, rendezvous
from odcheap.distributed.signals import Interruption, Listener
from odcheap.methods.base import Method
from odcheap.methods.students import check_run
from odcheap.runs import status
from odcheap.runs.checkpoint_io import AtomicCheckpointIO, epoch_path, read_run
from odcheap.runs.load import load_weights, read_weights
from odcheap.runs.resume import Start, make_folder, prepare
from odcheap.training import summary
from odcheap.training.callbacks import Narrator, Record
from odcheap.training.module import DistillationModule
from odcheap.training.nonfinite import NonfiniteGuard
from odcheap.training.train_step import GradientOptions
from odcheap.utils.console import console, say
from odcheap.utils.errors import OptionError, first_line
from odcheap.utils.files import write_text

logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # its greetings say what our first line says


CAPTURED_PRECISIONS = ("32-true", "32", "bf16-mixed", "bf16-true")  # float16 scales its loss anew


def start_weights(start: Start, method: Method, data: pl.LightningDataModule) -> None:
    """Loads `weights` into a new run; warns where they were selected under another split of the data."""
    cfg = start.cfg
    method.check_classes(data.classes)
    if start.content is not None and start.content["odcheap"]["split"] != data.fingerprint:
        if not cfg.test_only:
            raise OptionError(
                "data_dir", cfg.data_dir, "holds other images than the run that is resumed was started with"
            )
        say("warning: other images, or another split of them, than the checkpoint was trained with")
    if cfg.weights is None or start.checkpoint is not None:
        return
    weights = read_weights(cfg.weights)
    say(load_weights(method, weights, new_head=cfg.weights_head == "new"))
    if weights.split not in (None, data.fingerprint):
        say("warning: the weights were selected under another split; held-out images may have been trained on")


def captures(cfg: DictConfig) -> bool:
    """Whether steps become CUDA graphs: where the run has one GPU and nothing acts within a step.

    `OptionError` where `capture=true` cannot be.
    """
    on_gpu = cfg.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    against = {
        f"trainer.accelerator={cfg.trainer.accelerator}: there is no CUDA device to use": not on_gpu,
        "several processes average their gradients within a step": cfg.trainer.devices != 1
        or cfg.trainer.num_nodes != 1
        or cfg.trainer.strategy != "auto",
        "on_nonfinite=skip looks at each step before it is taken": cfg.on_nonfinite == "skip",
        "trainer.gradient_clip_val acts within a step": cfg.trainer.get("gradient_clip_val") is not None,
        "trainer.accumulate_grad_batches acts within a step": cfg.trainer.get("accumulate_grad_batches", 1) != 1,
        f"trainer.precision={cfg.trainer.precision}": str(cfg.trainer.precision) not in CAPTURED_PRECISIONS,
    }
    if cfg.test_only:
        return False
    reasons = [reason for reason, holds in against.items() if holds]
    if cfg.capture is True and reasons:
        raise OptionError("capture", True, f"cannot be: {reasons[0]}")
    return cfg.capture is not False and not reasons


def gradient_options(cfg: DictConfig) -> GradientOptions:
    """Takes the options of `trainer` that Lightning does not take with manual optimization."""
    given = {name: cfg.trainer[name] for name in GradientOptions._fields if name in cfg.trainer}
    return GradientOptions(**given, skip_nonfinite=cfg.on_nonfinite == "skip")


def not_captured(reason: str) -> None:
    say(f"the step runs without a CUDA graph: {reason} (capture=false skips the attempt)")


def must_capture(reason: str) -> None:
    raise OptionError("capture", True, f"cannot be: {reason}")


def begin_logging(loggers: dict[str, Logger]) -> None:
    """`OptionError` where one cannot begin: whatever a logger's library raises, it is about what it was given."""
    for name, logger in loggers.items():
        try:
            _ = logger.experiment
        except Exception as error:
            raise OptionError("logger", name, f"cannot begin: {first_line(error)}") from error


def part_names(start: Start) -> dict[str, str]:
    """Returns the option names of backbone and block type: those of the run that is continued, or those given."""
    groups = ("backbone", "block_type")
    if start.content is not None:  # the command that resumes does not have to name them
        stored = start.content["odcheap"]["student"]
        return {group: str((stored.get(group) or {}).get("part", "")) for group in groups}
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    return {group: choices.get(group, "") for group in groups}


class Run:
    """The parts of a run, put together; raises `OptionError` for what is wrong with `start.cfg`."""

    def __init__(
        self,
        start: Start,
        data: pl.LightningDataModule,
        method: Method,
        optimizer: partial,
        scheduler: partial,
        listener: Listener,
    ):
        self.start, self.cfg, self.data, self.listener = start, start.cfg, data, listener
        about = {
            "overrides": start.overrides,
            "config": OmegaConf.to_container(self.cfg, resolve=True),
            "split": data.fingerprint,
            "classes": data.classes,
        }
        names = part_names(start)
        about["student"] = summary.student_settings(about, data, names)
        cfg, figure = self.cfg, SELECT_BY[data.select_by]
        refused = must_capture if cfg.capture is True else not_captured
        classes = len(data.classes)
        saw = cfg.select != "test" and method.may_have_seen(data.fingerprint)
        gradients = gradient_options(cfg)
        per_epoch = -(-data.steps_per_epoch(launch.processes(cfg)) // gradients.accumulate_grad_batches)
        self.module = DistillationModule(
            method,
            optimizer,
            scheduler,
            per_epoch * cfg.trainer.max_epochs,
            classes,
            cfg.seed,
            about,
            gradients,
            refused if captures(cfg) else None,
            saw,
        )
        data.views = len(method.students) if method.has_own_views else 1
        self.record = Record(start.job_dir, cfg.select, figure, cfg.checkpoint_every, cfg.checkpoint_keep)
        self.console = console()

    def trainer(self, loggers: bool) -> pl.Trainer:
        narrator = Narrator(self.record, self.console, "experiment=short, or experiment=quickstart on digits")
        guard = NonfiniteGuard(self.cfg.on_nonfinite == "skip", self.cfg.max_skipped)
        made = instantiate(
            {name: value for name, value in self.cfg.trainer.items() if name not in GradientOptions._fields},
            callbacks=[guard, self.record, narrator, Interruption(self.listener, self.record, guard)],
            logger=[instantiate(part) for part in self.loggers().values()] if loggers else False,
            plugins=[AtomicCheckpointIO(), launch.environment()],
            limit_val_batches=1.0 if watched(self.data) else 0,
        )
        device = made.strategy.root_device
        if self.cfg.trainer.sync_batchnorm and device.type == "cpu":
            raise OptionError("trainer.sync_batchnorm", True, "must be false on CPUs: PyTorch has it for GPUs only")
        check_run(self.module.method.students.run, device)
        made.precision_plugin.convert_module(
            self.module
        )  # Lightning would only after it has loaded, and round on the way
        if made.world_size > 1 and launch.by_torchrun() and not torch.distributed.is_initialized():
            rendezvous.join("nccl" if device.type == "cuda" else "gloo")
        return made

    def loggers(self) -> dict[str, DictConfig]:
        return {name: part for name, part in self.cfg.logger.items() if part}

    def fit_and_test(self, standard: nn.Module) -> dict[str, Any]:
        """Trains, tests the selected epoch and the last one, writes the folder, returns the summary."""
        trainer = self.trainer(loggers=True)
        make_folder(self.start.job_dir)
        with status.occupied(self.start.job_dir) if trainer.is_global_zero else nullcontext():
            return self.train_and_test(trainer, standard)

    def train_and_test(self, trainer: pl.Trainer, standard: nn.Module) -> dict[str, Any]:
        if trainer.is_global_zero:
            prepare(self.start)
            begin_logging(dict(zip(self.loggers(), trainer.loggers, strict=True)))
            write_text(self.start.job_dir / "config.yaml", OmegaConf.to_yaml(self.cfg, resolve=True))
            status.mark(self.start.job_dir, "running")
        self.introduce(trainer)
        trainer.fit(self.module, datamodule=self.data, ckpt_path=self.start.checkpoint, weights_only=True)
        last = self.tested(trainer, self.record.history[-1])
        at_selected = self.tested(trainer, self.back_to_selected())
        result = self.summarise(at_selected, last, standard)
        if trainer.is_global_zero:
            self.write(result)
            status.mark(self.start.job_dir, "finished")
            summary.show(self.console, result, f"{self.start.job_dir}: finished")
        return result

    def introduce(self, trainer: pl.Trainer) -> None:
        cfg, data = self.cfg, self.data
        train, val, test = (len(data.labels[part]) for part in ("train", "val", "test"))
        counts = f"{train:,} training, {val:,} held-out, {test:,} test"
        where = f"{trainer.world_size} x {trainer.strategy.root_device.type}, {cfg.trainer.precision}"
        say(f"{data.name}: {counts} images; {cfg.num_stu} students; {where}; {self.start.job_dir}")
        if self.start.checkpoint:
            say(f"continuing from {self.start.checkpoint}")
        if cfg.select == "test":
            say("warning: select=test picks student and epoch on the test images; its accuracy is no honest estimate")

    def back_to_selected(self) -> dict[str, Any]:
        """Loads the selected epoch's weights and returns that epoch's record."""
        epoch = self.record.selected["epoch"]
        if epoch != self.record.history[-1]["epoch"]:
            path = epoch_path(self.start.job_dir, epoch)
            self.module.load_state_dict(read_run(path, "job_dir")["state_dict"])
        return next(row for row in self.record.history if row["epoch"] == epoch)

    def tested(self, trainer: pl.Trainer, row: dict[str, Any]) -> dict[str, Any]:
        trainer.test(self.module, datamodule=self.data, verbose=False)
        return summary.results(self.module, row, self.module.figures["test"])

    def chosen(self, found: dict[str, Any]) -> dict[str, Any]:
        return summary.selected(self.record, found, self.confusion(), self.data.classes)

    def confusion(self) -> list[list[int]]:
        """The chosen candidate's, of the latest test."""
        return self.module.figures["test"].confusion[self.record.selected["candidate"]]

    def summarise(self, at_selected: dict[str, Any], last: dict[str, Any], standard: nn.Module) -> dict[str, Any]:
        history, size = self.record.history, self.data.image_size
        images = len(self.data.labels["train"]) * len(history)
        return {
            "selected": self.chosen(at_selected),
            **at_selected,
            "last": last,
            "cost": summary.costs(self.module, standard, size, images),
            "images_per_second": sum(row["images_per_second"] for row in history) / len(history),
            "train_seconds": history[-1]["seconds"],
            "epochs": len(history),
            "seed": self.cfg.seed,
            "data": self.data.name,
            **summary.counted(self.data.labels, self.data.classes),
            "unreadable": self.data.unreadable(),
            "num_stu": self.cfg.num_stu,
            "split": self.data.fingerprint,
            "versions": summary.versions(),
            "finished": True,
        }

    def write(self, result: dict[str, Any]) -> None:
        """`summary.json` comes last: where it is, everything is."""
        job_dir, about = self.start.job_dir, self.module.about
        summary.write_confusion(job_dir / "confusion.csv", self.confusion(), self.data.classes)
        summary.write_split(job_dir / "split.csv", self.data.rows())
        student = self.module.method.candidates()[self.record.selected["candidate"]]
        summary.write_student(job_dir / "student.safetensors", student, about["student"])
        summary.write_json(job_dir / "summary.json", result)

    def test_only(self) -> dict[str, Any]:
        """Evaluates a checkpoint or given weights, writes `test.json` and nothing else."""
        trainer = self.trainer(loggers=False)
        make_folder(self.start.job_dir)
        if self.start.content is not None:
            self.module.load_state_dict(self.start.content["state_dict"])
            self.record.selected = {"candidate": 0, "epoch": self.start.content["epoch"], "score": -1.0}
        self.introduce(trainer)
        row = {}
        if watched(self.data):
            trainer.validate(self.module, datamodule=self.data, verbose=False)
            self.record.choose(self.record.selected["epoch"], self.module)
        if self.cfg.select != "test" and "val" in self.module.figures:
            figures = self.module.figures["val"]
            row = {
                f"val/{name}/{figure}": getattr(figures, figure)[k]
                for figure in ("top1", "balanced_accuracy")
                for k, name in enumerate(self.module.members)
            }
        found = self.tested(trainer, row)
        result = {"selected": self.chosen(found), **found}
        result |= {"split": self.data.fingerprint, "versions": summary.versions()}
        if trainer.is_global_zero:
            summary.write_json(self.start.job_dir / "test.json", result)
            summary.show(self.console, result, f"{self.start.job_dir}: test only")
        return result
