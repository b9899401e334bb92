"""Reads checkpoints of the 2019 reference code (facts about its format: keys, shapes, serialisation)."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from odcheap.layers.cheap_conv import DW, Group, Shift
from odcheap.methods.od import OnlineDistillation
from odcheap.methods.students import Students
from odcheap.models.cifar import CifarResNet
from odcheap.utils.errors import OptionError
from odcheap.utils.files import read_torch

TEMPERATURE = 4.0
BLOCK_TYPES = {"Shift": lambda groups: Shift(), "DW": lambda groups: DW(), "Group": Group}
SPATIAL = re.compile(r"(layer\d+\.\d+)\.(?:dw|group)([12])\.weight")
POINTWISE = re.compile(r"(layer\d+\.\d+)\.conv([12])\.weight")


@dataclass(frozen=True)
class ReferenceWeights:
    """A checkpoint under our names: state dicts of the students and of the teacher's head, and what they tell."""

    students: list[dict[str, Tensor]]
    head: dict[str, Tensor]
    block_type: str
    depth: int
    groups: int
    num_classes: int


def is_reference(content: dict[str, Any]) -> bool:
    return any(re.match(r"(module\.)?resnet_m\d+\.", str(name)) for name in content.get("state_dict", {}))


def translate(content: dict[str, Any], path: str | Path, option: str = "path") -> ReferenceWeights:
    """Block type, depth, groups and students read from names and shapes; `OptionError` where they are not all there."""
    state = {name.removeprefix("module."): tensor for name, tensor in content["state_dict"].items()}
    count = len({name.split(".")[0] for name in state if name.startswith("resnet_m")})
    try:
        students = [student_state(state, k) for k in range(1, count + 1)]
        first = students[0]
        blocks = len({name.split(".")[1] for name in first if name.startswith("layer1.")})
        spatial = first.get("layer1.0.conv1.spatial.weight")
        spatial_names = {name.split(".")[-2] for name in state if name.endswith(("dw1.weight", "group1.weight"))}
        return ReferenceWeights(
            students=students,
            head={name: tensor for name, tensor in state.items() if name.startswith(("norm.", "fc."))},
            block_type="Group" if "group1" in spatial_names else "DW" if "dw1" in spatial_names else "Shift",
            depth=6 * blocks + 2,
            groups=spatial.shape[0] // spatial.shape[1] if "group1" in spatial_names else 1,
            num_classes=first["fc.weight"].shape[0],
        )
    except (KeyError, IndexError, AttributeError) as error:
        raise OptionError(option, path, f"looks like a checkpoint of the 2019 code but lacks {error}") from error


def student_state(state: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    prefix = f"resnet_m{k}."
    mine = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    renamed = {}
    for name, tensor in mine.items():
        name = POINTWISE.sub(r"\1.conv\2.pointwise.weight", name)
        renamed[SPATIAL.sub(r"\1.conv\2.spatial.weight", name)] = tensor
    return renamed


class ReferenceModel(nn.Module):
    """The 2019 network with its weights, in eval mode; `block_type`, `depth`, `groups`, `num_stu` as in the file."""

    def __init__(self, weights: ReferenceWeights):
        super().__init__()
        self.block_type, self.depth, self.groups = weights.block_type, weights.depth, weights.groups
        self.num_stu = len(weights.students)
        conv = BLOCK_TYPES[self.block_type](self.groups)
        students = Students(lambda: CifarResNet(self.depth, conv, weights.num_classes), self.num_stu, seed=0)
        self.method = OnlineDistillation(students, TEMPERATURE, kl_reduction="mean")
        for student, state in zip(students.members, weights.students, strict=True):
            student.load_state_dict(state)
        self.method.load_state_dict(weights.head | {f"students.{k}": v for k, v in students.state_dict().items()})
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) -> the students' logits (S, N, K), the teacher's (N, K)."""
        outputs = self.method(images)
        return outputs["student_logits"], outputs["teacher_logits"]

    def loss(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        """The reference's loss: element-mean KL, T = 4, nothing detached; a scalar."""
        return self.method.loss({"student_logits": student_logits, "teacher_logits": teacher_logits}, target)["loss"]


def load_reference(path: str | Path) -> ReferenceModel:
    """The model of a 2019 checkpoint, with or without the `module.` prefix; `OptionError` where it is none."""
    content = read_torch(path)
    if not is_reference(content):
        raise OptionError("path", path, "not a checkpoint of the 2019 code: no tensor is named resnet_m1.*")
    with torch.random.fork_rng(devices=[]):
        try:
            return ReferenceModel(translate(content, path))
        except RuntimeError as error:
            raise OptionError("path", path, "the tensors do not fit the 2019 code's network") from error
