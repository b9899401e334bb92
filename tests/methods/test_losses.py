import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from methods import formulas
from methods.formulas import CLASSES, DISTANCES, IMAGES, TARGET, reached, softmax, students

from odcheap.layers.cheap_conv import DW
from odcheap.methods.dml import DeepMutualLearning
from odcheap.methods.ffl import FeatureFusion
from odcheap.methods.kdcl import CollaborativeLearning
from odcheap.methods.lmcl import LayerwiseMutualContrastiveLearning
from odcheap.methods.losses import DistillationLoss, FeatureDistance, soft_kl
from odcheap.methods.od import OnlineDistillation
from odcheap.methods.okddip import DiversePeers
from odcheap.methods.one import NativeEnsemble
from odcheap.methods.pcl import PeerCollaborativeLearning
from odcheap.methods.students import Students
from odcheap.models.cifar import CifarResNet
from odcheap.utils.errors import OptionError

logits = arrays(np.float64, (3, 5), elements=st.floats(-20, 20))


@given(student=logits, teacher=logits, temperature=st.floats(0.5, 20))
def test_soft_kl_is_kl_of_teacher_from_student(student, teacher, temperature):
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    expected = (p * (np.log(p) - np.log(q))).sum(1).mean()
    found = soft_kl(torch.from_numpy(student), torch.from_numpy(teacher), temperature, "batchmean")
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    by_element = soft_kl(torch.from_numpy(student), torch.from_numpy(teacher), temperature, "mean")
    assert by_element.item() == pytest.approx(expected / 5, rel=1e-9, abs=1e-12)


def test_both_sides_get_the_gradient_of_the_closed_form():
    student = torch.randn(4, 6, dtype=torch.double, requires_grad=True)
    teacher = torch.randn(4, 6, dtype=torch.double, requires_grad=True)
    soft_kl(student, teacher, 4.0, "batchmean").backward()
    p, q = softmax(teacher.detach().numpy() / 4), softmax(student.detach().numpy() / 4)
    np.testing.assert_allclose(student.grad.numpy(), (q - p) / 4 / 4, atol=1e-12)
    ratio = np.log(p / q)
    np.testing.assert_allclose(
        teacher.grad.numpy(), p * (ratio - (p * ratio).sum(1, keepdims=True)) / 4 / 4, atol=1e-12
    )


def test_huge_logits_stay_finite():
    assert soft_kl(torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]]), 1.0).isfinite()


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(OptionError, match="method.temperature=.*: must be a number, 1e-06 or more"):
        soft_kl(torch.zeros(1, 2), torch.zeros(1, 2), temperature)


def test_unknown_reduction_is_refused():
    with pytest.raises(OptionError, match="reduction=sum: must be one of batchmean, mean"):
        soft_kl(torch.zeros(1, 2), torch.zeros(1, 2), 1.0, "sum")


WEIGHTED = [("kl", None), ("standardized", None), *[(name, w) for name in ("dkd", "dist") for w in (None, [0.5, 3.0])]]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("name", "weights"), WEIGHTED)
def test_each_distance_equals_the_paper_s_formula(name, weights, temperature):
    """For a single student, for several, and for each pair of them."""
    z, t = formulas.logits(3), formulas.logits(2, seed=1)
    distance, target = DistillationLoss(name, temperature, weights), torch.from_numpy(TARGET)
    expected = [[DISTANCES[name](a, b, temperature, *(weights or ())) / distance.factor for a in z] for b in t]
    assert distance.factor == (1 if name == "dist" else temperature**2)
    students, teachers = torch.from_numpy(z), torch.from_numpy(t)
    np.testing.assert_allclose(distance(students[0], teachers[1], target), expected[1][0], rtol=1e-9)
    np.testing.assert_allclose(distance(students, teachers[0], target), expected[0], rtol=1e-9)
    np.testing.assert_allclose(distance(students[None], teachers[:, None], target), expected, rtol=1e-9)


