import numpy as np
import pytest
import torch
from methods.formulas import CLASSES, DISTANCES, ce, check, logits, reached, softmax, students, terms

from odcheap.layers.cheap_conv import Standard
from odcheap.methods.kd import OfflineDistillation
from odcheap.methods.teacher import Teacher, TeacherEnsemble
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


def several(temperature=4.0, **about):
    torch.manual_seed(0)
    return TeacherEnsemble(
        [teacher(**(about | {"history": {"train_seconds": 2.0 + k}})) for k in range(3)], temperature
    )


def test_several_teachers_give_the_mean_of_their_softened_predictions():
    given = several()
    images = torch.randn(4, 3, 8, 8)
    each = [softmax(member(images).double().numpy(), 4.0) for member in given.teachers]
    found = given(images)
    np.testing.assert_allclose(softmax(found.double().numpy(), 4.0), sum(each) / 3, rtol=1e-5)
    assert not found.requires_grad
    method = OfflineDistillation(students(2), given)
    assert reached(method, "kl_1") == {"student_1"}
    assert method.frozen_networks() == [given]
    state = method.state_dict()
    assert [name for name in state if name.startswith("teacher")] == [
        f"teacher.members.{k}._extra_state" for k in range(3)
    ]
    with pytest.raises(OptionError, match="is not the teacher that the run was started with"):
        OfflineDistillation(students(2), TeacherEnsemble(given.teachers[::-1], 4.0)).load_state_dict(state)


def test_another_number_of_teachers_is_refused_by_name():
    one, three = (OfflineDistillation(students(1), given) for given in (teacher(path="a"), several(path="b")))
    with pytest.raises(OptionError, match="^method.teacher_weights=a: names 1 teacher; there were 3 when the run was"):
        one.load_state_dict(three.state_dict())
    line = r"^method.teacher_weights=\[b,b,b\]: names 3 teachers; there was 1 when the run was started$"
    with pytest.raises(OptionError, match=line):
        three.load_state_dict(one.state_dict())


def test_certain_teachers_of_different_classes_stay_finite():
    class Certain(torch.nn.Module):
        def __init__(self, label):
            super().__init__()
            self.logits = 1e4 * torch.eye(CLASSES)[label]

        def forward(self, images):
            return self.logits.expand(len(images), -1)

    given = TeacherEnsemble([Teacher(Certain(k), (HALF, HALF), HALF, HALF, 8) for k in (0, 1)], 4.0)
    found = given(torch.zeros(2, 3, 8, 8))
    assert found.isfinite().all()
    torch.testing.assert_close((found[0] / 4).softmax(-1)[:2], torch.tensor([0.5, 0.5]))


def test_what_is_known_of_several_teachers():
    """Their costs are added up, and only a split that all of them had counts."""
    assert several().history == {"train_seconds": 9.0, "training_macs": None}
    method = OfflineDistillation(students(1), several(split="abc", classes=["a", "b"]))
    assert not method.may_have_seen("abc")
    with pytest.raises(OptionError, match="the teacher's classes are a, b"):
        method.check_classes(["b", "a"])
    mixed = TeacherEnsemble([teacher(split="abc"), teacher(split="def")], 4.0)
    assert OfflineDistillation(students(1), mixed).may_have_seen("abc")
    assert sum(p.numel() for p in mixed.network.parameters()) == 2 * sum(
        p.numel() for p in teacher().network.parameters()
    )


def test_the_feature_term_of_several_teachers_is_the_mean():
    given, images = several(), torch.randn(4, 3, 8, 8)
    own = students(2).eval()
    found = OfflineDistillation(own, given, feature="attention")(images)["feature_distances"]
    each = [OfflineDistillation(own, member, feature="attention")(images) for member in given.teachers]
    torch.testing.assert_close(found, sum(outputs["feature_distances"] for outputs in each) / 3)


def test_a_teacher_of_the_same_split_has_not_seen_the_held_out_images():
    assert not OfflineDistillation(students(1), teacher(split="abc")).may_have_seen("abc")
    assert OfflineDistillation(students(1), teacher(split="abc")).may_have_seen("other")
    assert OfflineDistillation(students(1), teacher()).may_have_seen("abc")


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_alpha_is_a_share(alpha):
    with pytest.raises(OptionError, match=f"method.alpha={alpha}: must be a number, 0 or more and at most 1"):
        OfflineDistillation(students(1), teacher(), alpha=alpha)
