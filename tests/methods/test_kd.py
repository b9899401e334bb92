import pytest
import torch
from methods.formulas import CLASSES, DISTANCES, ce, check, logits, reached, students, terms

from odcheap.layers.cheap_conv import Standard
from odcheap.methods.kd import OfflineDistillation
from odcheap.methods.teacher import Teacher
from odcheap.models.cifar import CifarResNet
from odcheap.utils.errors import OptionError

HALF = (0.5,) * 3


def teacher(**about):
    return Teacher(CifarResNet(8, Standard(), CLASSES), (HALF, HALF), HALF, HALF, 8, **about)


@pytest.mark.parametrize(("alpha", "loss"), [(0.0, "kl"), (0.3, "kl"), (1.0, "kl"), (0.3, "dkd"), (0.3, "dist")])
def test_the_loss_equals_the_paper_s_formula(alpha, loss):
    z, example = logits(3), logits(seed=1)
    expected = {f"ce_{k}": (1 - alpha) * ce(z[k]) for k in range(3)}
    expected |= {f"{loss}_{k}": alpha * DISTANCES[loss](z[k], example, 4) for k in range(3)}
    method = OfflineDistillation(students(), teacher(), alpha=alpha, loss=loss)
    check(terms(method, student_logits=z, teacher_logits=example), expected)


def test_the_teacher_never_changes():
    method = OfflineDistillation(students(2), teacher())
    network = method.teacher.network
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    method.train()
    for _ in range(2):
        optimizer.zero_grad()
        method.loss(method(torch.randn(4, 3, 8, 8)), torch.arange(4))["loss"].backward()
        optimizer.step()
    assert not any(m.training for m in [*method.teacher.modules(), *network.modules()])
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    assert not [name for name in method.state_dict() if "network" in name]
    assert method.double().teacher.network.fc.weight.dtype == torch.double  # goes where the method goes


def test_the_kl_teaches_the_students():
    assert reached(OfflineDistillation(students(2), teacher()), "kl_1") == {"student_1"}


def test_a_teacher_of_the_same_split_has_not_seen_the_held_out_images():
    assert not OfflineDistillation(students(1), teacher(split="abc")).may_have_seen("abc")
    assert OfflineDistillation(students(1), teacher(split="abc")).may_have_seen("other")
    assert OfflineDistillation(students(1), teacher()).may_have_seen("abc")


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_alpha_is_a_share(alpha):
    with pytest.raises(OptionError, match=f"method.alpha={alpha}: must be a number, 0 or more and at most 1"):
        OfflineDistillation(students(1), teacher(), alpha=alpha)
