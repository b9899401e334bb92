import numpy as np
import pytest
import torch
from methods.formulas import CLASSES, IMAGES, TARGET, ce, check, logits, reached, soft, softmax, students, terms

from odcheap.methods.kdcl import CollaborativeLearning
from odcheap.utils.errors import OptionError


def min_logit(z):
    aim = np.empty((IMAGES, CLASSES))
    for n, c in enumerate(TARGET):
        for j in range(CLASSES):
            aim[n, j] = min(own[n, j] - own[n, c] for own in z)
    return aim


def naive(z):
    losses = [[-np.log(softmax(own)[n, c]) for own in z] for n, c in enumerate(TARGET)]
    return np.stack([z[int(np.argmin(losses[n])), n] for n in range(IMAGES)])


@pytest.mark.parametrize("num_stu", [2, 3, 4])
@pytest.mark.parametrize("soft_target", [min_logit, naive])
def test_the_loss_equals_the_paper_s_formula(num_stu, soft_target):
    z = logits(num_stu)
    expected = {f"L_CE_{k}": ce(z[k]) for k in range(num_stu)}
    expected |= {f"L_KD_{k}": 0.5 * soft(z[k], soft_target(z), 2) for k in range(num_stu)}
    name = soft_target.__name__.replace("_", "")
    method = CollaborativeLearning(students(num_stu), weight=0.5, soft_target=name)
    check(terms(method, student_logits=z), expected)


@pytest.mark.parametrize("name", ["minlogit", "naive"])
def test_the_soft_target_is_a_given(name):
    method = CollaborativeLearning(students(), soft_target=name)
    assert reached(method, "L_KD_2") == {"student_2"}


def test_mixed_labels_choose_the_student_by_their_cross_entropy_and_minlogit_refuses_them():
    z, random = logits(3), np.random.default_rng(5)
    labels = random.dirichlet(np.ones(CLASSES), IMAGES)
    losses = [-(labels * np.log(softmax(own))).sum(1) for own in z]
    aim = np.stack([z[k, n] for n, k in enumerate(np.argmin(losses, axis=0))])
    method = CollaborativeLearning(students(), soft_target="naive")
    method.check_soft_labels()
    outputs = {"student_logits": torch.from_numpy(z)}
    found = {name: value.item() for name, value in method.loss(outputs, torch.from_numpy(labels)).items()}
    for k in range(3):
        assert found[f"L_CE_{k}"] == pytest.approx(losses[k].mean())
        assert found[f"L_KD_{k}"] == pytest.approx(soft(z[k], aim, 2))
    with pytest.raises(OptionError, match="method.soft_target=minlogit: needs one label for each image, which augment"):
        CollaborativeLearning(students()).check_soft_labels()


def test_unknown_targets_are_refused():
    with pytest.raises(OptionError, match="method.soft_target=linear: must be one of minlogit, naive"):
        CollaborativeLearning(students(), soft_target="linear")
