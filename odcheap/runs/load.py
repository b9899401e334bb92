"""Weights from files into a method's students: our checkpoints, exported students, checkpoints of the 2019 code."""

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from odcheap.methods.base import Method
from odcheap.models.build import check_state_dict
from odcheap.runs.reference import is_reference, translate_reference
from odcheap.utils.errors import OptionError
from odcheap.utils.files import read_safetensors, read_torch

STUDENT = "method.students.members."


@dataclass(frozen=True)
class Weights:
    """`students`: a state dict each; `own`: the method's own parts (empty for a lone student); `split`: fingerprint."""

    path: str
    students: list[dict[str, Tensor]]
    own: dict[str, Tensor]
    split: str | None


def read_weights(path: str | Path, option: str = "weights") -> Weights:
    """Raises `OptionError` where the file is missing, damaged or of no known kind."""
    if str(path).endswith(".safetensors"):
        tensors, metadata = read_safetensors(path, option)
        settings = json.loads(metadata.get("odcheap", "{}"))
        return Weights(str(path), [tensors], {}, settings.get("split"))
    content = read_torch(path, option)
    if is_reference(content):
        reference = translate_reference(content, path, option)
        return Weights(str(path), reference.students, reference.head, None)
    state = content.get("state_dict", {})
    count = len({name.split(".")[3] for name in state if name.startswith(STUDENT)})
    if not count:
        raise OptionError(option, path, "holds no students (neither odcheap's nor the 2019 code's names)")
    students = [below(state, f"{STUDENT}{k}.") for k in range(count)]
    return Weights(str(path), students, own_parts(below(state, "method.")), content.get("odcheap", {}).get("split"))


def load_weights(method: Method, weights: Weights, new_head: bool = False) -> str:
    """Copies the weights into the method and says what was loaded.

    A lone student goes to student 0, the others keep their first weights. `new_head` loads the bodies and leaves all
    classifiers and the method's own parts new. Any other difference raises `OptionError`, nothing changed.
    """
    members = method.students.members
    if len(weights.students) not in (1, len(members)):
        raise OptionError("weights", weights.path, f"holds {len(weights.students)} students; num_stu={len(members)}")
    for student, state in zip(members, weights.students, strict=False):
        check_student(student, state, weights.path, new_head)
    with_own = not new_head and bool(weights.own) and len(weights.students) == len(members)
    if with_own:
        check_own(method, weights)
    for student, state in zip(members, weights.students, strict=False):
        student.load_state_dict(body(student, state) if new_head else state, strict=not new_head)
    if with_own:
        method.load_state_dict(weights.own, strict=False)
    else:
        method.after_loading_students()
    what = "the method's own parts too" if with_own else "the method's own parts are new"
    heads = "classifiers are new" if new_head else "classifiers included"
    return f"{len(weights.students)} of {len(members)} students from {weights.path} ({heads}, {what})"


def own_parts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a method has beside its students; which teacher it had is no weight."""
    return {n: t for n, t in state.items() if not n.startswith("students.") and not n.endswith("_extra_state")}


def check_student(student: nn.Module, state: dict[str, Tensor], path: str, new_head: bool) -> None:
    own = student.state_dict()
    classes, given = (s.get(f"{student.classifier}.weight") for s in (own, state))
    if new_head:
        own, state = body(student, own), body(student, state)
    elif given is not None and given.shape[1:] == classes.shape[1:] and len(given) != len(classes):
        allowed = f"has {len(given)} classes, the data {len(classes)}; weights_head=new keeps the bodies only"
        raise OptionError("weights", path, allowed)
    check_state_dict(own, state, path, "another architecture")


def check_own(method: nn.Module, weights: Weights) -> None:
    own = own_parts(method.state_dict())
    check_state_dict(own, weights.own, weights.path, "another method; weights_head=new keeps the students' bodies")


def body(student: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(f"{student.classifier}.")}


def below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
