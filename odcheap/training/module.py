"""The LightningModule: a method with its recipe, its steps and its figures."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics.classification import MulticlassConfusionMatrix

from odcheap.data.in_memory import Batch
from odcheap.methods.base import Method
from odcheap.training.metrics import Scores, Terms
from odcheap.training.optim import build_optimization, follow_schedule
from odcheap.training.train_step import CapturedStep, CudaGraphs, Taken, single_precision
from odcheap.utils.seeds import derive_seed

Figures = dict[str, list]


class DistillationModule(pl.LightningModule):
    """Trains `method` with an optimizer and a learning rate schedule (see `build_optimization`).

    `about` is kept in every checkpoint. `figures` holds the latest result of each stage ("train", "val", "test"): a
    dict of lists over the members: the candidates (the students, then their averages where a method has them), the
    teacher where there is one, the students' ensemble. `chosen` is the candidate whose confusion is counted in a test.
    `teacher_saw_val`: its figures on held-out images are None, since it may have been trained on them.
    With `capture` whole steps, the optimizer's part included, are CUDA graphs (see `capture`); Lightning's hooks around
    backward and optimizer then find the work done. `refused` hears why, where that cannot be.
    """

    def __init__(
        self,
        method: Method,
        optimizer: partial[torch.optim.Optimizer],
        scheduler: partial[LRScheduler],
        seed: int,
        classes: int,
        about: dict[str, Any],
        capture: bool = False,
        refused: Callable[[str], None] = print,
        teacher_saw_val: bool = False,
    ):
        super().__init__()
        self.method = method.to(memory_format=torch.channels_last)
        self.optimizer, self.scheduler, self.seed, self.about = optimizer, scheduler, seed, about
        self.schedule_steps = self.saved_steps = 0
        self.members = member_names(method)
        self.teacher_saw_val = teacher_saw_val
        self.scores = nn.ModuleDict({f"{stage}_": Scores(len(self.members), classes) for stage in self.stages})
        self.terms: Terms | None = None
        self.running: dict[str, Any] = {}
        self.confusion = MulticlassConfusionMatrix(classes, validate_args=False)
        self.confused: list[list[int]] = []
        self.chosen = 0
        self.figures: dict[str, Figures] = {}
        self.latest: tuple[dict[str, Tensor], dict[str, Tensor], Tensor] | None = None
        self.capture, self.refused, self.captured = capture, refused, None
        self.taken: Taken | None = None

    stages = ("train", "val", "test")

    def configure_optimizers(self) -> dict[str, Any]:
        # Not `estimated_stepping_batches`: it makes the loaders before their place in the epoch can be restored.
        steps = len(self.trainer.datamodule.order()) * self.trainer.max_epochs
        self.schedule_steps = steps
        optimizer, schedule = build_optimization(self.method, self.optimizer, self.scheduler, steps)
        optimizer._step_supports_amp_scaling = False  # with float16 the gradients are unscaled before the guard looks
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        self.take_on(self.running)  # not when loading: Lightning then still turns all of this into its precision
        self.running = {}
        if self.saved_steps not in (0, self.schedule_steps):
            fresh = build_optimization(self.method, self.optimizer, self.scheduler, self.schedule_steps)
            optimizer, schedule = self.optimizers(use_pl_optimizer=False), self.lr_schedulers()
            follow_schedule(optimizer, schedule, fresh, schedule.last_epoch)
        if self.capture:
            optimizer = self.optimizers(use_pl_optimizer=False)
            self.captured = CapturedStep(self.method, optimizer, CudaGraphs(), self.refused)

    def on_train_end(self) -> None:
        self.captured = self.taken = None  # and with them the graphs' memory

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        # Whatever a network draws (dropout) depends on its place in the run alone, so that a resumed run draws it too.
        torch.manual_seed(derive_seed(self.seed, "step", self.current_epoch, batch_idx, self.global_rank))
        if self.captured is not None:
            self.taken = self.captured(batch.images, batch.target)
            self.latest = (self.taken.terms, self.taken.outputs, batch.target)
            return self.taken.terms["loss"]
        outputs = single_precision(self.method(batch.images))
        with torch.autocast(self.device.type, enabled=False):
            terms = self.method.loss(outputs, batch.target)
        self.latest = (terms, outputs, batch.target)
        return terms["loss"] * batch.share

    def backward(self, loss: Tensor) -> None:
        if self.captured is None:
            super().backward(loss)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        if gradient_clip_algorithm == "value" or not gradient_clip_val:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        for parameters in self.method.clipped_together():
            torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def on_train_epoch_start(self) -> None:
        self.method.at_epoch(self.current_epoch, self.trainer.max_epochs)
        self.scores["train_"].reset()
        if self.terms is not None:
            self.terms.reset()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        """Counts a step once it is taken: before any callback saves a checkpoint, and not where it was skipped."""
        if self.captured is None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        else:
            optimizer_closure()
        if self.latest is not None:
            if self.captured is None:  # a captured step has done it
                self.method.after_step()
            self.count(*self.latest)

    def count(self, terms: dict[str, Tensor], outputs: dict[str, Tensor], target: Tensor) -> None:
        if self.terms is None:
            self.terms = Terms(list(terms)).to(self.device)
        self.terms.update(terms, len(target))
        self.scores["train_"].update(self.member_logits(outputs), target)
        self.latest = None

    def on_validation_epoch_start(self) -> None:
        self.share_buffers()

    def on_test_epoch_start(self) -> None:
        self.share_buffers()
        self.confusion.reset()

    def share_buffers(self) -> None:
        """Batch norm's statistics differ between processes; rank 0's are the saved ones, so all evaluate with them."""
        if self.trainer.world_size > 1:
            for buffer in self.method.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.scores["val_"].update(self.evaluate(batch), batch.target)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        logits = self.evaluate(batch)
        self.scores["test_"].update(logits, batch.target)
        self.confusion.update(logits[self.chosen], batch.target)

    def evaluate(self, batch: Batch) -> Tensor:
        return self.member_logits(single_precision(self.method(batch.images)))

    def on_validation_epoch_end(self) -> None:
        self.finish("val")

    def on_test_epoch_end(self) -> None:
        self.finish("test")
        self.confused = self.confusion.compute().tolist()  # here, where every process takes part in the sum

    def finish(self, stage: str) -> Figures:
        """Computes the stage's figures over all processes and starts the next count."""
        scores = self.scores[f"{stage}_"]
        computed = scores.compute()
        recall = computed["recall"]
        few = recall.shape[1] <= 5
        figures = {
            "top1": computed["top1"].tolist(),
            "top5": [None] * len(self.members) if few else computed["top5"].tolist(),
            "balanced_accuracy": recall.nanmean(1).tolist(),
        }
        if stage == "val" and self.teacher_saw_val:
            for values in figures.values():
                values[self.members.index("teacher")] = None
        self.figures[stage] = figures
        scores.reset()
        return self.figures[stage]

    def member_logits(self, outputs: dict[str, Tensor]) -> Tensor:
        """(M, N, K) in the order of `members`; the ensemble's are the log of the students' mean softmax."""
        students, teacher, averages = (outputs.get(f"{kind}_logits") for kind in ("student", "teacher", "average"))
        ensemble = students.softmax(-1).mean(0).log()
        parts = [students, averages, teacher if teacher is None else teacher[None], ensemble[None]]
        return torch.cat([part for part in parts if part is not None]).detach()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what the run is, and the running metrics, summed over the processes."""
        checkpoint["odcheap"] = self.about
        checkpoint["schedule_steps"] = self.schedule_steps
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k.startswith("method.")}
        running = {"scores": self.scores["train_"]} | ({"terms": self.terms} if self.terms is not None else {})
        checkpoint["metrics"] = {name: summed(metric) for name, metric in running.items()}
        checkpoint["metrics"]["names"] = self.terms.names if self.terms is not None else []

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.running = checkpoint.get("metrics", {})
        self.saved_steps = checkpoint.get("schedule_steps", 0)

    def take_on(self, saved: dict[str, Any]) -> None:
        """The running metrics of an epoch that was begun before."""
        if saved.get("names"):
            self.terms = Terms(saved["names"]).to(self.device)
        for name, metric in (("scores", self.scores["train_"]), ("terms", self.terms)):
            if name in saved and self.global_rank == 0:  # they are sums: one process takes them on
                for state, value in saved[name].items():
                    setattr(metric, state, value.to(self.device))
                metric._update_count = 1

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Checkpoints hold the method only; the metrics beside it have no weights."""
        own = {name.removeprefix("method."): tensor for name, tensor in state_dict.items()}
        return self.method.load_state_dict(own, strict=strict, assign=assign)


def member_names(method: Method) -> list[str]:
    """Whoever is evaluated, in the order of their logits."""
    students = len(method.students)
    averages = len(method.candidates()) - students
    names = [f"student_{k}" for k in range(students)] + [f"average_{k}" for k in range(averages)]
    return [*names, *["teacher"] * (method.teacher_kind is not None), "ensemble"]


def summed(metric: Any) -> dict[str, Tensor]:
    """A metric's states, summed over the processes, on the CPU."""
    if metric.update_count == 0:
        metric._update_count = 1  # a count of nothing is what is meant here, not a mistake to be warned of
    with metric.sync_context():
        return {name: getattr(metric, name).detach().cpu().clone() for name in metric._defaults}
