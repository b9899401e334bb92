import numpy as np
import pytest
import torch
from methods.formulas import ce, check, logits, reached, soft, softmax, students, terms

from odcheap.methods.one import NativeEnsemble


@pytest.mark.parametrize("num_stu", [2, 4])
def test_the_loss_equals_the_paper_s_formula(num_stu):
    z, teacher = logits(num_stu), logits(seed=1)
    expected = {f"L_ce_{k}": ce(z[k]) for k in range(num_stu)} | {"L_ce_e": ce(teacher)}
    expected |= {f"L_kl_{k}": soft(z[k], teacher, 3) for k in range(num_stu)}
    check(terms(NativeEnsemble(students(num_stu)), student_logits=z, teacher_logits=teacher), expected)


def test_the_teacher_is_the_gate_s_mixture_of_logits():
    method = NativeEnsemble(students()).eval()
    for p in method.gate.parameters():
        torch.nn.init.normal_(p)
    images = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        found = method(images)
        pooled = torch.cat([s.features(images).mean((2, 3)) for s in method.students.members], 1).numpy()
        linear, norm = method.gate[0], method.gate[1]
        scores = pooled @ linear.weight.numpy().T + linear.bias.numpy()
        scores = scores / np.sqrt(1 + norm.eps) * norm.weight.numpy() + norm.bias.numpy()
    gates = softmax(np.maximum(scores, 0))
    expected = sum(gates[:, k, None] * found["student_logits"][k].numpy() for k in range(3))
    np.testing.assert_allclose(found["teacher_logits"], expected, rtol=1e-4, atol=1e-5)


def test_gate_and_teacher_learn_from_the_labels_alone():
    method = NativeEnsemble(students())
    everybody = {"student_0", "student_1", "student_2", "gate"}
    assert reached(method, "L_ce_e") == everybody
    assert reached(method, "L_kl_1") == {"student_1"}


def test_the_imitation_grows():
    z, teacher = logits(2), logits(seed=1)
    method = NativeEnsemble(students(2))
    method.start_epoch(0, 300)
    weak = terms(method, student_logits=z, teacher_logits=teacher)
    method.start_epoch(80, 300)
    full = terms(method, student_logits=z, teacher_logits=teacher)
    assert weak["L_kl_0"] == pytest.approx(np.exp(-5) * full["L_kl_0"], rel=1e-6)
    assert weak["L_ce_0"] == full["L_ce_0"]
