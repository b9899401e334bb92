"""Deep mutual learning: each student imitates every other.

Y. Zhang, T. Xiang, T. M. Hospedales, H. Lu, "Deep mutual learning", CVPR 2018. With p_k the softmax of student k,

    loss_k = L_C_k + 1 / (S - 1) sum_{l != k} KL(p_l || p_k)

p_l is a constant in the KL, whose gradient reaches student k only. The temperature is 1, and there is no ramp-up. All
students see the same augmented images and share nothing else.

The paper updates the students one after the other, with new predictions of those that are already updated. Here, as in
most later work, all take their step at once, so that a batch costs S forward passes. The paper's second form, in which
each student imitates the mean of the others, is not implemented.
"""

from torch import Tensor

from odcheap.methods.base import Method, Outputs, add_total, cross_entropy_terms, student_terms
from odcheap.methods.losses import Temperature, soft_kl
from odcheap.methods.students import Students
from odcheap.utils.arguments import check_arguments


@check_arguments("method")
class DeepMutualLearning(Method):
    """Students that imitate each other.

    Args:
        students: Two or more students.
        temperature: T of the softened predictions.
    """

    min_students = 2

    def __init__(self, students: Students, temperature: Temperature = 1.0):
        super().__init__(students)
        self.temperature = temperature

    def loss(self, outputs: Outputs, target: Tensor) -> dict[str, Tensor]:
        """Returns the terms `L_C_k`, `D_KL_k` (with the factor T^2) and their sum `loss`."""
        logits = outputs["student_logits"]
        pairs = soft_kl(logits[None], logits.detach()[:, None], self.temperature)  # (S, S): row l is the target
        peers = self.temperature**2 * pairs.sum(0) / (len(logits) - 1)  # a student's distance from itself is zero
        return add_total(cross_entropy_terms(logits, target, "L_C") | student_terms(peers, "D_KL"))
