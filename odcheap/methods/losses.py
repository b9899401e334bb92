"""Distillation losses: those of a student's and a teacher's logits, and those of their feature maps.

`DistillationLoss` chooses one of the functions of logits. `FeatureDistance` compares feature maps.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from odcheap.utils.arguments import check_arguments
from odcheap.utils.errors import OptionError

# In this range neither logits / T nor T^2 times a loss overflow in float32.
Temperature = Annotated[float, Field(ge=1e-6, le=1e6)]
KlReduction = Literal["batchmean", "mean"]
LossName = Literal["kl", "dkd", "dist", "standardized"]
FeatureName = Literal["attention", "l2"]
LossWeights = Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=2, max_length=2)]
DEFAULT_WEIGHTS = {"dkd": (1.0, 8.0), "dist": (1.0, 1.0)}  # of the two parts of a loss


@check_arguments("method")
def soft_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: Temperature,
    reduction: KlReduction = "batchmean",
) -> Tensor:
    """Returns KL(softmax(teacher / T) || softmax(student / T)), without the factor T^2.

    Source: Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015, section 2. Gradients flow to
    both tensors; detach the teacher's logits if they should not learn from this loss.

    Args:
        student_logits: (..., N, K) for N images and K classes.
        teacher_logits: (..., N, K); the dimensions before N are broadcast against those of `student_logits`.
        temperature: T, from 1e-6 to 1e6.
        reduction: "batchmean" sums over the classes and averages over the images. "mean" averages over all N x K
            elements, and gives a value that is smaller by the factor K. The 2019 code of online distillation does this.

    Returns:
        One value for each element of the broadcast dimensions before N; a scalar if there are none.

    Raises:
        OptionError: The temperature is out of range, or the reduction is unknown.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> round(soft_kl(student, teacher, temperature=1.0).item(), 4)
        1.5232
        >>> round(soft_kl(student, teacher, temperature=1.0, reduction="mean").item(), 4)
        0.7616
    """
    student = (student_logits / temperature).log_softmax(-1)
    teacher = (teacher_logits / temperature).log_softmax(-1)
    elements = teacher.exp() * (teacher - student)
    return elements.sum(-1).mean(-1) if reduction == "batchmean" else elements.mean((-2, -1))


def decoupled_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    temperature: float,
    weights: tuple[float, float] = DEFAULT_WEIGHTS["dkd"],
) -> Tensor:
    """Returns the loss of decoupled knowledge distillation (DKD), without the factor T^2.

    It is alpha TCKD + beta NCKD, two KLs from the teacher to the student. TCKD compares the probabilities (p_c,
    1 - p_c), in which c is the label. NCKD compares the softmax over the other classes. The usual KL is TCKD +
    (1 - p_c) NCKD with the teacher's p_c. Source: Zhao et al., "Decoupled knowledge distillation", CVPR 2022,
    equation 7.

    Args:
        student_logits: (..., N, K) for N images and K classes.
        teacher_logits: (..., N, K); the dimensions before N are broadcast against those of `student_logits`.
        target: Labels (N,), integers from 0 to K - 1.
        temperature: T, by which logits are divided before the softmax.
        weights: alpha and beta. The paper uses alpha = 1, and beta from 1 to 10; beta is 8 for most pairs of networks
            on CIFAR-100.

    Returns:
        One value for each element of the broadcast dimensions before N; a scalar if there are none.
    """
    # Logarithms of (p_c, 1 - p_c), and of the softmax over the other classes. No difference 1 - p_c is computed, which
    # would be 0 in float32 for a teacher that is nearly certain.
    classes = torch.arange(student_logits.shape[-1] - 1, device=target.device)
    others = classes + (classes >= target[:, None])  # (N, K - 1), all classes but the label
    binary, rest = [], []
    for logits in (student_logits / temperature, teacher_logits / temperature):
        label = logits.gather(-1, target[:, None].expand(*logits.shape[:-1], 1))
        other = logits.gather(-1, others.expand(*logits.shape[:-1], -1))
        pair = torch.cat([label, other.logsumexp(-1, keepdim=True)], dim=-1)
        binary.append(pair.log_softmax(-1))
        rest.append(other.log_softmax(-1))
    (tckd, nckd) = ((t.exp() * (t - s)).sum(-1).mean(-1) for s, t in (binary, rest))
    return weights[0] * tckd + weights[1] * nckd


def correlation_distance(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    weights: tuple[float, float] = DEFAULT_WEIGHTS["dist"],
) -> Tensor:
    """Returns the loss of DIST: one minus Pearson's correlation of the student's and the teacher's predictions.

    Predictions are softened: logits are divided by T. The loss has two parts: beta times the mean over the images of
    1 - corr(the K probabilities of the image), plus gamma times the mean over the classes of 1 - corr(the N
    probabilities of the class). With several processes, N is the number of images of one process. Source: Huang et al.,
    "Knowledge distillation from a stronger teacher", NeurIPS 2022, equations 9 to 11.

    Args:
        student_logits: (..., N, K) for N images and K classes.
        teacher_logits: (..., N, K); the dimensions before N are broadcast against those of `student_logits`.
        temperature: T, by which logits are divided before the softmax.
        weights: beta and gamma. The authors' code multiplies them by T^2, and this function does not, as in the
            paper's equations. The authors' weights 2 and 2 for CIFAR-100 with T = 4 are therefore 32 and 32 here.

    Returns:
        One value for each element of the broadcast dimensions before N; a scalar if there are none.
    """
    student, teacher = ((logits / temperature).softmax(-1) for logits in (student_logits, teacher_logits))
    inter, intra = (1 - correlate(student, teacher, dim).mean(-1) for dim in (-1, -2))
    return weights[0] * inter + weights[1] * intra


def correlate(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Returns Pearson's correlation coefficient of two tensors along a dimension; 0 if a tensor is constant along it.

    Args:
        a: A tensor.
        b: A tensor whose shape can be broadcast against that of `a`.
        dim: The dimension, which the result does not have.
    """
    # `normalize` divides by 1e-8 at least, so that neither the value nor the gradient is ever infinite.
    a, b = (F.normalize(x - x.mean(dim, keepdim=True), dim=dim, eps=1e-8) for x in (a, b))
    return (a * b).sum(dim)


