import pytest
import torch
from methods.formulas import ce, check, logits, reached, soft, students, terms

from odcheap.methods.alone import Alone
from odcheap.methods.pcl import PeerCollaborativeLearning
from odcheap.runs.load import Weights, load_weights, strip_prefix


@pytest.mark.parametrize("num_stu", [2, 3, 4])
def test_the_loss_equals_the_paper_s_formula(num_stu):
    z, teacher, averages = logits(num_stu), logits(seed=1), logits(num_stu, seed=2)
    expected = {f"L_ce_{k}": ce(z[k]) for k in range(num_stu)} | {"L_ce_t": ce(teacher)}
    expected |= {f"L_pe_{k}": soft(z[k], teacher, 3) for k in range(num_stu)}
    for k in range(num_stu):
        others = [soft(z[k], averages[j], 3) for j in range(num_stu) if j != k]
        expected[f"L_pm_{k}"] = sum(others) / len(others)
    method = PeerCollaborativeLearning(students(num_stu))
    found = terms(method, student_logits=z, teacher_logits=teacher, average_logits=averages)
    check(found, expected)


def test_what_is_imitated_is_a_given():
    method = PeerCollaborativeLearning(students())
    assert reached(method, "L_pe_0") == reached(method, "L_pm_0") == {"student_0"}
    assert reached(method, "L_ce_t") == {"student_0", "student_1", "student_2", "fc"}


def test_averages_begin_with_weights_that_were_loaded():
    method, other = PeerCollaborativeLearning(students(2)), Alone(students(2))
    with torch.no_grad():
        other.students.members[1].bn1.running_mean.fill_(3.0)
    content = {f"method.{name}": tensor for name, tensor in other.state_dict().items()}
    weights = Weights("FILE", [strip_prefix(content, f"method.students.members.{k}.") for k in range(2)], {}, None)
    load_weights(method, weights)
    assert torch.equal(method.averages.members[1].bn1.running_mean, torch.full((16,), 3.0))


def test_averages_keep_their_own_batch_norm_s_statistics():
    method = PeerCollaborativeLearning(students(2))
    before = method.students.members[0].bn1.running_mean.clone()
    with torch.no_grad():
        method.averages.members[0].conv1.weight.mul_(2)
    method(torch.randn(4, 3, 8, 8))
    student, average = (s.members[0].bn1 for s in (method.students, method.averages))
    assert not torch.equal(student.running_mean, before)
    torch.testing.assert_close(average.running_mean, 2 * student.running_mean)


def test_each_peer_and_its_average_see_the_same_view():
    method = PeerCollaborativeLearning(students(2)).eval()
    views = torch.randn(2, 4, 3, 8, 8)
    found = method(views)
    for k in range(2):
        torch.testing.assert_close(found["student_logits"][k], method.students.members[k](views[k]))
        torch.testing.assert_close(found["average_logits"][k], method.averages.members[k](views[k]))


def test_students_then_averages_are_to_be_chosen_from():
    method = PeerCollaborativeLearning(students(2))
    assert method.candidates() == [*method.students.members, *method.averages.members]
    assert not any(p.requires_grad for p in method.averages.parameters())
