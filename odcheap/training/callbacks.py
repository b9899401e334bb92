"""What watches a run: the record with its selection and checkpoints, the progress."""

import csv
import io
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from odcheap.runs.checkpoint_io import epoch_path, prune, step_path
from odcheap.training.module import DistillationModule
from odcheap.training.nonfinite import CHECK_EVERY
from odcheap.utils.files import write_text
from odcheap.utils.text import format_seconds


class Record(pl.Callback):
    """Keeps an epoch's figures, chooses candidate and epoch, saves. Its state is all that selection needs.

    `select`: "val" or "test" choose the best top-1 on those images (ties: the earlier epoch, then the lower candidate);
    "last" is student 0 of the last epoch. `figure` is the one that decides ("top1", "balanced_accuracy"). `every` is in
    minutes, None saves at the ends of epochs only.
    """

    def __init__(self, job_dir: Path, select: str, figure: str, every: float | None, keep: int):
        self.job_dir, self.select, self.figure, self.every, self.keep = job_dir, select, figure, every, keep
        self.selected: dict[str, Any] = {"candidate": 0, "epoch": 0, "score": -1.0}
        self.history: list[dict[str, Any]] = []
        self.before = 0.0  # seconds spent by the processes that this one continues
        self.began = self.epoch_began = self.saved = time.perf_counter()
        self.train_ended: float | None = None
        self.images = 0
        self.rate = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"selected": self.selected, "history": self.history, "seconds": self.seconds()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.selected, self.history, self.before = state["selected"], state["history"], state["seconds"]

    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.began

    def on_train_start(self, *_: Any) -> None:
        self.began = self.epoch_began = self.saved = time.perf_counter()

    def on_train_epoch_start(self, *_: Any) -> None:
        self.epoch_began, self.train_ended, self.images = time.perf_counter(), None, 0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.rate = trainer.optimizers[0].param_groups[0]["lr"]  # at the epoch's end the schedule has moved on

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.images += len(batch.target) * trainer.world_size
        within = batch_idx + 1 < trainer.num_training_batches
        if self.every is not None and within and (batch_idx + 1) % CHECK_EVERY == 0:
            due = time.perf_counter() - self.saved > 60 * self.every
            if trainer.strategy.broadcast(due):
                self.save(trainer, step_path(self.job_dir, trainer.current_epoch, batch_idx + 1))

    def on_validation_start(self, *_: Any) -> None:
        self.train_ended = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: DistillationModule) -> None:
        row = self.row(trainer, module)
        self.history.append(row)
        self.choose(trainer.current_epoch, module)
        for logger in trainer.loggers:
            logger.log_metrics({k: v for k, v in row.items() if v is not None}, step=row["step"])
        if trainer.is_global_zero:
            write_text(self.job_dir / "metrics.csv", as_csv(self.history))
        self.save(trainer, epoch_path(self.job_dir, trainer.current_epoch))

    def row(self, trainer: pl.Trainer, module: DistillationModule) -> dict[str, Any]:
        spent = (self.train_ended or time.perf_counter()) - self.epoch_began
        row: dict[str, Any] = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "lr": self.rate,
            "images_per_second": self.images / spent,
            "seconds": self.seconds(),
        }
        row |= {f"train/{name}": value for name, value in module.compute_terms().items()}
        stages = {"train": module.compute_figures("train")}
        if "val" in module.figures:
            stages["test" if self.select == "test" else "val"] = module.figures["val"]
        for stage, figures in stages.items():
            for name in ("top1", "top5", "balanced_accuracy"):
                values = getattr(figures, name)
                row |= {f"{stage}/{member}/{name}": v for member, v in zip(module.members, values, strict=True)}
        return row

    def choose(self, epoch: int, module: DistillationModule) -> None:
        if self.select == "last":
            self.selected = {"candidate": 0, "epoch": epoch, "score": -1.0}
            return
        for candidate in range(len(module.method.candidates())):
            score = getattr(module.figures["val"], self.figure)[candidate]
            if score > self.selected["score"]:
                self.selected = {"candidate": candidate, "epoch": epoch, "score": score}

    def save(self, trainer: pl.Trainer, path: Path) -> None:
        trainer.save_checkpoint(path)
        self.saved = time.perf_counter()
        if trainer.is_global_zero:
            prune(self.job_dir, self.keep, epoch_path(self.job_dir, self.selected["epoch"]))


def as_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


class Narrator(pl.Callback):
    """Tells the user how it goes: a live bar on a terminal, a line an epoch everywhere, the expected total time."""

    def __init__(self, record: Record, console: Console, shorter: str):
        self.record, self.console, self.shorter = record, console, shorter
        self.steps, self.began, self.told = 0, 0.0, 0.0
        self.bar: Progress | None = None

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.steps = 0
        if self.console.is_terminal and trainer.is_global_zero:
            columns = [TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn()]
            self.bar = Progress(*columns, TimeRemainingColumn(), console=self.console, expand=True)
            total = trainer.num_training_batches * trainer.max_epochs
            self.task = self.bar.add_task("training", total=total, completed=trainer.global_step)
            self.bar.start()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        if not trainer.is_global_zero:
            return
        self.steps += 1
        now = time.perf_counter()
        if self.steps == 5:  # the first steps allocate and warm up
            self.began = self.told = now
        if self.steps == 25:
            self.expect(trainer, module, (now - self.began) / 20)
        if self.bar is not None:
            self.bar.update(self.task, completed=trainer.global_step, description=self.latest(trainer))
        elif self.steps > 5 and now - self.told > 30:
            self.told = now
            done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            self.console.print(f"  epoch {trainer.current_epoch} batch {done}/{trainer.num_training_batches}")

    def expect(self, trainer: pl.Trainer, module: Any, seconds_a_step: float) -> None:
        steps = trainer.num_training_batches * trainer.max_epochs - trainer.global_step
        left = seconds_a_step * steps
        hint = f"; shorter: {self.shorter}" if left > 3600 and module.device.type == "cpu" else ""
        self.console.print(
            f"  about {format_seconds(left)} to go for {trainer.max_epochs} epochs{hint}", soft_wrap=True
        )

    def latest(self, trainer: pl.Trainer) -> str:
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        if not self.record.history:
            return epoch
        row = self.record.history[-1]
        _, _, accuracy, teacher = best_of(row)
        return f"{epoch}  {row['images_per_second']:,.0f} images/s  best {accuracy:.4f}{teacher}"

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.is_global_zero:
            row = self.record.history[-1]
            stage, student, accuracy, teacher = best_of(row)
            text = f"epoch {row['epoch']} ({trainer.current_epoch + 1}/{trainer.max_epochs})"
            text += f"  loss {row['train/loss']:.4f}  {row['images_per_second']:,.0f} images/s"
            self.console.print(f"{text}  {stage} top-1: best {student} {accuracy:.4f}{teacher}", soft_wrap=True)

    def on_train_end(self, *_: Any) -> None:
        self.stop()

    def on_exception(self, *_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def best_of(row: dict[str, Any]) -> tuple[str, str, float, str]:
    """Which images were watched, the best student on them, its accuracy, and the teacher's as a piece of text."""
    stage = next(s for s in ("val", "test", "train") if f"{s}/student_0/top1" in row)
    own = (f"{stage}/student_", f"{stage}/average_")
    students = {k: v for k, v in row.items() if k.startswith(own) and k.endswith("/top1")}
    best = max(students, key=students.get)
    teacher = row.get(f"{stage}/teacher/top1")
    also = "" if teacher is None else f"  teacher {teacher:.4f}"
    return stage, best.split("/")[1].replace("_", " "), students[best], also
