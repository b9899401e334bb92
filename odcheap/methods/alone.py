"""The baseline: the students learn from the labels alone.

    loss = sum_k CE(student_k)

The students see the same batches and share nothing else, so each student gets the weights that it would get without the
others. (The exception is dropout on a GPU: all students draw from one random generator there.)
"""

from typing import Any

from torch import Tensor

from odcheap.methods.base import IndependentMethod, LabelSmoothing, Outputs, add_total, cross_entropy_terms
from odcheap.methods.students import Students
from odcheap.utils.arguments import check_arguments


@check_arguments("method")
class Alone(IndependentMethod):
    """Trains students that do not learn from each other.

    Args:
        students: The S students.
        label_smoothing: The fraction of each label's probability that is divided among all classes, in [0, 1).
        **options: `average_decay`, the argument of `Method`: the largest decay of moving averages of the weights.
    """

    def __init__(self, students: Students, label_smoothing: LabelSmoothing = 0.0, **options: Any):
        super().__init__(students, **options)
        self.label_smoothing = label_smoothing

    def loss(self, outputs: Outputs, target: Tensor) -> dict[str, Tensor]:
        """Returns the loss, given the dict that `forward` returned and the labels of the N images.

        Returns:
            A dict of scalars.

            - `ce_0`, `ce_1`, ...: the cross-entropy of each student.
            - `loss`: their sum.
        """
        return add_total(cross_entropy_terms(outputs["student_logits"], target, "ce", self.label_smoothing))
