"""ONE: a gate weighs the students' logits into a teacher, which all learn from.

X. Lan, X. Zhu, S. Gong, "Knowledge distillation by on-the-fly native ensemble", NeurIPS 2018. With z_k student k's
logits, g = softmax(ReLU(BN(linear(features)))) the gate and w the ramp-up,

    z_e  = sum_k g_k z_k
    loss = sum_k L_ce_k + L_ce_e + w T^2 sum_k KL(softmax(z_e / T) || softmax(z_k / T))

T = 3, one view for all. As in the authors' code z_e is a given within the KL, so that gate and teacher learn from
L_ce_e alone, and w grows over the first 80 of 300 epochs. The paper's students are branches of one network, and the
gate reads what they share; ours are whole networks that share nothing, and the gate reads their pooled features.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odcheap.methods.base import Method, RampUp, cross_entropies, each, summed
from odcheap.methods.losses import check_distillation, soft_kl
from odcheap.methods.students import Students


class NativeEnsemble(Method):
    """`ramp_up` is a part of the run's epochs. Raises `OptionError`."""

    teacher_kind = "gated"
    fewest = 2

    def __init__(self, students: Students, temperature: float = 3.0, ramp_up: float = 80 / 300):
        super().__init__(students)
        check_distillation(temperature)
        self.temperature, self.ramp = temperature, RampUp(ramp_up)
        count = len(students)
        gate = [nn.Linear(count * students.num_features, count), nn.BatchNorm1d(count), nn.ReLU(), nn.Softmax(-1)]
        self.gate = nn.Sequential(*gate)

    def at_epoch(self, epoch: int, epochs: int) -> None:
        self.ramp.at_epoch(epoch, epochs)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features, logits = self.students(images)
        shares = self.gate(torch.cat([f.mean((2, 3)) for f in features], dim=1))  # (N, S)
        return {"student_logits": logits, "teacher_logits": (shares.T[..., None] * logits).sum(0)}

    def loss(self, outputs: dict[str, Tensor], target: Tensor) -> dict[str, Tensor]:
        """Terms `L_ce_k`, `L_ce_e` and `L_kl_k`, the latter with w T^2."""
        logits, teacher = outputs["student_logits"], outputs["teacher_logits"]
        terms = cross_entropies(logits, target, "L_ce") | {"L_ce_e": F.cross_entropy(teacher, target)}
        kl = self.ramp.weight * self.temperature**2 * soft_kl(logits, teacher.detach(), self.temperature)
        return summed(terms | each(kl, "L_kl"))
