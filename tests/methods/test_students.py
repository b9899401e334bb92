import pytest
import torch

from odcheap.layers.cheap_conv import DW
from odcheap.methods.students import Students
from odcheap.models.cifar import CifarResNet
from odcheap.utils.errors import OptionError


def made(num_stu: int, seed: int = 0) -> Students:
    return Students(lambda: CifarResNet(8, DW(), 10), num_stu, seed)


def test_student_k_starts_from_seed_and_k_alone():
    few, many, other = made(2), made(4), made(2, seed=1)
    for k in range(2):
        assert torch.equal(few.members[k].conv1.weight, many.members[k].conv1.weight)
        assert not torch.equal(few.members[k].conv1.weight, other.members[k].conv1.weight)


def test_students_differ():
    weights = [s.conv1.weight for s in made(4).members]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


def test_making_students_leaves_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    made(2)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("num_stu", [0, -1, "two", 1.5])
def test_num_stu_must_be_a_count(num_stu):
    with pytest.raises(OptionError, match=f"num_stu={num_stu}: must be"):
        made(num_stu)
