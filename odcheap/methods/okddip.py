"""OKDDip: peers teach each other by attention, and all of them the group's leader.

D. Chen, J.-P. Mei, C. Wang, Y. Feng, C. Chen, "Online knowledge distillation with diverse peers", AAAI 2020. The last
student is the leader, the others are its m auxiliary peers. With q softmax(z / T), h pooled features, L and E linear,
and w the ramp-up,

    a_kb = softmax_b(L(h_k) . E(h_b)),   t_k = sum_b a_kb q_b
    loss = sum_k L_gt_k + w T^2 [ sum_{k <= m} KL(t_k || q_k) + KL(1/m sum_b q_b || q_leader) ]

T = 3, one view for all, w over the first 80 of 300 epochs. Nothing is a given: L and E learn through the targets. The
authors' code mixes logits where the formula mixes predictions; this is the formula. The network version: students share
nothing but L and E, which project to an eighth of the features. With two students there is one peer, which has nobody
to listen to.
"""

import torch
from torch import Tensor, nn

from odcheap.methods.base import Method, RampUp, cross_entropies, each, summed
from odcheap.methods.losses import check_distillation
from odcheap.methods.students import Students


class DiversePeers(Method):
    """`ramp_up` is a part of the run's epochs. Raises `OptionError`."""

    teacher_kind = "mean"
    fewest = 2

    def __init__(self, students: Students, temperature: float = 3.0, ramp_up: float = 80 / 300):
        super().__init__(students)
        check_distillation(temperature)
        self.temperature, self.ramp = temperature, RampUp(ramp_up)
        features = students.num_features
        self.query, self.key = (nn.Linear(features, max(1, features // 8), bias=False) for _ in range(2))

    def at_epoch(self, epoch: int, epochs: int) -> None:
        self.ramp.at_epoch(epoch, epochs)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """`attention` (N, m, m): whom each peer listens to. The teacher is the mean prediction of the peers."""
        features, logits = self.students(images)
        pooled = torch.stack([f.mean((2, 3)) for f in features[:-1]], dim=1)  # (N, m, F)
        attention = (self.query(pooled) @ self.key(pooled).transpose(1, 2)).softmax(-1)
        mean = (logits[:-1] / self.temperature).softmax(-1).mean(0)
        return {"student_logits": logits, "teacher_logits": mean.log() * self.temperature, "attention": attention}

    def loss(self, outputs: dict[str, Tensor], target: Tensor) -> dict[str, Tensor]:
        """Terms `L_gt_k`, `L_dis1_k` of the peers and `L_dis2` of the leader, the latter two with w T^2."""
        logits = outputs["student_logits"]
        log_q = (logits / self.temperature).log_softmax(-1)
        peers = log_q[:-1].exp()
        aims = torch.einsum("nkb,bnc->knc", outputs["attention"], peers)
        weight = self.ramp.weight * self.temperature**2
        terms = cross_entropies(logits, target, "L_gt")
        terms |= each(weight * divergence(aims, log_q[:-1]), "L_dis1")
        return summed(terms | {"L_dis2": weight * divergence(peers.mean(0), log_q[-1])})


def divergence(aims: Tensor, log_q: Tensor) -> Tensor:
    """KL(aims || q) over the last dimension, averaged over the images before it."""
    return (torch.xlogy(aims, aims) - aims * log_q).sum(-1).mean(-1)
