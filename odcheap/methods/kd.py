"""Offline distillation: every student learns from the labels and from a trained teacher, which stays as it is.

G. Hinton, O. Vinyals, J. Dean, "Distilling the knowledge in a neural network", arXiv 1503.02531, 2015, section 2. With
z_t the teacher's logits and z_k student k's,

    loss = sum_k [ (1 - alpha) CE(student_k) + alpha T^2 KL(softmax(z_t / T) || softmax(z_k / T)) ]

The paper gives the labels a considerably lower weight and names no number: T = 4 and alpha = 0.9 are a usual choice.
One view for all; the students share nothing but the teacher.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from odcheap.methods.base import Method, cross_entropies, each, summed
from odcheap.methods.losses import check_distillation, soft_kl
from odcheap.methods.students import Students
from odcheap.methods.teacher import Teacher, read_teacher
from odcheap.utils.errors import OptionError


class OfflineDistillation(Method):
    """Raises `OptionError`."""

    teacher_kind = "frozen"

    def __init__(self, students: Students, teacher: Teacher, temperature: float = 4.0, alpha: float = 0.9):
        super().__init__(students)
        check_distillation(temperature)
        if not 0 <= alpha <= 1:
            raise OptionError("method.alpha", alpha, "must be from 0 to 1")
        self.teacher, self.temperature, self.alpha = teacher, temperature, alpha

    def clipped_together(self) -> list[list[nn.Parameter]]:
        return [list(student.parameters()) for student in self.students.members]

    def frozen(self) -> list[nn.Module]:
        return [self.teacher]

    def check_classes(self, classes: list[str]) -> None:
        self.teacher.check_classes(classes)

    def saw_held_out(self, split: str) -> bool:
        return self.teacher.split != split

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"student_logits": self.students(images)[1], "teacher_logits": self.teacher(images)}

    def loss(self, outputs: dict[str, Tensor], target: Tensor) -> dict[str, Tensor]:
        """Terms `ce_k` with 1 - alpha and `kl_k` with alpha T^2."""
        logits = outputs["student_logits"]
        soft = self.alpha * self.temperature**2 * soft_kl(logits, outputs["teacher_logits"], self.temperature)
        hard = {name: (1 - self.alpha) * term for name, term in cross_entropies(logits, target, "ce").items()}
        return summed(hard | each(soft, "kl"))


def taught(
    students: Students,
    teacher_weights: str,
    teacher_network: str | None,
    teacher_mean: Sequence[float] | None,
    teacher_std: Sequence[float] | None,
    teacher_size: int | None,
    mean: Sequence[float],
    std: Sequence[float],
    temperature: float = 4.0,
    alpha: float = 0.9,
) -> OfflineDistillation:
    """The method with a teacher from a file (see `read_teacher`); `mean`, `std`: those of the students' images."""
    own = teacher_mean, teacher_std, teacher_size
    teacher = read_teacher(teacher_weights, teacher_network, students.num_classes, *own, mean, std)
    return OfflineDistillation(students, teacher, temperature, alpha)
