"""Terms that compare feature maps, by themselves and in the methods that have them."""

import numpy as np
import pytest
import torch
from methods.formulas import CLASSES, reached, students
from methods.test_kd import teacher

from odcheap.data.base import Batch
from odcheap.layers.cheap_conv import Standard
from odcheap.methods.dml import DeepMutualLearning
from odcheap.methods.features import FeatureDistance
from odcheap.methods.kd import OfflineDistillation
from odcheap.methods.od import OnlineDistillation
from odcheap.methods.teacher import Teacher
from odcheap.models.cifar import CifarResNet, wide_resnet
from odcheap.training.train_step import EagerStep
from odcheap.utils.errors import OptionError

HALF = (0.5,) * 3


def maps(*channels, sides=(8, 4), seed=0):
    """Maps of two images."""
    random = np.random.default_rng(seed)
    return [random.normal(size=(2, c, side, side)) for c, side in zip(channels, sides, strict=True)]


def pooled(x, side):
    """A mean over squares of pixels."""
    step = x.shape[-1] // side
    return x.reshape(*x.shape[:2], side, step, side, step).mean((3, 5))


def attention(x):
    energy = (x**2).sum(1).reshape(len(x), -1)
    return energy / np.sqrt((energy**2).sum(1, keepdims=True))


def difference(a, b, feature):
    side = min(a.shape[-1], b.shape[-1])
    a, b = pooled(a, side), pooled(b, side)
    if feature == "attention":
        a, b = attention(a), attention(b)
    return ((a - b) ** 2).mean()


def largest(feature, *sides):
    return min(max(side) for side in sides) ** 2 if feature == "attention" else 1


def tensors(given):
    return [torch.from_numpy(m) for m in given]


@pytest.mark.parametrize("feature", ["attention", "l2"])
@pytest.mark.parametrize("sides", [(8, 4), (4, 2), (16, 8)])
def test_the_distance_equals_the_paper_s_formula(feature, sides):
    """Also where the maps of the teacher are smaller or larger."""
    own, target = [maps(3, 5, seed=k) for k in range(2)], maps(3, 5, sides=sides, seed=9)
    found = FeatureDistance(feature, [[3, 5]] * 2, [3, 5])([tensors(m) for m in own], tensors(target))
    expected = [sum(difference(a, b, feature) for a, b in zip(m, target, strict=True)) for m in own]
    expected = np.array(expected) * largest(feature, (8, 4), sides)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_other_channels_are_adapted_for_l2_only():
    assert not list(FeatureDistance("attention", [[3]], [4]).parameters())
    distance = FeatureDistance("l2", [[3, 5]], [4, 5]).double()
    assert [p.shape for p in distance.parameters()] == [(4, 3, 1, 1), (4,)]
    own, target = maps(3, 5), maps(4, 5, seed=1)
    weight, bias = (p.detach().numpy() for p in distance.parameters())
    adapted = np.einsum("oi,nihw->nohw", weight[..., 0, 0], own[0]) + bias[:, None, None]
    expected = difference(adapted, target[0], "l2") + difference(own[1], target[1], "l2")
    np.testing.assert_allclose(distance([tensors(own)], tensors(target)).item(), expected, rtol=1e-9)


@pytest.mark.parametrize("feature", ["attention", "l2"])
def test_students_imitate_the_mean_of_the_others(feature):
    own = [maps(3, 5, seed=0), maps(3, 5, seed=1), maps(3, 5, sides=(4, 2), seed=2)]
    found = FeatureDistance(feature, [[3, 5]] * 3, [3, 5]).compare_mutually([tensors(m) for m in own])
    for k in range(3):
        expected = 0.0
        for stage in range(2):
            side = (4, 2)[stage]
            shown = [pooled(m[stage], side) for m in own]
            if feature == "attention":
                shown = [attention(m) for m in shown]
            others = sum(m for j, m in enumerate(shown) if j != k) / 2
            expected += ((shown[k] - others) ** 2).mean() * largest(feature, (4, 2))
        np.testing.assert_allclose(found[k], expected, rtol=1e-9)


def test_maps_of_16_bits_are_compared_in_float32():
    own, target = ([m.bfloat16() for m in tensors(maps(3, 5, seed=k))] for k in (0, 1))
    distance = FeatureDistance("l2", [[3, 5]], [4, 5])
    with torch.autocast("cpu", torch.bfloat16):
        target = [torch.cat([target[0], target[0][:, :1]], 1), target[1]]
        found = distance([own], target)
        assert found.dtype == distance.compare_mutually([own, own]).dtype == torch.float32
    exact = distance([[m.float() for m in own]], [m.float() for m in target])
    assert torch.equal(found, exact)
    assert distance.bfloat16()([own], target).dtype == torch.float32  # trainer.precision=bf16-true


def test_maps_of_zeros_have_a_finite_gradient():
    zeros = torch.zeros(2, 3, 4, 4, requires_grad=True)
    FeatureDistance("attention", [[3]], [3])([[zeros]], [torch.ones(2, 3, 4, 4)]).sum().backward()
    assert zeros.grad.isfinite().all()


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


class Transformer(torch.nn.Module):
    """A convolution to patches, and layers without maps."""

    def __init__(self):
        super().__init__()
        self.patches, self.fc = torch.nn.Conv2d(3, 8, 4, 4), torch.nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.fc(self.patches(x).flatten(2).mean(2))


def test_networks_without_stages_are_refused():
    given = Teacher(Transformer(), (HALF, HALF), HALF, HALF, 8)
    line = "method.feature=attention: needs feature maps .* and Transformer has none"
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
    assert [call.name for call in method.teacher.stages.calls] == ["layer1", "layer2", "layer3"]
    assert not list(method.features.parameters())
    assert CifarResNet(8, Standard(), CLASSES).num_features == 64
