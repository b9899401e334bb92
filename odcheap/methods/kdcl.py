"""KDCL: the students learn from a soft target, which is computed from the logits of all students and the label.

Q. Guo, X. Wang, Y. Wu, Z. Yu, D. Liang, X. Hu, P. Luo, "Online knowledge distillation via collaborative learning",
CVPR 2020. Each student sees its own augmentation of the images. z_k are the logits of student k, c is the label, j a
class, and z_t the soft target:

    minlogit:  z_t[j] = min_k (z_k[j] - z_k[c])
    naive:     z_t    = the z_k with the smallest cross-entropy
    loss       = sum_k L_CE_k + weight T^2 sum_k KL(softmax(z_t / T) || softmax(z_k / T))

T = 2, the weight is 1, and there is no ramp-up; z_t is detached. The students share nothing. The target needs the
label, so there is no teacher at test time. Two of the paper's four targets are not implemented: Linear solves an
optimization problem for each image, and General needs held-out images in training.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from odcheap.methods.base import LogitDistillation, Outputs, add_total, cross_entropy_terms, student_terms
from odcheap.methods.losses import Temperature
from odcheap.methods.students import Students
from odcheap.utils.arguments import check_arguments
from odcheap.utils.errors import OptionError


@check_arguments("method")
class CollaborativeLearning(LogitDistillation):
    """Trains students that learn from the labels and from a soft target, which all students' logits give (KDCL).

    Args:
        students: Two or more students.
        temperature: T, by which logits are divided before the softmax in the KL divergence.
        weight: The factor of the loss terms that compare students with the soft target, in addition to T^2.
        soft_target: How the soft target is computed for each image. "minlogit" subtracts, in each student, the logit of
            the label from all logits, and takes the smallest result of each class over the students. "naive" takes the
            logits of the student with the smallest cross-entropy.
        **options: `loss`, `loss_weights` and `average_decay`, the arguments of `LogitDistillation`.
    """

    has_own_views = True
    min_students = 2

    def __init__(
        self,
        students: Students,
        temperature: Temperature = 2.0,
        weight: Annotated[float, Field()] = 1.0,
        soft_target: Literal["minlogit", "naive"] = "minlogit",
        **options: Any,
    ):
        super().__init__(students, temperature, **options)
        self.weight, self.soft_target = weight, soft_target
        self.make_target = min_logit_target if soft_target == "minlogit" else naive_target

    def check_soft_labels(self) -> None:
        super().check_soft_labels()
        if self.soft_target == "minlogit":
            allowed = "needs one label for each image, which augment.mixup and augment.cutmix do not give"
            raise OptionError("method.soft_target", self.soft_target, f"{allowed}; naive takes mixed labels")

    def loss(self, outputs: Outputs, target: Tensor) -> dict[str, Tensor]:
        """Returns the loss, given the dict that `forward` returned and the labels of the N images.

        Returns:
            A dict of scalars, in which k is the number of a student.

            - `L_CE_k`: the cross-entropy of student k.
            - `L_KD_k`: weight T^2 KL(soft target || student k), or the other loss that the option `loss` names.
            - `loss`: the sum of all terms.
        """
        logits = outputs["student_logits"]
        soft_target = self.make_target(logits.detach(), target)
        distances = self.weight * self.distance.factor * self.distance(logits, soft_target, target)
        return add_total(cross_entropy_terms(logits, target, "L_CE") | student_terms(distances, "L_KD"))


def min_logit_target(logits: Tensor, target: Tensor) -> Tensor:
    """Returns, for each image and class, the smallest value over the students of logit(class) - logit(label).

    Args:
        logits: The students' logits (S, N, K).
        target: Labels (N,).

    Returns:
        (N, K), which serve as the logits of the soft target.
    """
    # (S, N, 1): each student's logit of the image's label.
    label_logits = logits.gather(-1, target.expand(len(logits), -1)[..., None])
    return (logits - label_logits).amin(0)


def naive_target(logits: Tensor, target: Tensor) -> Tensor:
    """Returns, for each image, the logits of the student with the smallest cross-entropy.

    Args:
        logits: The students' logits (S, N, K).
        target: Labels (N,), or probabilities of the classes (N, K).

    Returns:
        (N, K); different images may have the logits of different students.
    """
    losses = torch.stack([F.cross_entropy(student, target, reduction="none") for student in logits])
    # The index of the best student, (N,), is repeated for all classes, since `gather` picks each element separately.
    return logits.gather(0, losses.argmin(0)[None, :, None].expand(1, -1, logits.shape[-1]))[0]
