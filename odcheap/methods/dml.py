"""Deep mutual learning: each student imitates every other.

Y. Zhang, T. Xiang, T. M. Hospedales, H. Lu, "Deep mutual learning", CVPR 2018. With p_k the softmax of student k,

    loss_k = L_C_k + 1 / (S - 1) sum_{l != k} KL(p_l || p_k)

The KL's gradient reaches student k only: p_l is a constant there. Temperature 1, no ramp-up, one view for all; the
students share nothing but the images.

Differences from the paper: it updates the students one after the other, with new predictions of those already updated;
here, as in most later work, all take their step at once, so that a batch costs S forward passes. Its second form, in
which each student imitates the mean of the others, is not offered.
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

    def forward(self, images: Tensor) -> Outputs:
        return {"student_logits": self.students(images)[1], "teacher_logits": None}

    def loss(self, outputs: Outputs, target: Tensor) -> dict[str, Tensor]:
        """Returns the terms `L_C_k`, `D_KL_k` (with the factor T^2) and their sum `loss`."""
        logits = outputs["student_logits"]
        pairs = soft_kl(logits[None], logits.detach()[:, None], self.temperature)  # (S, S): from peer l to student k
        peers = self.temperature**2 * pairs.sum(0) / (len(logits) - 1)  # a student's distance from itself is zero
        return add_total(cross_entropy_terms(logits, target, "L_C") | student_terms(peers, "D_KL"))
