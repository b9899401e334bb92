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
    """The base class of training methods: it holds the students, and computes their outputs and the loss.

    The students are networks that are trained together. A new method is a subclass with its own `loss`, and in most
    cases with its own `teacher_logits` or `forward`. It also needs a YAML file in `conf/method`. The terms that `loss`
    returns are already multiplied by their weights, so that their plain sum is the loss.

    Args:
        students: The S students.
        average_decay: The largest decay of the moving averages of the students' weights, in [0, 1). None keeps no
            moving averages. They cost S more forward passes in each step, and training may select the best of them in
            place of a student.

    Attributes:
        teacher_kind: What the teacher is: "head" (a classifier on the students' features), "gated" (a weighted sum of
            their logits), "mean" (the mean of their predictions), "frozen" (a network that is not trained) or any other
            word; None if the method has no teacher.
        has_own_views: Whether each student is trained on its own augmentation of the training images.
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
        """Runs the S students and the teacher on N images of K classes, and returns their logits.

        Args:
            images: (N, C, H, W); or (S, N, C, H, W), in which each of the S students has its own augmentation.

        Returns:
            A dict with at least the first two of these keys.

            - `student_logits`: (S, N, K).
            - `teacher_logits`: (N, K), as `teacher_logits` returns them; None if there is no teacher.
            - `average_logits`: (S, N, K), of the moving averages of the students' weights, if the method keeps them.
        """
        features, logits = self.students(images)
        outputs = {"student_logits": logits, "teacher_logits": self.teacher_logits(features, logits)}
        return outputs | self.average_outputs(images)

    def teacher_logits(self, features: list[Tensor], logits: Tensor) -> Tensor | None:
        """Computes the teacher's logits (N, K) from the students' outputs; returns None if there is no such teacher.

        This default returns None.

        Args:
            features: A list with the last feature map (N, C, h, w) of each of the S students.
            logits: The students' logits (S, N, K).
        """
        return None

    def loss(self, outputs: Outputs, target: Tensor) -> dict[str, Tensor]:
        """Returns a dict of scalars: the terms of the loss by name, and their sum under the key `loss`.

        Args:
            outputs: The dict that `forward` returned.
            target: Labels (N,), integers from 0 to K - 1. In training with mixup or cutmix they are the probabilities
                of the classes, (N, K).
        """
        raise NotImplementedError

    def candidates(self) -> list[nn.Module]:
        """Returns the networks from which training selects the best one: all students, then their moving averages."""
        return [*self.students.members, *(self.averages.members if self.averages is not None else ())]

    def frozen_networks(self) -> list[nn.Module]:
        """Returns the networks that a training step runs forward only, without gradients, so that costs include them.

        This default returns the moving averages of the students; the list is empty if there are none.
        """
        return [] if self.averages is None else list(self.averages.members)

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """Returns groups of parameters: gradient clipping limits the norm of the gradient of each group separately.

        This default returns one group with all parameters.
        """
        return [list(self.parameters())]

    def average_outputs(self, images: Tensor) -> Outputs:
        """Runs the moving averages of the students on images, and returns a dict with their logits.

        The dict has the key `average_logits`, (S, N, K). It is empty if the method keeps no moving averages.

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
        """Sets the moving averages, if there are any, to the students' weights.

        It must be called after only the students' weights were loaded, as from a file without moving averages.
        """
        if self.averages is not None:
            self.averages.copy_weights(self.students)

    def check_classes(self, classes: list[str]) -> None:
        """Raises `OptionError` if a teacher that was loaded from a file has other classes than the data.

        This default, for methods without such a teacher, never raises it.

        Args:
            classes: The names of the classes of the data, in the order of the labels.
        """

    def check_soft_labels(self) -> None:
        """Raises `OptionError` if the loss cannot take probabilities (N, K), which mixup and cutmix give, as labels.

        This default never raises it.
        """

    def check_precision(self, precision: str) -> None:
        """Raises `OptionError` if the method keeps moving averages and the weights have fewer than 32 bits.

        Args:
            precision: The precision of the training, as Lightning names it, such as "bf16-true".
        """
        if self.averages is not None:
            require_single_precision(precision)

    def may_have_seen(self, split: str) -> bool:
        """Returns True if a teacher from a file may have been trained on images that this run holds out for validation.

        This default, for methods without such a teacher, returns False.

        Args:
            split: The fingerprint of the run's data: a hash of the training images, their labels, and the choice of
                those that are held out.
        """
        return False


class IndependentMethod(Method):
    """The base class of training methods whose students do not learn from each other.

    The gradient of each student is clipped separately. Subclasses implement the same functions as those of `Method`.
    """

    def clip_groups(self) -> list[list[nn.Parameter]]:
        return [list(student.parameters()) for student in self.students.members]


