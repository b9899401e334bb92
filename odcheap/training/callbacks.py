"""Lightning callbacks for a run: checks of gradients, metrics, selection, checkpoints, progress, and signals.

The candidates are the networks from which the best one is selected: the students, then the moving averages of their
weights if there are any.
"""

import time
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import CheckpointIO
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from odcheap.data.base import Batch
from odcheap.distributed import rendezvous
from odcheap.distributed.signals import SignalListener, Stopped
from odcheap.runs.folder import epoch_path, prune_checkpoints, read_checkpoint, step_path
from odcheap.training.module import DistillationModule, Figures
from odcheap.training.summary import name_figures
from odcheap.training.train_step import StepResult
from odcheap.utils.console import say
from odcheap.utils.errors import Failure
from odcheap.utils.files import write_checkpoint, write_csv
from odcheap.utils.text import count_things, format_accuracy, format_seconds

CHECK_EVERY = 10  # batches between two looks at the gradients or the clock, for which a process waits for others
WARM_UP_STEPS, TIMED_STEPS = 5, 20  # the expected time is measured on 20 steps, after 5 that allocate memory
REPORT_EVERY = 30  # seconds between lines of progress if the output is not a terminal


class NonfiniteGuard(pl.Callback):
    """Checks after training steps whether their gradients were finite, and raises `Failure` if they were not.

    On a GPU several steps are checked together, every `CHECK_EVERY` batches and before a checkpoint is written.

    Args:
        skip: True if the training step itself skips updates with gradients that are not finite. Such steps are then
            only counted.
        limit: The number of steps that may be skipped in the whole run. `Failure` is raised if there are more.
    """

    def __init__(self, skip: bool, limit: int):
        self.skip, self.limit, self.skipped = skip, limit, 0
        self.pending: list[tuple[str, Tensor, dict[str, Tensor]]] = []  # step, whether finite, loss terms

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.skipped = state_dict["skipped"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        result: StepResult = outputs["result"]
        if result.finite is not None:
            place = f"epoch {trainer.current_epoch + 1}, step {trainer.global_step}"
            # They are copied, since a CUDA graph overwrites its results at the next batch.
            terms = {name: term.clone() for name, term in result.terms.items() if name != "loss"}
            self.pending.append((place, result.finite.clone(), terms))
        if self.skip or pl_module.device.type == "cpu" or (batch_idx + 1) % CHECK_EVERY == 0:
            self.check()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.check()

    def check(self) -> None:
        """Checks the gradients of all steps since the last call for NaN and infinity.

        Raises:
            Failure: The gradients of a step are not finite, and skipping is off or too many steps have been skipped.
        """
        # One transfer from the device for all steps; most often that is all.
        pending, self.pending = self.pending, []
        if not pending or torch.stack([finite for _, finite, _ in pending]).all():
            return
        # The message names the loss terms of the first such step that are not finite.
        place, _, terms = next(step for step in pending if not step[1])
        names = ", ".join(name for name, term in terms.items() if not torch.isfinite(term)) or "a gradient"
        self.skipped += 1
        if not self.skip or self.skipped > self.limit:
            what = f"on_nonfinite={'skip' if self.skip else 'stop'}: {place}: {names} is not finite"
            more = f" (more than max_skipped={self.limit} times)" if self.skip else ""
            raise Failure(f"{what}{more}; the last checkpoint is kept; try a lower optimizer.lr")
        say(f"skipped {place}: {names} is not finite ({self.skipped} of {self.limit})")


class AtomicCheckpointIO(CheckpointIO):
    """A plugin of Lightning that writes checkpoints atomically: a crash never leaves an incomplete file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(path, checkpoint)

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        return read_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


class Record(pl.Callback):
    """Records the metrics of each epoch, selects the best network and epoch, and saves checkpoints.

    The network is selected from the candidates: all students, then the moving averages of their weights, if any.

    Args:
        job_dir: The run's folder.
        select: How to select. "val" or "test" selects the candidate and epoch with the best metric on these images. If
            metrics are equal, the earlier epoch wins, then the earlier candidate. "last" selects student 0 of the last
            epoch.
        figure: The metric by which "val" and "test" select: "top1" or "balanced_accuracy".
        every: The number of minutes between two checkpoints within an epoch; None to save only at the end of each
            epoch.
        keep: The number of newest checkpoints to keep. The checkpoint of the selected epoch is kept in addition.

    Attributes:
        history: A dict for each epoch, from names such as "val/student_0/top1" to metrics.
        selected: A dict with what is selected so far: the indices `candidate` and `epoch`, both from 0, and `score`,
            the metric that was compared.
    """

    def __init__(self, job_dir: Path, select: str, figure: str, every: float | None, keep: int):
        self.job_dir, self.select, self.figure, self.every, self.keep = job_dir, select, figure, every, keep
        self.selected: dict[str, Any] = {"candidate": 0, "epoch": 0, "score": -1.0}
        self.history: list[dict[str, Any]] = []
        self.earlier_seconds = 0.0  # training time before the run was resumed
        self.start_time = self.epoch_start = self.saved_time = time.perf_counter()
        self.train_end: float | None = None
        self.images = 0
        self.lr = 0.0
        self.has_begun = False  # whether an epoch has begun: everything was restored from the checkpoint then
        self.validated_step = -1  # the number of optimizer steps before the latest validation

    def state_dict(self) -> dict[str, Any]:
        return {"selected": self.selected, "history": self.history, "seconds": self.seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.selected, self.history = state_dict["selected"], state_dict["history"]
        self.earlier_seconds = state_dict["seconds"]

    def seconds(self) -> float:
        """Returns the training time in seconds from the start of the run until now.

        If the run was resumed, this includes the training time that its checkpoint contains.
        """
        return self.earlier_seconds + time.perf_counter() - self.start_time

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start_time = self.epoch_start = self.saved_time = time.perf_counter()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epoch_start, self.train_end, self.images = time.perf_counter(), None, 0
        self.validated_step, self.has_begun = -1, True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]  # at the end of the epoch it is that of the next epoch

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        # All processes must save at the same batch: process 0 decides whether it is time.
        self.images += len(batch.target) * trainer.world_size
        is_within = batch_idx + 1 < trainer.num_training_batches
        if self.every is not None and is_within and (batch_idx + 1) % CHECK_EVERY == 0:
            is_due = time.perf_counter() - self.saved_time > 60 * self.every
            if trainer.strategy.broadcast(is_due):
                self.save(trainer, step_path(self.job_dir, trainer.current_epoch, batch_idx + 1))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.train_end = time.perf_counter()
        self.validated_step = trainer.global_step

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, DistillationModule)
        # Metrics are used only if they are those of the weights at the end of this epoch. An epoch may have no
        # validation (`max_steps` ends it, or `check_val_every_n_epoch` leaves it out) or one within it
        # (`val_check_interval`).
        figures = pl_module.figures.get("val") if self.validated_step == trainer.global_step else None
        row = self.summarize_epoch(trainer, pl_module, figures)
        self.history.append(row)
        self.select_best(trainer.current_epoch, figures, len(pl_module.method.candidates()))

        # Log the metrics, and write all epochs to metrics.csv: later epochs may have more columns than the first one.
        for logger in trainer.loggers:
            logger.log_metrics({k: v for k, v in row.items() if v is not None}, step=row["step"])
        if trainer.is_global_zero:
            names = list(dict.fromkeys(name for row in self.history for name in row))
            write_csv(
                self.job_dir / "metrics.csv", [names, *([row.get(name) for name in names] for row in self.history)]
            )
        self.save(trainer, epoch_path(self.job_dir, trainer.current_epoch))

    def summarize_epoch(
        self, trainer: pl.Trainer, module: DistillationModule, watched: Figures | None
    ) -> dict[str, Any]:
        """Returns the metrics of the current epoch by name; every process must call this.

        Args:
            trainer: The trainer.
            module: The module that is trained.
            watched: The metrics on the held-out images, or on the test images if they are used to select. None if no
                images were evaluated in this epoch.
        """
        # The speed is that of the training alone, without the evaluation after it.
        seconds = (self.train_end or time.perf_counter()) - self.epoch_start
        row: dict[str, Any] = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "lr": self.lr,
            "images_per_second": self.images / seconds,
            "seconds": self.seconds(),
        }
        row |= {f"train/{name}": value for name, value in module.terms.compute().items()}
        row |= name_figures("train", module.members, module.compute_figures("train"))
        if watched is not None:
            stage = "test" if self.select == "test" else "val"
            row |= {f"{stage}/{name}": value for name, value in module.val_terms.compute().items()}
            row |= name_figures(stage, module.members, watched)
        return row

    def select_best(self, epoch: int, figures: Figures | None, candidates: int) -> None:
        """Updates `selected` if a candidate (student or moving average) is better than all before.

        Args:
            epoch: The number of the epoch, from 0.
            figures: The metrics of all networks that are evaluated: students, moving averages of their weights, teacher
                and ensemble. None if no images were evaluated.
            candidates: The number of students and moving averages. Only these first entries of `figures` are compared.
        """
        # "Better" excludes equal, so that the earlier epoch and the lower candidate stay selected.
        if self.select == "last":
            self.selected = {"candidate": 0, "epoch": epoch, "score": -1.0}
        elif figures is not None:
            scores = getattr(figures, self.figure)[:candidates]
            for candidate, score in enumerate(scores):
                if score > self.selected["score"]:
                    self.selected = {"candidate": candidate, "epoch": epoch, "score": score}

    def save(self, trainer: pl.Trainer, path: Path) -> None:
        """Saves a checkpoint to `path`, and removes the oldest checkpoints if there are more than `keep`."""
        trainer.save_checkpoint(path)
        self.saved_time = time.perf_counter()
        if trainer.is_global_zero:
            prune_checkpoints(self.job_dir, self.keep, epoch_path(self.job_dir, self.selected["epoch"]))


class ProgressReporter(pl.Callback):
    """Prints a line for each epoch, the expected time of the run, and on a terminal also progress bars.

    Without a terminal, a line is printed every 30 s in place of the bars.

    Args:
        record: The callback that records the metrics of each epoch.
        console: The console to print on.
        shorter: A text with options for shorter runs. It is printed if a run on a CPU will take more than an hour.
    """

    def __init__(self, record: Record, console: Console, shorter: str):
        self.record, self.console, self.shorter = record, console, shorter
        self.steps, self.timed_from, self.reported = 0, 0.0, 0.0
        self.bar: Progress | None = None
        self.training: TaskID | None = None
        self.evaluation: TaskID | None = None
        self.best = 0.0  # the highest accuracy of a candidate in any epoch

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.steps = 0
        self.best = max((find_best_candidate(row)[2] for row in self.record.history), default=0.0)
        if self.console.is_terminal and trainer.is_global_zero:
            batches = int(trainer.num_training_batches)
            done = max(0, trainer.current_epoch * batches + trainer.fit_loop.batch_idx + 1)
            total = batches * (trainer.max_epochs or 1)
            self.training = self.start_bar().add_task("training", total=total, completed=done)

    def start_bar(self, transient: bool = False) -> Progress:
        """Returns the display of progress bars, which is started first if it is not shown yet.

        Args:
            transient: True if a display that is started here is to vanish at its end.
        """
        if self.bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=self.console, expand=True, transient=transient)
            self.bar.start()
        return self.bar

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero:
            return
        # The expected time is measured on the first steps, without those that allocate memory.
        self.steps += 1
        now, batches, epochs = time.perf_counter(), int(trainer.num_training_batches), trainer.max_epochs or 1
        done = trainer.current_epoch * batches + batch_idx + 1
        if self.steps == WARM_UP_STEPS:
            self.timed_from = self.reported = now
        if self.steps == WARM_UP_STEPS + TIMED_STEPS:
            seconds = (batches * epochs - done) * (now - self.timed_from) / TIMED_STEPS
            self.report_expected_time(seconds, epochs, pl_module.device)

        # The progress bar, or on other outputs than a terminal a line now and then.
        if self.bar is not None and self.training is not None:
            text = f"epoch {trainer.current_epoch + 1}/{epochs}{self.describe_latest_epoch()}"
            self.bar.update(self.training, completed=done, description=text)
        elif self.steps > WARM_UP_STEPS and now - self.reported > REPORT_EVERY:
            self.reported = now
            self.console.print(f"  batch {batch_idx + 1}/{batches} of epoch {trainer.current_epoch + 1}")

    def report_expected_time(self, seconds: float, epochs: int, device: torch.device) -> None:
        """Prints how long the training will still take.

        Args:
            seconds: The expected time in seconds.
            epochs: The number of epochs of the run.
            device: The device of the training. If it is a CPU and the time is long, options for shorter runs are
                printed, too.
        """
        hint = f"; shorter: {self.shorter}" if seconds > 3600 and device.type == "cpu" else ""
        text = f"  about {format_seconds(seconds)} to go for {count_things(epochs, 'epoch')}{hint}"
        self.console.print(text, soft_wrap=True)

    def describe_latest_epoch(self) -> str:
        """Returns speed and accuracies of the latest epoch as text, which is empty before the first epoch has ended."""
        if not self.record.history:
            return ""
        row = self.record.history[-1]
        stage, name, accuracy = find_best_candidate(row)
        teacher = row.get(f"{stage}/teacher/top1")
        text = f"  {row['images_per_second']:,.0f} images/s  {stage} top-1: {name} {format_accuracy(accuracy)} %"
        text += "" if teacher is None else f"  teacher {format_accuracy(teacher)} %"
        return f"{text}  best so far {format_accuracy(self.best)} %"

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            row, epoch = self.record.history[-1], f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            self.best = max(self.best, find_best_candidate(row)[2])
            figures = self.describe_latest_epoch()
            loss = f"  loss {row['train/loss']:.4f}" if "train/loss" in row else "  every step was skipped"
            self.console.print(f"{epoch}{loss}{figures}", soft_wrap=True)
            if self.bar is not None and self.training is not None:  # so that the finished bar has the last figures
                self.bar.update(self.training, description=f"{epoch}{figures}")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.reported = time.perf_counter()
        if self.console.is_terminal and trainer.is_global_zero:
            name, batches = describe_evaluation(trainer)
            self.evaluation = self.start_bar(transient=True).add_task(name, total=batches)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        now = time.perf_counter()
        if self.bar is not None and self.evaluation is not None:
            self.bar.update(self.evaluation, completed=batch_idx + 1)
        elif trainer.is_global_zero and now - self.reported > REPORT_EVERY:
            self.reported = now
            name, batches = describe_evaluation(trainer)
            self.console.print(f"  batch {batch_idx + 1}/{batches} of the {name}")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.bar is not None and self.evaluation is not None:
            self.bar.remove_task(self.evaluation)
            self.evaluation = None
            if self.training is None:
                self.stop()

    on_test_start, on_test_batch_end, on_test_end = on_validation_start, on_validation_batch_end, on_validation_end

    def stop(self, *_: Any, **__: Any) -> None:
        """Ends the display of progress bars, if it is shown; all arguments are ignored."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = self.training = self.evaluation = None

    on_train_end = on_exception = stop


def describe_evaluation(trainer: pl.Trainer) -> tuple[str, float]:
    """Returns the name of the current evaluation, "validation" or "test", and its number of batches."""
    name, batches = ("test", trainer.num_test_batches) if trainer.testing else ("validation", trainer.num_val_batches)
    return name, batches[0]  # there is one loader


def find_best_candidate(row: dict[str, Any]) -> tuple[str, str, float]:
    """Finds the student, or moving average of a student's weights, with the best top-1 accuracy in an epoch.

    Args:
        row: The metrics of the epoch, by names such as "val/student_0/top1".

    Returns:
        Three values: the part of the data whose accuracies are compared, the name of the best network, such as
        "student 0", and its accuracy. The part is the first of "val", "test" and "train" that `row` has.
    """
    stage = next(s for s in ("val", "test", "train") if f"{s}/student_0/top1" in row)
    prefixes = (f"{stage}/student_", f"{stage}/average_")
    candidates = {name: value for name, value in row.items() if name.startswith(prefixes) and name.endswith("/top1")}
    best = max(candidates, key=lambda name: candidates[name])
    return stage, best.split("/")[1].replace("_", " "), candidates[best]


class Interruption(pl.Callback):
    """Saves a checkpoint and raises `Stopped` after the current step if any process has received a signal.

    It also tells the listener since when the training has been waiting for a batch, so that a signal can stop a
    training that gets no batches.

    Args:
        listener: The listener that receives the signals.
        record: The callback that saves checkpoints.
        guard: The callback whose check of the gradients is called before the checkpoint is saved.
    """

    def __init__(self, listener: SignalListener, record: Record, guard: NonfiniteGuard):
        self.listener, self.record, self.guard = listener, record, guard
        self.group: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.listener.install_handlers()  # Lightning has replaced them
        self.listener.defer()
        if trainer.world_size > 1:  # gloo compares the signals on the CPU, without waiting for a GPU
            self.group = cast(torch.distributed.ProcessGroup, torch.distributed.new_group(backend="gloo"))
            rendezvous.check_same_start(trainer.current_epoch, trainer.global_step, self.group)

    def start_waiting(self, *_: Any, **__: Any) -> None:
        """Tells the listener that the training waits for a batch from now on."""
        self.listener.waiting_since = time.monotonic()

    def end_waiting(self, *_: Any, **__: Any) -> None:
        """Tells the listener that the training does not wait for a batch."""
        self.listener.waiting_since = None

    on_train_epoch_start = on_validation_epoch_start = on_validation_batch_end = start_waiting
    on_train_batch_start = on_validation_batch_start = on_validation_epoch_end = end_waiting

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.listener.install_handlers()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = batch_idx + 1
        if done == trainer.num_training_batches:
            return
        if signum := self.agree_on_signal():
            self.guard.check()
            self.record.save(trainer, step_path(self.record.job_dir, trainer.current_epoch, done))
            raise Stopped(signum)
        self.start_waiting()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if signum := self.agree_on_signal():  # `Record` has just saved a checkpoint
            raise Stopped(signum)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.listener.is_deferred = False

    def agree_on_signal(self) -> int:
        """Returns the number of a signal that any process has received, or 0; every process must call this."""
        signum = torch.tensor(self.listener.received)
        if self.group is not None:
            torch.distributed.all_reduce(signum, torch.distributed.ReduceOp.MAX, self.group)
        return int(signum)
