"""PCL: peers (students) learn from a classifier on all their features, and from moving averages of the other peers.

G. Wu, S. Gong, "Peer collaborative learning for online knowledge distillation", AAAI 2021. z_k are the logits of peer
k, z_t those of the teacher, m_l those of the moving average of peer l's weights; q(z) = softmax(z / T), L_ce is the
cross-entropy of each, S the number of peers, and w the ramp-up:

    z_t  = linear(concat(pooled features))
    loss = sum_k L_ce_k + L_ce_t + w T^2 sum_k [ KL(q(z_t) || q(z_k)) + 1 / (S - 1) sum_{l != k} KL(q(m_l) || q(z_k)) ]

T = 3, and w grows over the first 80 of 300 epochs; z_t and m_l are detached in the KLs. Every peer sees its own
augmentation of the images, and its moving average sees the same one. The moving averages are those of
`AveragedStudents` with decay 0.999; they cost S more forward passes in each step, without a backward pass. The paper
deploys a moving average, so one may be selected in place of a student. The paper's peers are branches of one network;
here they are whole networks that share nothing but the teacher's linear layer.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odcheap.methods.base import (
    Outputs,
    RampedDistillation,
    add_total,
    cross_entropy_terms,
    mean_of_others,
    student_terms,
)
from odcheap.methods.students import AverageDecay, Students
from odcheap.utils.arguments import check_arguments


@check_arguments("method")
class PeerCollaborativeLearning(RampedDistillation):
    """Trains students that learn from a teacher, and from moving averages of the other students' weights (PCL).

    The teacher is a classifier on the features of all students.

    Args:
        students: Two or more students.
        average_decay: The largest decay of the moving averages of the students' weights, in [0, 1).
        **options: The other arguments of `RampedDistillation`: `temperature` (T, by default 3), `ramp_up` (the fraction
            of the run's epochs, by default 80/300, in which the weight of the distillation terms rises to 1), `loss`
            and `loss_weights`.
    """

    teacher_kind = "head"
    has_own_views = True

    def __init__(self, students: Students, *, average_decay: AverageDecay = 0.999, **options: Any):
        super().__init__(students, average_decay=average_decay, **options)
        self.fc = nn.Linear(students.total_features, students.num_classes)

    def teacher_logits(self, features: list[Tensor], logits: Tensor) -> Tensor:
        return self.fc(torch.cat([f.mean((2, 3)) for f in features], dim=1))

    def loss(self, outputs: Outputs, target: Tensor) -> dict[str, Tensor]:
        """Returns the loss, given the dict that `forward` returned and the labels of the N images.

        Returns:
            A dict of scalars, in which k is the number of a student, and w in [0, 1] the current weight of the ramp-up.

            T is the temperature. If the option `loss` names another loss, this loss is used in place of the KL.

            - `L_ce_k`: the cross-entropy of student k.
            - `L_ce_t`: the cross-entropy of the teacher.
            - `L_pe_k`: w T^2 KL(teacher || student k).
            - `L_pm_k`: w T^2 KL(moving average of student l || student k), averaged over the other students l.
            - `loss`: the sum of all terms.
        """
        logits, teacher = outputs["student_logits"], outputs["teacher_logits"]
        weight = self.distillation_weight
        terms = cross_entropy_terms(logits, target, "L_ce") | {"L_ce_t": F.cross_entropy(teacher, target)}
        terms |= student_terms(weight * self.distance(logits, teacher.detach(), target), "L_pe")
        # (S, S): row l has the distances of the moving average of peer l from each student. The diagonal, a student's
        # distance from its own moving average, is left out.
        pairs = self.distance(logits[None], outputs["average_logits"][:, None], target)
        return add_total(terms | student_terms(weight * mean_of_others(pairs), "L_pm"))
