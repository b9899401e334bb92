import numpy as np
import pytest
import torch
from methods.formulas import IMAGES, ce, check, kl, logits, reached, softmax, students, terms

from odcheap.methods.okddip import DiversePeers


@pytest.mark.parametrize("num_stu", [2, 3, 4])
def test_the_loss_equals_the_paper_s_formula(num_stu):
    z, peers = logits(num_stu), num_stu - 1
    attention = softmax(np.random.default_rng(1).normal(size=(IMAGES, peers, peers)))
    q = softmax(z, 3)
    expected = {f"L_gt_{k}": ce(z[k]) for k in range(num_stu)}
    for k in range(peers):
        aim = sum(attention[:, k, b, None] * q[b] for b in range(peers))
        expected[f"L_dis1_{k}"] = 9 * kl(aim, q[k])
    expected["L_dis2"] = 9 * kl(q[:-1].mean(0), q[-1])
    found = terms(DiversePeers(students(num_stu)), student_logits=z, teacher_logits=None, attention=attention)
    check(found, expected)


def test_attention_is_between_the_peers_features_image_by_image():
    method = DiversePeers(students(3)).eval()
    images = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        found = method(images)
        pooled = [s.features(images).mean((2, 3)).numpy() for s in method.students.members[:2]]
    query, key = (layer.weight.detach().numpy() for layer in (method.query, method.key))
    for n in range(4):
        scores = [[(query @ pooled[a][n]) @ (key @ pooled[b][n]) for b in range(2)] for a in range(2)]
        np.testing.assert_allclose(found["attention"][n], softmax(np.array(scores)), rtol=1e-4)


def test_the_teacher_is_the_mean_prediction_of_the_peers():
    method = DiversePeers(students(4)).eval()
    with torch.no_grad():
        found = method(torch.randn(4, 3, 8, 8))
    expected = (found["student_logits"][:3] / 3).softmax(-1).mean(0)
    torch.testing.assert_close((found["teacher_logits"] / 3).softmax(-1), expected)


def test_peers_and_attention_learn_through_the_targets_and_the_leader_from_all():
    method = DiversePeers(students(4))
    assert reached(method, "L_dis1_0") == {"student_0", "student_1", "student_2", "query", "key"}
    assert reached(method, "L_dis2") == {"student_0", "student_1", "student_2", "student_3"}
