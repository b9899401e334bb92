"""Loads weights from a file into the students of a training method.

The file is a checkpoint of a run, a `student.safetensors`, or a checkpoint of the 2019 code of online distillation.
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
    """The weights that `read_weights` has read from a file.

    Attributes:
        path: The file.
        students: A state dict for each student in the file.
        method: The tensors of the training method that belong to no student, such as the weights of the teacher's
            classifier. It is empty if the file is a `student.safetensors`, which contains one network only.
        split: A hash that identifies the training images and the held-out images of the run that wrote the file; None
            if it is not known.
        classes: The names of the classes, in the order of the logits; None if they are not known.
        folded: True if parallel branches of the network were folded into one convolution (see
            `layers.fuse.fold_branches`). Such a network cannot be trained further.
    """

    path: str
    students: list[dict[str, Tensor]]
    method: dict[str, Tensor]
    split: str | None
    classes: list[str] | None = None
    folded: bool = False


def read_weights(path: str | Path, option: str = "weights") -> Weights:
    """Reads the weights of one or more students from a file. No network is built or changed.

    Args:
        path: A checkpoint of a run, a `student.safetensors`, or a checkpoint of the 2019 code of online distillation.
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
    """Copies weights into the students of a training method, and into its other modules if possible.

    If the weights are those of a single student, they are copied into student 0, and the other students keep their
    initial weights. The other modules of the method, such as the teacher's classifier, are not loaded in three cases:
    the file does not contain them, or contains fewer students; `new_head` is true; or the classes of the file differ
    from `classes`, or have another order.

    Args:
        method: The training method. It is changed in place.
        weights: The weights; see `read_weights`.
        new_head: If true, only the bodies of the students are loaded, and not their classifiers (last layers). Use it
            for data with other classes.
        classes: The names of the data's classes, in the order of the labels. If the file has the same classes in
            another order, or more classes, the outputs of its classifiers are selected and sorted by the names of the
            classes. If it is None, the names are not compared.

    Returns:
        One line of text that says what was loaded.

    Raises:
        OptionError: The shapes or names of the weights do not fit the method. The method is then unchanged.
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
    """Returns weights whose classifiers have only the outputs of the given classes, in the given order.

    Args:
        weights: The weights; `weights.classes` must not be None.
        classes: The names of the classes of the result, in the order of its logits.
        classifiers: For each student, the name of the last layer in its state dict, such as "fc".

    Returns:
        New weights with the same students and without the tensors of other modules (`method` is empty).

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
    """Returns those tensors in a method's state dict that belong to no student, such as a teacher's classifier.

    Entries of `get_extra_state` are left out, since they are no weights.
    """
    return {n: t for n, t in state.items() if not n.startswith("students.") and not n.endswith("_extra_state")}


def check_student(student: nn.Module, state: dict[str, Tensor], path: str, new_head: bool) -> None:
    """Raises `OptionError` if a state dict cannot be loaded into a student, because its names or shapes differ.

    Args:
        student: The student.
        state: The state dict in the file.
        path: The file, for messages.
        new_head: If true, the tensors of the classifier are not compared.
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
    """Returns the tensors of a state dict that do not belong to the classifier, the last layer of a network.

    Args:
        student: The network; its attribute `classifier` is the name of the last layer.
        state: Its state dict, or another one with the same names.
    """
    return {name: tensor for name, tensor in state.items() if not name.startswith(f"{student.classifier}.")}


def strip_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the tensors whose names begin with `prefix`, under their names without this prefix."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
