"""No method: the students learn from the labels alone, which is the baseline of every gain.

    loss = sum_k CE(student_k)

The students see the same batches and share nothing else: each one's weights are what they would be without the others.
(On a GPU, students with dropout draw from one generator.)
"""

from torch import Tensor

from odcheap.methods.base import IndependentMethod, LabelSmoothing, Outputs, add_total, cross_entropy_terms
from odcheap.methods.ema import AverageDecay, AveragedStudents
from odcheap.methods.students import Students
from odcheap.utils.arguments import check_arguments


@check_arguments("method")
class Alone(IndependentMethod):
    """Independent students.

    Args:
        students: The students.
        label_smoothing: The part of each label that is divided among all classes.
        average_decay: The largest decay of averages of the students' weights over the steps, which are then candidates
            too, for S more forward passes a step; None for no averages.
    """

    def __init__(
        self, students: Students, label_smoothing: LabelSmoothing = 0.0, average_decay: AverageDecay | None = None
    ):
        super().__init__(students)
        self.label_smoothing = label_smoothing
        self.averages = None if average_decay is None else AveragedStudents(students, average_decay)

    def forward(self, images: Tensor) -> Outputs:
        outputs = {"student_logits": self.students(images)[1], "teacher_logits": None}
        return outputs | self.average_outputs(images)

    def loss(self, outputs: Outputs, target: Tensor) -> dict[str, Tensor]:
        """Returns the terms `ce_k` and their sum `loss`."""
        return add_total(cross_entropy_terms(outputs["student_logits"], target, "ce", self.label_smoothing))
