import pytest
from methods.formulas import ce, check, logits, reached, soft, students, terms

from odcheap.methods.dml import DeepMutualLearning
from odcheap.utils.errors import OptionError


@pytest.mark.parametrize("num_stu", [2, 3, 4])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_equals_the_paper_s_formula(num_stu, temperature):
    z = logits(num_stu)
    expected = {f"L_C_{k}": ce(z[k]) for k in range(num_stu)}
    for k in range(num_stu):
        others = [soft(z[k], z[j], temperature) for j in range(num_stu) if j != k]
        expected[f"D_KL_{k}"] = sum(others) / len(others)
    check(terms(DeepMutualLearning(students(num_stu), temperature), student_logits=z), expected)


def test_the_kl_teaches_the_one_that_imitates():
    method = DeepMutualLearning(students())
    assert [reached(method, f"D_KL_{k}") for k in range(3)] == [{"student_0"}, {"student_1"}, {"student_2"}]


def test_one_student_is_refused():
    with pytest.raises(OptionError, match="num_stu=1: must be 2 or more with method=dml"):
        DeepMutualLearning(students(1))
