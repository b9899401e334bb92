import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from odcheap.methods.losses import soft_kl
from odcheap.utils.errors import OptionError


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


logits = arrays(np.float64, (3, 5), elements=st.floats(-20, 20))


@given(student=logits, teacher=logits, temperature=st.floats(0.5, 20))
def test_soft_kl_is_kl_of_teacher_from_student(student, teacher, temperature):
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    expected = (p * (np.log(p) - np.log(q))).sum(1).mean()
    found = soft_kl(torch.from_numpy(student), torch.from_numpy(teacher), temperature, "batchmean")
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    by_element = soft_kl(torch.from_numpy(student), torch.from_numpy(teacher), temperature, "mean")
    assert by_element.item() == pytest.approx(expected / 5, rel=1e-9, abs=1e-12)


def test_both_sides_get_the_gradient_of_the_closed_form():
    student = torch.randn(4, 6, dtype=torch.double, requires_grad=True)
    teacher = torch.randn(4, 6, dtype=torch.double, requires_grad=True)
    soft_kl(student, teacher, 4.0, "batchmean").backward()
    p, q = softmax(teacher.detach().numpy() / 4), softmax(student.detach().numpy() / 4)
    np.testing.assert_allclose(student.grad.numpy(), (q - p) / 4 / 4, atol=1e-12)
    ratio = np.log(p / q)
    np.testing.assert_allclose(
        teacher.grad.numpy(), p * (ratio - (p * ratio).sum(1, keepdims=True)) / 4 / 4, atol=1e-12
    )


def test_huge_logits_stay_finite():
    assert soft_kl(torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]]), 1.0).isfinite()


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(OptionError, match="method.temperature=.*: must be a number, 1e-06 or more"):
        soft_kl(torch.zeros(1, 2), torch.zeros(1, 2), temperature)


def test_unknown_reduction_is_refused():
    with pytest.raises(OptionError, match="reduction=sum: must be one of batchmean, mean"):
        soft_kl(torch.zeros(1, 2), torch.zeros(1, 2), 1.0, "sum")
