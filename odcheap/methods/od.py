"""The paper's method: students and an online teacher on their concatenated features learn from each other.

J. Xie, S. Lin, Y. Zhang, L. Luo, "Training convolutional neural networks with cheap convolutions and online
distillation", arXiv 1909.13063, 2019. With Z_k student k's last feature map and T the temperature,

    teacher = linear(pool(ReLU(BN(concat(Z_1 .. Z_S)))))
    loss    = CE(teacher) + sum_k [ CE(student_k) + T^2 KL(softmax(teacher / T) || softmax(student_k / T)) ]

The teacher's logits are not detached, so the KL also teaches the teacher: that is the whole of the mutual learning.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odcheap.methods.base import Method, check_smoothing, summed
from odcheap.methods.ema import Averages
from odcheap.methods.losses import check_distillation, soft_kl
from odcheap.methods.students import Students


class OnlineDistillation(Method):
    """Students with a teacher head on their concatenated features.

    `kl_reduction`: "batchmean" (the textbook's) or "mean" (the 2019 code's; smaller by the number of classes).
    `detach_teacher`: the KL's gradient reaches the students only. `normalise=False` leaves out the teacher's BN and
    ReLU. `label_smoothing` is for the labels of all. `average_decay`: averages of the students' weights over the steps
    are candidates too, for S more forward passes a step (None: there are none). Raises `OptionError`.
    """

    teacher_kind = "head"

    def __init__(
        self,
        students: Students,
        temperature: float = 4.0,
        kl_reduction: str = "batchmean",
        detach_teacher: bool = False,
        normalise: bool = True,
        label_smoothing: float = 0.0,
        average_decay: float | None = None,
    ):
        super().__init__(students)
        check_distillation(temperature, kl_reduction)
        check_smoothing(label_smoothing)
        self.temperature, self.kl_reduction, self.detach_teacher = temperature, kl_reduction, detach_teacher
        self.label_smoothing = label_smoothing
        self.averages = None if average_decay is None else Averages(students, average_decay)
        width = len(students) * students.num_features
        self.norm = nn.BatchNorm2d(width) if normalise else None
        self.fc = nn.Linear(width, students.num_classes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features, student_logits = self.students(images)
        together = torch.cat(features, dim=1)
        if self.norm is not None:
            together = F.relu(self.norm(together), inplace=True)
        outputs = {"student_logits": student_logits, "teacher_logits": self.fc(together.mean((2, 3)))}
        return outputs | self.averaged(images)

    def loss(self, outputs: dict[str, Tensor], target: Tensor) -> dict[str, Tensor]:
        """Terms `ce_teacher`, `ce_student_k`, `kl_student_k` (with its T^2) and their sum, `loss`."""
        teacher = outputs["teacher_logits"]
        example = teacher.detach() if self.detach_teacher else teacher
        terms = {"ce_teacher": F.cross_entropy(teacher, target, label_smoothing=self.label_smoothing)}
        for k, student in enumerate(outputs["student_logits"]):
            kl = soft_kl(student, example, self.temperature, self.kl_reduction)
            terms[f"ce_student_{k}"] = F.cross_entropy(student, target, label_smoothing=self.label_smoothing)
            terms[f"kl_student_{k}"] = self.temperature**2 * kl
        return summed(terms)
