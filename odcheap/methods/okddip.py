"""OKDDip: peers learn from each other with attention weights, and the group's leader learns from all peers.

D. Chen, J.-P. Mei, C. Wang, Y. Feng, C. Chen, "Online knowledge distillation with diverse peers", AAAI 2020. The last
student is the leader, the other m students are its auxiliary peers. q_k = softmax(z_k / T) are the softened predictions
of student k, h_k its pooled features, L and E linear layers, L_gt_k the cross-entropy, and w the ramp-up:

    a_kb = softmax_b(L(h_k) . E(h_b)),   t_k = sum_b a_kb q_b
    loss = sum_k L_gt_k + w T^2 [ sum_{k <= m} KL(t_k || q_k) + KL(1/m sum_b q_b || q_leader) ]

T = 3, all students see the same augmented images, and w grows over the first 80 of 300 epochs. The targets are not
detached, since L and E learn through them. The authors' code mixes logits and the formula mixes predictions; this file
follows the formula. Of the paper's two versions this is the one with whole networks: the students share nothing but L
and E, whose outputs have an eighth of the number of features. With two students there is one peer, which has no other
peer to learn from.
"""

from typing import Any

import torch
from torch import Tensor, nn

from odcheap.methods.base import Outputs, RampedDistillation, add_total, cross_entropy_terms, student_terms
from odcheap.methods.students import Students
from odcheap.utils.errors import OptionError


class DiversePeers(RampedDistillation):
    """Trains peers that learn from each other with attention weights, and a leader that learns from all peers.

    Args:
        students: Two or more students; the last one is the leader, the others are the peers.
        **options: `temperature` (T, by default 3), `ramp_up` (the fraction of the run's epochs, by default 80/300, in
            which the weight of the distillation terms rises to 1), `loss`, `loss_weights` and `average_decay`; see
            `RampedDistillation` and `LogitDistillation`.
    """

    teacher_kind = "mean"

    def __init__(self, students: Students, **options: Any):
        super().__init__(students, **options)
        features = students.num_features
        lengths = [student.num_features for student in students.backbones()]
        if len(set(lengths[:-1])) > 1:
            allowed = f"compares features of equal length, and the last maps of the peers have {lengths[:-1]} channels"
            raise OptionError("method", "okddip", allowed)
        self.query, self.key = (nn.Linear(features, max(1, features // 8), bias=False) for _ in range(2))

    def forward(self, images: Tensor) -> Outputs:
        """Returns the outputs by name, for images (N, C, H, W).

        Returns:
            `student_logits` (S, N, K); `teacher_logits` (N, K), T times the logarithm of the mean of the m peers'
            predictions at temperature T; `attention` (N, m, m), the weight that each peer (first m) gives to each peer
            (second m).
        """
        features, logits = self.students(images)
        pooled = torch.stack([f.mean((2, 3)) for f in features[:-1]], dim=1)  # (N, m, F)
        attention = (self.query(pooled) @ self.key(pooled).transpose(1, 2)).softmax(-1)
        # Logits that give the mean of the peers' softened predictions again when they are divided by T.
        mean = (logits[:-1] / self.temperature).softmax(-1).mean(0)
        outputs = {"student_logits": logits, "teacher_logits": mean.log() * self.temperature, "attention": attention}
        return outputs | self.average_outputs(images)

    def loss(self, outputs: Outputs, target: Tensor) -> dict[str, Tensor]:
        """Returns the loss terms by name, for the result of `forward` and the labels (N,); see `Method.loss`.

        Returns:
            `L_gt_k`: the cross-entropy of each student k. `L_dis1_k`: w T^2 times the KL from the attention-weighted
            predictions of the peers to peer k. `L_dis2`: w T^2 times the KL from the mean of the peers to the leader.
            `loss`: the sum of all terms. w is the weight `ramp`, in [0, 1].
        """
        logits = outputs["student_logits"]
        peers = (logits[:-1] / self.temperature).softmax(-1)  # (m, N, K)
        # For peer k the sum over the peers b of attention[n, k, b] times the predictions of peer b for image n.
        targets = torch.einsum("nkb,bnc->knc", outputs["attention"], peers)
        # Both distillation terms have the ramp-up, and T^2, which keeps the gradient's size independent of T.
        terms = cross_entropy_terms(logits, target, "L_gt")
        terms |= student_terms(self.compare(targets, logits[:-1], target), "L_dis1")
        return add_total(terms | {"L_dis2": self.compare(peers.mean(0), logits[-1], target)})

    def compare(self, prediction: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        """Returns the loss of students with respect to predictions that they should imitate, with its weight.

        Args:
            prediction: Softened probabilities (..., N, K).
            logits: Students' logits (..., N, K).
            target: Labels (N,).

        Returns:
            One value for each element of the dimensions before N; a scalar if there are none.
        """
        # Logits that give the prediction again when they are divided by T; a probability of 0 has no logarithm.
        tiny = torch.finfo(prediction.dtype).tiny
        imitated = prediction.clamp_min(tiny).log() * self.temperature
        return self.distillation_weight * self.distance(logits, imitated, target)
