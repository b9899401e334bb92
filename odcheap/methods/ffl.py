"""FFL: the students' feature maps are fused into a classifier; it learns from their ensemble, and they from it.

J. Kim, M. Hyun, I. Chung, N. Kwak, "Feature fusion for online mutual knowledge distillation", arXiv 1904.09058, 2019.
With z_e the mean of the students' logits z_k, w the ramp-up, and

    z_f  = linear(pool(ReLU(BN(conv 1x1(ReLU(BN(depth-wise 3x3(concat(maps)))))))))
    loss = sum_k L_ce_k + L_ce_f + w T^2 [ KL(softmax(z_e / T) || softmax(z_f / T))
                                           + sum_k KL(softmax(z_f / T) || softmax(z_k / T)) ]

T = 3, one view for all. As in the authors' code the first argument of each KL is a given, w grows over the first 80 of
300 epochs, and the students (branches there, whole networks that share nothing here) learn from L_ce_f too. The authors
train the fusion with a weight decay of its own, 1e-5; here all have the recipe's.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odcheap.methods.base import Method, RampUp, cross_entropies, each, summed
from odcheap.methods.losses import check_distillation, soft_kl
from odcheap.methods.students import Students


class FeatureFusion(Method):
    """`ramp_up` is a part of the run's epochs. Raises `OptionError`."""

    teacher_kind = "head"
    fewest = 2

    def __init__(self, students: Students, temperature: float = 3.0, ramp_up: float = 80 / 300):
        super().__init__(students)
        check_distillation(temperature)
        self.temperature, self.ramp = temperature, RampUp(ramp_up)
        one = students.num_features
        both = one * len(students)
        depthwise = [nn.Conv2d(both, both, 3, padding=1, groups=both, bias=False), nn.BatchNorm2d(both), nn.ReLU()]
        self.fusion = nn.Sequential(*depthwise, nn.Conv2d(both, one, 1, bias=False), nn.BatchNorm2d(one), nn.ReLU())
        self.fc = nn.Linear(one, students.num_classes)

    def at_epoch(self, epoch: int, epochs: int) -> None:
        self.ramp.at_epoch(epoch, epochs)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features, logits = self.students(images)
        fused = self.fusion(torch.cat(features, dim=1))
        return {"student_logits": logits, "teacher_logits": self.fc(fused.mean((2, 3)))}

    def loss(self, outputs: dict[str, Tensor], target: Tensor) -> dict[str, Tensor]:
        """Terms `L_ce_k`, `L_ce_f`, `L_kl_e` (to the fused classifier) and `L_kl_f_k` (from it), with w T^2."""
        logits, fused = outputs["student_logits"], outputs["teacher_logits"]
        weight = self.ramp.weight * self.temperature**2
        terms = cross_entropies(logits, target, "L_ce") | {"L_ce_f": F.cross_entropy(fused, target)}
        terms["L_kl_e"] = weight * soft_kl(fused, logits.mean(0).detach(), self.temperature)
        return summed(terms | each(weight * soft_kl(logits, fused.detach(), self.temperature), "L_kl_f"))
