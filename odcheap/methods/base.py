"""The base classes of methods, and loss terms that several methods share."""

import math
from collections.abc import Iterable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from odcheap.methods.losses import DistillationLoss, FeatureName, KlReduction, LossName, LossWeights, Temperature
from odcheap.methods.students import AverageDecay, AveragedStudents, Students, require_single_precision
from odcheap.utils.arguments import check_arguments
from odcheap.utils.errors import OptionError

Outputs = dict[str, Any]  # named tensors; `teacher_logits` may be None
LabelSmoothing = Annotated[float, Field(ge=0, lt=1)]  # Szegedy et al., 2016, section 7
RampUpLength = Annotated[float, Field(ge=0, le=1)]  # a fraction of the run's epochs
FeatureWeight = Annotated[float, Field(gt=0)]


@check_arguments("method")
class Method(nn.Module):
    """The base class of training methods: it holds the students (networks), and computes their outputs and the loss.

    A new method is a subclass with `loss`, in most cases also with `teacher_logits` or `forward`, and a YAML file.
    `loss` returns its terms under the names that they have in the paper, each with its factor: what is logged is what
    is summed.

    Args:
        students: The S students.
        average_decay: The largest decay of the moving averages of the students' weights, in [0, 1); None for no moving
            averages. They cost S more forward passes in each step, and the best of them may be selected in place of a
            student.

    Attributes:
        teacher_kind: What the teacher is: "head" (a classifier on the students' features), "gated" (a weighted sum of
            their logits), "mean" (the mean of their predictions), "frozen" (a network that is not trained) or a word of
            your own; None if the method has no teacher.
        has_own_views: Whether each student is trained on its own augmentation of the images.
        min_students: The smallest number of students; `OptionError` is raised if there are fewer.
        joins_maps: Whether the students' last feature maps are joined along the channels, so that their heights and
            widths must be equal.
        averages: The moving averages of the students' weights; None if the method keeps none.
    """

    teacher_kind: str | None = None
    has_own_views = False
    min_students = 1
    joins_maps = False

    def __init__(self, students: Students, average_decay: AverageDecay | None = None):
        super().__init__()
        if len(students) < self.min_students:
            name = type(self).__module__.rpartition(".")[2]
            raise OptionError("num_stu", len(students), f"must be {self.min_students} or more with method={name}")
        self.students = students
        self.averages = None if average_decay is None else AveragedStudents(students, average_decay)

    def forward(self, images: Tensor) -> Outputs:
        """Returns the outputs by name; the teacher's logits are those that `teacher_logits` returns.

        Args:
            images: (N, C, H, W); or (S, N, C, H, W), in which each of the S students has its own augmentation.

        Returns:
            At least `student_logits` (S, N, K) and `teacher_logits`, (N, K) or None, for N images and K classes. If the
            method keeps moving averages of the students' weights, also `average_logits` (S, N, K).
        """
        features, logits = self.students(images)
        outputs = {"student_logits": logits, "teacher_logits": self.teacher_logits(features, logits)}
        return outputs | self.average_outputs(images)

    def teacher_logits(self, features: list[Tensor], logits: Tensor) -> Tensor | None:
        """Returns the logits (N, K) of a teacher that is computed from the students' outputs, or None.

        This default returns None.

        Args:
            features: The last feature map (N, C, h, w) of each student.
            logits: The students' logits (S, N, K).
        """
        return None

    def loss(self, outputs: Outputs, target: Tensor) -> dict[str, Tensor]:
        """Returns the loss terms by name, and their sum under the name `loss`; all are scalars.

        Args:
            outputs: The outputs that `forward` returned.
            target: Labels (N,), integers from 0 to K - 1; in training with mixup or cutmix the probabilities of the
                classes (N, K).
        """
        raise NotImplementedError

    def candidates(self) -> list[nn.Module]:
        """Returns the networks of which training selects the best: the students, then their moving averages, if any."""
        return [*self.students.members, *(self.averages.members if self.averages is not None else ())]

    def frozen_networks(self) -> list[nn.Module]:
        """Returns the networks that each training step runs in the forward pass only, without gradients.

        This default returns the moving averages of the students, if there are any.
        """
        return [] if self.averages is None else list(self.averages.members)

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """Returns groups of parameters; gradient clipping limits the norm of the gradient in each group separately.

        This default returns all parameters as one group.
        """
        return [list(self.parameters())]

    def average_outputs(self, images: Tensor) -> Outputs:
        """Returns {"average_logits": logits (S, N, K) of the moving averages}; an empty dict if there are none.

        Args:
            images: (N, C, H, W); or (S, N, C, H, W), in which each of the S students has its own augmentation.
        """
        return {} if self.averages is None else {"average_logits": self.averages.logits(images)}

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Sets the weights of loss terms that depend on the epoch; it must be called before each epoch.

        This default does nothing.

        Args:
            epoch: The number of the epoch that begins, from 0.
            epochs: The number of epochs of the run.
        """

    def after_step(self) -> None:
        """Updates the moving averages, if there are any; it must be called after each step of the optimizer."""
        if self.averages is not None:
            self.averages.update(self.students)

    def after_loading_students(self) -> None:
        """Sets the moving averages, if there are any, to the students' weights; call it after loading only those."""
        if self.averages is not None:
            self.averages.copy_weights(self.students)

    def check_classes(self, classes: list[str]) -> None:
        """Raises `OptionError` if a teacher from a file has other classes than the data; this default never does.

        Args:
            classes: The names of the classes of the data, in the order of the labels.
        """

    def check_soft_labels(self) -> None:
        """Raises `OptionError` if the loss cannot take probabilities (N, K) as labels, which mixup and cutmix give.

        This default never raises it.
        """

    def check_precision(self, precision: str) -> None:
        """Raises `OptionError` if the method keeps moving averages and the weights have fewer than 32 bits.

        Args:
            precision: A precision of Lightning, such as "bf16-true".
        """
        if self.averages is not None:
            require_single_precision(precision)

    def may_have_seen(self, split: str) -> bool:
        """Returns whether a teacher from a file may have been trained on images that this run holds out.

        Args:
            split: The fingerprint of the run's data, a hash of the training images and of which of them are held out.
        """
        return False


