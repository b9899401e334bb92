"""Offline distillation (KD): every student learns from the labels and from a trained teacher, which does not change.

G. Hinton, O. Vinyals, J. Dean, "Distilling the knowledge in a neural network", arXiv 1503.02531, 2015, section 2. z_t
are the teacher's logits and z_k those of student k:

    loss = sum_k [ (1 - alpha) CE(student_k) + alpha T^2 KL(softmax(z_t / T) || softmax(z_k / T)) ]

With several teachers the mean of their softened predictions stands in place of softmax(z_t / T); see `TeacherEnsemble`.

The paper gives the labels' term a considerably lower weight but names no number; T = 4 and alpha = 0.9 are usual.
All students see the same augmented images and share nothing but the teacher. A feature term (`FeatureDistillation`)
compares the maps at the ends of the last stages, as many as all networks have. With several teachers it is the mean of
the terms of each.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from odcheap.methods.base import (
    FeatureDistillation,
    FeatureWeight,
    IndependentMethod,
    Outputs,
    add_total,
    cross_entropy_terms,
    student_terms,
)
from odcheap.methods.losses import FeatureDistance, FeatureName, LossName, LossWeights, Temperature
from odcheap.methods.students import AverageDecay, Students
from odcheap.methods.teacher import Stds, Teacher, TeacherEnsemble, TeacherWeights, load_teacher
from odcheap.models.backbone import StageRecorder
from odcheap.models.build import Numbers, Side
from odcheap.utils.arguments import check_arguments

Alpha = Annotated[float, Field(ge=0, le=1)]


@check_arguments("method")
class OfflineDistillation(FeatureDistillation, IndependentMethod):
    """Trains students that learn from the labels and from a trained teacher, which does not change.

    Args:
        students: The S students.
        teacher: One trained network (`Teacher`), or several of them (`TeacherEnsemble`).
        temperature: T, by which logits are divided before the softmax in the KL divergence.
        alpha: The weight of the loss term that compares students with the teacher, in [0, 1]. The cross-entropy has the
            weight 1 - alpha.
        **options: `loss`, `loss_weights`, `feature`, `feature_weight` and `average_decay`, the arguments of
            `FeatureDistillation`.
    """

    teacher_kind = "frozen"

    def __init__(
        self,
        students: Students,
        teacher: Teacher | TeacherEnsemble,
        temperature: Temperature = 4.0,
        alpha: Alpha = 0.9,
        **options: Any,
    ):
        super().__init__(students, temperature, **options)
        self.teacher, self.alpha = teacher, alpha
        self.features: nn.ModuleList | None = None  # a `FeatureDistance` for each teacher
        if self.feature is not None:
            networks = [*students.members, *(member.network for member in teacher.teachers)]
            self.stages = StageRecorder(networks, "method.feature", self.feature)
            own, given = self.stages.channels[: len(students)], self.stages.channels[len(students) :]
            self.features = nn.ModuleList(FeatureDistance(self.feature, own, channels) for channels in given)

    def frozen_networks(self) -> list[nn.Module]:
        return [self.teacher, *super().frozen_networks()]

    def clip_groups(self) -> list[list[nn.Parameter]]:
        groups = super().clip_groups()
        if self.features is not None:  # each student has convolutions of its own there
            for distance in cast("list[FeatureDistance]", list(self.features)):
                for group, adapters in zip(groups, distance.adapters, strict=True):
                    group += adapters.parameters()
        return groups

    def check_classes(self, classes: list[str]) -> None:
        for teacher in self.teacher.teachers:
            teacher.check_classes(classes)

    def may_have_seen(self, split: str) -> bool:
        return self.teacher.split != split

    def forward(self, images: Tensor) -> Outputs:
        with nullcontext([]) if self.features is None else self.stages.record() as maps:
            outputs = {"student_logits": self.students(images)[1], "teacher_logits": self.teacher(images)}
        if self.features is not None:
            own, given = maps[: len(self.students)], maps[len(self.students) :]
            distances = [distance(own, target) for distance, target in zip(self.features, given, strict=True)]
            outputs["feature_distances"] = torch.stack(distances).mean(0)
        return outputs | self.average_outputs(images)

    def loss(self, outputs: Outputs, target: Tensor) -> dict[str, Tensor]:
        """Returns the loss, given the dict that `forward` returned and the labels of the N images.

        Returns:
            A dict of scalars, in which k is the number of a student. Weights are already multiplied in.

            - `ce_k`: (1 - alpha) times the cross-entropy of student k.
            - `kl_k`: alpha T^2 KL(teacher || student k). If the option `loss` is not "kl", its value is the name.
            - `attention_k` or `l2_k`: the distance of the feature maps; only if they are compared.
            - `loss`: the sum of all terms.
        """
        logits = outputs["student_logits"]
        distances = self.distance(logits, outputs["teacher_logits"], target)
        soft = self.alpha * self.distance.factor * distances
        hard = {name: (1 - self.alpha) * term for name, term in cross_entropy_terms(logits, target, "ce").items()}
        return add_total(hard | student_terms(soft, self.distance.name) | self.feature_terms(outputs))


@check_arguments("method")
def build_offline_distillation(
    students: Students,
    teacher_weights: TeacherWeights,
    teacher_network: str | None,
    teacher_mean: Numbers | None,
    teacher_std: Stds | None,
    teacher_size: Side | None,
    mean: Sequence[float],
    std: Sequence[float],
    temperature: Temperature = 4.0,
    alpha: Alpha = 0.9,
    loss: LossName = "kl",
    loss_weights: LossWeights | None = None,
    feature: FeatureName | None = None,
    feature_weight: FeatureWeight = 1.0,
    average_decay: AverageDecay | None = None,
) -> OfflineDistillation:
    """Loads one or several teachers from files, and returns the `OfflineDistillation` of the students from them.

    Args:
        students: The S students.
        teacher_weights: The folder of a run, its `student.safetensors`, or a file of published weights. A list of these
            gives several teachers, to all of which the other arguments apply.
        teacher_network: The network that published weights belong to, `torchvision/NAME` or `timm/NAME`; None for the
            teacher of a run.
        teacher_mean: The mean of each channel with which the teacher's images are normalized. None takes the one of the
            teacher's run, or ImageNet's for published weights.
        teacher_std: The standard deviation of each channel for the same images; None as for `teacher_mean`.
        teacher_size: The side, in pixels, of the images that the teacher expects. None takes the one of the teacher's
            run, or 224 for published weights.
        mean: The mean of each channel with which the students' images are normalized.
        std: The standard deviation of each channel with which the students' images are normalized.
        temperature: T, by which logits are divided before the softmax in the KL divergence.
        alpha: The weight of the loss term that compares students with the teacher, in [0, 1].
        loss: How predictions are compared: "kl", "dkd", "dist" or "standardized"; see `LogitDistillation`.
        loss_weights: The weights of the two parts of "dkd" or "dist"; None for the usual ones.
        feature: How feature maps are compared: "attention" or "l2"; None to compare none.
        feature_weight: The factor of the loss terms that compare feature maps.
        average_decay: The largest decay of the moving averages of the students' weights; None for no moving averages.

    Raises:
        OptionError: A file is of another kind, its weights do not fit the network, or the teacher has another number of
            classes or channels than the students.
    """
    paths = [teacher_weights] if isinstance(teacher_weights, str) else teacher_weights
    expected = (mean, std), teacher_mean, teacher_std, teacher_size
    teachers = [load_teacher(path, teacher_network, students.num_classes, *expected) for path in paths]
    teacher = teachers[0] if len(teachers) == 1 else TeacherEnsemble(teachers, temperature)
    options = {"loss": loss, "loss_weights": loss_weights, "feature": feature, "feature_weight": feature_weight}
    return OfflineDistillation(students, teacher, temperature, alpha, average_decay=average_decay, **options)
