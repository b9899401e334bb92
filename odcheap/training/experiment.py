"""Builds a run from its config, trains and tests it, and writes the results to its folder.

The members of a method are the networks that are evaluated: students, moving averages of their weights, teacher and
ensemble. The candidates are the members that may be selected as the result: students and moving averages.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.console import Console
from torch import nn

from odcheap.config.messages import explained_errors
from odcheap.data.base import SELECT_BY, ImageData, Process, limit_batches
from odcheap.data.mixing import build_mixing
from odcheap.distributed import cluster, launch, rendezvous
from odcheap.distributed.signals import SignalListener
from odcheap.layers import kernels
from odcheap.layers.kernels.cpu_library import needs_compilation
from odcheap.methods.base import Method
from odcheap.methods.students import check_run
from odcheap.runs import status
from odcheap.runs.folder import CONFIG, STUDENT, SUMMARY, TEST, check_usable, epoch_path, make_folder, read_checkpoint
from odcheap.runs.resume import Start, prepare_folder
from odcheap.runs.settings import select_student_settings
from odcheap.runs.training_images import write_digests
from odcheap.training import summary, trackers
from odcheap.training.callbacks import (
    AtomicCheckpointIO,
    Interruption,
    NonfiniteGuard,
    ProgressReporter,
    Record,
)
from odcheap.training.module import DistillationModule
from odcheap.training.optim import build_optimization
from odcheap.training.student_networks import (
    build_standards,
    build_students,
    check_networks,
    list_builders,
    load_start_weights,
    name_students,
)
from odcheap.training.trackers import LoggerRuns, StepLosses
from odcheap.training.train_step import GradientOptions, report_eager, uses_graphs
from odcheap.utils.console import console as build_console
from odcheap.utils.console import say
from odcheap.utils.errors import Failure, OptionError, describe_external_failure
from odcheap.utils.files import write_csv, write_json, write_text
from odcheap.utils.performance import describe_load
from odcheap.utils.seeds import temporary_seed
from odcheap.utils.text import escape_control_chars

logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # the device is in the first line of odcheap

# Options of Lightning's that switch off, or shorten, what a run's results are made from, or that odcheap sets itself.
OWN_OPTIONS = {"barebones", "callbacks", "fast_dev_run", "limit_predict_batches", "limit_test_batches"}
OWN_OPTIONS |= {"limit_val_batches", "logger", "overfit_batches", "plugins"}
EPOCH_LIMIT = "limit_train_batches"  # the loader takes it and not Lightning, so that it knows where an epoch ends
LIMITS = ("max_time", "max_steps")  # options of Lightning's that may end a training before its last epoch
SHORTER_RUNS = "experiment=short, or experiment=quickstart on digits"


@dataclass(frozen=True)
class FitResult:
    """The result of a training: the metrics of all epochs, and which network of which epoch is selected.

    Attributes:
        history: A dict for each epoch, from names such as "val/student_0/top1" to metrics.
        candidate: The index of the selected network, from 0. The students come first, then the moving averages of
            their weights.
        epoch: The number of the selected epoch, from 0.
    """

    history: list[dict[str, Any]]
    candidate: int
    epoch: int

    def row(self, epoch: int) -> dict[str, Any]:
        """Returns the entry of `history` for an epoch, whose number counts from 0."""
        return next(row for row in self.history if row["epoch"] == epoch)


@dataclass(frozen=True)
class TestResult:
    """The accuracies of all networks of a run on the test images.

    Attributes:
        members: A dict with the keys `students`, `averages`, `teacher` and `ensemble`, from `summarize_members`.
        confusion: A confusion matrix for each network, first of all students, then of their moving averages, the
            teacher and the ensemble. Rows are true classes, columns predicted classes.
    """

    __test__ = False  # pytest would take the class for a test case

    members: dict[str, Any]
    confusion: list[list[list[int]]]


@dataclass
class Experiment:
    """A run with all objects that it needs, such as the data set, the training method and the optimizer.

    Args:
        start: The run's config and folder, and the checkpoint from which it continues, if there is one.
        data: The data set; its method `read` has been called.
        method: The training method with its students.
        optimizer: A class of `torch.optim` with its options, such as `partial(torch.optim.SGD, lr=0.1)`.
        scheduler: A class of `torch.optim.lr_scheduler` with its options, also as a `functools.partial`.
        listener: The listener that receives signals; a signal ends the training after the current step.
        standards: For each student, the same network with standard convolutions, with which costs are compared. They
            may be left out only if `run` is not called.
        callbacks: Further callbacks of Lightning's `Trainer`.
        console: The console on which progress and results are printed.

    Raises:
        OptionError: The options do not fit together.

    Example:
        `Experiment.build(start, SignalListener()).run()` trains, tests and writes a run's folder.
    """

    start: Start
    data: ImageData
    method: Method
    optimizer: partial
    scheduler: partial
    listener: SignalListener
    standards: Sequence[nn.Module] = ()
    callbacks: Sequence[pl.Callback] = ()
    console: Console = field(default_factory=build_console)

    def __post_init__(self) -> None:
        # Switch the fused kernels on or off before any layer is used.
        cfg = self.cfg = self.start.cfg
        kernels.use(cfg.kernels)
        # Lightning refuses these options of `trainer` with manual optimization, so the training step takes them.
        options = {name: cfg.trainer[name] for name in GradientOptions._fields if name in cfg.trainer}
        gradients = GradientOptions(**options, skip_nonfinite=cfg.on_nonfinite == "skip")
        if gradients.gradient_clip_algorithm is not None and not gradients.gradient_clip_val:
            allowed = "has no effect without trainer.gradient_clip_val"
            raise OptionError("trainer.gradient_clip_algorithm", gradients.gradient_clip_algorithm, allowed)
        batches = self.data.steps_per_epoch(launch.count_processes(cfg))
        self.batches = limit_batches(batches, cfg.trainer.get(EPOCH_LIMIT))
        steps = -(-self.batches // gradients.accumulate_grad_batches)
        self.module = DistillationModule(
            self.method,
            self.optimizer,
            self.scheduler,
            steps * cfg.trainer.max_epochs,
            len(self.data.classes),
            cfg.seed,
            summary.describe_run(self.start.config, self.data),
            gradients,
            partial(report_eager, cfg.capture) if uses_graphs(cfg) else None,
            teacher_saw_val=cfg.select != "test" and self.method.may_have_seen(self.data.fingerprint),
            mixing=build_mixing(self.data.policy, len(self.data.classes), cfg.seed),
        )
        self.check_evaluations(steps)
        figure = SELECT_BY[self.data.select_by]
        self.logger_runs = LoggerRuns()
        self.record = Record(self.start.job_dir, cfg.select, figure, cfg.checkpoint_every, cfg.checkpoint_keep)

    @classmethod
    def build(cls, start: Start, listener: SignalListener) -> "Experiment":
        """Builds a run from its config, and loads the weights with which it starts.

        Args:
            start: The run's config and folder, and the checkpoint from which it continues, if there is one.
            listener: The listener that receives signals.

        Raises:
            OptionError: The options do not fit together.
        """
        # The data come first, since the network needs their number of classes.
        cfg = start.cfg
        data = instantiate(cfg.data, policy=instantiate(cfg.augment))
        data.read()
        data.check(launch.count_processes(cfg))
        classes, builders = len(data.classes), list_builders(start, data.image_size[0])
        students = build_students(start, builders, classes)
        with temporary_seed(cfg.seed, "method"):
            method = instantiate(cfg.method)(students=students)

        # All checks are made before the folder of the run is made.
        optimizer, scheduler = instantiate(cfg.optimizer), instantiate(cfg.scheduler)
        build_optimization(method, optimizer, scheduler, steps=1000)  # so that errors appear before the folder is made
        method.check_precision(str(cfg.trainer.precision))
        if cfg.augment.mixup or cfg.augment.cutmix:
            method.check_soft_labels()
        check_networks(method, builders, data.image_size)
        load_start_weights(start, method, data)
        return cls(start, data, method, optimizer, scheduler, listener, build_standards(start, builders, classes))

    def build_trainer(self) -> pl.Trainer:
        """Builds Lightning's `Trainer`; if torchrun has started several processes, they form their process group here.

        Raises:
            OptionError: The device does not support an option.
        """
        cfg = self.cfg
        guard = NonfiniteGuard(cfg.on_nonfinite == "skip", cfg.max_skipped)
        progress = ProgressReporter(self.record, self.console, SHORTER_RUNS)
        trainer = instantiate(
            {name: value for name, value in cfg.trainer.items() if name not in (*GradientOptions._fields, EPOCH_LIMIT)},
            _convert_="all",  # Lightning takes dicts and lists of Python only, as for `max_time`
            # The guard comes first, so that a step is checked before another callback saves a checkpoint.
            callbacks=[
                guard,
                self.logger_runs,
                self.record,
                progress,
                StepLosses(lambda: self.record.lr),
                Interruption(self.listener, self.record, guard),
                *self.callbacks,
            ],
            logger=False,  # `run` adds the loggers
            plugins=[AtomicCheckpointIO(), launch.make_cluster_environment()],
            limit_val_batches=1.0 if self.watches_images else 0,
        )
        show_profile()
        device = trainer.strategy.root_device
        if cfg.trainer.sync_batchnorm and device.type == "cpu":
            raise OptionError("trainer.sync_batchnorm", True, "must be false on CPUs: PyTorch has it for GPUs only")
        check_run(self.method.students.run, device)
        # Lightning converts the module after loading a checkpoint into it, which would round the loaded weights.
        trainer.precision_plugin.convert_module(self.module)
        if trainer.world_size > 1 and cluster.is_torchrun() and not torch.distributed.is_initialized():
            rendezvous.join_process_group("nccl" if device.type == "cuda" else "gloo")
        return trainer

    def check_evaluations(self, steps: int) -> None:
        """Checks that the options of `trainer` leave at least one evaluation, without which no epoch can be selected.

        Args:
            steps: The number of optimizer steps in an epoch.

        Raises:
            OptionError: An option ends the run before the first evaluation, or `trainer` has an option that odcheap
                sets itself.
        """
        options, advice = self.cfg.trainer, "no epoch would be evaluated; select=last selects nothing"
        for name in OWN_OPTIONS & {str(name) for name in options}:
            raise OptionError(f"trainer.{name}", options[name], "is not an option of odcheap's runs")
        interval = options.get("val_check_interval")
        if isinstance(interval, int) and interval > self.batches and options.get("check_val_every_n_epoch", 1):
            allowed = f"must be at most {self.batches}, the number of batches in an epoch"
            raise OptionError("trainer.val_check_interval", interval, allowed)
        if self.cfg.test_only or self.cfg.select == "last" or not self.watches_images:
            return
        every, max_steps = options.get("check_val_every_n_epoch") or 1, options.get("max_steps", -1)
        if every > options.max_epochs:
            allowed = f"must be at most trainer.max_epochs={options.max_epochs}: {advice}"
            raise OptionError("trainer.check_val_every_n_epoch", every, allowed)
        if 0 <= max_steps < every * steps:
            raise OptionError("trainer.max_steps", max_steps, f"must be {every * steps} or more: {advice}")

    @property
    def watches_images(self) -> bool:
        """Whether there are images to evaluate after each epoch."""
        return len(self.data.labels[self.data.watched_part]) > 0

    def run(self) -> dict[str, Any]:
        """Trains, tests the weights of the last and of the selected epoch, and writes the results to the run's folder.

        Returns:
            The content of `summary.json`.
        """
        # Only the first process writes to the folder; it holds the folder's lock until the run has ended.
        self.check_selected()
        loggers = trackers.build_loggers(self.start)
        trainer = self.build_trainer()
        job_dir, is_first = self.start.job_dir, trainer.is_global_zero
        make_folder(job_dir)
        with status.lock_folder(job_dir) if is_first else nullcontext(), trackers.finish_loggers(loggers):
            if is_first:
                prepare_folder(self.start)
                settings = self.start.config.to_settings()
                text = OmegaConf.to_yaml(settings)
                loggers = trackers.start_loggers(self.start, loggers, settings, text)
                trainer.loggers = list(loggers.values())
                self.logger_runs.ids = {name: str(logger.version) for name, logger in loggers.items() if logger.version}
                write_text(job_dir / CONFIG, text)
            self.print_introduction(trainer)

            # The weights of the last epoch are in memory; those of the selected one are read from its checkpoint.
            fit = self.fit(trainer)
            last = self.test(trainer, fit.history[-1])
            if fit.epoch != fit.history[-1]["epoch"]:
                path = epoch_path(job_dir, fit.epoch)
                load_state(self.module, read_checkpoint(path, "job_dir"), path, "job_dir")
            selected = self.test(trainer, fit.row(fit.epoch))

            content = self.summarize(fit, selected, last)
            if is_first:
                confusion, steps = selected.confusion[fit.candidate], fit.history[-1]["step"]
                if loggers:
                    trackers.log_result(loggers, content, confusion, self.data.classes, steps)
                self.write(fit, selected, content)
                status.write_status(job_dir, "finished")
                summary.print_summary(self.console, content, f"{job_dir}: finished")
        return content

    def check_selected(self) -> None:
        """Raises `OptionError` if the checkpoint names a selected network that the run does not have."""
        candidate = self.start.selected_candidate
        if candidate is not None and candidate >= len(self.method.candidates()):
            allowed = f"has selected student {candidate}, which it does not have"
            raise OptionError("resume", self.start.checkpoint, allowed)

    def fit(self, trainer: pl.Trainer) -> FitResult:
        """Trains, from the start or from the run's checkpoint, and returns what was selected.

        Raises:
            Failure: An option of the trainer ended the run before the first epoch, or no epoch was evaluated although
                the best one has to be selected.
        """
        process, views = loading_process(trainer), len(self.method.students) if self.method.has_own_views else 1
        train_loader = self.data.train_loader(process, views)
        train_loader.sampler.limit = self.cfg.trainer.get(EPOCH_LIMIT)
        try:
            trainer.fit(
                self.module,
                train_loader,
                self.data.val_loader(process),  # not used if there are no images to evaluate
                ckpt_path=self.start.checkpoint,
                weights_only=True,
            )
        except Exception as error:
            # A made-up checkpoint may have a correct checksum. Lightning and PyTorch restore most of it, and raise
            # errors of every kind if the values do not fit.
            is_restored = self.start.checkpoint is None or self.record.has_begun
            if is_restored or isinstance(error, explained_errors()) or describe_external_failure(error) is not None:
                raise
            raise describe_wrong_state(self.start.checkpoint, error) from error
        selected = self.record.selected
        if not self.record.history:
            raise Failure("trainer: its options ended the run before the first epoch, so there is nothing to test")
        if selected["score"] < 0 and self.cfg.select != "last" and self.watches_images:
            raise Failure("trainer: its options left out the evaluation of every epoch; select=last selects nothing")
        self.report_early_end()
        return FitResult(self.record.history, selected["candidate"], selected["epoch"])

    def report_early_end(self) -> None:
        """Prints a line if the training has ended before its last epoch. It names the options that can cause this."""
        done, epochs = self.record.history[-1]["epoch"] + 1, self.cfg.trainer.max_epochs
        if done < epochs:
            limits = {name: self.cfg.trainer.get(name) for name in LIMITS}
            given = [f"trainer.{name}={value}" for name, value in limits.items() if value not in (None, -1)]
            say(f"the training has ended in epoch {done} of {epochs}{': ' if given else ''}{', '.join(given)}")

    def test(self, trainer: pl.Trainer, val: dict[str, Any]) -> TestResult:
        """Evaluates the current weights on the test images.

        Args:
            trainer: The trainer.
            val: The metrics of the same weights on the held-out images, by names such as "val/student_0/top1". They
                become a part of the result.
        """
        trainer.test(self.module, self.data.test_loader(loading_process(trainer)), verbose=False)
        figures = self.module.figures["test"]
        members = summary.summarize_members(self.module.members, figures, val, self.method.teacher_kind)
        return TestResult(members, figures.confusion)

    def run_test_only(self) -> dict[str, Any]:
        """Evaluates the weights of a checkpoint or a file; writes `test.json` and no other file.

        Returns:
            The content of `test.json`.
        """
        self.check_selected()
        trainer = self.build_trainer()
        make_folder(self.start.job_dir)
        if self.start.content is not None:
            load_state(self.module, self.start.content, self.start.checkpoint)
        self.print_introduction(trainer)

        # A run has selected its student. Only weights from elsewhere, and a run before the end of its first epoch, have
        # no selection: then the held-out images decide, as after the last epoch of a training.
        epoch = self.start.content["epoch"] if self.start.content is not None else 0
        candidate = self.start.selected_candidate
        val: dict[str, Any] = {}
        if self.watches_images:
            trainer.validate(self.module, self.data.val_loader(loading_process(trainer)), verbose=False)
            figures = self.module.figures["val"]
            self.record.select_best(epoch, figures, len(self.method.candidates()))
            if self.cfg.select != "test":
                val = summary.name_figures("val", self.module.members, figures)
        fit = FitResult([], self.record.selected["candidate"] if candidate is None else candidate, epoch)
        tested = self.test(trainer, val)
        content = {
            "selected": self.summarize_selected(fit, tested),
            **tested.members,
            "students": self.name_networks(tested.members["students"]),
            "split": self.data.fingerprint,
            "versions": summary.list_versions(),
        }
        if trainer.is_global_zero:
            check_usable(self.start.job_dir)
            write_json(self.start.job_dir / TEST, content)
            summary.print_summary(self.console, content, f"{self.start.job_dir}: test only")
        return content

    def print_introduction(self, trainer: pl.Trainer) -> None:
        """Prints the numbers of images and students, the device and the run's folder, and warnings about the run."""
        cfg, data = self.cfg, self.data
        train, val, test = (len(data.labels[part]) for part in ("train", "val", "test"))
        names = name_students(self.start)
        students = f"{cfg.num_stu} students" + ("" if names is None else f" ({', '.join(names)})")
        counts = f"{train:,} training, {val:,} held-out, {test:,} test"
        limited = "" if data.limit is None else f" (data.limit={data.limit})"
        device = f"{trainer.world_size} x {trainer.strategy.root_device.type}, {cfg.trainer.precision}"
        say(f"{data.name}: {counts} images{limited}; {students}; {device}; {self.start.job_dir}")
        if trainer.strategy.root_device.type == "cpu":
            if line := describe_load(torch.get_num_threads()):
                say(line)
            if cfg.kernels == "auto":
                if needs_compilation():
                    say("compiling fused operators for this processor, once; this takes some seconds")
                if reason := kernels.reason_for_plain_layers("cpu"):
                    say(f"training with PyTorch's own operators, which takes longer: {reason}")
        if line := describe_few_images(data):
            say(line)
        if self.start.checkpoint:
            say(f"{'testing' if cfg.test_only else 'continuing from'} {self.start.checkpoint}")
            before, epochs = self.start.saved_epochs, self.start.cfg.trainer.max_epochs
            if isinstance(before, int) and before != epochs:
                schedule = f"the learning rate follows the schedule for {epochs} epochs"
                say(f"trainer.max_epochs: {epochs} in place of {before}; {schedule}")
        if cfg.select == "test":
            say("warning: select=test picks student and epoch on the test images; its accuracy is too high an estimate")

    def summarize(self, fit: FitResult, selected: TestResult, last: TestResult) -> dict[str, Any]:
        """Returns the content of `summary.json`; every process must call this.

        Args:
            fit: The result of the training.
            selected: The result of the test with the weights of the selected epoch.
            last: The result of the test with the weights of the last epoch.
        """
        data, history = self.data, fit.history
        assert self.standards, "costs are compared with those of the standard network"
        chosen = fit.candidate % len(self.method.students)
        images = min(len(data.labels["train"]), self.batches * data.batch_size) * len(history)
        return {
            "selected": self.summarize_selected(fit, selected),
            **selected.members,
            "students": self.name_networks(selected.members["students"]),
            "last": last.members,
            "cost": summary.summarize_costs(self.method, self.standards[chosen], data.image_size, images, chosen),
            "images_per_second": sum(row["images_per_second"] for row in history) / len(history),
            "train_seconds": history[-1]["seconds"],
            "epochs": len(history),
            "seed": self.cfg.seed,
            "data": data.name,
            **summary.count_images(data.labels, data.classes),
            "unreadable": data.unreadable(),
            "num_stu": self.cfg.num_stu,
            "split": data.fingerprint,
            "versions": summary.list_versions(),
            "finished": True,
        }

    def name_networks(self, students: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Adds the name and the costs of each student's network to its accuracies if the networks differ.

        Args:
            students: A dict of accuracies for each student, which is the entry `students` of `summarize_members`.

        Returns:
            The dicts of all students. If the networks differ, each has three more keys: `network` (a name such as
            "DW resnet20"), `params` (number of parameters) and `macs` (multiply-accumulates for one image).
        """
        names = name_students(self.start)
        if names is None:
            return students
        return [
            figures | {"network": name, **summary.count_costs(student, self.data.image_size)}
            for figures, name, student in zip(students, names, self.method.students.members, strict=True)
        ]

    def summarize_selected(self, fit: FitResult, tested: TestResult) -> dict[str, Any]:
        """Returns the entry `selected` of `summary.json`.

        Args:
            fit: The result of the training, which says what is selected.
            tested: The result of the test with the weights of the selected epoch.

        Returns:
            A dict with the index `student`, `averaged` (whether the moving average of its weights was selected),
            `epoch` (from 0), the images and the metric of the selection, and accuracies. Its `recall` maps each class
            to the recall on the test images, which is None for a class without test images.
        """
        students, averages = tested.members["students"], tested.members["averages"] or []
        figures = [*students, *averages][fit.candidate]
        # The recall of a class is the diagonal entry of its row divided by the sum of the row.
        confusion = enumerate(tested.confusion[fit.candidate])
        recall = [counts[k] / sum(counts) if sum(counts) else None for k, counts in confusion]
        return {
            "student": fit.candidate % len(students),
            "averaged": fit.candidate >= len(students),
            "epoch": fit.epoch,
            "selected_on": self.record.select,
            "selected_by": self.record.figure,
            **figures,
            "balanced_accuracy": figures["test_balanced_accuracy"],
            "recall": dict(zip(self.data.classes, recall, strict=True)),
        }

    def write(self, fit: FitResult, selected: TestResult, content: dict[str, Any]) -> None:
        """Writes the results into the run's folder: `confusion.csv`, `split.csv`, the student, and `summary.json`.

        `summary.json` is written last: if it exists, all other files are complete.

        Args:
            fit: The result of the training.
            selected: The result of the test with the weights of the selected epoch.
            content: The content of `summary.json`, from `summarize`.
        """
        job_dir, classes = self.start.job_dir, self.data.classes
        counts = ([name, *row] for name, row in zip(classes, selected.confusion[fit.candidate], strict=True))
        write_csv(job_dir / "confusion.csv", [["true \\ predicted", *classes], *counts])
        if files := list(self.data.rows()):
            write_csv(job_dir / "split.csv", [["file", "class", "part"], *files])
        if self.data.digests is not None:
            write_digests(job_dir, self.data.digests)
        student = self.method.candidates()[fit.candidate]
        settings = select_student_settings(self.module.about, fit.candidate % len(self.method.students))
        summary.write_student(job_dir / STUDENT, student, settings)
        write_json(job_dir / SUMMARY, content)


def load_state(
    module: DistillationModule, content: Mapping[str, Any], path: Path | None, option: str = "resume"
) -> None:
    """Copies the weights from a checkpoint that has been read into a module.

    Args:
        module: The module, whose weights are changed in place.
        content: The content of the checkpoint.
        path: The path of the checkpoint, for messages.
        option: The name of the option that gave the checkpoint, for messages.

    Raises:
        OptionError: The weights do not fit.
    """
    try:
        module.load_state_dict(content["state_dict"])
    except RuntimeError as error:
        raise describe_wrong_state(path, error, option) from error


def describe_wrong_state(path: Path | None, error: Exception, option: str = "resume") -> OptionError:
    """Returns an `OptionError` which says that the weights or another state of a checkpoint do not fit the run.

    Args:
        path: The path of the checkpoint.
        error: The error that was raised when the state was restored.
        option: The name of the option that gave the checkpoint, for messages.
    """
    reason = escape_control_chars(" ".join(str(error).split())[:160])
    return OptionError(option, path, f"its state does not fit the run ({type(error).__name__}: {reason})")


def show_profile() -> None:
    """Lets Lightning's profiler (`+trainer.profiler=simple`) print its report, although other messages are hidden."""
    # odcheap hides other messages of Lightning, and Hydra disables the loggers that it finds.
    logger = logging.getLogger("pytorch_lightning.profilers.profiler")
    logger.setLevel(logging.INFO)
    logger.disabled = False


def loading_process(trainer: pl.Trainer) -> Process:
    """Returns the device and the ranks of this process, for the data loaders."""
    return Process(trainer.strategy.root_device, trainer.global_rank, trainer.world_size, trainer.num_devices)


def describe_few_images(data: ImageData) -> str:
    """Returns a warning if a class has fewer than two training or held-out images; otherwise an empty text."""
    few = []
    for part, name in (("train", "training"), ("val", "held-out")):
        counts = np.bincount(np.asarray(data.labels[part], dtype=int), minlength=len(data.classes))
        count = int((counts < 2).sum())
        if count and counts.any():
            few.append(f"{count} of {len(counts)} classes have fewer than 2 {name} images")
    limit = "" if data.limit is None else f" (data.limit={data.limit})"
    return f"warning: {', and '.join(few)}{limit}; their accuracies say little" if few else ""
