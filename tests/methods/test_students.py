import copy

import pytest
import torch
from methods.formulas import students
from methods.test_kd import teacher
from methods.test_losses import MAKERS

from odcheap.layers.cheap_conv import DW, Shift
from odcheap.methods.alone import Alone
from odcheap.methods.ffl import FeatureFusion
from odcheap.methods.kd import OfflineDistillation
from odcheap.methods.od import OnlineDistillation
from odcheap.methods.okddip import DiversePeers
from odcheap.methods.one import NativeEnsemble
from odcheap.methods.pcl import PeerCollaborativeLearning
from odcheap.methods.students import AveragedStudents, Students, check_run, run_on_streams, run_sequential
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


@pytest.mark.parametrize("run", [run_sequential, run_on_streams])
def test_each_student_may_have_a_view_of_its_own(run):
    students = Students(lambda: CifarResNet(8, DW(), 10), 2, seed=0, run=run).eval().double()
    views = torch.randn(2, 4, 3, 16, 16, dtype=torch.double)
    features, logits = students(views)
    for k in range(2):
        torch.testing.assert_close(logits[k], students.members[k](views[k]))
        torch.testing.assert_close(features[k], students.members[k].features(views[k]))


def test_a_run_on_streams_needs_a_gpu():
    with pytest.raises(OptionError, match="together=streams: needs a CUDA device; the run is on cpu"):
        check_run(run_on_streams, torch.device("cpu"))
    check_run(run_sequential, torch.device("cpu"))


def test_on_a_cpu_streams_are_one_after_another():
    """After training the costs are counted there."""
    students = Students(lambda: CifarResNet(8, DW(), 10), 2, seed=0, run=run_on_streams).eval()
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(students(images)[1], torch.stack([s(images) for s in students.members]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_streams_train_as_one_after_another_does():
    method = OnlineDistillation(Students(lambda: CifarResNet(14, DW(), 10), 3, seed=0)).double().cuda()
    images, target = torch.randn(8, 3, 16, 16).double().cuda(), torch.randint(10, (8,)).cuda()
    gradients = []
    for run in (run_sequential, run_on_streams):
        method.students.run = run
        method.zero_grad()
        method.loss(method(images), target)["loss"].backward()
        gradients.append([p.grad.clone() for p in method.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_students_of_different_shapes():
    """Student k has the weights that it has among students of its own shape; od joins maps of different channels."""
    builders = [lambda: CifarResNet(8, DW(), 10), lambda: CifarResNet(14, Shift(), 10, width=12)]
    students = Students(builders, 2, seed=0)
    assert torch.equal(students.members[0].fc.weight, made(2).members[0].fc.weight)
    assert (students.num_features, students.total_features, students.num_classes) == (64, 64 + 48, 10)
    for method in (OnlineDistillation, NativeEnsemble, FeatureFusion, PeerCollaborativeLearning, DiversePeers):
        outputs = method(students)(torch.randn(3, 3, 16, 16))
        assert outputs["student_logits"].shape == (2, 3, 10)
        assert outputs["teacher_logits"].shape == (3, 10)


def test_builders_that_do_not_fit_are_refused():
    one, other = (lambda: CifarResNet(8, DW(), 10)), (lambda: CifarResNet(8, DW(), 7))
    with pytest.raises(OptionError, match="num_stu=3: must be 2, the number of functions in `build`"):
        Students([one, one], 3, seed=0)
    with pytest.raises(OptionError, match=r"must make networks with equal numbers of classes, not \[10, 7\]"):
        Students([one, other], 2, seed=0)
    with pytest.raises(OptionError, match="build=.*must be a function"):
        Students([one, one()], 2, seed=0)
    network = CifarResNet(8, DW(), 10)
    with pytest.warns(UserWarning, match="the students start with equal weights"):
        Students([lambda: CifarResNet(8, Shift(), 10), *2 * [lambda: copy.deepcopy(network)]], 3, seed=0)


def test_peers_of_okddip_need_features_of_equal_length():
    wide, narrow = (lambda: CifarResNet(8, DW(), 10)), (lambda: CifarResNet(8, DW(), 10, width=12))
    DiversePeers(Students([wide, wide, narrow], 3, seed=0))  # the leader may differ
    with pytest.raises(OptionError, match=r"method=okddip: compares features of equal length, .* \[48, 64\] channels"):
        DiversePeers(Students([narrow, wide, wide], 3, seed=0))


def test_averages_follow_the_weights_after_each_step():
    """True means at first, then with the decay."""
    given = made(2).double()
    averages = AveragedStudents(given, average_decay=0.75)
    weight, average = given.members[1].fc.weight, averages.members[1].fc.weight
    expected = average.clone()
    for step in range(8):
        with torch.no_grad():
            weight.copy_(torch.full_like(weight, step**2))
        averages.update(given)
        decay = min(1 - 1 / (step + 1), 0.75)
        expected = decay * expected + (1 - decay) * step**2
        torch.testing.assert_close(average, expected)


def test_sixteen_bits_are_too_few_for_an_average():
    with pytest.raises(
        OptionError, match="trainer.precision=bfloat16: averages, which move by thousandths, need weights in 32 bits"
    ):
        AveragedStudents(few := made(2).bfloat16(), 0.9).update(few)


@pytest.mark.parametrize("decay", [-0.1, 1.0, "x", False])
def test_the_decay_is_below_one(decay):
    with pytest.raises(
        OptionError, match=f"method.average_decay={str(decay).lower()}: must be a number, 0 or more and below 1"
    ):
        AveragedStudents(made(2), decay)


def offline(given, **options):
    torch.manual_seed(0)
    return OfflineDistillation(given, teacher(), **options)


@pytest.mark.parametrize("make", [Alone, offline, *(m for m in MAKERS if m is not PeerCollaborativeLearning)])
def test_averages_on_request(make):
    """They follow the students and change nothing of what these learn."""
    torch.manual_seed(0)
    plain, averaged = make(students(2)).train(), make(students(2), average_decay=0.9).train()
    averaged.load_state_dict(plain.state_dict(), strict=False)
    images, target = torch.randn(4, 3, 8, 8), torch.arange(4)
    outputs = [method(images) for method in (plain, averaged)]
    losses = [method.loss(output, target)["loss"] for method, output in zip((plain, averaged), outputs, strict=True)]
    assert torch.equal(*losses)
    assert plain.candidates() == list(plain.students.members)
    assert averaged.candidates()[2:] == averaged.frozen_networks()[-2:] == list(averaged.averages.members)
    assert "average_logits" not in outputs[0]
    assert not outputs[1]["average_logits"].requires_grad
    with torch.no_grad():
        averaged.students.members[1].fc.bias.add_(1)
    averaged.after_step()  # the first one takes the weights as they are
    assert torch.equal(averaged.averages.members[1].fc.bias, averaged.students.members[1].fc.bias)
