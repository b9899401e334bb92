"""OKDDip: peers learn from each other by attention, and the group's leader learns from all of them.

D. Chen, J.-P. Mei, C. Wang, Y. Feng, C. Chen, "Online knowledge distillation with diverse peers", AAAI 2020. The last
student is the leader, the others are its m auxiliary peers. With q = softmax(z / T), h pooled features, L and E linear,
and w the ramp-up,

    a_kb = softmax_b(L(h_k) . E(h_b)),   t_k = sum_b a_kb q_b
    loss = sum_k L_gt_k + w T^2 [ sum_{k <= m} KL(t_k || q_k) + KL(1/m sum_b q_b || q_leader) ]

T = 3, all students see the same augmented images, and w grows over the first 80 of 300 epochs. The targets are not
constants, since L and E learn through them. The authors' code mixes logits, the formula mixes predictions; this is the
formula. Of the paper's two versions this is the one with whole networks: students share nothing but L and E, which
project to an eighth of the features. With two students there is one peer, which has no other peer to learn from.
"""

import torch
from torch import Tensor, nn

from odcheap.methods.base import Method, Outputs, RampUp, RampUpLength, add_total, cross_entropy_terms, student_terms
from odcheap.methods.losses import Temperature
from odcheap.methods.students import Students
from odcheap.utils.arguments import check_arguments


@check_arguments("method")
class DiversePeers(Method):
    """Peers that learn from each other by attention, and a leader that learns from them.

    Args:
        students: Two or more students; the last one is the leader.
        temperature: T of the softened predictions.
        ramp_up: The length of the ramp-up as a fraction of the run's epochs.
    """

    teacher_kind = "mean"
    min_students = 2

    def __init__(self, students: Students, temperature: Temperature = 3.0, ramp_up: RampUpLength = 80 / 300):
        super().__init__(students)
        self.temperature, self.ramp = temperature, RampUp(ramp_up)
        features = students.num_features
        self.query, self.key = (nn.Linear(features, max(1, features // 8), bias=False) for _ in range(2))

    def forward(self, images: Tensor) -> Outputs:
        """Returns the logits, and `attention` (N, m, m) of each peer to each peer. The teacher is the peers' mean."""
        features, logits = self.students(images)
        pooled = torch.stack([f.mean((2, 3)) for f in features[:-1]], dim=1)  # (N, m, F)
        attention = (self.query(pooled) @ self.key(pooled).transpose(1, 2)).softmax(-1)
        mean = (logits[:-1] / self.temperature).softmax(-1).mean(0)
        return {"student_logits": logits, "teacher_logits": mean.log() * self.temperature, "attention": attention}

    def loss(self, outputs: Outputs, target: Tensor) -> dict[str, Tensor]:
        """Returns the terms `L_gt_k`, `L_dis1_k` of the peers, `L_dis2` of the leader, and their sum `loss`.

        The last two have the factor w T^2.
        """
        logits = outputs["student_logits"]
        log_q = (logits / self.temperature).log_softmax(-1)
        peers = log_q[:-1].exp()
        targets = torch.einsum("nkb,bnc->knc", outputs["attention"], peers)
        weight = self.ramp_weight * self.temperature**2
        terms = cross_entropy_terms(logits, target, "L_gt")
        terms |= student_terms(weight * kl_divergence(targets, log_q[:-1]), "L_dis1")
        return add_total(terms | {"L_dis2": weight * kl_divergence(peers.mean(0), log_q[-1])})


def kl_divergence(target: Tensor, log_q: Tensor) -> Tensor:
    """Returns KL(target || q), summed over the classes and averaged over the images: (..., N, K) -> (...)."""
    return (torch.xlogy(target, target) - target * log_q).sum(-1).mean(-1)
