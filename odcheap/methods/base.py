"""The base class of methods, and loss terms that several of them share."""

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from odcheap.methods.ema import AveragedStudents, require_single_precision
from odcheap.methods.students import Students
from odcheap.utils.arguments import check_arguments
from odcheap.utils.errors import OptionError

Outputs = dict[str, Any]  # named tensors; `teacher_logits` may be None
LabelSmoothing = Annotated[float, Field(ge=0, lt=1)]  # Szegedy et al., 2016, section 7
RampUpLength = Annotated[float, Field(ge=0, le=1)]  # a fraction of the run's epochs


class Method(nn.Module):
    """Students that are trained together. A new method is a subclass with `loss`, mostly `forward`, and a YAML file.

    The terms that `loss` returns have the paper's names, and are logged as they are summed.

    Args:
        students: The students.

    Attributes:
        teacher_kind: What the teacher is ("head", "gated", "mean", "frozen" or a word of your own); None without one.
        has_own_views: Whether each student is trained on an augmentation of its own.
        min_students: The least number of students; fewer are refused with `OptionError`.
    """

    teacher_kind: str | None = None
    has_own_views = False
    min_students = 1

    def __init__(self, students: Students):
        super().__init__()
        if len(students) < self.min_students:
            name = type(self).__module__.rpartition(".")[2]
            raise OptionError("num_stu", len(students), f"must be {self.min_students} or more with method={name}")
        self.students = students
        self.averages: AveragedStudents | None = None
        self.ramp: RampUp | None = None

    @property
    def ramp_weight(self) -> Tensor | float:
        """The current weight of the terms that grow over the first epochs."""
        return 1.0 if self.ramp is None else self.ramp.weight

    def forward(self, images: Tensor) -> Outputs:
        """Returns named outputs.

        This default is for methods without a teacher: the students' logits, and those of their averages if there are
        any.

        Args:
            images: (N, C, H, W), or (S, N, C, H, W) with a view for each student.

        Returns:
            At least `student_logits` (S, N, K) and `teacher_logits`, (N, K) or None.
        """
        outputs = {"student_logits": self.students(images)[1], "teacher_logits": None}
        return outputs | self.average_outputs(images)

    def loss(self, outputs: Outputs, target: Tensor) -> dict[str, Tensor]:
        """Returns the loss terms by name, and their sum `loss`.

        Args:
            outputs: What `forward` returned.
            target: Labels (N,).
        """
        raise NotImplementedError

    def candidates(self) -> list[nn.Module]:
        """Returns the networks of which the best is kept: the students, then their averages if there are any."""
        return [*self.students.members, *(self.averages.members if self.averages is not None else ())]

    def frozen_networks(self) -> list[nn.Module]:
        """Returns the networks that each training step runs without a backward pass."""
        return [] if self.averages is None else list(self.averages.members)

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """Returns the parameters in groups; gradient clipping takes the norm of each group by itself."""
        return [list(self.parameters())]

    def average_outputs(self, images: Tensor) -> Outputs:
        """Returns `average_logits` (S, N, K) of the averaged students; nothing if there are none."""
        return {} if self.averages is None else {"average_logits": self.averages.logits(images)}

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Prepares an epoch (counted from 0) of a run of `epochs`; training calls it before each epoch."""
        if self.ramp is not None:
            self.ramp.start_epoch(epoch, epochs)

    def after_step(self) -> None:
        """Updates the averages; training calls it after each step of the optimizer."""
        if self.averages is not None:
            self.averages.update(self.students)

    def after_loading_students(self) -> None:
        """Resets the averages, after only the students' weights were loaded from a file."""
        if self.averages is not None:
            self.averages.copy_weights(self.students)

    def check_classes(self, classes: list[str]) -> None:
        """Raises `OptionError` if a teacher from a file has other classes than the data."""

    def check_precision(self, precision: str) -> None:
        """Raises `OptionError` if the weights would have too few bits for their averages."""
        if self.averages is not None:
            require_single_precision(precision)

    def may_have_seen(self, split: str) -> bool:
        """Whether a teacher from a file may have been trained on the held-out images of this split."""
        return False


class IndependentMethod(Method):
    """A method whose students do not learn from each other: gradient clipping takes the norm of each by itself."""

    def clip_groups(self) -> list[list[nn.Parameter]]:
        return [list(student.parameters()) for student in self.students.members]


@check_arguments("method")
class RampUp(nn.Module):
    """The weight of a loss term, which grows from exp(-5) to 1 over the first epochs.

    The weight is exp(-5 (1 - t)^2), in which t grows linearly from 0 to 1.

    Source: Laine, Aila, "Temporal ensembling for semi-supervised learning", 2017, section 3. The weight is a tensor, so
    that a step recorded as a CUDA graph reads the current value.

    Args:
        ramp_up: The number of these epochs as a fraction of the run's epochs; 0 for a weight of 1 from the start.
    """

    weight: Tensor

    def __init__(self, ramp_up: RampUpLength):
        super().__init__()
        self.length = ramp_up
        self.register_buffer("weight", torch.ones(()))

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Sets the weight for an epoch (from 0) of a run of `epochs`."""
        remaining = max(0.0, 1 - epoch / (self.length * epochs)) if self.length else 0.0
        self.weight.fill_(math.exp(-5 * remaining**2))


def add_total(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the terms and their sum, `loss`."""
    return terms | {"loss": torch.stack(list(terms.values())).sum()}


def cross_entropy_terms(logits: Tensor, target: Tensor, name: str, smoothing: float = 0.0) -> dict[str, Tensor]:
    """Returns the cross-entropy of each student, named `<name>_<k>`.

    Args:
        logits: (S, N, K).
        target: Labels (N,).
        name: The terms' name.
        smoothing: The part of each label that is divided among all classes.
    """
    losses = (F.cross_entropy(student, target, label_smoothing=smoothing) for student in logits)
    return {f"{name}_{k}": value for k, value in enumerate(losses)}


def student_terms(values: Tensor, name: str) -> dict[str, Tensor]:
    """Returns one value for each student, (S,), as terms named `<name>_<k>`."""
    return {f"{name}_{k}": value for k, value in enumerate(values)}
