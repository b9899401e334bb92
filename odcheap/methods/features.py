"""Loss terms that compare feature maps, and the base class of the methods that have them."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from odcheap.methods.base import LogitDistillation, Outputs, student_terms
from odcheap.methods.losses import Temperature
from odcheap.methods.students import Students
from odcheap.models.stages import StageRecorder
from odcheap.utils.arguments import check_arguments
from odcheap.utils.errors import OptionError

FeatureName = Literal["attention", "l2"]
FeatureWeight = Annotated[float, Field(gt=0)]


def attention_map(features: Tensor) -> Tensor:
    """Returns the spatial attention of feature maps: the mean of their squares over the channels, with norm 1.

    Source: Zagoruyko, Komodakis, "Paying more attention to attention", ICLR 2017, section 3.1, with p = 2. The authors'
    code takes the mean in place of the sum, which the normalization makes equal.

    Args:
        features: (N, C, h, w).

    Returns:
        (N, h * w).

    Example:
        >>> attention_map(torch.tensor([[[[3.0, 0.0]], [[0.0, 2.0]]]]))  # two channels of 1 x 2 pixels
        tensor([[0.9138, 0.4061]])
    """
    return F.normalize(features.square().mean(1).flatten(1))


class FeatureDistance(nn.Module):
    """The distance of students' feature maps from maps that they should imitate, summed over pairs of maps.

    With "attention" the distance of two maps is P times the mean, over images and pixels, of the squared difference of
    their attention maps. P is the number of pixels of the largest map that is compared. The paper's authors have 1000
    in place of P, for images of 32 x 32 pixels, for which P is 1024; with P the distance does not depend on the size of
    the images.

    With "l2" it is the mean of the squared difference of the maps themselves (Romero et al., "FitNets", ICLR 2015,
    equation 3, with a mean in place of the sum). If their numbers of channels differ, a 1 x 1 convolution of the
    student's map, which is trained too, changes its number.

    Of two maps of different sizes the larger one is average-pooled first. Gradients reach the students and the 1 x 1
    convolutions only.

    Args:
        feature: "attention" or "l2".
        channels: For each student the number of channels of each of its M maps.
        target_channels: The number of channels of each of the M maps that the students should imitate.
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
        """Returns the distance of each student's feature maps from those that it should imitate, (S,).

        It is computed in float32 or float64.

        Args:
            maps: For each student its M maps (N, C, h, w).
            targets: The M maps (N, C', h', w') that all students should imitate; they are detached.
        """
        with torch.autocast(targets[0].device.type, enabled=False):
            targets = [to_single_precision(target.detach()) for target in targets]
            distances = []
            for student, adapters in zip(maps, self.adapters, strict=True):
                assert isinstance(adapters, nn.ModuleList)
                parts, pixels = [], []
                for own, target, adapter in zip(student, targets, adapters, strict=True):
                    own, target = pool_larger(to_single_precision(own), target)
                    parts.append(F.mse_loss(self.represent(adapt(own, adapter)), self.represent(target)))
                    pixels.append(own.shape[-2] * own.shape[-1])
                distances.append(self.scale(pixels) * torch.stack(parts).sum())
            return torch.stack(distances)

    def compare_mutually(self, maps: Sequence[Sequence[Tensor]]) -> Tensor:
        """Returns for each student the distance (S,) of its maps from the mean of all other students' maps.

        The mean is that of the attention maps, or with "l2" that of the maps themselves; it is detached.

        Args:
            maps: For each of S >= 2 students its M maps (N, C, h, w).
        """
        distances, pixels = [], []
        with torch.autocast(maps[0][0].device.type, enabled=False):
            for stage in zip(*maps, strict=True):
                size = min((own.shape[-2:] for own in stage), key=lambda size: size[0] * size[1])
                own = torch.stack([self.represent(pool(to_single_precision(m), size)) for m in stage])
                others = (own.sum(0) - own).detach() / (len(stage) - 1)
                distances.append((own - others).square().flatten(1).mean(1))
                pixels.append(size[0] * size[1])
            return self.scale(pixels) * torch.stack(distances).sum(0)

    def scale(self, pixels: Sequence[int]) -> int:
        """Returns the factor of the distances: with "attention" the number of pixels of the largest map, otherwise 1.

        Args:
            pixels: The number of pixels of each map that is compared.
        """
        return max(pixels) if self.feature == "attention" else 1

    def represent(self, features: Tensor) -> Tensor:
        """Returns what is compared: attention maps (N, h * w), or with "l2" the given feature maps (N, C, h, w)."""
        return attention_map(features) if self.feature == "attention" else features


