"""Deep mutual learning: each student imitates every other.

Y. Zhang, T. Xiang, T. M. Hospedales, H. Lu, "Deep mutual learning", CVPR 2018. With p_k student k's softmax,

    loss_k = L_C_k + 1 / (S - 1) sum_{l != k} KL(p_l || p_k)

The KL's gradient reaches student k only: p_l is a given there. Temperature 1, no ramp-up, one view for all; students
share nothing but the images. The paper updates them in turn, with fresh predictions of those already updated; here, as
in most later work, all take their step at once, so that a batch costs S forward passes. The paper's second form, in
which each imitates the mean of the others, is not offered.
"""

from torch import Tensor

from odcheap.methods.base import Method, cross_entropies, each, summed
from odcheap.methods.losses import check_distillation, soft_kl
from odcheap.methods.students import Students


class DeepMutualLearning(Method):
    """Raises `OptionError`."""

    fewest = 2

    def __init__(self, students: Students, temperature: float = 1.0):
        super().__init__(students)
        check_distillation(temperature)
        self.temperature = temperature

    def forward(self, images: Tensor) -> dict[str, Tensor | None]:
        return {"student_logits": self.students(images)[1], "teacher_logits": None}

    def loss(self, outputs: dict[str, Tensor], target: Tensor) -> dict[str, Tensor]:
        """Terms `L_C_k` and `D_KL_k`, the latter with the factor T^2."""
        logits = outputs["student_logits"]
        pairs = soft_kl(logits[None], logits.detach()[:, None], self.temperature)  # (S, S): from peer l to student k
        peers = self.temperature**2 * pairs.sum(0) / (len(logits) - 1)  # a student is no distance from itself
        return summed(cross_entropies(logits, target, "L_C") | each(peers, "D_KL"))
