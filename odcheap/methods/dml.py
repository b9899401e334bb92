"""Deep mutual learning (DML): each student imitates all other students.

Y. Zhang, T. Xiang, T. M. Hospedales, H. Lu, "Deep mutual learning", CVPR 2018. S is the number of students, p_k the
softmax of student k's logits and L_C_k its cross-entropy:

    loss_k = L_C_k + 1 / (S - 1) sum_{l != k} KL(p_l || p_k)

In the KL p_l is detached, so the gradient of loss_k reaches student k only. The temperature is 1, and there is no
ramp-up. All students see the same augmented images and share nothing else.

The paper updates the students one after the other, and computes the predictions of updated students anew. Here, as in
most later work, all students are updated at the same time, so that a batch costs S forward passes. The paper's second
form, in which each student imitates the mean of the other students, is not implemented. A feature term
(`FeatureDistillation`), which the paper does not have, compares a student's maps at the ends of its stages with the
mean of the other students' maps, which is detached.
"""

from typing import Any

from torch import Tensor

from odcheap.methods.base import (
    FeatureDistillation,
    Outputs,
    add_total,
    cross_entropy_terms,
    mean_of_others,
    student_terms,
)
from odcheap.methods.losses import FeatureDistance, Temperature
from odcheap.methods.students import Students
from odcheap.models.backbone import StageRecorder
from odcheap.utils.arguments import check_arguments
from odcheap.utils.errors import OptionError


@check_arguments("method")
class DeepMutualLearning(FeatureDistillation):
    """Trains students that learn from the labels and from each other's predictions (deep mutual learning, DML).

    Args:
        students: Two or more students.
        temperature: T, by which logits are divided before the softmax in the KL divergence.
        **options: `loss`, `loss_weights`, `feature`, `feature_weight` and `average_decay`, the arguments of
            `FeatureDistillation`.
    """

    min_students = 2

    def __init__(self, students: Students, temperature: Temperature = 1.0, **options: Any):
        super().__init__(students, temperature, **options)
        self.features: FeatureDistance | None = None
        if self.feature is not None:
            self.stages = StageRecorder(students.members, "method.feature", self.feature)
            channels = self.stages.channels
            if self.feature == "l2" and any(own != channels[0] for own in channels):
                allowed = "needs students with equal numbers of channels; attention does not"
                raise OptionError("method.feature", self.feature, allowed)
            self.features = FeatureDistance(self.feature, channels, channels[0])

    def forward(self, images: Tensor) -> Outputs:
        if self.features is None:
            return super().forward(images)
        with self.stages.record() as maps:
            outputs = super().forward(images)
        return outputs | {"feature_distances": self.features.compare_mutually(maps)}

    def loss(self, outputs: Outputs, target: Tensor) -> dict[str, Tensor]:
        """Returns the loss, given the dict that `forward` returned and the labels of the N images.

        Returns:
            A dict of scalars, in which k is the number of a student. Weights are already multiplied in.

            - `L_C_k`: the cross-entropy of student k.
            - `D_KL_k`: T^2 times KL(another student || student k), averaged over the other students. If the option
              `loss` is not "kl", the key contains its value, such as `D_DKD_k`.
            - `attention_k` or `l2_k`: the distance of the feature maps; only if they are compared.
            - `loss`: the sum of all terms.
        """
        logits = outputs["student_logits"]
        # (S, S): row l has the distances of student l's predictions, the detached targets, from each student.
        pairs = self.distance(logits[None], logits.detach()[:, None], target)
        peers = self.distance.factor * mean_of_others(pairs)
        name = f"D_{self.distance.name.upper()}"
        terms = cross_entropy_terms(logits, target, "L_C") | student_terms(peers, name)
        return add_total(terms | self.feature_terms(outputs))
