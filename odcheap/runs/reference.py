"""Loads checkpoints of the 2019 code of online distillation, the reference for this package.

The architecture is not stored in these checkpoints. It is read from the names and shapes of their tensors.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from odcheap.layers.cheap_conv import DW, BlockType, Group, Shift
from odcheap.methods.od import OnlineDistillation
from odcheap.methods.students import Students
from odcheap.models.cifar import CifarResNet
from odcheap.utils.errors import OptionError
from odcheap.utils.files import read_torch
from odcheap.utils.text import escape_control_chars

TEMPERATURE = 4.0
SPATIAL_NAME = re.compile(r"(layer\d+\.\d+)\.(?:dw|group)([12])\.weight")
POINTWISE_NAME = re.compile(r"(layer\d+\.\d+)\.conv([12])\.weight")


@dataclass(frozen=True)
class ReferenceWeights:
    """The weights in a checkpoint of the 2019 code of online distillation, with the names that odcheap's modules use.

    Attributes:
        students: For each student, a state dict that a `CifarResNet` can load.
        head: The state dict of the teacher's own layers, which are batch norm and a linear layer (`norm` and `fc` of
            `OnlineDistillation`).
        block_type: The kind of cheap convolution: "Shift", "DW" or "Group".
        depth: The depth of the ResNet, such as 56.
        groups: The number of groups if the block type is "Group"; otherwise 1.
        expansion: How many times wider than its output a block is in its middle; see `CifarResNet`.
        num_classes: The number of classes, K.
    """

    students: list[dict[str, Tensor]]
    head: dict[str, Tensor]
    block_type: str
    depth: int
    groups: int
    expansion: int
    num_classes: int


def get_state_dict(content: dict[str, Any], path: str | Path, option: str = "path") -> dict[str, Tensor]:
    """Returns the entry `state_dict` of a checkpoint that has been read; an empty dict if there is no such entry.

    Args:
        content: The content of the checkpoint.
        path: The file of the checkpoint, for messages.
        option: The name of the option that gave the file, for messages.

    Raises:
        OptionError: The entry is not a dict from names to tensors.
    """
    state = content.get("state_dict", {})
    if not isinstance(state, dict):
        raise OptionError(option, path, f"its state_dict must be tensors by name, not a {type(state).__name__}")
    for name, value in state.items():
        # PyTorch also stores what a module's `get_extra_state` returns, which may be any value.
        if not isinstance(name, str) or not (isinstance(value, Tensor) or name.endswith("_extra_state")):
            entry = escape_control_chars(str(name)[:100])
            raise OptionError(option, path, f"its state_dict must be tensors by name; {entry} is something else")
    return state


def is_reference(state: Mapping[str, Tensor]) -> bool:
    """Returns whether the tensors of a state dict have the names that the 2019 code of online distillation uses."""
    return any(re.match(r"(module\.)?resnet_m\d+\.", name) for name in state)


def translate_reference(tensors: Mapping[str, Tensor], path: str | Path, option: str = "path") -> ReferenceWeights:
    """Renames the tensors of a checkpoint of the 2019 code of online distillation, so that odcheap's modules can load
    them.

    The kind of cheap convolution, the depth of the network, and the numbers of groups and classes are found from the
    names and shapes of the tensors. They are part of the result.

    Args:
        tensors: The state dict in the checkpoint; see `is_reference`.
        path: The file of the checkpoint, for messages.
        option: The name of the option that gave the file, for messages.

    Raises:
        OptionError: The checkpoint lacks tensors that the network of the 2019 code has.
    """
    # The students are called resnet_m1, resnet_m2, ...; `DataParallel` has added a prefix.
    state = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    count = len({name.split(".")[0] for name in state if name.startswith("resnet_m")})
    try:
        students = [_student_state(state, k) for k in range(1, count + 1)]
        first = students[0]
        blocks = len({name.split(".")[1] for name in first if name.startswith("layer1.")})
        spatial_names = {name.split(".")[-2] for name in state if name.endswith(("dw1.weight", "group1.weight"))}
        groups = 1
        if "group1" in spatial_names:
            weight = first["layer1.0.conv1.spatial.weight"]  # (C, C / groups, kh, kw)
            groups = weight.shape[0] // weight.shape[1]
        return ReferenceWeights(
            students=students,
            head={name: tensor for name, tensor in state.items() if name.startswith(("norm.", "fc."))},
            block_type="Group" if "group1" in spatial_names else "DW" if "dw1" in spatial_names else "Shift",
            depth=6 * blocks + 2,
            groups=groups,
            expansion=len(first["layer1.0.conv1.pointwise.weight"]) // len(first["layer1.0.conv2.pointwise.weight"]),
            num_classes=first["fc.weight"].shape[0],
        )
    except (KeyError, IndexError, AttributeError, ZeroDivisionError, TypeError) as error:
        raise OptionError(option, path, f"looks like a checkpoint of the 2019 code but lacks {error}") from error


def _student_state(state: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """Returns the state dict of the student with number k (counted from 1), with the names of odcheap's modules."""
    prefix = f"resnet_m{k}."
    renamed = {}
    for name, tensor in state.items():
        if name.startswith(prefix):
            name = POINTWISE_NAME.sub(r"\1.conv\2.pointwise.weight", name.removeprefix(prefix))
            renamed[SPATIAL_NAME.sub(r"\1.conv\2.spatial.weight", name)] = tensor
    return renamed


