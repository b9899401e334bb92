"""The baseline: the students learn from the labels alone.

    loss = sum_k CE(student_k)

The students see the same batches and share nothing else, so each gets the weights that it would get without the others.
(Except on a GPU with dropout: all students draw from one generator there.)
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
        average_decay: The largest decay of moving averages of the students' weights; None for no averages. The averages
            cost S more forward passes a step, and the best one may be selected in place of a student.
    """

    def __init__(
        self, students: Students, label_smoothing: LabelSmoothing = 0.0, average_decay: AverageDecay | None = None
    ):
        super().__init__(students)
        self.label_smoothing = label_smoothing
        self.averages = None if average_decay is None else AveragedStudents(students, average_decay)

    def loss(self, outputs: Outputs, target: Tensor) -> dict[str, Tensor]:
        """Returns the terms `ce_k` and their sum `loss`."""
        return add_total(cross_entropy_terms(outputs["student_logits"], target, "ce", self.label_smoothing))