def to_single_precision(features: Tensor) -> Tensor:
    """Returns a tensor of 16 bits in float32; others are returned as they are."""
    return features.float() if features.dtype in (torch.bfloat16, torch.float16) else features


def adapt(features: Tensor, adapter: nn.Module) -> Tensor:
    """Applies a 1 x 1 convolution to feature maps, computed in the dtype of the maps.

    Args:
        features: (N, C, h, w).
        adapter: The convolution, an `nn.Conv2d`; the maps are returned unchanged if it is another module.
    """
    if not isinstance(adapter, nn.Conv2d):
        return features
    assert adapter.bias is not None
    return F.conv2d(features, adapter.weight.to(features.dtype), adapter.bias.to(features.dtype))


def pool(features: Tensor, size: Sequence[int]) -> Tensor:
    """Returns feature maps average-pooled to another size, or unchanged if they have this size.

    Args:
        features: (N, C, h, w).
        size: The height and the width of the result, (h', w').
    """
    height, width = size
    return features if features.shape[-2:] == (height, width) else F.adaptive_avg_pool2d(features, (height, width))


def pool_larger(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Returns two feature maps (N, C, h, w), of which the larger one is average-pooled to the size of the other."""
    size = min(first.shape[-2:], second.shape[-2:], key=lambda size: size[0] * size[1])
    return pool(first, size), pool(second, size)


def pair_stages(recorders: Sequence[StageRecorder], option: str, value: str) -> None:
    """Makes all recorders record the same number of feature maps: those at the ends of the last stages.

    Args:
        recorders: A `StageRecorder` for each network, changed in place. All keep as many stages as the network with the
            fewest stages has.
        option: The option that asks for feature maps, such as `method.feature`, for the message.
        value: Its value.

    Raises:
        OptionError: A network has no stages.
    """
    count = min(len(recorder.calls) for recorder in recorders)
    if not count:
        lacking = next(recorder.network for recorder in recorders if not recorder.calls)
        name = type(getattr(lacking, "network", lacking)).__name__
        allowed = f"needs feature maps (N, C, h, w) at the ends of stages, and {name} has none"
        raise OptionError(option, value, allowed)
    for recorder in recorders:
        recorder.calls = recorder.calls[-count:]


@check_arguments("method")
class FeatureDistillation(LogitDistillation):
    """The base class of methods that compare softened predictions and, on request, feature maps.

    Args:
        students: The S students.
        temperature: T, by which logits are divided before the softmax.
        feature: How feature maps are compared: "attention" compares where in the image they are large, "l2" all their
            values, see `FeatureDistance`; None to compare no feature maps.
        feature_weight: The factor of the loss term that compares feature maps. For "attention", the factor 1 is about
            the one that Zagoruyko and Komodakis (2017) used.
        **options: `loss`, `loss_weights`, `kl_reduction` and `average_decay`; see `LogitDistillation`.
    """

    def __init__(
        self,
        students: Students,
        temperature: Temperature,
        feature: FeatureName | None = None,
        feature_weight: FeatureWeight = 1.0,
        **options: Any,
    ):
        super().__init__(students, temperature, **options)
        if feature is None and feature_weight != 1:
            allowed = "has no feature term to weight; method.feature=attention or l2 adds one"
            raise OptionError("method.feature_weight", feature_weight, allowed)
        self.feature, self.feature_weight = feature, feature_weight

    def feature_terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """Returns the terms `attention_k` or `l2_k` of each student k, with their weight; none without `feature`.

        Args:
            outputs: The outputs of `forward`. Its key `feature_distances` has the distance of each student, (S,).
        """
        if self.feature is None:
            return {}
        return student_terms(self.feature_weight * outputs["feature_distances"], self.feature)
