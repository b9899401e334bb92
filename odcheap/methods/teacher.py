"""A trained network that teaches and never changes: with its own normalisation and size of picture."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odcheap.data.transforms import LARGEST_SIDE
from odcheap.layers.cheap_conv import Standard
from odcheap.models.build import load_network, read_student_settings
from odcheap.models.wrappers import load_pretrained, timm_backbone, torchvision_backbone
from odcheap.utils.errors import OptionError
from odcheap.utils.files import read_safetensors

OPTION = "method.teacher_weights"
LIBRARIES = {"torchvision": torchvision_backbone, "timm": timm_backbone}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224


class Teacher(nn.Module):
    """(N, 3, H, W) normalised for the students -> logits (N, K) of `network`, without gradients.

    The network is in eval mode and stays there whatever mode its surroundings are put into. It is no part of the state
    that a checkpoint keeps, only its digest is: another teacher's is refused with `OptionError`. `made_with`: mean and
    standard deviation that the images come with; `mean`, `std`, `size`: what the network expects. `classes`, `split`
    and `history` (`train_seconds`, `training_macs`) are known of our own runs; `path` is for messages.
    """

    def __init__(
        self,
        network: nn.Module,
        made_with: tuple[Sequence[float], Sequence[float]],
        mean: Sequence[float],
        std: Sequence[float],
        size: int,
        classes: list[str] | None = None,
        split: str | None = None,
        history: dict[str, Any] | None = None,
        path: str = "",
    ):
        super().__init__()
        self.hidden, self.size = (network.requires_grad_(False).eval(),), size  # a tuple, so that it is not registered
        unknown = {"train_seconds": None, "training_macs": None}
        self.classes, self.split, self.history, self.path = classes, split, unknown | (history or {}), path
        (from_mean, from_std), (to_mean, to_std) = (
            [torch.tensor(list(values)).view(1, -1, 1, 1) for values in pair] for pair in (made_with, (mean, std))
        )
        self.register_buffer("scale", from_std / to_std, persistent=False)
        self.register_buffer("offset", (from_mean - to_mean) / to_std, persistent=False)
        super().train(False)

    @property
    def network(self) -> nn.Module:
        return self.hidden[0]

    def train(self, mode: bool = True) -> "Teacher":
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Teacher":
        self.network._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def get_extra_state(self) -> Tensor:
        return digest(self.network)

    def set_extra_state(self, state: Tensor) -> None:
        if not torch.equal(state.cpu(), digest(self.network)):
            raise OptionError(OPTION, self.path, "is not the teacher that the run was started with")

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        images = images * self.scale + self.offset
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        return self.network(images)

    def check_classes(self, classes: list[str]) -> None:
        """`OptionError` where they are known and other than these."""
        if self.classes is not None and self.classes != classes:
            mine, theirs = (f"{', '.join(names[:3])} ..." for names in (self.classes, classes))
            raise OptionError(OPTION, self.path, f"the teacher's classes are {mine}; the data's {theirs}")


def digest(network: nn.Module) -> Tensor:
    """(16,) bytes that tell one network's weights from another's, whatever they were rounded to since."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in network.state_dict().items():
        rounded = tensor.detach().cpu().to(torch.bfloat16).contiguous().flatten()
        found.update(name.encode() + rounded.view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(bytearray(found.digest()), dtype=torch.uint8)


def read_teacher(
    path: str,
    published: str | None,
    num_classes: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    size: int | None,
    images_mean: Sequence[float],
    images_std: Sequence[float],
) -> Teacher:
    """From a run's folder or its `student.safetensors`, or from a local file of published weights.

    `published` then names the network, as `torchvision/resnet50` or `timm/resnet18d`. None for `mean`, `std` and `size`
    (pixels a side) means the run's own, or ImageNet's. Raises `OptionError`.
    """
    check_given(mean, std, size)
    made_with = (images_mean, images_std)
    if published is not None:
        network = of_library(published, path, num_classes)
        own_mean, own_std, own_size = IMAGENET
        return Teacher(network, made_with, mean or own_mean, std or own_std, size or own_size)
    file = Path(path) / "student.safetensors" if Path(path).is_dir() else Path(path)
    tensors, metadata = read_safetensors(file, OPTION)
    settings = read_student_settings(
        metadata, OPTION, f"{path} (for published weights method.teacher_network names the network)"
    )
    network = load_network(settings, tensors, OPTION, str(path))
    if network.num_classes != num_classes:
        raise OptionError(OPTION, path, f"the teacher has {network.num_classes} classes, the data {num_classes}")
    expects = mean or settings["mean"], std or settings["std"], size or settings["image_size"][-1]
    return Teacher(network, made_with, *expects, settings["classes"], settings["split"], history_of(file), str(path))


def check_given(mean: Sequence[float] | None, std: Sequence[float] | None, size: int | None) -> None:
    for option, values in (("mean", mean), ("std", std)):
        if values is not None and (len(values) != 3 or (option == "std" and min(values) <= 0)):
            allowed = "must be three numbers, and std's above zero"
            raise OptionError(f"method.teacher_{option}", list(values), allowed)
    if size is not None and not 1 <= size <= LARGEST_SIDE:
        raise OptionError("method.teacher_size", size, f"must be 1 to {LARGEST_SIDE} pixels a side")


def history_of(student: Path) -> dict[str, Any]:
    """What its training took, where its run's summary lies beside it."""
    summary = student.with_name("summary.json")
    found = json.loads(summary.read_text()) if summary.is_file() else {}
    cost = found.get("cost") or {}
    return {"train_seconds": found.get("train_seconds"), "training_macs": cost.get("training_macs")}


def of_library(published: str, path: str, num_classes: int) -> nn.Module:
    library, _, name = published.partition("/")
    if library not in LIBRARIES or not name:
        raise OptionError("method.teacher_network", published, "must be torchvision/NAME or timm/NAME")
    network = LIBRARIES[library](name, Standard(), num_classes)
    load_pretrained(network.network, path, num_classes, OPTION, new_head=False)
    return network
