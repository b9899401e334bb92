"""LMCL: the students exchange contrastive distributions of their features at the ends of all stages.

C. Yang, Z. An, H. Zhou, F. Zhuang, Y. Xu, Q. Zhang, "Online knowledge distillation via mutual contrastive learning for
visual recognition", TPAMI 2023. The last feature map of each stage is averaged over its pixels, and a projection head
(linear, ReLU, linear) makes a vector of length 1 from it. v_k[i] is that of student k for image i, at one stage. The
contrastive distribution of student a for image i, with the vectors of student b, is over all other images j of the
batch:

    p_ab[i] = softmax over j != i of (v_a[i] . v_b[j] / tau)

CE_k is the cross-entropy of student k, q_k its softmax at the temperature T, and S the number of students. NLL(p) is
the mean of -log p[i][j] over the images i, and over the images j != i with the label of i. p^T is p softened by T too,
softmax(... / (tau T)). The terms of student k are summed over the stages; l != k are the other students:

    VCL_k      = NLL(p_kk)                                         vanilla contrastive learning
    ICL_k      = 1 / (S - 1) sum_l NLL(p_kl)                       interactive contrastive learning
    soft VCL_k = 1 / (S - 1) sum_l T^2 KL(p^T_ll || p^T_kk)
    soft ICL_k = 1 / (S - 1) sum_l T^2 KL(p^T_lk || p^T_kl)
    loss       = sum_k [ CE_k + 1 / (S - 1) sum_l T^2 KL(q_l || q_k)
                         + 0.1 VCL_k + 0.1 ICL_k + soft VCL_k + soft ICL_k ]

tau = 0.1, T = 3, and the vectors have 128 numbers. The first argument of each KL is detached. The gradient of ICL and
soft ICL reaches both students, as in the authors' code. All students see the same augmented images.

What differs from the paper: A stage is compared with the same stage of the other students, with equal weights; the
paper compares each stage with each other one, with weights that a second network learns by meta-optimization. A head
takes the features of a stage as they are; the paper refines them by further blocks, which have classifiers of their own
and whose combined predictions the students imitate. Here the students imitate each other's predictions, as in `dml`.
The paper's sums over the other students are means here, which is the same for two students. An image is not compared
with itself in the soft terms either; in the authors' code it is. Batches are drawn at random; the authors draw two
images of each class. An image whose label no other one has, in the batch of its process, does not count in VCL and ICL.
"""

from collections.abc import Callable
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from odcheap.methods.base import (
    LogitDistillation,
    Outputs,
    add_total,
    cross_entropy_terms,
    mean_of_others,
    student_terms,
)
from odcheap.methods.losses import Temperature, soft_kl, to_single_precision
from odcheap.methods.students import Students
from odcheap.models.backbone import StageRecorder
from odcheap.utils.arguments import check_arguments
from odcheap.utils.errors import OptionError

Weight = Annotated[float, Field(ge=0)]
ContrastTemperature = Annotated[float, Field(ge=1e-3, le=1e3)]


class Projection(nn.Module):
    """A projection head: averages feature maps over their pixels, and maps the means to vectors of norm 1.

    It computes in float32 or float64, also if its weights have 16 bits.

    Args:
        channels: The number of channels of the feature maps, C.
        size: The number of elements of each vector.

    Shape:
        (N, C, h, w) -> (N, size).
    """

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.hidden, self.output = nn.Linear(channels, size), nn.Linear(size, size)

    def forward(self, features: Tensor) -> Tensor:
        x = to_single_precision(features).mean((2, 3))
        x = F.relu(F.linear(x, self.hidden.weight.to(x.dtype), self.hidden.bias.to(x.dtype)))
        return F.normalize(F.linear(x, self.output.weight.to(x.dtype), self.output.bias.to(x.dtype)))


