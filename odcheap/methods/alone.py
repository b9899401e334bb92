"""No method: the students learn from the labels alone, which is the baseline of every gain.

    loss = sum_k CE(student_k)

They see the same batches and share nothing else: each one's weights are what they would be without the others. Where
gradients are clipped each student has a norm of its own. (On a GPU, or as one network, those of a backbone with dropout
draw from one generator.)
"""

from torch import Tensor, nn

from odcheap.method import Method, cross_entropies, summed


class Alone(Method):
    """Independent students."""

    def clipped_together(self) -> list[list[nn.Parameter]]:
        return [list(student.parameters()) for student in self.students.members]

    def forward(self, images: Tensor) -> dict[str, Tensor | None]:
        return {"student_logits": self.students(images)[1], "teacher_logits": None}

    def loss(self, outputs: dict[str, Tensor], target: Tensor) -> dict[str, Tensor]:
        """Terms `ce_k`."""
        return summed(cross_entropies(outputs["student_logits"], target, "ce"))