class ReferenceModel(nn.Module):
    """The students and the teacher of the 2019 code of online distillation, in eval mode.

    Args:
        weights: The weights; `translate_reference` reads them from a checkpoint.

    Attributes:
        block_type: The kind of cheap convolution: "Shift", "DW" or "Group".
        depth: The depth of the ResNets, such as 56.
        groups: The number of groups if the block type is "Group"; otherwise 1.
        num_stu: The number of students, S.

    Shape:
        Normalized images (N, 3, H, W) -> logits of the students (S, N, K) and of the teacher (N, K).
    """

    def __init__(self, weights: ReferenceWeights):
        super().__init__()
        self.block_type, self.depth, self.groups = weights.block_type, weights.depth, weights.groups
        self.num_stu = len(weights.students)
        block_types: dict[str, BlockType] = {"Shift": Shift(), "DW": DW(), "Group": Group(self.groups)}
        conv = block_types[self.block_type]
        students = Students(
            lambda: CifarResNet(self.depth, conv, weights.num_classes, weights.expansion), self.num_stu, seed=0
        )
        self.method = OnlineDistillation(students, TEMPERATURE, kl_reduction="mean")
        for student, state in zip(students.members, weights.students, strict=True):
            student.load_state_dict(state)
        self.method.load_state_dict(weights.head | {f"students.{k}": v for k, v in students.state_dict().items()})
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.method(images)
        return outputs["student_logits"], outputs["teacher_logits"]

    def loss(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        """Returns the loss of the 2019 code, a scalar: cross-entropy plus distillation with temperature 4.

        The KL divergence is averaged over all N x K elements, and gradients also flow through the teacher's logits.

        Args:
            student_logits: (S, N, K).
            teacher_logits: (N, K).
            target: Labels (N,).
        """
        return self.method.loss({"student_logits": student_logits, "teacher_logits": teacher_logits}, target)["loss"]


def load_reference(path: str | Path) -> ReferenceModel:
    """Loads a checkpoint of the 2019 code of online distillation as a module in eval mode.

    Args:
        path: The file. The names of its tensors may have the prefix `module.`, which `DataParallel` adds.

    Returns:
        A module. `module(images)` takes normalized images (N, 3, H, W) and returns two tensors: the logits of the
        students (S, N, K) and those of the teacher (N, K). `module.loss` computes the loss of the 2019 code.

    Raises:
        OptionError: The file is not such a checkpoint.

    Example:
        >>> model = load_reference(path)
        >>> model.block_type, model.depth, model.num_stu
        ('DW', 8, 4)
        >>> student_logits, teacher_logits = model(torch.zeros(2, 3, 32, 32))
        >>> model.loss(student_logits, teacher_logits, torch.tensor([0, 1])).shape
        torch.Size([])
    """
    state = get_state_dict(read_torch(path), path)
    if not is_reference(state):
        raise OptionError("path", path, "not a checkpoint of the 2019 code: no tensor is named resnet_m1.*")
    # Building the networks draws random weights; the caller's random numbers do not change.
    with torch.random.fork_rng(devices=[]):
        try:
            return ReferenceModel(translate_reference(state, path))
        except RuntimeError as error:
            raise OptionError("path", path, "the tensors do not fit the 2019 code's network") from error