class IndependentMethod(Method):
    """A method whose students do not learn from each other; each student's gradient is clipped separately."""

    def clip_groups(self) -> list[list[nn.Parameter]]:
        return [list(student.parameters()) for student in self.students.members]


@check_arguments("method")
class LogitDistillation(Method):
    """The base class of methods that compare softened predictions: the softmax of logits that are divided by T.

    Args:
        students: The S students.
        temperature: T, by which logits are divided before the softmax.
        loss: How predictions are compared: "kl", "dkd", "dist" or "standardized"; see `DistillationLoss`.
        loss_weights: The weights of the two parts of "dkd" or "dist"; None for the usual ones.
        kl_reduction: "batchmean" (the usual definition), or "mean" (smaller by a factor equal to the number of
            classes); see `soft_kl`.
        average_decay: The largest decay of the moving averages of the students' weights, in [0, 1); None for no moving
            averages.

    Attributes:
        distance: The loss, which is called with students' logits, teacher's logits and labels. The name of its terms
            contains `distance.name`.

    Raises:
        OptionError: The loss is "standardized" and there are two classes, or `loss_weights` or `kl_reduction` is given
            for a loss that has none.
    """

    def __init__(
        self,
        students: Students,
        temperature: Temperature,
        loss: LossName = "kl",
        loss_weights: LossWeights | None = None,
        kl_reduction: KlReduction = "batchmean",
        average_decay: AverageDecay | None = None,
    ):
        super().__init__(students, average_decay)
        self.temperature = temperature
        self.distance = DistillationLoss(loss, temperature, loss_weights, kl_reduction)
        if loss == "standardized" and students.num_classes == 2:
            allowed = "has no effect with two classes: two standardized logits are always 1 and -1"
            raise OptionError("method.loss", loss, f"{allowed}; use kl, dkd or dist")

    def check_soft_labels(self) -> None:
        self.distance.check_soft_labels()


@check_arguments("method")
class FeatureDistillation(LogitDistillation):
    """The base class of methods that compare softened predictions and, on request, feature maps.

    Args:
        students: The S students.
        temperature: T, by which logits are divided before the softmax.
        feature: How feature maps are compared: "attention" compares where in the image they are large, "l2" all their
            values, see `FeatureDistance`; None to compare no feature maps.
        feature_weight: The factor of the loss term that compares feature maps. For "attention", the factor 1 is about
            the one that Zagoruyko and Komodakis (2017) used.
        **options: `loss`, `loss_weights`, `kl_reduction` and `average_decay`; see `LogitDistillation`.
    """

    def __init__(
        self,
        students: Students,
        temperature: Temperature,
        feature: FeatureName | None = None,
        feature_weight: FeatureWeight = 1.0,
        **options: Any,
    ):
        super().__init__(students, temperature, **options)
        if feature is None and feature_weight != 1:
            allowed = "has no feature term to weight; method.feature=attention or l2 adds one"
            raise OptionError("method.feature_weight", feature_weight, allowed)
        self.feature, self.feature_weight = feature, feature_weight

    def feature_terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """Returns the terms `attention_k` or `l2_k` of each student k, with their weight; none without `feature`.

        Args:
            outputs: The outputs of `forward`. Its key `feature_distances` has the distance of each student, (S,).
        """
        if self.feature is None:
            return {}
        return student_terms(self.feature_weight * outputs["feature_distances"], self.feature)


