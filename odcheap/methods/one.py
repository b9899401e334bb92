"""ONE: a gate computes a weighted sum of the students' logits; this is the teacher, from which all students learn.

X. Lan, X. Zhu, S. Gong, "Knowledge distillation by on-the-fly native ensemble", NeurIPS 2018. z_k are the logits of
student k, g = softmax(ReLU(BN(linear(features)))) are the gate's weights, z_e the teacher's logits, L_ce is the
cross-entropy of each, and w the ramp-up:

    z_e  = sum_k g_k z_k
    loss = sum_k L_ce_k + L_ce_e + w T^2 sum_k KL(softmax(z_e / T) || softmax(z_k / T))

T = 3, and all students see the same augmented images. As in the authors' code z_e is detached in the KL, so that the
gate learns from L_ce_e alone, and w grows over the first 80 of 300 epochs. The paper's students are branches of one
network, and the gate reads the features that they share; here they are whole networks that share nothing, and the gate
reads their pooled features.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odcheap.methods.base import Outputs, RampedDistillation, add_total, cross_entropy_terms, student_terms
from odcheap.methods.students import Students


class NativeEnsemble(RampedDistillation):
    """Trains students that learn from a teacher, a weighted sum of their logits with weights from a gate (ONE).

    Args:
        students: Two or more students.
        **options: The other arguments of `RampedDistillation`: `temperature` (T, by default 3), `ramp_up` (the fraction
            of the run's epochs, by default 80/300, in which the weight of the distillation terms rises to 1), `loss`,
            `loss_weights` and `average_decay`.
    """

    teacher_kind = "gated"

    def __init__(self, students: Students, **options: Any):
        super().__init__(students, **options)
        count = len(students)
        gate = [nn.Linear(students.total_features, count), nn.BatchNorm1d(count), nn.ReLU(), nn.Softmax(-1)]
        self.gate = nn.Sequential(*gate)

    def teacher_logits(self, features: list[Tensor], logits: Tensor) -> Tensor:
        gates = self.gate(torch.cat([f.mean((2, 3)) for f in features], dim=1))  # (N, S)
        return (gates.T[..., None] * logits).sum(0)

    def loss(self, outputs: Outputs, target: Tensor) -> dict[str, Tensor]:
        """Returns the loss, given the dict that `forward` returned and the labels of the N images.

        Returns:
            A dict of scalars, in which k is the number of a student, and w in [0, 1] the current weight of the ramp-up.

            - `L_ce_k`: the cross-entropy of student k.
            - `L_ce_e`: the cross-entropy of the teacher.
            - `L_kl_k`: w T^2 KL(teacher || student k). If the option `loss` is not "kl", its value stands in place of
              `kl`, such as `L_dkd_k`.
            - `loss`: the sum of all terms.
        """
        logits, teacher = outputs["student_logits"], outputs["teacher_logits"]
        terms = cross_entropy_terms(logits, target, "L_ce") | {"L_ce_e": F.cross_entropy(teacher, target)}
        distances = self.distillation_weight * self.distance(logits, teacher.detach(), target)
        return add_total(terms | student_terms(distances, f"L_{self.distance.name}"))
