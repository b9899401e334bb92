import pytest
import torch
from methods.formulas import CLASSES, ce, check, logits, reached, soft, students, terms
from torch.nn import functional as F

from odcheap.methods.od import OnlineDistillation
from odcheap.utils.errors import OptionError

STUDENTS = {"student_0", "student_1", "student_2"}


@pytest.mark.parametrize("num_stu", [1, 2, 4])
@pytest.mark.parametrize(("reduction", "divisor"), [("batchmean", 1), ("mean", CLASSES)])
def test_the_loss_equals_the_paper_s_formula(num_stu, reduction, divisor):
    z, teacher = logits(num_stu), logits(seed=1)
    expected = {"ce_teacher": ce(teacher)} | {f"ce_student_{k}": ce(z[k]) for k in range(num_stu)}
    expected |= {f"kl_student_{k}": soft(z[k], teacher, 4) / divisor for k in range(num_stu)}
    method = OnlineDistillation(students(num_stu), kl_reduction=reduction)
    check(terms(method, student_logits=z, teacher_logits=teacher), expected)


@pytest.mark.parametrize("detached", [False, True])
def test_the_kl_reaches_the_teacher_unless_detached(detached):
    method = OnlineDistillation(students(), detach_teacher=detached)
    assert reached(method, "kl_") == (STUDENTS if detached else STUDENTS | {"norm", "fc"})
    assert all(student.fc.weight.grad.any() for student in method.students.members)


def test_the_teacher_s_cross_entropy_teaches_the_students_bodies():
    method = OnlineDistillation(students())
    assert reached(method, "ce_teacher") == STUDENTS | {"norm", "fc"}
    assert all(student.fc.weight.grad is None for student in method.students.members)


def test_the_teacher_sees_every_student_once_and_in_order():
    method = OnlineDistillation(students()).eval()
    x = torch.randn(2, 3, 8, 8)
    outputs = method(x)
    maps = torch.cat([s.features(x) for s in method.students.members], 1)
    scale = method.norm.weight / (method.norm.running_var + method.norm.eps).sqrt()
    normed = (maps - method.norm.running_mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1)
    pooled = F.relu(normed + method.norm.bias.view(1, -1, 1, 1)).mean((2, 3))
    torch.testing.assert_close(outputs["teacher_logits"], F.linear(pooled, method.fc.weight, method.fc.bias))
    for k, student in enumerate(method.students.members):
        torch.testing.assert_close(outputs["student_logits"][k], student(x))


@pytest.mark.parametrize("temperature", [0, -2])
def test_the_temperature_must_be_positive(temperature):
    with pytest.raises(OptionError, match=f"method.temperature={temperature}: must be a number, 1e-06 or more"):
        OnlineDistillation(students(1), temperature=temperature)
