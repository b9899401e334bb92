import numpy as np
import pytest
import torch
from methods.formulas import CLASSES, TARGET, ce, check, logits, reached, softmax, students, terms

from odcheap.methods.alone import Alone
from odcheap.methods.base import Method
from odcheap.methods.od import OnlineDistillation
from odcheap.utils.errors import OptionError


def test_the_loss_is_that_of_the_labels():
    z = logits(3)
    check(terms(Alone(students()), student_logits=z), {f"ce_{k}": ce(z[k]) for k in range(3)})


@pytest.mark.parametrize("make", [Alone, OnlineDistillation])
def test_smoothed_labels(make):
    """A part of the label is divided among all classes."""
    z, smoothing = logits(2), 0.2
    label = (1 - smoothing) * np.eye(CLASSES)[TARGET] + smoothing / CLASSES
    method = make(students(2), label_smoothing=smoothing)
    found = terms(method, student_logits=z, teacher_logits=z[0])
    for k in range(2):
        name = f"ce_{k}" if make is Alone else f"ce_student_{k}"
        assert found[name] == pytest.approx(-(label * np.log(softmax(z[k]))).sum(1).mean())
    if make is OnlineDistillation:
        assert found["ce_teacher"] == pytest.approx(found["ce_student_0"])
    with pytest.raises(OptionError, match="method.label_smoothing=1: must be a number, 0 or more and below 1"):
        make(students(2), label_smoothing=1)


def test_each_term_reaches_its_own_student_only():
    method = Alone(students())
    assert [reached(method, f"ce_{k}") for k in range(3)] == [{"student_0"}, {"student_1"}, {"student_2"}]


def trained(num_stu, drawing):
    """Student 1's weights after some steps, where these students draw random numbers."""
    method = Alone(students(num_stu))
    for k in drawing:
        layer = method.students.members[k].layer1
        layer.register_forward_hook(lambda module, given, out: torch.dropout(out, 0.5, module.training))
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1, momentum=0.9)
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for step in range(3):
        torch.manual_seed(step)
        optimizer.zero_grad()
        method.loss(method(images), torch.arange(8) % 5)["loss"].backward()
        optimizer.step()
    return method.students.members[1].state_dict()


@pytest.mark.parametrize(("one", "other"), [((2, ()), (3, ())), ((2, (1,)), (2, (0, 1))), ((2, (1,)), (3, (0, 1, 2)))])
def test_a_student_learns_the_same_whoever_is_beside_it(one, other):
    """Also where it draws random numbers, and the student before it draws some or none."""
    found, expected = trained(*one), trained(*other)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_random_numbers_differ_between_students_and_steps():
    method = Alone(students(2))
    method.students.members[1].load_state_dict(method.students.members[0].state_dict())
    for member in method.students.members:
        member.layer1.register_forward_hook(lambda module, given, out: torch.dropout(out, 0.5, module.training))
    images = torch.randn(4, 3, 8, 8)
    first, second = (method(images)["student_logits"] for _ in range(2))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], second[0])


def test_gradients_are_clipped_student_by_student():
    method: Method = Alone(students())
    parts = method.clip_groups()
    assert [len(part) for part in parts] == [len(list(s.parameters())) for s in method.students.members]
    assert parts[1][0] is next(method.students.members[1].parameters())
