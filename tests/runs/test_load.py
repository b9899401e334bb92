from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from odcheap.layers.cheap_conv import DW, Group
from odcheap.methods.od import OnlineDistillation
from odcheap.methods.students import Students
from odcheap.models.cifar import CifarResNet
from odcheap.models.wrappers import load_pretrained
from odcheap.runs.load import STUDENT, Weights, load_weights, read_weights, strip_prefix
from odcheap.runs.reference import load_reference
from odcheap.utils.errors import OptionError


def made(num_stu=2, classes=10, conv=None, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return OnlineDistillation(Students(lambda: CifarResNet(8, conv or DW(), classes), num_stu, seed))


def weights_of(method, lone=False):
    state = {f"method.{name}": t.clone() for name, t in method.state_dict().items()}
    students = [strip_prefix(state, f"{STUDENT}{k}.") for k in range(1 if lone else len(method.students))]
    own = {n: t for n, t in strip_prefix(state, "method.").items() if not n.startswith("students.")}
    return Weights("FILE", students, {} if lone else own, None)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_all_parts_are_loaded():
    source, target = made(seed=1), made()
    load_weights(target, weights_of(source))
    assert same(source, target)


def test_a_lone_student_goes_to_student_0_and_the_others_stay():
    source, target, untouched = made(seed=1), made(3), made(3)
    load_weights(target, weights_of(source, lone=True))
    assert same(source.students.members[0], target.students.members[0])
    for k in (1, 2):
        assert same(untouched.students.members[k], target.students.members[k])
    assert same(untouched.fc, target.fc)


def test_a_new_head_keeps_the_bodies_only():
    source, target, untouched = made(seed=1, classes=7), made(), made()
    load_weights(target, weights_of(source), new_head=True)
    for k in range(2):
        assert torch.equal(source.students.members[k].conv1.weight, target.students.members[k].conv1.weight)
        assert same(untouched.students.members[k].fc, target.students.members[k].fc)
    assert same(untouched.fc, target.fc)


NAMES = [f"class {k}" for k in range(10)]


@pytest.mark.parametrize("classes", [NAMES[::-1], NAMES[3:7], [NAMES[8], NAMES[2]]])
def test_classes_in_another_order_or_besides_others_are_matched_by_name(classes):
    source, target = made(seed=1), made(classes=len(classes))
    known = replace(weights_of(source), classes=NAMES)
    own = {name: tensor.clone() for name, tensor in target.fc.state_dict().items()}
    assert "matched by the names of the classes" in load_weights(target, known, classes=classes)
    images = torch.randn(2, 3, 32, 32)
    for before, after in zip(source.students.members, target.students.members, strict=True):
        expected = before.eval()(images)[:, [NAMES.index(name) for name in classes]]
        assert torch.allclose(after.eval()(images), expected, atol=1e-6)
    assert all(torch.equal(target.fc.state_dict()[name], tensor) for name, tensor in own.items())


def test_other_classes_are_refused_by_both_names_and_a_new_head_is_the_way_out():
    source, target, untouched = made(seed=1), made(), made()
    known = replace(weights_of(source), classes=NAMES)
    renamed = [*NAMES[:9], "tom"]
    message = r"weights=FILE: has 10 classes \(class 0, class 1, class 2, ...\), the data 10 classes \(class 0, .*\); "
    with pytest.raises(OptionError, match=message + r"weights_head=new .*\(tom is not in the file\)"):
        load_weights(target, known, classes=renamed)
    assert same(target, untouched)
    load_weights(target, known, new_head=True, classes=renamed)
    assert torch.equal(source.students.members[0].conv1.weight, target.students.members[0].conv1.weight)


def test_classes_that_do_not_fit_the_file_s_own_classifier_are_refused():
    with pytest.raises(OptionError, match="has 12 classes and a classifier of another size"):
        load_weights(made(), replace(weights_of(made()), classes=[*NAMES, "a", "b"]), classes=NAMES)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (made(3), "holds 3 students; num_stu=2"),
        (made(classes=7), "has 7 classes, the data 10; weights_head=new keeps the bodies only"),
        (made(conv=Group(4)), r"another architecture: layer1.0.conv1.spatial.weight is \(16, 4, 3, 3\) in the file"),
    ],
)
def test_other_mismatches_are_refused_and_nothing_changes(source, reason):
    target, untouched = made(), made()
    with pytest.raises(OptionError, match=f"weights=FILE: {reason}"):
        load_weights(target, weights_of(source))
    assert same(target, untouched)


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 200_000, '{"split": 3}', '{"classes": "ab"}', '{"classes": [1]}'])
def test_metadata_of_a_wrong_kind_are_one_line(tmp_path, text):
    save_file({"a": torch.ones(1)}, tmp_path / "w.safetensors", metadata={"odcheap": text})
    with pytest.raises(OptionError, match=r"weights=.*w.safetensors: ") as refused:
        read_weights(tmp_path / "w.safetensors")
    assert "\n" not in str(refused.value)


TARGET = made()
TENSORS = st.sampled_from([torch.ones(1), torch.ones(7, 64), torch.tensor(3)])
ODD_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | TENSORS,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), below, max_size=3),
    max_leaves=5,
)
ODD_NAMES = st.sampled_from(
    [STUDENT, f"{STUDENT}0", f"{STUDENT}0.fc.weight", f"{STUDENT}x.fc.bias", "method.fc.weight", "resnet_m1.fc.weight"]
)
ODD_STATES = st.dictionaries(ODD_NAMES | st.integers() | st.text(max_size=3), TENSORS | ODD_VALUES, max_size=4)


@given(
    content=st.fixed_dictionaries(
        {}, optional={"state_dict": ODD_STATES | ODD_VALUES, "odcheap": ODD_VALUES, "model": ODD_VALUES}
    )
)
@example({"state_dict": None})
@example({"state_dict": {f"{STUDENT}0.fc.weight": 3}})
@example({"state_dict": {f"{STUDENT}0.fc.weight": torch.ones(7, 64)}, "odcheap": {"classes": ["a"]}})
@example({"state_dict": {f"{STUDENT}0.fc.weight": torch.ones(7, 64)}, "odcheap": 3})
@example({"state_dict": {f"{STUDENT}0.fc.weight": torch.ones(7, 64)}, "odcheap": {"classes": 3}})
@example({"state_dict": {"resnet_m1.fc.weight": torch.tensor(3)}})
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_content_of_a_file_of_weights_is_loaded_or_is_one_line(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    for call in (
        lambda: load_weights(TARGET, read_weights(tmp_path / "w.pt"), classes=NAMES),
        lambda: load_reference(tmp_path / "w.pt"),
    ):
        with pytest.raises(OptionError) as refused:
            call()
        assert "\n" not in str(refused.value)
    network = torch.nn.Linear(2, 7)
    with pytest.raises(OptionError) as refused:
        load_pretrained(network, str(tmp_path / "w.pt"), 7)
    assert "\n" not in str(refused.value)
