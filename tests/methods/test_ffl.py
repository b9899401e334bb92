import pytest
import torch
from methods.formulas import ce, check, logits, reached, soft, students, terms
from torch.nn import functional as F

from odcheap.methods.ffl import FeatureFusion


@pytest.mark.parametrize("num_stu", [2, 4])
def test_the_loss_equals_the_paper_s_formula(num_stu):
    z, fused = logits(num_stu), logits(seed=1)
    expected = {f"L_ce_{k}": ce(z[k]) for k in range(num_stu)} | {"L_ce_f": ce(fused)}
    expected["L_kl_e"] = soft(fused, z.mean(0), 3)
    expected |= {f"L_kl_f_{k}": soft(z[k], fused, 3) for k in range(num_stu)}
    check(terms(FeatureFusion(students(num_stu)), student_logits=z, teacher_logits=fused), expected)


def test_the_fusion_sees_each_student_s_map():
    method = FeatureFusion(students(2)).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        x = torch.cat([s.features(images) for s in method.students.members], 1)
        depthwise, first, _, pointwise, *_ = method.fusion
        scale = 1 / (1 + first.eps) ** 0.5
        x = F.relu(scale * F.conv2d(x, depthwise.weight, padding=1, groups=128))
        x = F.relu(scale * torch.einsum("oi,nihw->nohw", pointwise.weight[..., 0, 0], x))
        torch.testing.assert_close(method(images)["teacher_logits"], method.fc(x.mean((2, 3))), rtol=1e-4, atol=1e-5)


def test_what_is_imitated_is_a_given():
    method = FeatureFusion(students(2))
    assert reached(method, "L_kl_f_1") == {"student_1"}
    assert reached(method, "L_kl_e") == {"student_0", "student_1", "fusion", "fc"}  # through the fused maps
    assert reached(method, "L_ce_f") == {"student_0", "student_1", "fusion", "fc"}
    method.zero_grad()
    images = torch.randn(10, 3, 8, 8)
    method.loss(method(images), torch.arange(10) % 5)["L_kl_e"].backward()
    assert all(student.fc.weight.grad is None for student in method.students.members)