def standardize(logits: Tensor) -> Tensor:
    """Returns the Z-scores of logits (..., K): their mean over the classes is 0, and their standard deviation is 1.

    The deviation is computed with K as the divisor. 1e-7 is added to it, as in the authors' code. Source: Sun et al.,
    "Logit standardization in knowledge distillation", CVPR 2024, algorithm 1.
    """
    deviation = logits.std(-1, correction=0, keepdim=True)
    return (logits - logits.mean(-1, keepdim=True)) / (deviation + 1e-7)


class DistillationLoss:
    """A function of a student's and a teacher's logits, chosen by name, that compares their softened predictions.

    Args:
        name: "kl" for `soft_kl`, "dkd" for `decoupled_kl`, "dist" for `correlation_distance`, "standardized" for
            `soft_kl` of the Z-scores of the logits.
        temperature: T, by which logits are divided before the softmax.
        weights: The weights of the two parts of "dkd" (alpha, beta) or "dist" (beta, gamma). None takes (1, 8) for
            "dkd", (1, 1) for "dist".
        kl_reduction: How "kl" is averaged: "batchmean" over the images, "mean" over images and classes.

    Attributes:
        factor: The number by which the caller should multiply the result. It is T^2, since the gradient of a KL shrinks
            as 1 / T^2. It is 1 for "dist", whose gradient does not shrink in this way.

    Raises:
        OptionError: `weights` is given for another loss than "dkd" and "dist", or `kl_reduction` is "mean" for another
            loss than "kl".
    """

    def __init__(
        self,
        name: LossName,
        temperature: float,
        weights: LossWeights | None = None,
        kl_reduction: KlReduction = "batchmean",
    ):
        if weights is not None and name not in DEFAULT_WEIGHTS:
            allowed = f"must be null with method.loss={name}, which has one part; dkd and dist have two"
            raise OptionError("method.loss_weights", list(weights), allowed)
        if kl_reduction != "batchmean" and name != "kl":
            allowed = f"must be batchmean with method.loss={name}; mean belongs to method.loss=kl"
            raise OptionError("method.kl_reduction", kl_reduction, allowed)
        self.name, self.temperature, self.kl_reduction = name, temperature, kl_reduction
        alpha, beta = weights or DEFAULT_WEIGHTS.get(name, (1.0, 1.0))
        self.weights = alpha, beta
        self.factor = 1.0 if name == "dist" else temperature**2

    def check_soft_labels(self) -> None:
        """Raises `OptionError` if the loss needs one label for each image; only "dkd" does."""
        if self.name == "dkd":
            allowed = "needs one label for each image, and mixed images have two; kl, dist and standardized do not"
            raise OptionError("method.loss", "dkd", allowed)

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        """Returns the loss, not multiplied by `factor`; gradients flow to both tensors of logits.

        Args:
            student_logits: (..., N, K) for N images and K classes.
            teacher_logits: (..., N, K); the dimensions before N are broadcast against those of `student_logits`.
            target: Labels (N,), which only "dkd" uses. Other losses accept probabilities (N, K) too.

        Returns:
            One value for each element of the broadcast dimensions before N; a scalar if there are none.

        Raises:
            OptionError: The loss is "dkd", and `target` has probabilities.
        """
        if target.ndim != 1:
            self.check_soft_labels()
        if self.name == "dkd":
            return decoupled_kl(student_logits, teacher_logits, target, self.temperature, self.weights)
        if self.name == "dist":
            return correlation_distance(student_logits, teacher_logits, self.temperature, self.weights)
        if self.name == "standardized":
            student_logits, teacher_logits = standardize(student_logits), standardize(teacher_logits)
        return soft_kl(student_logits, teacher_logits, self.temperature, self.kl_reduction)


