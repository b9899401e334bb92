"""Offline distillation (KD): every student learns from the labels and from a trained teacher, which does not change.

G. Hinton, O. Vinyals, J. Dean, "Distilling the knowledge in a neural network", arXiv 1503.02531, 2015, section 2. z_t
are the teacher's logits and z_k those of student k:

    loss = sum_k [ (1 - alpha) CE(student_k) + alpha T^2 KL(softmax(z_t / T) || softmax(z_k / T)) ]

The paper gives the labels' term a considerably lower weight but names no number; T = 4 and alpha = 0.9 are usual.
All students see the same augmented images and share nothing but the teacher.
"""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from odcheap.methods.base import (
    IndependentMethod,
    LogitDistillation,
    Outputs,
    add_total,
    cross_entropy_terms,
    student_terms,
)
from odcheap.methods.ema import AverageDecay
from odcheap.methods.losses import LossName, LossWeights, Temperature
from odcheap.methods.students import Students
from odcheap.methods.teacher import ImageSide, Means, Stds, Teacher, load_teacher
from odcheap.utils.arguments import check_arguments

Alpha = Annotated[float, Field(ge=0, le=1)]


@check_arguments("method")
class OfflineDistillation(LogitDistillation, IndependentMethod):
    """Trains students that learn from the labels and from a trained teacher.

    Args:
        students: The students.
        teacher: The trained network; it is not trained further.
        temperature: T, by which logits are divided before the softmax in the KL divergence.
        alpha: The weight of the teacher's term, in [0, 1]; the labels' term has the weight 1 - alpha.
        **options: `loss`, `loss_weights` and `average_decay`; see `LogitDistillation`.
    """

    teacher_kind = "frozen"

    def __init__(
        self, students: Students, teacher: Teacher, temperature: Temperature = 4.0, alpha: Alpha = 0.9, **options: Any
    ):
        super().__init__(students, temperature, **options)
        self.teacher, self.alpha = teacher, alpha

    def frozen_networks(self) -> list[nn.Module]:
        return [self.teacher, *super().frozen_networks()]

    def check_classes(self, classes: list[str]) -> None:
        self.teacher.check_classes(classes)

    def may_have_seen(self, split: str) -> bool:
        return self.teacher.split != split

    def forward(self, images: Tensor) -> Outputs:
        outputs = {"student_logits": self.students(images)[1], "teacher_logits": self.teacher(images)}
        return outputs | self.average_outputs(images)

    def loss(self, outputs: Outputs, target: Tensor) -> dict[str, Tensor]:
        """Returns the loss terms by name.

        Returns:
            For each student k: `ce_k`, (1 - alpha) times its cross-entropy; `kl_k`, alpha T^2 times the KL from the
            teacher to the student; with another loss than the KL its name stands in place of `kl`. `loss`: the sum of
            all terms.
        """
        logits = outputs["student_logits"]
        distances = self.distance(logits, outputs["teacher_logits"], target)
        soft = self.alpha * self.temperature**2 * distances
        hard = {name: (1 - self.alpha) * term for name, term in cross_entropy_terms(logits, target, "ce").items()}
        return add_total(hard | student_terms(soft, self.distance.name))


@check_arguments("method")
def build_offline_distillation(
    students: Students,
    teacher_weights: str,
    teacher_network: str | None,
    teacher_mean: Means | None,
    teacher_std: Stds | None,
    teacher_size: ImageSide | None,
    mean: Sequence[float],
    std: Sequence[float],
    temperature: Temperature = 4.0,
    alpha: Alpha = 0.9,
    loss: LossName = "kl",
    loss_weights: LossWeights | None = None,
    average_decay: AverageDecay | None = None,
) -> OfflineDistillation:
    """Builds the method with a teacher whose weights are in a file.

    Args:
        students: The students.
        teacher_weights: A run's folder, its `student.safetensors`, or a file of published weights.
        teacher_network: The network that published weights belong to, `torchvision/NAME` or `timm/NAME`; None for a
            run.
        teacher_mean: The mean, of each channel, with which the teacher's images are normalized; None for that of its
            run, or that of ImageNet for published weights.
        teacher_std: The standard deviation, of each channel; None as for `teacher_mean`.
        teacher_size: The side, in pixels, of the images that the teacher expects; None for that of its run, or 224 for
            published weights.
        mean: The mean, of each channel, with which the students' images are normalized.
        std: The standard deviation, of each channel, with which the students' images are normalized.
        temperature: T, by which logits are divided before the softmax in the KL divergence.
        alpha: The weight of the teacher's term, in [0, 1].
        loss: How predictions are compared; see `LogitDistillation`.
        loss_weights: The weights of the two parts of the loss; see `LogitDistillation`.
        average_decay: The largest decay of the moving averages of the students' weights; see `Method`.

    Raises:
        OptionError: See `load_teacher`.
    """
    expected = teacher_mean, teacher_std, teacher_size
    teacher = load_teacher(teacher_weights, teacher_network, students.num_classes, *expected, mean, std)
    options = {"loss": loss, "loss_weights": loss_weights, "average_decay": average_decay}
    return OfflineDistillation(students, teacher, temperature, alpha, **options)
