"""The LightningModule, which trains the networks of a method and computes their accuracies.

The metrics of an epoch are exact sums over all images and processes, and checkpoints within an epoch contain them.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric

from odcheap.data.base import Batch
from odcheap.data.mixing import Mixing, to_labels
from odcheap.methods.base import Method
from odcheap.training.optim import build_optimization, follow_schedule
from odcheap.training.train_step import (
    CudaGraphs,
    EagerStep,
    GradientOptions,
    GraphStep,
    to_single_precision,
)
from odcheap.utils.seeds import derive_seed, seed_generators

STAGES = ("train", "val", "test")


class RunningSums(Metric):
    """The base class of metrics whose states are sums, which can be saved and continued within an epoch.

    A checkpoint contains the sums over all processes. After loading, process 0 continues with these sums, and all other
    processes start at zero, so that nothing counts twice.
    """

    full_state_update = False

    def reset(self) -> None:
        super().reset()
        self._update_count = 1  # an epoch may have no step that counts, about which torchmetrics would warn

    def summed_state(self) -> dict[str, Tensor]:
        """Returns the states, by name, summed over all processes, on the CPU; every process must call this."""
        self._update_count = max(1, self._update_count)  # without updates torchmetrics warns, but a sum of 0 is correct
        with self.sync_context():
            state = {name: value for name, value in self.metric_state.items() if isinstance(value, Tensor)}
            return {name: value.detach().cpu().clone() for name, value in state.items()}

    def load_summed_state(self, state: dict[str, Tensor]) -> None:
        """Continues from the sums that `summed_state` returned.

        Only one process may call this. The sums of all processes are added at the end, so the loaded sums would
        otherwise count several times.
        """
        for name, value in state.items():
            setattr(self, name, value.to(self.device))
        self._update_count = 1


class MemberScores(RunningSums):
    """Accuracies of M networks on the same images, as micro-averaged fractions in [0, 1].

    The states are counts, so the results do not depend on how the images are divided among batches and processes.

    Args:
        members: The number of networks, M.
        classes: The number of classes, K.
        with_confusion: True to count confusion matrices, too.

    Example:
        >>> scores = MemberScores(members=1, classes=3)
        >>> scores.update(torch.eye(3)[None], torch.tensor([0, 1, 1]))
        >>> round(scores.compute()["top1"].item(), 4)
        0.6667
    """

    # All networks share these states, so that the number of GPU kernels of an update does not grow with M.
    hits: Tensor
    top5_hits: Tensor
    seen: Tensor
    confusion: Tensor

    def __init__(self, members: int, classes: int, with_confusion: bool = False):
        super().__init__()
        rows = members if with_confusion else 0
        self.add_state("hits", torch.zeros(members, classes, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("top5_hits", torch.zeros(members, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros(classes, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("confusion", torch.zeros(rows, classes, classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Adds the predictions for a batch to the counts.

        Args:
            logits: The logits of all networks, (M, N, K).
            target: Labels (N,).
        """
        predicted, classes = logits.argmax(-1), logits.shape[-1]
        self.hits.index_add_(1, target, (predicted == target).long())
        self.seen.index_add_(0, target, torch.ones_like(target))
        if classes > 5:
            self.top5_hits += (logits.topk(5, dim=-1).indices == target[:, None]).any(-1).sum(-1)
        if len(self.confusion):
            cell = target * classes + predicted  # (M, N): the matrix entry that counts the image
            self.confusion.view(len(logits), -1).scatter_add_(1, cell, torch.ones_like(cell))

    def compute(self) -> dict[str, Tensor]:
        """Returns the metrics of all networks over the images so far.

        Returns:
            A dict with these keys:

            - `top1`, `top5`: the accuracy of each network, (M,); `top5` has no meaning with 5 classes or fewer;
            - `recall`: the recall of each class, (M, K); NaN for a class without images;
            - `confusion`: the number of images by network, true class and predicted class, (M, K, K); (0, K, K) if
              confusion matrices are not counted.
        """
        total = self.seen.sum().double()
        return {
            "top1": self.hits.sum(1).double() / total,
            "top5": self.top5_hits.double() / total,
            "recall": self.hits.double() / self.seen,
            "confusion": self.confusion,
        }