def test_the_usual_kl_is_that_of_the_decoupled_parts():
    z, t, target = (torch.from_numpy(x) for x in (formulas.logits(), formulas.logits(seed=1), TARGET))
    rest = 1 - t.softmax(-1)[range(IMAGES), target]
    found = 0.0
    for n in range(IMAGES):
        weights = [1.0, rest[n].item()]
        found += DistillationLoss("dkd", 1.0, weights)(z[n : n + 1], t[n : n + 1], target[n : n + 1]).item() / IMAGES
    assert found == pytest.approx(soft_kl(z, t, 1.0).item(), rel=1e-9)


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize(("scale", "temperature"), [(1e4, 1.0), (1.0, 1e-6), (1.0, 1e6), (0.0, 4.0), (1e-30, 1.0)])
def test_distances_and_their_gradients_are_finite_in_float32(name, scale, temperature):
    """For predictions that are certain, equal or constant."""
    students, teacher = (scale * torch.randn(*shape, generator=torch.manual_seed(0)) for shape in ((2, 4, 3), (4, 3)))
    distance = DistillationLoss(name, temperature)
    for pair in ((students, teacher), (students, students.flip(0)), (students[:, :1], teacher[:1])):
        student, taught_by = (tensor.clone().requires_grad_() for tensor in pair)
        found = distance(student, taught_by, torch.arange(student.shape[-2]) % 3)
        found.sum().backward()
        for tensor in (found, student.grad, taught_by.grad):
            assert tensor.isfinite().all()


def test_a_certain_teacher_still_teaches_the_other_classes():
    """1 - p is 0 in float32, and its logarithm is computed all the same."""
    teacher, target = torch.tensor([[40.0, 1.0, 0.0]]), torch.tensor([0])
    student = torch.tensor([[2.0, 0.0, 1.0]], requires_grad=True)
    found = DistillationLoss("dkd", 1.0, [0.0, 1.0])(student, teacher, target)
    p = softmax(np.array([1.0, 0.0]))
    assert found.item() == pytest.approx((p * np.log(p / p[::-1])).sum(), rel=1e-5)


MAKERS = [
    OnlineDistillation,
    DeepMutualLearning,
    CollaborativeLearning,
    FeatureFusion,
    LayerwiseMutualContrastiveLearning,
    DiversePeers,
    NativeEnsemble,
    PeerCollaborativeLearning,
]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("name", ["dkd", "dist", "standardized"])
def test_a_method_has_the_distance_in_place_of_the_kl(make, name):
    """Terms that compare predictions change, have its name where they had that of the KL, and reach the same."""
    given = students(3)
    kl, other = make(given), make(given, loss=name, loss_weights=None)
    other.load_state_dict(kl.state_dict())
    images, target = torch.randn(10, 3, 8, 8), torch.arange(10) % CLASSES
    found, expected = (method.loss(method(images), target) for method in (other, kl))
    for term, value in expected.items():
        own = term.replace("kl", name).replace("KL", name.upper())
        is_other = "_ce" in term or "cl_" in term or term.startswith(("ce_", "L_CE", "L_C_", "L_gt"))
        assert torch.equal(found.pop(own), value) == is_other, own
        if not is_other and not term.endswith(("loss", "_1", "_2")):
            assert reached(other, own) == reached(kl, term), own
    assert not found


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"loss": "js"}, "method.loss=js: must be one of kl, dkd, dist, standardized"),
        ({"loss": "dkd", "loss_weights": [1.0]}, "method.loss_weights=.*: must be a list of entries"),
        ({"loss": "dist", "loss_weights": [1.0, -1.0]}, "method.loss_weights=.*0 or more"),
        ({"loss_weights": [1.0, 2.0]}, r"method.loss_weights=\[1.0, 2.0\]: must be null with method.loss=kl"),
        (
            {"loss": "dist", "kl_reduction": "mean"},
            "method.kl_reduction=mean: must be batchmean with method.loss=dist; mean belongs to method.loss=kl",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(options, line):
    with pytest.raises(OptionError, match=line):
        OnlineDistillation(students(2), **options)


def test_the_decoupled_loss_needs_labels():
    mixed = torch.full((4, 3), 1 / 3)
    with pytest.raises(OptionError, match="method.loss=dkd: needs one label for each image"):
        DistillationLoss("dkd", 1.0)(torch.zeros(2, 4, 3), torch.zeros(4, 3), mixed)
    for name in ("kl", "dist", "standardized"):
        assert DistillationLoss(name, 1.0)(torch.eye(3), torch.eye(3), mixed).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("make", MAKERS)
def test_standardized_logits_of_two_classes_are_refused_since_they_have_no_gradient(make):
    student = torch.tensor([[2.0, -1.0], [0.5, 3.0]], requires_grad=True)
    DistillationLoss("standardized", 4.0)(student, torch.tensor([[1.0, 3.0], [0.0, 7.0]]), torch.zeros(2)).backward()
    torch.testing.assert_close(student.grad, torch.zeros(2, 2), rtol=0, atol=1e-6)
    two = Students(lambda: CifarResNet(8, DW(), 2), 2, seed=0)
    make(two, loss="dist")
    with pytest.raises(OptionError, match="method.loss=standardized: has no effect with two classes"):
        make(two, loss="standardized")


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