@check_arguments("method")
class LayerwiseMutualContrastiveLearning(LogitDistillation):
    """Trains students that imitate each other's predictions and contrastive distributions (LMCL).

    A contrastive distribution says how similar the features of an image are to those of each other image of the batch.
    It is a softmax of inner products of vectors, which projection heads compute from the last feature map of a stage.
    One student gives the vector of the image; the same student or another one gives those of the other images.

    Args:
        students: Two or more students. Their last stages are compared with each other, then those before them, and so
            on; the student with the fewest stages determines how many are compared.
        temperature: T, by which logits and contrastive logits are divided before the softmax in each KL.
        contrast_temperature: tau, by which the inner products of the vectors are divided.
        embedding_size: The number of elements of the vectors.
        vcl_weight: The factor of vanilla contrastive learning (VCL): in each student, images with the same label should
            have similar vectors.
        icl_weight: The factor of interactive contrastive learning (ICL), the same between two students.
        soft_vcl_weight: The factor of soft VCL: by a KL, the distributions of a student's own vectors imitate those of
            another student's own vectors.
        soft_icl_weight: The factor of soft ICL: by a KL, the distributions of the vectors of student k over those of
            student l imitate the distributions of the vectors of student l over those of student k.
        **options: `loss`, `loss_weights` and `average_decay`, the arguments of `LogitDistillation`. The loss compares
            the students' predictions; contrastive distributions are always compared by the KL.

    Raises:
        OptionError: The four factors are all 0, or a student has no feature maps at the ends of stages.
    """

    min_students = 2

    def __init__(
        self,
        students: Students,
        temperature: Temperature = 3.0,
        contrast_temperature: ContrastTemperature = 0.1,
        embedding_size: Annotated[int, Field(ge=1, le=2**14)] = 128,
        vcl_weight: Weight = 0.1,
        icl_weight: Weight = 0.1,
        soft_vcl_weight: Weight = 1.0,
        soft_icl_weight: Weight = 1.0,
        **options: Any,
    ):
        super().__init__(students, temperature, **options)
        self.contrast_temperature = contrast_temperature
        self.weights = {"vcl": vcl_weight, "icl": icl_weight, "soft_vcl": soft_vcl_weight, "soft_icl": soft_icl_weight}
        if not any(self.weights.values()):
            allowed = "leaves no contrastive term, since the other three weights are 0 too; method=dml has none"
            raise OptionError("method.soft_icl_weight", soft_icl_weight, allowed)
        self.stages = StageRecorder(students.members, "method", "lmcl")
        # A head for each stage of each student.
        self.heads = nn.ModuleList(
            nn.ModuleList(Projection(channels, embedding_size) for channels in own) for own in self.stages.channels
        )

    def check_soft_labels(self) -> None:
        super().check_soft_labels()
        for name in ("vcl", "icl"):
            if self.weights[name]:
                allowed = "needs one label for each image, which augment.mixup and augment.cutmix do not give"
                raise OptionError(f"method.{name}_weight", self.weights[name], f"{allowed}; 0 leaves this term out")

    def forward(self, images: Tensor) -> Outputs:
        if not self.training:
            return super().forward(images)
        with self.stages.record() as maps:
            outputs = super().forward(images)
        with torch.autocast(images.device.type, enabled=False):
            embeddings = [
                torch.stack([head(own) for head, own in zip(cast(nn.ModuleList, heads), student, strict=True)])
                for heads, student in zip(self.heads, maps, strict=True)
            ]
        return outputs | {"embeddings": torch.stack(embeddings)}

    def loss(self, outputs: Outputs, target: Tensor) -> dict[str, Tensor]:
        """Returns the loss, given the dict that `forward` returned and the labels of the N images.

        Returns:
            A dict of scalars for each student k. Terms with l are averaged over the other students l. p_kl are the
            contrastive distributions of the vectors of student k over those of student l. The last four terms are
            already multiplied by their weights. They are left out if their weight is 0, and in eval mode.

            - `L_ce_k`: the cross-entropy of student k.
            - `L_kl_k`: T^2 KL(predictions of l || predictions of k). If the option `loss` is not "kl", its value stands
              in place of `kl`, such as `L_dkd_k`.
            - `L_vcl_k`: vanilla contrastive learning, the mean of -log p_kk of images with the same label.
            - `L_icl_k`: interactive contrastive learning, the mean of -log p_kl of images with the same label.
            - `L_soft_vcl_k`: T^2 KL(p_ll || p_kk).
            - `L_soft_icl_k`: T^2 KL(p_lk || p_kl).
            - `loss`: the sum of all terms.
        """
        logits = outputs["student_logits"]
        terms = cross_entropy_terms(logits, target, "L_ce")
        peers = mean_of_others(self.distance(logits[None], logits.detach()[:, None], target))
        terms |= student_terms(self.distance.factor * peers, f"L_{self.distance.name}")
        if "embeddings" in outputs:
            if target.ndim != 1:
                self.check_soft_labels()
            contrast = compare_vectors(outputs["embeddings"]) / self.contrast_temperature
            for name, values in self.contrastive_losses(contrast, target).items():
                terms |= student_terms(values, f"L_{name}")
        return add_total(terms)

    def contrastive_losses(self, contrast: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Returns a dict of the contrastive terms; each is a tensor (S,) and already multiplied by its weight.

        The keys are `vcl` (vanilla contrastive learning), `icl` (interactive contrastive learning), `soft_vcl` and
        `soft_icl`. A term whose weight is 0 is left out.

        Args:
            contrast: The logits of the contrastive distributions, (S, S, M, N, N - 1): the result of `compare_vectors`
                divided by tau.
            target: Labels (N,).
        """
        own = contrast.diagonal(dim1=0, dim2=1).movedim(-1, 0)  # (S, M, N, N - 1): those of a student with itself
        fixed, fixed_own = contrast.detach().transpose(0, 1), own.detach()[:, None]
        # The values of each two students, row by column. In `contrast` row a has the anchors of student a, so that the
        # means of `icl` and `soft_icl` are over the rows, and those of the others over the columns.
        losses: dict[str, Callable[[], Tensor]] = {
            "vcl": lambda: contrastive_loss(own, target).sum(-1),
            "icl": lambda: mean_of_others(contrastive_loss(contrast, target).sum(-1).T),
            "soft_vcl": lambda: mean_of_others(self.compare_distributions(own[None], fixed_own)),
            "soft_icl": lambda: mean_of_others(self.compare_distributions(contrast, fixed).T),
        }
        return {name: weight * losses[name]() for name, weight in self.weights.items() if weight}

    def compare_distributions(self, contrast: Tensor, imitated: Tensor) -> Tensor:
        """Returns T^2 KL(imitated || contrast) of contrastive distributions, (S, S), summed over the M stages.

        Args:
            contrast: The logits of the distributions that learn, (S, S, M, N, N - 1); the first S may be 1.
            imitated: The logits of the distributions that are imitated, of the same shape; the second S may be 1.
        """
        return self.temperature**2 * soft_kl(contrast, imitated, self.temperature).sum(-1)


def compare_vectors(embeddings: Tensor) -> Tensor:
    """Returns the inner products of the vectors of each two students, for each two different images.

    Args:
        embeddings: (S, M, N, D): a vector of D elements for each of S students, M stages and N images.

    Returns:
        (S, S, M, N, N - 1). The entry [a, b, m, i] is for stage m and image i: it has the products of the vector of
        student a for image i with the vectors of student b for all other images, in the order of the batch.
    """
    products = torch.einsum("amid,bmjd->abmij", embeddings, embeddings)
    return products.gather(-1, list_others(len(products[0, 0, 0]), products.device).expand(*products.shape[:-1], -1))


def list_others(count: int, device: torch.device) -> Tensor:
    """Returns, for each of N images, the indices of the other images, (N, N - 1).

    Args:
        count: N.
        device: The device of the result.

    Example:
        >>> list_others(3, torch.device("cpu"))
        tensor([[1, 2],
                [0, 2],
                [0, 1]])
    """
    images, others = torch.arange(count, device=device)[:, None], torch.arange(count - 1, device=device)
    return others + (others >= images)


def contrastive_loss(contrast: Tensor, target: Tensor) -> Tensor:
    """Returns the supervised contrastive loss: the mean of -log p over the pairs of images with the same label.

    p is the softmax of `contrast`. The partners of an image are the other images with its label. -log p is averaged
    over the partners of each image, then over all images that have a partner. The loss is 0 if no image has a partner.

    Args:
        contrast: The logits of contrastive distributions, (..., N, N - 1): for each image a logit for each other image.
        target: Labels (N,).

    Returns:
        One value for each element of the dimensions before N.
    """
    same = target[:, None] == target[list_others(len(target), target.device)]
    partners = same.sum(-1)
    found = (contrast.log_softmax(-1) * same).sum(-1) / partners.clamp(min=1)
    return -found.sum(-1) / (partners > 0).sum().clamp(min=1)
