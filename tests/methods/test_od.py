import numpy as np
import pytest
import torch
from torch.nn import functional as F

from odcheap.layers.cheap_conv import DW
from odcheap.methods.od import OnlineDistillation
from odcheap.methods.students import Students
from odcheap.models.cifar import CifarResNet
from odcheap.utils.errors import OptionError


def made(num_stu=3, **options) -> OnlineDistillation:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return OnlineDistillation(Students(lambda: CifarResNet(8, DW(), 5), num_stu, seed=0), **options)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("num_stu", [1, 2, 4])
@pytest.mark.parametrize(("reduction", "divisor"), [("batchmean", 1), ("mean", 5)])
def test_loss_equals_the_paper_s_formula(num_stu, reduction, divisor):
    students, teacher = (
        np.random.default_rng(0).normal(size=(num_stu, 7, 5)),
        np.random.default_rng(1).normal(size=(7, 5)),
    )
    target = np.arange(7) % 5
    expected = -np.log(softmax(teacher)[range(7), target]).mean()
    p = softmax(teacher / 4)
    for student in students:
        expected -= np.log(softmax(student)[range(7), target]).mean()
        expected += 16 * (p * np.log(p / softmax(student / 4))).sum(1).mean() / divisor
    outputs = {"student_logits": torch.from_numpy(students), "teacher_logits": torch.from_numpy(teacher)}
    terms = made(num_stu, kl_reduction=reduction).loss(outputs, torch.from_numpy(target))
    assert terms["loss"].item() == pytest.approx(expected, rel=1e-12)
    assert sum(v for k, v in terms.items() if k != "loss").item() == pytest.approx(expected, rel=1e-12)
    assert len(terms) == 2 + 2 * num_stu


@pytest.mark.parametrize("detached", [False, True])
def test_kl_reaches_the_teacher_unless_detached(detached):
    method = made(detach_teacher=detached)
    terms = method.loss(method(torch.randn(4, 3, 8, 8)), torch.arange(4))
    sum(v for k, v in terms.items() if k.startswith("kl_")).backward()
    assert (method.fc.weight.grad is None) == detached
    assert (method.norm.weight.grad is None) == detached
    assert all(s.fc.weight.grad.any() for s in method.students.members)


def test_teacher_s_cross_entropy_teaches_the_students_bodies():
    method = made()
    method.loss(method(torch.randn(4, 3, 8, 8)), torch.arange(4))["ce_teacher"].backward()
    assert all(s.conv1.weight.grad.any() for s in method.students.members)
    assert all(s.fc.weight.grad is None for s in method.students.members)


def test_teacher_sees_every_student_once_and_in_order():
    method = made().eval()
    x = torch.randn(2, 3, 8, 8)
    outputs = method(x)
    maps = torch.cat([s.features(x) for s in method.students.members], 1)
    scale = method.norm.weight / (method.norm.running_var + method.norm.eps).sqrt()
    normed = (maps - method.norm.running_mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1)
    expected = F.linear(
        F.relu(normed + method.norm.bias.view(1, -1, 1, 1)).mean((2, 3)), method.fc.weight, method.fc.bias
    )
    torch.testing.assert_close(outputs["teacher_logits"], expected)
    for k, student in enumerate(method.students.members):
        torch.testing.assert_close(outputs["student_logits"][k], student(x))


def test_students_may_see_a_view_each():
    method = made().eval()
    views = torch.randn(3, 2, 3, 8, 8)
    for k, student in enumerate(method.students.members):
        torch.testing.assert_close(method(views)["student_logits"][k], student(views[k]))


@pytest.mark.parametrize("temperature", [0, -2])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(OptionError, match=f"method.temperature={temperature}: must be a number, 1e-06 or more"):
        made(temperature=temperature)