@check_arguments("method")
class RampUp(nn.Module):
    """The weight of a loss term, which grows from exp(-5) to 1 over the first epochs.

    The weight is exp(-5 (1 - t)^2), in which t grows linearly from 0 to 1 during the ramp-up.

    Source: Laine, Aila, "Temporal ensembling for semi-supervised learning", 2017, section 3. The weight is a tensor, so
    that a training step that was recorded as a CUDA graph reads the current value.

    Args:
        ramp_up: The length of the ramp-up as a fraction of the run's epochs, in [0, 1]; 0 for a weight of 1 from the
            start.

    Attributes:
        weight: The current weight, a scalar.
    """

    weight: Tensor

    def __init__(self, ramp_up: RampUpLength):
        super().__init__()
        self.length = ramp_up
        self.register_buffer("weight", torch.ones(()))

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Sets the weight for an epoch.

        Args:
            epoch: The number of the epoch, from 0.
            epochs: The number of epochs of the run.
        """
        # What is left of the ramp-up, 1 - t; the buffer is filled in place, since a CUDA graph reads its address.
        remaining = max(0.0, 1 - epoch / (self.length * epochs)) if self.length else 0.0
        self.weight.fill_(math.exp(-5 * remaining**2))


@check_arguments("method")
class RampedDistillation(LogitDistillation):
    """The base class of methods that compare softened predictions with a weight that grows over the first epochs.

    Args:
        students: Two or more students.
        temperature: T, by which logits are divided before the softmax.
        ramp_up: The fraction of the run's epochs, in [0, 1], in which the weight rises to 1; see `RampUp`.
        **options: `loss`, `loss_weights` and `average_decay`; see `LogitDistillation`.

    Attributes:
        ramp: The weight, w.
    """

    min_students = 2

    def __init__(
        self, students: Students, temperature: Temperature = 3.0, ramp_up: RampUpLength = 80 / 300, **options: Any
    ):
        super().__init__(students, temperature, **options)
        self.ramp = RampUp(ramp_up)

    @property
    def distillation_weight(self) -> Tensor:
        """The factor of the distillation terms: w, in [0, 1], times `distance.factor`, which is T^2 for a KL."""
        return self.ramp.weight * self.distance.factor

    def start_epoch(self, epoch: int, epochs: int) -> None:
        self.ramp.start_epoch(epoch, epochs)


def add_total(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a dict with the given loss terms (scalars by name), and with their sum under the key `loss`."""
    return terms | {"loss": torch.stack(list(terms.values())).sum()}


def cross_entropy_terms(logits: Tensor, target: Tensor, name: str, smoothing: float = 0.0) -> dict[str, Tensor]:
    """Returns the cross-entropy of each student, averaged over the images, as terms `<name>_0`, `<name>_1`, ...

    Args:
        logits: The students' logits (S, N, K).
        target: Labels (N,), or probabilities of the classes (N, K).
        name: The name of the terms, before the student's number.
        smoothing: The fraction of each label's probability that is divided among all classes.
    """
    return student_terms([F.cross_entropy(student, target, label_smoothing=smoothing) for student in logits], name)


def student_terms(values: Iterable[Tensor], name: str) -> dict[str, Tensor]:
    """Returns the values of the students, such as a tensor (S,), as a dict with the keys `<name>_0`, `<name>_1`, ..."""
    return {f"{name}_{k}": value for k, value in enumerate(values)}


def mean_of_others(pairs: Tensor) -> Tensor:
    """Returns for each student the mean of its values with all other students, (S,).

    Args:
        pairs: (S, S) for S >= 2 students. Column k has the values of student k; that on the diagonal does not count.

    Example:
        >>> mean_of_others(torch.tensor([[9.0, 1.0, 2.0], [3.0, 9.0, 4.0], [5.0, 6.0, 9.0]]))
        tensor([4.0000, 3.5000, 3.0000])
    """
    return (pairs.sum(0) - pairs.diagonal()) / (len(pairs) - 1)
