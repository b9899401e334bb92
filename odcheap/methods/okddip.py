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
    """Trains peers that learn from each other, and a leader that learns from all peers (OKDDip).

    A peer imitates a weighted mean of the predictions of all peers. The weights are an attention between the features
    of the peers.

    Args:
        students: Two or more students. The last student is the leader, the others are the peers.
        **options: The other arguments of `RampedDistillation`: `temperature` (T, by default 3), `ramp_up` (the fraction
            of the run's epochs, by default 80/300, in which the weight of the distillation terms rises to 1), `loss`,
            `loss_weights` and `average_decay`.
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
        """Runs the S students, of which m = S - 1 are peers, on images (N, C, H, W).

        Returns:
            A dict with at least the first three of these keys.

            - `student_logits`: (S, N, K).
            - `teacher_logits`: (N, K), T times the logarithm of the mean of the peers' predictions at temperature T.
            - `attention`: (N, m, m). Entry [n, k, b] is the weight of peer b in what peer k imitates for image n.
            - `average_logits`: (S, N, K), of the moving averages of the students' weights, if the method keeps them.
        """
        features, logits = self.students(images)
        pooled = torch.stack([f.mean((2, 3)) for f in features[:-1]], dim=1)  # (N, m, F)
        attention = (self.query(pooled) @ self.key(pooled).transpose(1, 2)).softmax(-1)
        # Logits that give the mean of the peers' softened predictions again when they are divided by T.
        mean = (logits[:-1] / self.temperature).softmax(-1).mean(0)
        outputs = {"student_logits": logits, "teacher_logits": mean.log() * self.temperature, "attention": attention}
        return outputs | self.average_outputs(images)

    def loss(self, outputs: Outputs, target: Tensor) -> dict[str, Tensor]:
        """Returns the loss, given the dict that `forward` returned and the labels of the N images.

        Returns:
            A dict of scalars, in which w in [0, 1] is the current weight of the ramp-up.
            T is the temperature. If the option `loss` names another loss, this loss is used in place of the KL.

            - `L_gt_k`: the cross-entropy of each student k.
            - `L_dis1_k`: w T^2 KL(attention-weighted mean of the peers' predictions || peer k), for each peer k.
            - `L_dis2`: w T^2 KL(mean of the peers' predictions || leader).
            - `loss`: the sum of all terms.
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
        """Returns the distillation loss of students, already multiplied by its weight w T^2.

        Args:
            prediction: The softened predictions that the students should imitate, probabilities (..., N, K).
            logits: The logits of the students, (..., N, K).
            target: Labels (N,).

        Returns:
            One value for each element of the dimensions before N; a scalar if there are none.
        """
        # Logits that give the prediction again when they are divided by T; a probability of 0 has no logarithm.
        tiny = torch.finfo(prediction.dtype).tiny
        imitated = prediction.clamp_min(tiny).log() * self.temperature
        return self.distillation_weight * self.distance(logits, imitated, target)
