"""FFL: a classifier on the students' fused feature maps learns from their ensemble, and the students learn from it.

J. Kim, M. Hyun, I. Chung, N. Kwak, "Feature fusion for online mutual knowledge distillation", arXiv 1904.09058, 2019.
z_k are the logits of student k, z_e is their mean over the students, z_f are the logits of the fused classifier, L_ce
is the cross-entropy of each, and w the ramp-up:

    z_f  = linear(pool(ReLU(BN(conv 1x1(ReLU(BN(depth-wise 3x3(concat(features)))))))))
    loss = sum_k L_ce_k + L_ce_f + w T^2 [ KL(softmax(z_e / T) || softmax(z_f / T))
                                           + sum_k KL(softmax(z_f / T) || softmax(z_k / T)) ]

T = 3, and all students see the same augmented images. As in the authors' code the first argument of each KL is
detached, w grows over the first 80 of 300 epochs, and the students learn from L_ce_f too. The authors' students are
branches of one network; here they are whole networks that share nothing. The authors train the fusion with a weight
decay of its own, 1e-5; here all parts have the run's weight decay.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odcheap.methods.base import Outputs, RampedDistillation, add_total, cross_entropy_terms, student_terms
from odcheap.methods.students import Students


class FeatureFusion(RampedDistillation):
    """Trains students together with a teacher: a classifier on their fused feature maps (FFL).

    Args:
        students: Two or more students.
        **options: The other arguments of `RampedDistillation`: `temperature` (T, by default 3), `ramp_up` (the fraction
            of the run's epochs, by default 80/300, in which the weight of the distillation terms rises to 1), `loss`,
            `loss_weights` and `average_decay`.
    """

    teacher_kind = "head"
    joins_maps = True

    def __init__(self, students: Students, **options: Any):
        super().__init__(students, **options)
        # The fusion of the maps of all students to one map with as many channels as student 0's: depth-wise 3 x 3, then
        # 1 x 1, each with batch norm and ReLU.
        concat, fused = students.total_features, students.num_features
        depthwise = nn.Conv2d(concat, concat, 3, padding=1, groups=concat, bias=False)
        pointwise = nn.Conv2d(concat, fused, 1, bias=False)
        layers = [depthwise, nn.BatchNorm2d(concat), nn.ReLU(), pointwise, nn.BatchNorm2d(fused), nn.ReLU()]
        self.fusion = nn.Sequential(*layers)
        self.fc = nn.Linear(fused, students.num_classes)

    def teacher_logits(self, features: list[Tensor], logits: Tensor) -> Tensor:
        return self.fc(self.fusion(torch.cat(features, dim=1)).mean((2, 3)))

    def loss(self, outputs: Outputs, target: Tensor) -> dict[str, Tensor]:
        """Returns the loss, given the dict that `forward` returned and the labels of the N images.

        Returns:
            A dict of scalars, in which k is the number of a student, and w in [0, 1] the current weight of the ramp-up.
            If the option `loss` is not "kl", its value stands in place of `kl` in the keys.

            - `L_ce_k`: the cross-entropy of student k.
            - `L_ce_f`: the cross-entropy of the teacher, the classifier on the fused feature maps.
            - `L_kl_e`: w T^2 KL(mean of the students' logits || teacher).
            - `L_kl_f_k`: w T^2 KL(teacher || student k).
            - `loss`: the sum of all terms.
        """
        logits, fused = outputs["student_logits"], outputs["teacher_logits"]
        terms = cross_entropy_terms(logits, target, "L_ce") | {"L_ce_f": F.cross_entropy(fused, target)}
        name = f"L_{self.distance.name}"
        weight = self.distillation_weight
        terms[f"{name}_e"] = weight * self.distance(fused, logits.mean(0).detach(), target)
        # The KL in the other direction; each detached side is a fixed target.
        return add_total(terms | student_terms(weight * self.distance(logits, fused.detach(), target), f"{name}_f"))