@check_arguments("method")
class LogitDistillation(Method):
    """The base class of methods that compare softened predictions: the softmax of logits that are divided by T.

    Args:
        students: The S students.
        temperature: T, by which logits are divided before the softmax.
        loss: How predictions are compared: "kl" by the Kullback-Leibler divergence, "dkd" by decoupled knowledge
            distillation, "dist" by Pearson's correlation, "standardized" by the KL of Z-scores of the logits.
        loss_weights: The weights of the two parts of "dkd" or "dist"; None for 1 and 8 with "dkd", 1 and 1 with "dist".
        kl_reduction: How "kl" is averaged: "batchmean" over the images (the usual definition), or "mean" over images
            and classes, which is smaller by a factor equal to the number of classes.
        average_decay: The largest decay of the moving averages of the students' weights, in [0, 1); None for no moving
            averages.

    Attributes:
        distance: A `DistillationLoss`, called as distance(student_logits, teacher_logits, target). In `loss`, the keys
            of its terms contain `distance.name`, such as "kl".

    Raises:
        OptionError: The loss is "standardized" and there are only two classes, `loss_weights` is given for another loss
            than "dkd" and "dist", or `kl_reduction` is "mean" for another loss than "kl".
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
    """The base class of methods that compare softened predictions and, if `feature` is given, also feature maps.

    Args:
        students: The S students.
        temperature: T, by which logits are divided before the softmax.
        feature: How feature maps are compared. "attention" compares at which pixels they are large, "l2" compares all
            their values, and None compares no feature maps.
        feature_weight: The factor of the loss terms that compare feature maps. For "attention", Zagoruyko and Komodakis
            (2017) used a factor that is about 1 here.
        **options: `loss`, `loss_weights`, `kl_reduction` and `average_decay`, the arguments of `LogitDistillation`.
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
        """Returns the loss terms that compare feature maps, multiplied by `feature_weight`.

        The keys are `attention_k` or `l2_k` for each student k. The dict is empty if no feature maps are compared.

        Args:
            outputs: The dict that `forward` returned. Its key `feature_distances` has a value for each student, (S,).
        """
        if self.feature is None:
            return {}
        return student_terms(self.feature_weight * outputs["feature_distances"], self.feature)


@check_arguments("method")
class RampUp(nn.Module):
    """The weight of a loss term, which grows from exp(-5) to 1 over the first epochs (the ramp-up).

    The weight is exp(-5 (1 - t)^2), in which t grows linearly from 0 to 1 during the ramp-up. It changes only when
    `start_epoch` is called, once before each epoch. Source: Laine, Aila, "Temporal ensembling for semi-supervised
    learning", 2017, section 3.

    Args:
        ramp_up: The length of the ramp-up as a fraction of the run's epochs, in [0, 1]; 0 for a weight of 1 from the
            start.

    Attributes:
        weight: The current weight, a scalar tensor. A training step that was recorded as a CUDA graph reads it anew
            each time.
    """

    weight: Tensor

    def __init__(self, ramp_up: RampUpLength):
        super().__init__()
        self.length = ramp_up
        self.register_buffer("weight", torch.ones(()))

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Sets `weight` for an epoch; it must be called before each epoch.

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
        ramp_up: The fraction of the run's epochs, in [0, 1], in which the weight rises from exp(-5) to 1.
        **options: `loss`, `loss_weights` and `average_decay`, the arguments of `LogitDistillation`.

    Attributes:
        ramp: The `RampUp` whose attribute `weight` is the current weight w, in [0, 1].
    """

    min_students = 2

    def __init__(
        self, students: Students, temperature: Temperature = 3.0, ramp_up: RampUpLength = 80 / 300, **options: Any
    ):
        super().__init__(students, temperature, **options)
        self.ramp = RampUp(ramp_up)

    @property
    def distillation_weight(self) -> Tensor:
        """The current factor of the distillation terms: w, in [0, 1], times `distance.factor` (T^2; 1 for "dist")."""
        return self.ramp.weight * self.distance.factor

    def start_epoch(self, epoch: int, epochs: int) -> None:
        self.ramp.start_epoch(epoch, epochs)


def add_total(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a dict with the given loss terms (scalars by name) and, under the key `loss`, their sum."""
    return terms | {"loss": torch.stack(list(terms.values())).sum()}


def cross_entropy_terms(logits: Tensor, target: Tensor, name: str, smoothing: float = 0.0) -> dict[str, Tensor]:
    """Returns the cross-entropy of each student, averaged over the images, in a dict.

    Args:
        logits: The students' logits (S, N, K).
        target: Labels (N,), or probabilities of the classes (N, K).
        name: The beginning of the keys, which are `<name>_0`, `<name>_1`, ...
        smoothing: The label smoothing: the fraction of each label's probability that is divided among all classes.
    """
    return student_terms([F.cross_entropy(student, target, label_smoothing=smoothing) for student in logits], name)


def student_terms(values: Iterable[Tensor], name: str) -> dict[str, Tensor]:
    """Returns a dict with one value for each student, given such as a tensor (S,), by `<name>_0`, `<name>_1`, ..."""
    return {f"{name}_{k}": value for k, value in enumerate(values)}


def mean_of_others(pairs: Tensor) -> Tensor:
    """Returns the mean of each column of a square matrix without the entry on the diagonal, (S,).

    Args:
        pairs: (S, S) for S >= 2 students. Column k has the values of student k with each student; the value of a
            student with itself does not count.

    Example:
        >>> mean_of_others(torch.tensor([[9.0, 1.0, 2.0], [3.0, 9.0, 4.0], [5.0, 6.0, 9.0]]))
        tensor([4.0000, 3.5000, 3.0000])
    """
    return (pairs.sum(0) - pairs.diagonal()) / (len(pairs) - 1)
