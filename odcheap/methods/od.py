"""Online distillation (OD): the students and a teacher, a classifier on all their features, learn from each other.

J. Xie, S. Lin, Y. Zhang, L. Luo, "Training convolutional neural networks with cheap convolutions and online
distillation", arXiv 1909.13063, 2019. Z_k is the last feature map of student k, S the number of students, T the
temperature, and CE the cross-entropy:

    teacher = linear(pool(ReLU(BN(concat(Z_1 .. Z_S)))))
    loss    = CE(teacher) + sum_k [ CE(student_k) + T^2 KL(softmax(teacher / T) || softmax(student_k / T)) ]

The teacher's logits are not detached, so the gradient of the KL also trains the teacher: learning is mutual. A feature
term (`FeatureDistillation`), which the paper does not have, compares each student's last feature map with the teacher's
map before its pooling. That map is detached in this term: otherwise all maps could agree by becoming constant.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odcheap.methods.base import FeatureDistillation, LabelSmoothing, Outputs, add_total
from odcheap.methods.losses import FeatureDistance, Temperature
from odcheap.methods.students import Students
from odcheap.utils.arguments import check_arguments


@check_arguments("method")
class OnlineDistillation(FeatureDistillation):
    """Trains students together with a teacher: a classifier on their concatenated feature maps (online distillation).

    Args:
        students: The S students.
        temperature: T, by which logits are divided before the softmax in the KL divergence.
        detach_teacher: False lets the gradient of the KL reach the teacher too, so that learning is mutual. With True
            only the students learn from the KL.
        normalise: Whether the teacher has batch norm and ReLU before its pooling and its linear layer.
        label_smoothing: The fraction of each label's probability that is divided among all classes, in [0, 1). It
            applies to the cross-entropy of the students and of the teacher.
        **options: `loss`, `loss_weights`, `kl_reduction`, `feature`, `feature_weight` and `average_decay`, the
            arguments of `FeatureDistillation`. The authors' 2019 code averages the KL as with kl_reduction="mean".

    Example:
        >>> from odcheap.layers.cheap_conv import DW
        >>> from odcheap.models.cifar import CifarResNet
        >>> students = Students(lambda: CifarResNet(8, DW(), num_classes=10), num_stu=2, seed=0)
        >>> method = OnlineDistillation(students, temperature=4.0)
        >>> outputs = method(torch.zeros(4, 3, 32, 32))
        >>> outputs["student_logits"].shape, outputs["teacher_logits"].shape
        (torch.Size([2, 4, 10]), torch.Size([4, 10]))
        >>> list(method.loss(outputs, torch.arange(4)))
        ['ce_teacher', 'ce_student_0', 'kl_student_0', 'ce_student_1', 'kl_student_1', 'loss']
    """

    teacher_kind = "head"
    joins_maps = True

    def __init__(
        self,
        students: Students,
        temperature: Temperature = 4.0,
        detach_teacher: bool = False,
        normalise: bool = True,
        label_smoothing: LabelSmoothing = 0.0,
        **options: Any,
    ):
        super().__init__(students, temperature, **options)
        self.detach_teacher, self.label_smoothing = detach_teacher, label_smoothing
        width = students.total_features
        self.norm = nn.BatchNorm2d(width) if normalise else None
        self.fc = nn.Linear(width, students.num_classes)
        self.features: FeatureDistance | None = None
        if self.feature is not None:
            channels = [[student.num_features] for student in students.backbones()]
            self.features = FeatureDistance(self.feature, channels, [width])

    def forward(self, images: Tensor) -> Outputs:
        features, student_logits = self.students(images)
        concat = torch.cat(features, dim=1)
        if self.norm is not None:
            concat = F.relu(self.norm(concat), inplace=True)
        outputs = {"student_logits": student_logits, "teacher_logits": self.fc(concat.mean((2, 3)))}
        if self.features is not None:
            outputs["feature_distances"] = self.features([[own] for own in features], [concat])
        return outputs | self.average_outputs(images)

    def loss(self, outputs: Outputs, target: Tensor) -> dict[str, Tensor]:
        """Returns the loss, given the dict that `forward` returned and the labels of the N images.

        Returns:
            A dict of scalars, in which k is the number of a student. Weights are already multiplied in.

            - `ce_teacher`: the cross-entropy of the teacher.
            - `ce_student_k`: the cross-entropy of student k.
            - `kl_student_k`: T^2 KL(teacher || student k). If the option `loss` is not "kl", its value stands in place
              of `kl`, such as `dkd_student_k`.
            - `attention_k` or `l2_k`: the distance of the feature maps; only if they are compared.
            - `loss`: the sum of all terms.
        """
        teacher = outputs["teacher_logits"]
        soft_target = teacher.detach() if self.detach_teacher else teacher
        terms = {"ce_teacher": F.cross_entropy(teacher, target, label_smoothing=self.label_smoothing)}
        for k, student in enumerate(outputs["student_logits"]):
            distance = self.distance(student, soft_target, target)
            terms[f"ce_student_{k}"] = F.cross_entropy(student, target, label_smoothing=self.label_smoothing)
            terms[f"{self.distance.name}_student_{k}"] = self.distance.factor * distance
        return add_total(terms | self.feature_terms(outputs))
