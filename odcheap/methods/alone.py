"""No method: the students learn from the labels alone, which is the baseline of every gain.

    loss = sum_k CE(student_k)

They see the same batches and share nothing else: each one's weights are what they would be without the others. Where
gradients are clipped each student has a norm of its own. (On a GPU, or as one network, those of a backbone with dropout
draw from one generator.)
"""

from torch import Tensor, nn

from odcheap.methods.base import Method, check_smoothing, cross_entropies, summed
from odcheap.methods.ema import Averages
from odcheap.methods.students import Students


class Alone(Method):
    """Independent students. `average_decay`: averages of their weights over the steps are candidates too, for S more
    forward passes a step (None: there are none). Raises `OptionError`.
    """

    def __init__(self, students: Students, label_smoothing: float = 0.0, average_decay: float | None = None):
        super().__init__(students)
        check_smoothing(label_smoothing)
        self.label_smoothing = label_smoothing
        self.averages = None if average_decay is None else Averages(students, average_decay)

    def clipped_together(self) -> list[list[nn.Parameter]]:
        return [list(student.parameters()) for student in self.students.members]

    def forward(self, images: Tensor) -> dict[str, Tensor | None]:
        outputs = {"student_logits": self.students(images)[1], "teacher_logits": None}
        return outputs | self.averaged(images)

    def loss(self, outputs: dict[str, Tensor], target: Tensor) -> dict[str, Tensor]:
        """Terms `ce_k`."""
        return summed(cross_entropies(outputs["student_logits"], target, "ce", self.label_smoothing))