class TermMeans(RunningSums):
    """The mean of each loss term over the images of an epoch. All batches must have the terms of the first batch.

    Example:
        >>> means = TermMeans()
        >>> means.update({"ce": torch.tensor(1.0)}, images=3)
        >>> means.update({"ce": torch.tensor(2.0)}, images=1)
        >>> means.compute()
        {'ce': 1.25}
    """

    total: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.add_state("total", torch.zeros(0, dtype=torch.double), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, terms: dict[str, Tensor], images: int) -> None:
        """Adds the loss terms of a batch to the sums, weighted by its number of images.

        Args:
            terms: The loss terms by name, each a mean over the images of the batch.
            images: The number of images in the batch.
        """
        self.names = self.names or list(terms)
        batch = images * torch.stack([terms[name].detach() for name in self.names]).double()
        self.total = self.total + batch if len(self.total) else batch
        self.images += images

    def compute(self) -> dict[str, float]:
        """Returns the mean of each loss term over the images so far.

        Returns:
            A dict from the name of a term to its mean; empty before the first batch.
        """
        means = (self.total / self.images).tolist()
        return dict(zip(self.names, means, strict=True)) if means else {}


class Figures(NamedTuple):
    """Metrics of all members (the networks that are evaluated, such as students and teacher) on one part of the data.

    Each list has one entry for each member, in the order of `DistillationModule.members`. Accuracies are fractions in
    [0, 1]. The accuracies of the teacher are None if it may have been trained on these images.

    Attributes:
        top1: The top-1 accuracies.
        top5: The top-5 accuracies; a list of None with 5 classes or fewer.
        balanced_accuracy: The balanced accuracies: the mean of the recalls of all classes that have images.
        confusion: The confusion matrices of numbers of images, K x K. Rows are true classes, columns predicted classes.
            They are computed on the test images only; otherwise the list is empty.
    """

    top1: list[float | None]
    top5: list[float | None]
    balanced_accuracy: list[float | None]
    confusion: list[list[list[int]]]


