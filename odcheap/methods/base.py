"""What a method offers to whatever trains it; each file of `methods/` is one method."""

import math

import torch
from torch import Tensor, nn

from odcheap.methods.ema import Averages, refuse_few_bits
from odcheap.methods.students import Students
from odcheap.utils.errors import OptionError


class Method(nn.Module):
    """Students that learn together; here they have nothing in common.

    `forward(images)` takes (N, C, H, W), or a view of them for each student, (S, N, C, H, W), and returns at least
    `student_logits` (S, N, K) and `teacher_logits`, (N, K) or None. `loss(outputs, target)` returns the terms by the
    paper's names, as they are summed, and their sum, `loss`. `OptionError` with fewer students than `fewest`.
    """

    teacher_kind: str | None = None  # head, gated, mean or frozen
    own_views = False  # whether each student is trained on an augmentation of its own
    fewest = 1

    def __init__(self, students: Students):
        super().__init__()
        if len(students) < self.fewest:
            name = type(self).__module__.rpartition(".")[2]
            raise OptionError("num_stu", len(students), f"must be {self.fewest} or more with method={name}")
        self.students = students
        self.averages: Averages | None = None

    def candidates(self) -> list[nn.Module]:
        """The networks of which the best becomes the product: the students, then their averages where there are any."""
        return [*self.students.members, *(self.averages.members if self.averages is not None else ())]

    def frozen(self) -> list[nn.Module]:
        """Networks that each training step runs without a backward pass."""
        return [] if self.averages is None else list(self.averages.members)

    def clipped_together(self) -> list[list[nn.Parameter]]:
        """The parameters by groups, each of which has one norm where gradients are clipped."""
        return [list(self.parameters())]

    def averaged(self, images: Tensor) -> dict[str, Tensor]:
        """`average_logits` (S, N, K), where there are averages."""
        return {} if self.averages is None else {"average_logits": self.averages.logits(images)}

    def at_epoch(self, epoch: int, epochs: int) -> None:
        """Called before each epoch (from 0) of a run of so many."""

    def after_step(self) -> None:
        """Called after each step of the optimizer."""
        if self.averages is not None:
            self.averages.follow(self.students)

    def weights_loaded(self) -> None:
        """Called when the students have weights from elsewhere and the method's own parts have not."""
        if self.averages is not None:
            self.averages.begin_with(self.students)

    def check_classes(self, classes: list[str]) -> None:
        """`OptionError` where a teacher from elsewhere knows other classes."""

    def check_precision(self, precision: str) -> None:
        """`OptionError` where its weights would have too few bits for their averages."""
        if self.averages is not None:
            refuse_few_bits(precision)

    def saw_held_out(self, split: str) -> bool:
        """Whether a teacher from elsewhere may have been trained on this split's held-out images."""
        return False


class RampUp(nn.Module):
    """The weight of a term, which grows from exp(-5) to 1 over a part `length` of the run's epochs; in between
    exp(-5 (1 - t)^2). Source: Laine, Aila, "Temporal ensembling for semi-supervised learning", 2017, section 3.

    A tensor, so that a step recorded as a CUDA graph follows it. `OptionError` unless 0 <= length <= 1.
    """

    weight: Tensor

    def __init__(self, length: float):
        super().__init__()
        if not 0 <= length <= 1:
            raise OptionError("method.ramp_up", length, "must be a part of the run's epochs: 0 to 1")
        self.length = length
        self.register_buffer("weight", torch.ones(()))

    def at_epoch(self, epoch: int, epochs: int) -> None:
        left = max(0.0, 1 - epoch / (self.length * epochs)) if self.length else 0.0
        self.weight.fill_(math.exp(-5 * left**2))


def summed(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """The terms and their sum, `loss`."""
    return terms | {"loss": torch.stack(list(terms.values())).sum()}


def cross_entropies(logits: Tensor, target: Tensor, name: str, smoothing: float = 0.0) -> dict[str, Tensor]:
    """Of each student's logits (S, N, K), called `<name>_<k>`; `smoothing` of a label goes to all classes alike."""
    found = (nn.functional.cross_entropy(own, target, label_smoothing=smoothing) for own in logits)
    return {f"{name}_{k}": value for k, value in enumerate(found)}


def check_smoothing(smoothing: float) -> None:
    """Raises `OptionError` unless 0 <= smoothing < 1. Source: Szegedy et al., 2016, section 7."""
    if not 0 <= smoothing < 1:
        raise OptionError("method.label_smoothing", smoothing, "must be 0 or more and below 1")


def each(values: Tensor, name: str) -> dict[str, Tensor]:
    """One value a student (S,), called `<name>_<k>`."""
    return {f"{name}_{k}": value for k, value in enumerate(values)}
