"""KDCL: a soft target made of all students' logits and the label, over distorted views.

Q. Guo, X. Wang, Y. Wu, Z. Yu, D. Liang, X. Hu, P. Luo, "Online knowledge distillation via collaborative learning",
CVPR 2020. With z_k student k's logits on its own view of the images and c the label,

    minlogit:  z_t[j] = min_k (z_k[j] - z_k[c])
    naive:     z_t    = the z_k of least cross-entropy
    loss       = sum_k L_CE_k + weight T^2 sum_k KL(softmax(z_t / T) || softmax(z_k / T))

T = 2, weight 1, no ramp-up; z_t is a given. Every student sees an augmentation of its own, and they share nothing. The
target needs the label, so there is no teacher at test time. Two of the paper's four targets are not offered: Linear
solves a problem for each image, General needs held-out images within training.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from odcheap.methods.base import Method, cross_entropies, each, summed
from odcheap.methods.losses import check_distillation, soft_kl
from odcheap.methods.students import Students
from odcheap.utils.errors import OptionError

TARGETS = ("minlogit", "naive")


class CollaborativeLearning(Method):
    """Raises `OptionError`."""

    own_views = True
    fewest = 2

    def __init__(
        self, students: Students, temperature: float = 2.0, weight: float = 1.0, soft_target: str = "minlogit"
    ):
        super().__init__(students)
        check_distillation(temperature)
        if soft_target not in TARGETS:
            raise OptionError("method.soft_target", soft_target, f"must be one of {', '.join(TARGETS)}")
        self.temperature, self.weight, self.soft_target = temperature, weight, soft_target

    def forward(self, images: Tensor) -> dict[str, Tensor | None]:
        return {"student_logits": self.students(images)[1], "teacher_logits": None}

    def loss(self, outputs: dict[str, Tensor], target: Tensor) -> dict[str, Tensor]:
        """Terms `L_CE_k` and `L_KD_k`, the latter with weight T^2."""
        logits = outputs["student_logits"]
        aim = (min_logit if self.soft_target == "minlogit" else naive)(logits.detach(), target)
        kl = self.weight * self.temperature**2 * soft_kl(logits, aim, self.temperature)
        return summed(cross_entropies(logits, target, "L_CE") | each(kl, "L_KD"))


def min_logit(logits: Tensor, target: Tensor) -> Tensor:
    """(S, N, K), (N,) -> (N, K)."""
    of_label = logits.gather(-1, target.expand(len(logits), -1)[..., None])
    return (logits - of_label).amin(0)


def naive(logits: Tensor, target: Tensor) -> Tensor:
    """(S, N, K), (N,) -> (N, K)."""
    losses = torch.stack([F.cross_entropy(own, target, reduction="none") for own in logits])
    return logits.gather(0, losses.argmin(0)[None, :, None].expand(1, -1, logits.shape[-1]))[0]
