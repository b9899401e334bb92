"""PCL: peers learn from an ensemble of their features, and from each other's averages over time.

G. Wu, S. Gong, "Peer collaborative learning for online knowledge distillation", AAAI 2021. With z_t the ensemble
teacher, m_l the logits of peer l's average, q(z) = softmax(z / T) and w the ramp-up,

    z_t  = linear(concat(pooled features))
    loss = sum_k L_ce_k + L_ce_t + w T^2 sum_k [ KL(q(z_t) || q(z_k)) + 1 / (S - 1) sum_{l != k} KL(q(m_l) || q(z_k)) ]

T = 3, w over the first 80 of 300 epochs; z_t and m_l are givens within the KLs. Every peer sees an augmentation of its
own, its average the same. An average's weights follow a <- d a + (1 - d) weights after each step g (from 0), with
d = min(1 - 1 / (g + 1), 0.999); its batch norm's statistics are those of its own forward passes on the training
batches, S more without a backward pass. The paper deploys an average: they are candidates beside the students. Its
peers are branches of one network; ours are whole networks that share nothing but the ensemble's classifier.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odcheap.methods.base import Method, RampUp, cross_entropies, each, summed
from odcheap.methods.ema import Averages
from odcheap.methods.losses import check_distillation, soft_kl
from odcheap.methods.students import Students


class PeerCollaborativeLearning(Method):
    """`average_decay` bounds d; `ramp_up` is a part of the run's epochs. Raises `OptionError`."""

    teacher_kind = "head"
    own_views = True
    fewest = 2

    def __init__(
        self, students: Students, temperature: float = 3.0, average_decay: float = 0.999, ramp_up: float = 80 / 300
    ):
        super().__init__(students)
        check_distillation(temperature)
        self.temperature, self.ramp = temperature, RampUp(ramp_up)
        self.fc = nn.Linear(len(students) * students.num_features, students.num_classes)
        self.averages = Averages(students, average_decay)

    def at_epoch(self, epoch: int, epochs: int) -> None:
        self.ramp.at_epoch(epoch, epochs)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """`average_logits` (S, N, K) besides."""
        features, logits = self.students(images)
        teacher = self.fc(torch.cat([f.mean((2, 3)) for f in features], dim=1))
        return {"student_logits": logits, "teacher_logits": teacher} | self.averaged(images)

    def loss(self, outputs: dict[str, Tensor], target: Tensor) -> dict[str, Tensor]:
        """Terms `L_ce_k`, `L_ce_t`, `L_pe_k` (from the ensemble) and `L_pm_k` (from the averages), with w T^2."""
        logits, teacher = outputs["student_logits"], outputs["teacher_logits"]
        weight = self.ramp.weight * self.temperature**2
        terms = cross_entropies(logits, target, "L_ce") | {"L_ce_t": F.cross_entropy(teacher, target)}
        terms |= each(weight * soft_kl(logits, teacher.detach(), self.temperature), "L_pe")
        pairs = soft_kl(logits[None], outputs["average_logits"][:, None], self.temperature)  # from average l to peer k
        others = (pairs.sum(0) - pairs.diagonal()) / (len(logits) - 1)
        return summed(terms | each(weight * others, "L_pm"))
