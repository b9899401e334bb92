"""Deep mutual learning (DML): each student imitates all other students.

Y. Zhang, T. Xiang, T. M. Hospedales, H. Lu, "Deep mutual learning", CVPR 2018. S is the number of students, p_k the
softmax of student k's logits and L_C_k its cross-entropy:

    loss_k = L_C_k + 1 / (S - 1) sum_{l != k} KL(p_l || p_k)

In the KL p_l is detached, so the gradient of loss_k reaches student k only. The temperature is 1, and there is no
ramp-up. All students see the same augmented images and share nothing else.

The paper updates the students one after the other, and computes the predictions of updated students anew. Here, as in
most later work, all students are updated at the same time, so that a batch costs S forward passes. The paper's second
form, in which each student imitates the mean of the other students, is not implemented.
"""

from typing import Any

from torch import Tensor

from odcheap.methods.base import LogitDistillation, Outputs, add_total, cross_entropy_terms, student_terms
from odcheap.methods.losses import Temperature
from odcheap.methods.students import Students
from odcheap.utils.arguments import check_arguments


@check_arguments("method")
class DeepMutualLearning(LogitDistillation):
    """Trains students that imitate each other.

    Args:
        students: Two or more students.
        temperature: T, by which logits are divided before the softmax in the KL divergence.
        **options: `loss`, `loss_weights` and `average_decay`; see `LogitDistillation`.
    """

    min_students = 2

    def __init__(self, students: Students, temperature: Temperature = 1.0, **options: Any):
        super().__init__(students, temperature, **options)

    def loss(self, outputs: Outputs, target: Tensor) -> dict[str, Tensor]:
        """Returns the loss terms by name.

        Returns:
            For each student k: `L_C_k`, its cross-entropy; `D_KL_k`, T^2 times the mean KL from the other students'
            predictions to its own; with another loss than the KL, such as dkd, `D_DKD_k`. `loss`: the sum of all terms.
        """
        logits = outputs["student_logits"]
        # (S, S): row l has the distances of student l's predictions, the detached targets, from each student.
        pairs = self.distance(logits[None], logits.detach()[:, None], target)
        # A student's distance from itself is zero. (That of "dist" is not, for predictions that are constant.)
        others = pairs.sum(0) - pairs.diagonal().detach()
        peers = self.temperature**2 * others / (len(logits) - 1)
        name = f"D_{self.distance.name.upper()}"
        return add_total(cross_entropy_terms(logits, target, "L_C") | student_terms(peers, name))