class DistillationModule(pl.LightningModule):
    """Trains the networks of a method, and evaluates them.

    The evaluated networks are called members. They are the students, the moving averages of their weights (if there are
    any), the teacher (if there is one), and the ensemble of the students. Lightning's manual optimization is used:
    `training_step` calls an `EagerStep` or a `GraphStep`.

    A checkpoint that is saved within an epoch contains the metrics of this epoch so far. The data loader saves how many
    batches are done.

    Args:
        method: The networks to train and their loss.
        optimizer: A class of `torch.optim` with its options, such as `partial(torch.optim.SGD, lr=0.1)`.
        scheduler: A class of `torch.optim.lr_scheduler` with its options, also as a `functools.partial`.
        steps: The number of optimizer steps in the whole run.
        classes: The number of classes.
        seed: The seed of the run.
        about: A description of the run, from `summary.describe_run`. Every checkpoint contains it as `odcheap`.
        gradients: How gradients are accumulated, clipped and checked.
        on_graph_refused: None to train in eager mode. A function to record training steps as CUDA graphs; it is called
            with the reason, a text, if a step cannot be recorded.
        teacher_saw_val: True if the teacher may have been trained on the held-out images. Its accuracies on these
            images are then None.
        mixing: The function that mixes the images of training batches (mixup, cutmix); None for no mixing. With mixing,
            a prediction in training counts as correct if it is the more probable label of the mixed image.

    Attributes:
        members: The names of the members, such as "student_0", "average_0", "teacher" and "ensemble".
        figures: The latest metrics of each stage that was evaluated, by "train", "val" or "test".
    """

    def __init__(
        self,
        method: Method,
        optimizer: partial[torch.optim.Optimizer],
        scheduler: partial[LRScheduler],
        steps: int,
        classes: int,
        seed: int = 0,
        about: dict[str, Any] | None = None,
        gradients: GradientOptions = GradientOptions(),  # noqa: B008 - immutable
        on_graph_refused: Callable[[str], None] | None = None,
        teacher_saw_val: bool = False,
        mixing: Mixing | None = None,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.method = method.to(memory_format=torch.channels_last)
        self.optimizer, self.scheduler, self.steps, self.seed = optimizer, scheduler, steps, seed
        self.about, self.gradients, self.on_graph_refused = about or {}, gradients, on_graph_refused
        self.teacher_saw_val, self.mixing = teacher_saw_val, mixing
        self.members = name_members(method)
        # With an underscore, since a `ModuleDict` cannot have a key "train".
        scores = {f"{stage}_": MemberScores(len(self.members), classes, stage == "test") for stage in STAGES}
        self.scores = nn.ModuleDict(scores)
        self.terms, self.val_terms = TermMeans(), TermMeans()
        self.figures: dict[str, Figures] = {}
        self.step: EagerStep | GraphStep | None = None
        self.restored: dict[str, Any] = {}

    def stage_scores(self, stage: str) -> MemberScores:
        """Returns the metrics that count right predictions in a stage, which is "train", "val" or "test"."""
        return cast(MemberScores, self.scores[f"{stage}_"])

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[LRScheduler]]:
        optimizer, schedule = build_optimization(self.method, self.optimizer, self.scheduler, self.steps)
        return [optimizer], [schedule]

    def on_train_start(self) -> None:
        # Continue the running metrics of an interrupted epoch. They are sums over all processes, so only one process
        # loads them. This is not done in `on_load_checkpoint`, since Lightning converts the module's precision later.
        metrics = self.restored.get("metrics")
        if metrics is not None and self.global_rank == 0:
            self.stage_scores("train").load_summed_state(metrics["scores"])
            self.terms.load_summed_state(metrics["terms"])
            self.terms.names = metrics["names"]

        optimizer = cast(torch.optim.Optimizer, self.optimizers(use_pl_optimizer=False))
        schedule = cast(LRScheduler, self.lr_schedulers())
        if self.restored.get("steps", self.steps) != self.steps:  # the run is resumed with another number of epochs
            fresh = build_optimization(self.method, self.optimizer, self.scheduler, self.steps)
            follow_schedule(optimizer, schedule, fresh, schedule.last_epoch)

        if self.on_graph_refused is not None:
            self.step = GraphStep(EagerStep(self.method, optimizer), CudaGraphs(), self.on_graph_refused)
        else:
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            self.step = EagerStep(self.method, optimizer, self.gradients, scaler, self.manual_backward)
            self.step.load_state_dict(self.restored.get("accumulated", {}))
        self.restored = {}

    def on_train_end(self) -> None:
        self.step = None  # frees the memory of CUDA graphs

    def on_train_epoch_start(self) -> None:
        self.method.start_epoch(self.current_epoch, self.trainer.max_epochs or 1)
        self.stage_scores("train").reset()
        self.terms.reset()

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Trains on a batch. Returns `loss`, a scalar for Lightning, and `result`, a `StepResult` for callbacks."""
        # Random numbers of the networks (dropout) depend only on the step, so a resumed run draws the same ones.
        seed = derive_seed(self.seed, "step", self.current_epoch, batch_idx, self.global_rank)
        seed_generators(seed, self.device)
        if self.mixing is not None:
            batch = self.mixing(batch, self.current_epoch, batch_idx)
        # The weights are updated after every accumulate_grad_batches batches, and after the last one of the epoch.
        done = batch_idx + 1
        update = done % self.gradients.accumulate_grad_batches == 0 or done == self.trainer.num_training_batches
        assert self.step is not None  # built in `on_train_start`
        result = self.step(batch, update)
        if update:
            cast(LRScheduler, self.lr_schedulers()).step()
            # Lightning counts the optimizer's steps, but does not see those inside a CUDA graph.
            progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
            progress.increment_ready()
            progress.increment_completed()
        if result.taken or not update:  # a skipped step does not count
            self.terms.update(result.terms, len(batch.target))
            self.stage_scores("train").update(self.member_logits(result.outputs), to_labels(batch.target))
        return {"loss": result.terms["loss"], "result": result}

    def on_validation_epoch_start(self) -> None:
        self.val_terms.reset()
        self.share_buffers()

    def share_buffers(self) -> None:
        """Copies the batch norm statistics of process 0, which checkpoints contain, to all processes."""
        if self.trainer.world_size > 1:
            for buffer in self.method.buffers():
                torch.distributed.broadcast(buffer, src=0)

    on_test_epoch_start = share_buffers

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        outputs = to_single_precision(self.method(batch.images))
        with torch.autocast(batch.images.device.type, enabled=False):
            terms = self.method.loss(outputs, batch.target)
        self.val_terms.update({"loss": terms["loss"]}, len(batch.target))
        self.stage_scores("val").update(self.member_logits(outputs), batch.target)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        outputs = to_single_precision(self.method(batch.images))
        self.stage_scores("test").update(self.member_logits(outputs), batch.target)

    def on_validation_epoch_end(self) -> None:
        self.compute_figures("val")

    def on_test_epoch_end(self) -> None:
        self.compute_figures("test")

    def compute_figures(self, stage: str) -> Figures:
        """Returns the metrics of a stage, summed over all processes, and sets its counts to zero.

        Every process must call this.

        Args:
            stage: "train", "val" or "test".
        """
        scores = self.stage_scores(stage)
        computed = scores.compute()
        recall = computed["recall"]
        figures = Figures(
            computed["top1"].tolist(),
            [None] * len(self.members) if recall.shape[1] <= 5 else computed["top5"].tolist(),
            recall.nanmean(1).tolist(),
            computed["confusion"].tolist(),
        )
        # Held-out images that a teacher was trained on say nothing about it.
        if stage == "val" and self.teacher_saw_val:
            for values in (figures.top1, figures.top5, figures.balanced_accuracy):
                values[self.members.index("teacher")] = None
        scores.reset()
        self.figures[stage] = figures
        return figures

    def member_logits(self, outputs: dict[str, Tensor | None]) -> Tensor:
        """Returns the logits of all M members, (M, N, K), detached, in the order of `members`.

        The logits of the ensemble are the logarithm of the mean of the students' softmax.

        Args:
            outputs: The outputs that `Method.forward` returned.
        """
        teacher, averages = outputs.get("teacher_logits"), outputs.get("average_logits")
        students = outputs["student_logits"]
        assert students is not None
        ensemble = students.softmax(-1).mean(0).log()
        parts = [students, averages, teacher if teacher is None else teacher[None], ensemble[None]]
        return torch.cat([part for part in parts if part is not None]).detach()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds to a checkpoint, in place, what the run needs besides weights and optimizer state to continue.

        These are the description of the run, its number of steps, the metrics of the epoch so far, and the gradients
        that were accumulated since the last step of the optimizer. Every process must call this, since the metrics are
        summed over all processes.
        """
        # Only the method's weights are kept in the state dict, not the counts of the metrics.
        checkpoint["odcheap"], checkpoint["steps"] = self.about, self.steps
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k.startswith("method.")}
        checkpoint["accumulated"] = self.step.state_dict() if isinstance(self.step, EagerStep) else {}
        scores, terms = self.stage_scores("train").summed_state(), self.terms.summed_state()
        checkpoint["metrics"] = {"scores": scores, "terms": terms, "names": self.terms.names}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.restored = {name: checkpoint[name] for name in ("metrics", "steps", "accumulated") if name in checkpoint}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads the state dict of a checkpoint, which contains the method's weights and buffers only."""
        own = {name.removeprefix("method."): tensor for name, tensor in state_dict.items()}
        return self.method.load_state_dict(own, strict=strict, assign=assign)


def name_members(method: Method) -> list[str]:
    """Returns the names of the networks of a method that are evaluated.

    They are "student_0", "student_1" and so on, then "average_0" and so on if the method keeps moving averages, then
    "teacher" if there is one, and "ensemble".
    """
    students = len(method.students)
    averages = len(method.candidates()) - students
    names = [f"student_{k}" for k in range(students)] + [f"average_{k}" for k in range(averages)]
    return [*names, *["teacher"] * (method.teacher_kind is not None), "ensemble"]
