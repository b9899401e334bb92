import math

import pytest
import torch
from methods.formulas import CLASSES, Patches, reached, students
from methods.test_kd import HALF, teacher

from odcheap.data.base import Batch
from odcheap.layers.cheap_conv import Standard
from odcheap.methods.base import RampUp
from odcheap.methods.dml import DeepMutualLearning
from odcheap.methods.kd import OfflineDistillation
from odcheap.methods.losses import FeatureDistance
from odcheap.methods.od import OnlineDistillation
from odcheap.methods.teacher import Teacher
from odcheap.models.cifar import CifarResNet, wide_resnet
from odcheap.training.train_step import EagerStep
from odcheap.utils.errors import OptionError


def test_the_ramp_grows_over_its_part_of_the_epochs():
    ramp = RampUp(80 / 300)
    assert ramp.weight == 1
    weight = ramp.weight
    for epoch in (0, 20, 40, 79, 80, 299):
        ramp.start_epoch(epoch, 300)
        expected = math.exp(-5 * (1 - min(epoch, 80) / 80) ** 2)
        assert ramp.weight.item() == pytest.approx(expected, rel=1e-6)
    assert ramp.weight is weight  # in place: a recorded step reads it there
    ramp.start_epoch(1, 15)
    assert ramp.weight.item() == pytest.approx(math.exp(-5 * (1 - 1 / 4) ** 2), rel=1e-6)


def test_without_length_there_is_no_ramp():
    ramp = RampUp(0)
    ramp.start_epoch(0, 10)
    assert torch.equal(ramp.weight, torch.ones(()))


@pytest.mark.parametrize("length", [-0.1, 1.5])
def test_its_length_is_a_part_of_the_run(length):
    with pytest.raises(OptionError, match=f"method.ramp_up={length}: must be a number, 0 or more and at most 1"):
        RampUp(length)


def wide_teacher():
    return Teacher(wide_resnet(10, 2, CLASSES), (HALF, HALF), HALF, HALF, 16)


def offline(given, **options):
    return OfflineDistillation(given, wide_teacher(), **options)


@pytest.mark.parametrize("feature", ["attention", "l2"])
@pytest.mark.parametrize("make", [offline, DeepMutualLearning, OnlineDistillation])
def test_a_term_reaches_its_own_student_only(make, feature):
    """And, of kd and od, the convolutions that adapt its maps."""
    method = make(students(2), feature=feature, feature_weight=2.0)
    adapted = {"features"} if feature == "l2" and make is not DeepMutualLearning else set()
    assert [reached(method, f"{feature}_{k}") for k in range(2)] == [{"student_0"} | adapted, {"student_1"} | adapted]
    outputs = method(torch.randn(4, 3, 8, 8))
    found = method.loss(outputs, torch.arange(4))
    weighted = 2.0 * outputs["feature_distances"]
    torch.testing.assert_close(torch.stack([found[f"{feature}_{k}"] for k in range(2)]), weighted)
    torch.testing.assert_close(found["loss"], sum(value for name, value in found.items() if name != "loss"))
    assert all(isinstance(output, torch.Tensor | None) for output in outputs.values())


def test_which_maps_are_compared():
    """Those of the teacher's last stages, each student's own with the others', and the last with the fused one."""
    images = torch.randn(4, 3, 8, 8)
    method = offline(students(2), feature="attention").eval()
    network = method.teacher.network
    x = torch.nn.functional.interpolate(images, (16, 16), mode="bilinear", antialias=True)
    wide = [network.body[:2](x), network.body[:3](x), network.features(x)]
    own = [stage_maps(student, images) for student in method.students.members]
    expected = FeatureDistance("attention", [[0] * 3] * 2, [0] * 3)(own, wide)
    torch.testing.assert_close(method(images)["feature_distances"], expected, rtol=1e-4, atol=1e-7)

    method = DeepMutualLearning(students(2), feature="l2").eval()
    own = [stage_maps(student, images) for student in method.students.members]
    expected = sum(((a - b) ** 2).mean() for a, b in zip(*own, strict=True))
    torch.testing.assert_close(method(images)["feature_distances"], torch.stack([expected] * 2))

    method = OnlineDistillation(students(2), feature="attention", normalise=False).eval()
    own = [stage_maps(student, images)[-1:] for student in method.students.members]
    expected = FeatureDistance("attention", [[0]] * 2, [0])(own, [torch.cat([m[0] for m in own], 1)])
    torch.testing.assert_close(method(images)["feature_distances"], expected)


def stage_maps(network, images):
    x = network.bn1(network.conv1(images)).relu()
    first = network.layer1(x)
    second = network.layer2(first)
    return [first, second, network.layer3(second)]


@pytest.mark.parametrize("make", [offline, DeepMutualLearning, OnlineDistillation])
def test_without_the_option_nothing_is_recorded(make, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "register_forward_hook", pytest.fail)
    method = make(students(2))
    assert "feature_distances" not in method(torch.randn(2, 3, 8, 8))
    assert not [name for name in method.state_dict() if name.startswith("features")]


def test_adapting_convolutions_are_trained_and_clipped_with_their_student():
    method = offline(students(2), feature="l2")
    adapters = [set(group.parameters()) for group in method.features[0].adapters]
    assert all(adapters)
    assert all(own <= set(group) for own, group in zip(adapters, method.clip_groups(), strict=True))
    assert sum(map(len, method.clip_groups())) == len([p for p in method.parameters() if p.requires_grad])
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    before = [p.detach().clone() for p in method.features.parameters()]
    images = torch.randn(4, 3, 8, 8)
    EagerStep(method, optimizer)(Batch(images, torch.arange(4)))
    assert all(not torch.equal(a, b) for a, b in zip(before, method.features.parameters(), strict=True))


def test_networks_without_stages_are_refused():
    given = Teacher(Patches(), (HALF, HALF), HALF, HALF, 8)
    line = "method.feature=attention: needs feature maps .* and Patches has none"
    with pytest.raises(OptionError, match=line):
        OfflineDistillation(students(1), given, feature="attention")


def test_students_of_other_widths_are_refused_for_l2():
    given = students(2)
    given.members[1] = wide_resnet(10, 2, CLASSES)
    method = DeepMutualLearning(given, feature="attention")
    assert method(torch.randn(2, 3, 8, 8))["feature_distances"].shape == (2,)
    with pytest.raises(OptionError, match="method.feature=l2: needs students with equal numbers of channels"):
        DeepMutualLearning(given, feature="l2")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"feature": "fitnet"}, "method.feature=fitnet: must be one of attention, l2, or null"),
        ({"feature_weight": 3.0}, "method.feature_weight=3.0: has no feature term to weight"),
        ({"feature": "l2", "feature_weight": 0.0}, "method.feature_weight=0.0: must be a number, above 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, line):
    with pytest.raises(OptionError, match=line):
        DeepMutualLearning(students(2), **options)
    with pytest.raises(OptionError, match=line):
        OfflineDistillation(students(2), teacher(), **options)


def test_a_standard_teacher_of_the_same_kind_has_the_same_stages():
    method = OfflineDistillation(students(1), teacher(), feature="l2")
    assert [call.name for call in method.stages.calls[1]] == ["layer1", "layer2", "layer3"]
    assert not list(method.features.parameters())
    assert CifarResNet(8, Standard(), CLASSES).num_features == 64
