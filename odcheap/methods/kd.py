"""Offline distillation: every student learns from the labels and from a trained teacher, which is not trained further.

G. Hinton, O. Vinyals, J. Dean, "Distilling the knowledge in a neural network", arXiv 1503.02531, 2015, section 2. With
z_t the teacher's logits and z_k student k's,

    loss = sum_k [ (1 - alpha) CE(student_k) + alpha T^2 KL(softmax(z_t / T) || softmax(z_k / T)) ]

The paper gives the labels a considerably lower weight but names no number; T = 4 and alpha = 0.9 are a usual choice.
All students see the same augmented images and share nothing but the teacher.
"""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from odcheap.methods.base import IndependentMethod, Outputs, add_total, cross_entropy_terms, student_terms
from odcheap.methods.losses import Temperature, soft_kl
from odcheap.methods.students import Students
from odcheap.methods.teacher import ImageSide, Means, Stds, Teacher, load_teacher
from odcheap.utils.arguments import check_arguments

Alpha = Annotated[float, Field(ge=0, le=1)]


@check_arguments("method")
class OfflineDistillation(IndependentMethod):
    """Students that learn from a trained teacher.

    Args:
        students: The students.
        teacher: The trained network.
        temperature: T of the softened predictions.
        alpha: Weight of the teacher's term; the labels' term has the weight 1 - alpha.
    """

    teacher_kind = "frozen"

    def __init__(self, students: Students, teacher: Teacher, temperature: Temperature = 4.0, alpha: Alpha = 0.9):
        super().__init__(students)
        self.teacher, self.temperature, self.alpha = teacher, temperature, alpha

    def frozen_networks(self) -> list[nn.Module]:
        return [self.teacher]

    def check_classes(self, classes: list[str]) -> None:
        self.teacher.check_classes(classes)

    def may_have_seen(self, split: str) -> bool:
        return self.teacher.split != split

    def forward(self, images: Tensor) -> Outputs:
        return {"student_logits": self.students(images)[1], "teacher_logits": self.teacher(images)}

    def loss(self, outputs: Outputs, target: Tensor) -> dict[str, Tensor]:
        """Returns the terms `ce_k` (with 1 - alpha), `kl_k` (with alpha T^2) and their sum `loss`."""
        logits = outputs["student_logits"]
        soft = self.alpha * self.temperature**2 * soft_kl(logits, outputs["teacher_logits"], self.temperature)
        hard = {name: (1 - self.alpha) * term for name, term in cross_entropy_terms(logits, target, "ce").items()}
        return add_total(hard | student_terms(soft, "kl"))


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
) -> OfflineDistillation:
    """Builds the method with a teacher from a file.

    Args:
        students: The students.
        teacher_weights: A run's folder, its `student.safetensors`, or a file of published weights.
        teacher_network: `torchvision/NAME` or `timm/NAME` for published weights.
        teacher_mean: Mean of the teacher's images; None for that of its run, or of ImageNet for published weights.
        teacher_std: Their standard deviation; None as for the mean.
        teacher_size: Side of its images in pixels; None as for the mean.
        mean: Mean of the students' images.
        std: Standard deviation of the students' images.
        temperature: T of the softened predictions.
        alpha: Weight of the teacher's term.
    """
    expected = teacher_mean, teacher_std, teacher_size
    teacher = load_teacher(teacher_weights, teacher_network, students.num_classes, *expected, mean, std)
    return OfflineDistillation(students, teacher, temperature, alpha)
