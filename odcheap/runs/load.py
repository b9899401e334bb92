"""Loads weights into the students of a method.

They come from a checkpoint of a run, a `student.safetensors`, or a checkpoint of the method's 2019 reference code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from odcheap.methods.base import Method
from odcheap.models.build import check_state_dict
from odcheap.runs.reference import get_state_dict, is_reference, translate_reference
from odcheap.runs.schemas import SavedWeights, validate
from odcheap.utils.errors import OptionError
from odcheap.utils.files import parse_json, read_safetensors, read_torch

STUDENT = "method.students.members."  # the prefix of the students' tensors in a checkpoint


@dataclass(frozen=True)
class Weights:
    """The weights in a file.

    Attributes:
        path: The file.
        students: A state dict for each student.
        method: The state dict of what else the method has, such as the teacher's classifier; empty if the file contains
            one student only.
        split: A hash of the images with which the weights were trained, and of which of them were held out; None if it
            is not known.
        classes: The names of the classes, in the order of the logits; None if they are not known.
        folded: Whether they are those of a folded network (see `layers.fuse.fold_branches`), which cannot be trained.
    """

    path: str
    students: list[dict[str, Tensor]]
    method: dict[str, Tensor]
    split: str | None
    classes: list[str] | None = None
    folded: bool = False


def read_weights(path: str | Path, option: str = "weights") -> Weights:
    """Reads weights from a file.

    Args:
        path: A checkpoint of a run, a `student.safetensors`, or a checkpoint of the method's 2019 reference code.
        option: The name of the option that gave the file, for messages.

    Raises:
        OptionError: The file is missing, damaged or of an unknown kind.
    """
    if str(path).endswith(".safetensors"):
        tensors, metadata = read_safetensors(path, option)
        settings = parse_json(metadata.get("odcheap", "{}"), path, option)
        settings = validate(SavedWeights, settings, path, option).model_dump()
        return Weights(str(path), [tensors], {}, settings["split"], settings["classes"], settings["folded"])

    # A checkpoint, of the 2019 code or of a run.
    content = read_torch(path, option)
    state = get_state_dict(content, path, option)
    if is_reference(state):
        reference = translate_reference(state, path, option)
        return Weights(str(path), reference.students, reference.head, None)
    count = len({name.split(".")[3] for name in state if name.startswith(STUDENT)})
    if not count:
        raise OptionError(option, path, "holds no students: it has the names of neither odcheap nor the 2019 code")
    students = [strip_prefix(state, f"{STUDENT}{k}.") for k in range(count)]
    own = select_method_state(strip_prefix(state, "method."))
    about = validate(SavedWeights, content.get("odcheap", {}), path, option).model_dump()
    return Weights(str(path), students, own, about.get("split"), about.get("classes"))


def load_weights(method: Method, weights: Weights, new_head: bool = False, classes: Sequence[str] | None = None) -> str:
    """Copies weights into the students of a method, and into the rest of the method if it fits.

    If the file contains one student, its weights are copied into student 0, and the other students keep their initial
    weights. What else the method has, such as the teacher's classifier, is loaded too. It is not loaded if the file
    contains one student only, if `new_head` is true, or if the file has other classes than `classes` or another order
    of them.

    Args:
        method: The method, changed in place.
        weights: The weights from a file.
        new_head: Whether only the students' bodies are loaded, and their classifiers keep their initial weights.
        classes: The names of the data's classes, in the order of the labels. If the file has these classes in another
            order, or more classes, the outputs of its classifiers are selected and sorted by the names.

    Returns:
        One line that says what was loaded.

    Raises:
        OptionError: The shapes or names of the weights do not fit the method. The method is not changed then.
    """
    matched = not new_head and classes is not None and weights.classes not in (None, list(classes))
    if matched:
        classifiers = [str(student.classifier) for student in method.students.backbones()]
        weights = select_classes(weights, list(classes or ()), classifiers)
    # Everything is checked first, so that an error leaves the method unchanged.
    members = method.students.members
    if len(weights.students) not in (1, len(members)):
        raise OptionError("weights", weights.path, f"holds {len(weights.students)} students; num_stu={len(members)}")
    for student, state in zip(members, weights.students, strict=False):
        check_student(student, state, weights.path, new_head)
    with_method = not new_head and bool(weights.method) and len(weights.students) == len(members)
    if with_method:
        own = select_method_state(method.state_dict())
        reason = "another method; weights_head=new keeps the students' bodies"
        check_state_dict(own, weights.method, weights.path, reason)

    # Load the students, then the rest of the method; without it, moving averages start at the loaded weights.
    for student, state in zip(members, weights.students, strict=False):
        student.load_state_dict(select_body(student, state) if new_head else state, strict=not new_head)
    if with_method:
        method.load_state_dict(weights.method, strict=False)
    else:
        method.after_loading_students()
    own_text = "the method's own parts too" if with_method else "the method's own parts are new"
    heads = "classifiers are new" if new_head else "classifiers included"
    heads = "the classifiers' outputs matched by the names of the classes" if matched else heads
    return f"{len(weights.students)} of {len(members)} students from {weights.path} ({heads}, {own_text})"


def select_classes(weights: Weights, classes: list[str], classifiers: list[str]) -> Weights:
    """Returns the students' weights with the outputs of the classifiers selected and sorted by class names.

    Args:
        weights: Weights whose classes are known.
        classes: The names of the classes that the result has, in their order.
        classifiers: The name of each student's last layer.

    Raises:
        OptionError: The weights do not have one of the classes.
    """
    # The position of each class among the outputs of the file.
    known = weights.classes or []
    missing = [name for name in classes if name not in known]
    if missing:
        allowed = f"has {describe_classes(known)}, the data {describe_classes(classes)}"
        allowed += f"; weights_head=new keeps the bodies only ({missing[0]} is not in the file)"
        raise OptionError("weights", weights.path, allowed)
    outputs = {name: k for k, name in enumerate(known)}
    rows = [outputs[name] for name in classes]
    # Select the rows of the classifier's weight and bias.
    students = []
    for classifier, state in zip(classifiers, weights.students, strict=False):
        heads = {name: tensor for name, tensor in state.items() if name.startswith(f"{classifier}.")}
        if any(tensor.ndim < 1 or len(tensor) != len(known) for tensor in heads.values()):
            raise OptionError("weights", weights.path, f"has {len(known)} classes and a classifier of another size")
        students.append(state | {name: tensor[rows] for name, tensor in heads.items()})
    return replace(weights, students=students, method={}, classes=classes)


def describe_classes(classes: Sequence[str]) -> str:
    """Returns the number and the first names of classes as text, such as `3 classes (cat, dog, owl)`."""
    names = ", ".join(name[:40] for name in classes[:3])
    return f"{len(classes)} classes ({names}{', ...' if len(classes) > 3 else ''})"


def select_method_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns those tensors of a method's state dict that belong to no student, such as a teacher's classifier.

    The entries of `get_extra_state` are left out: the digest of a frozen teacher.
    """
    return {n: t for n, t in state.items() if not n.startswith("students.") and not n.endswith("_extra_state")}


def check_student(student: nn.Module, state: dict[str, Tensor], path: str, new_head: bool) -> None:
    """Raises `OptionError` if a state dict does not fit a student.

    Args:
        student: The student.
        state: The state dict in the file.
        path: The file, for messages.
        new_head: Whether the classifier is not loaded and need not fit.
    """
    # Another number of classes is the most likely difference, and has a message of its own.
    own = student.state_dict()
    if new_head:
        own, state = select_body(student, own), select_body(student, state)
    else:
        name = f"{student.classifier}.weight"
        expected, loaded = own[name], state.get(name)
        if loaded is not None and loaded.shape[1:] == expected.shape[1:] and len(loaded) != len(expected):
            allowed = f"has {len(loaded)} classes, the data {len(expected)}; weights_head=new keeps the bodies only"
            raise OptionError("weights", path, allowed)
    check_state_dict(own, state, path, "another architecture")


def select_body(student: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a student's state dict except those of its classifier.

    Args:
        student: The student, which has the name of its classifier.
        state: Its state dict, or another one with the same names.
    """
    return {name: tensor for name, tensor in state.items() if not name.startswith(f"{student.classifier}.")}


def strip_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the tensors whose names begin with a prefix; in the result the names do not have the prefix."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