def attention_map(features: Tensor) -> Tensor:
    """Returns the spatial attention of feature maps: the mean of their squares over the channels, scaled to norm 1.

    Source: Zagoruyko, Komodakis, "Paying more attention to attention", ICLR 2017, section 3.1, with p = 2.

    Args:
        features: (N, C, h, w).

    Returns:
        (N, h * w); each row has the L2 norm 1.

    Example:
        >>> attention_map(torch.tensor([[[[3.0, 0.0]], [[0.0, 2.0]]]]))  # two channels of 1 x 2 pixels
        tensor([[0.9138, 0.4061]])
    """
    return F.normalize(features.square().mean(1).flatten(1))


class FeatureDistance(nn.Module):
    """The distance of the feature maps of S students from M target maps, which the students should imitate.

    Each student has M feature maps; map m is compared with target map m, and the M distances are added. If two maps
    have different sizes, the larger one is average-pooled first. Gradients do not reach the target maps.

    With "attention", the distance of two maps is P times the mean squared difference of their attention maps, which
    `attention_map` computes. P is the number of pixels of the largest map that is compared. With this factor, the
    distance does not depend on the size of the images; the authors of attention transfer have 1000 in its place.

    With "l2", the distance is the mean squared difference of the maps themselves (Romero et al., "FitNets", ICLR 2015,
    equation 3, with a mean in place of the sum). If a student's map has another number of channels than the target map,
    a 1 x 1 convolution, which is trained too, changes it.

    Args:
        feature: "attention" or "l2".
        channels: A list for each student, with the number of channels of each of its M maps.
        target_channels: The number of channels of each of the M target maps.
    """

    def __init__(self, feature: FeatureName, channels: Sequence[Sequence[int]], target_channels: Sequence[int]):
        super().__init__()
        self.feature = feature
        self.adapters = nn.ModuleList(
            nn.ModuleList(
                nn.Conv2d(own, wanted, 1) if feature == "l2" and own != wanted else nn.Identity()
                for own, wanted in zip(student, target_channels, strict=True)
            )
            for student in channels
        )

    def forward(self, maps: Sequence[Sequence[Tensor]], targets: Sequence[Tensor]) -> Tensor:
        """Returns the distance of each student's feature maps from the target maps, (S,), in float32 or float64.

        Args:
            maps: A list for each of the S students, with its M maps (N, C, h, w).
            targets: The M target maps (N, C', h', w'), the same for all students; they are detached.
        """
        distances = []
        with torch.autocast(targets[0].device.type, enabled=False):
            for student, adapters in zip(maps, self.adapters, strict=True):
                parts, pixels = [], []
                for own, target, adapter in zip(student, targets, cast(nn.ModuleList, adapters), strict=True):
                    own, target = pool_to_smallest([own, target.detach()])
                    if isinstance(adapter, nn.Conv2d):  # in the dtype of the maps, whatever that of its weights
                        weight, bias = (parameter.to(own.dtype) for parameter in adapter.parameters())
                        own = F.conv2d(own, weight, bias)
                    parts.append(F.mse_loss(self.represent(own), self.represent(target)))
                    pixels.append(own[0, 0].numel())
                distances.append(self.scale(pixels) * torch.stack(parts).sum())
        return torch.stack(distances)

    def compare_mutually(self, maps: Sequence[Sequence[Tensor]]) -> Tensor:
        """Returns the distance of each student's maps from the mean of all other students' maps, (S,).

        With "attention", attention maps are averaged and compared; with "l2", the maps themselves. The mean is
        detached.

        Args:
            maps: A list for each of S >= 2 students, with its M maps (N, C, h, w).
        """
        distances, pixels = [], []
        with torch.autocast(maps[0][0].device.type, enabled=False):
            for stage in zip(*maps, strict=True):
                pooled = pool_to_smallest(stage)
                own = torch.stack([self.represent(features) for features in pooled])
                others = (own.sum(0) - own).detach() / (len(stage) - 1)
                distances.append((own - others).square().flatten(1).mean(1))
                pixels.append(pooled[0][0, 0].numel())
            return self.scale(pixels) * torch.stack(distances).sum(0)

    def scale(self, pixels: Sequence[int]) -> int:
        """Returns the factor of the distances: the number of pixels of the largest map with "attention", 1 with "l2".

        Args:
            pixels: The number of pixels of each map that is compared.
        """
        return max(pixels) if self.feature == "attention" else 1

    def represent(self, features: Tensor) -> Tensor:
        """Returns what is compared: attention maps (N, h * w), or with "l2" the given feature maps (N, C, h, w)."""
        return attention_map(features) if self.feature == "attention" else features


def to_single_precision(features: Tensor) -> Tensor:
    """Converts a tensor in bfloat16 or float16 to float32; returns any other tensor without a change."""
    return features.float() if features.dtype in (torch.bfloat16, torch.float16) else features


def pool_to_smallest(maps: Sequence[Tensor]) -> list[Tensor]:
    """Returns feature maps in float32 or float64, average-pooled to the height and width of the smallest map.

    Args:
        maps: Feature maps (N, C, h, w); C, h and w may differ between them.
    """
    height, width = min((features.shape[-2:] for features in maps), key=lambda size: size[0] * size[1])
    return [
        features if features.shape[-2:] == (height, width) else F.adaptive_avg_pool2d(features, (height, width))
        for features in map(to_single_precision, maps)
    ]
