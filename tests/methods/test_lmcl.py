import numpy as np
import pytest
import torch
from methods.formulas import (
    CLASSES,
    IMAGES,
    TARGET,
    Patches,
    ce,
    check,
    logits,
    reached,
    soft,
    softmax,
    students,
    terms,
)

from odcheap.methods.lmcl import LayerwiseMutualContrastiveLearning, Projection
from odcheap.methods.students import Students
from odcheap.models.backbone import StageRecorder
from odcheap.models.cifar import wide_resnet
from odcheap.utils.errors import OptionError

STAGES = 3
WEIGHTS = ("vcl_weight", "icl_weight", "soft_vcl_weight", "soft_icl_weight")


def vectors(num_stu, seed=3):
    x = np.random.default_rng(seed).normal(size=(num_stu, STAGES, IMAGES, 4))
    return x / np.sqrt((x**2).sum(-1, keepdims=True))


def distribution(anchor, others, i, tau):
    """By image j != i: the softmax of the products of image i's vector with those of the others."""
    images = [j for j in range(IMAGES) if j != i]
    return dict(zip(images, softmax(np.array([anchor[i] @ others[j] for j in images]), tau), strict=True))


def hard(anchor, others, tau):
    """-log p, averaged over an image's partners, then over the images that have one."""
    found = []
    for i in range(IMAGES):
        p = distribution(anchor, others, i, tau)
        partners = [j for j in p if TARGET[j] == TARGET[i]]
        if partners:
            found.append(np.mean([-np.log(p[j]) for j in partners]))
    return np.mean(found)


def kl(given, found, tau):
    """Of two distributions, each given by anchors and others, averaged over the images."""
    total = 0.0
    for i in range(IMAGES):
        p, q = distribution(*given, i, tau), distribution(*found, i, tau)
        total += sum(p[j] * np.log(p[j] / q[j]) for j in p) / IMAGES
    return total


OTHER = {"vcl_weight": 1.0, "icl_weight": 2.0, "soft_vcl_weight": 3.0, "soft_icl_weight": 4.0}
OTHER |= {"temperature": 2.0, "contrast_temperature": 0.5}


@pytest.mark.parametrize(("num_stu", "options"), [(2, {}), (3, OTHER)])
def test_the_loss_equals_the_paper_s_formula(num_stu, options):
    z, v = logits(num_stu), vectors(num_stu)
    method = LayerwiseMutualContrastiveLearning(students(num_stu), **options)
    temperature, tau = options.get("temperature", 3.0), options.get("contrast_temperature", 0.1)
    weights = {"vcl": 0.1, "icl": 0.1, "soft_vcl": 1.0, "soft_icl": 1.0}
    weights |= {name: options.get(f"{name}_weight", weight) for name, weight in weights.items()}
    expected = {f"L_ce_{k}": ce(z[k]) for k in range(num_stu)}
    for k in range(num_stu):
        others = [j for j in range(num_stu) if j != k]
        expected[f"L_kl_{k}"] = np.mean([soft(z[k], z[j], temperature) for j in others])
        own = dict.fromkeys(weights, 0.0)
        for a in range(STAGES):
            own["vcl"] += hard(v[k, a], v[k, a], tau)
            own["icl"] += np.mean([hard(v[k, a], v[j, a], tau) for j in others])
            own["soft_vcl"] += temperature**2 * np.mean(
                [kl((v[j, a], v[j, a]), (v[k, a], v[k, a]), tau * temperature) for j in others]
            )
            own["soft_icl"] += temperature**2 * np.mean(
                [kl((v[j, a], v[k, a]), (v[k, a], v[j, a]), tau * temperature) for j in others]
            )
        expected |= {f"L_{name}_{k}": weights[name] * value for name, value in own.items()}
    check(terms(method, student_logits=z, embeddings=v), expected)


def test_the_vectors_are_those_of_each_stage_s_last_map():
    method = LayerwiseMutualContrastiveLearning(students(2), embedding_size=6)
    images = torch.randn(4, 3, 8, 8)
    found = method(images)["embeddings"]
    assert found.shape == (2, STAGES, 4, 6)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(2, STAGES, 4))
    for k, student in enumerate(method.students.members):
        with StageRecorder([student], "method", "lmcl").record() as maps:
            student(images)
        for stage, own in enumerate(maps[0]):
            hidden, output = method.heads[k][stage].hidden, method.heads[k][stage].output
            x = output(hidden(own.mean((2, 3))).relu())
            torch.testing.assert_close(found[k, stage], x / x.norm(dim=-1, keepdim=True))


def test_whom_each_term_teaches():
    """What is imitated is given; the vectors of both students of a pair are changed."""
    method = LayerwiseMutualContrastiveLearning(students(3))
    assert reached(method, "L_kl_0") == {"student_0"}
    assert reached(method, "L_vcl_0") == reached(method, "L_soft_vcl_0") == {"student_0", "heads"}
    everybody = {"student_0", "student_1", "student_2", "heads"}
    assert reached(method, "L_icl_0") == reached(method, "L_soft_icl_0") == everybody


def test_terms_without_a_weight_are_left_out():
    for name in WEIGHTS:
        method = LayerwiseMutualContrastiveLearning(students(2), **(dict.fromkeys(WEIGHTS, 0.0) | {name: 2.0}))
        found = method.loss(method(torch.randn(4, 3, 8, 8)), torch.arange(4) % 2)
        assert {term.rpartition("_")[0] for term in found} == {"", "L_ce", "L_kl", f"L_{name.removesuffix('_weight')}"}


def test_a_forward_pass_in_eval_mode_has_no_contrastive_terms():
    """Their size would be that of the batch."""
    method = LayerwiseMutualContrastiveLearning(students(2)).eval()
    found = method.loss(method(torch.randn(4, 3, 8, 8)), torch.arange(4))
    assert {term.rpartition("_")[0] for term in found} == {"", "L_ce", "L_kl"}


@pytest.mark.parametrize("images", [1, 2, 3])
def test_few_images_and_labels_without_partners_give_finite_losses(images):
    """With one label each, VCL and ICL are zero."""
    method = LayerwiseMutualContrastiveLearning(students(2))
    embeddings = torch.from_numpy(vectors(2)[:, :, :images]).requires_grad_()
    z = torch.from_numpy(logits(2)[:, :images]).requires_grad_()
    found = method.loss({"student_logits": z, "embeddings": embeddings}, torch.arange(images))
    found["loss"].backward()
    assert all(tensor.isfinite().all() for tensor in (found["loss"], embeddings.grad, z.grad))
    assert found["L_vcl_0"] == found["L_icl_1"] == 0
    assert (found["L_soft_icl_0"] > 0) == (images > 2)  # of two images the only other one has all of the probability


def test_a_head_computes_in_float32():
    head = Projection(3, 8)
    exact = head(torch.ones(2, 3, 4, 4))
    found = head.bfloat16()(torch.ones(2, 3, 4, 4, dtype=torch.bfloat16))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, atol=0.02, rtol=0)
    zeros = torch.zeros(2, 3, 4, 4, requires_grad=True)
    head(zeros).sum().backward()
    assert zeros.grad.isfinite().all()


def test_students_of_different_shapes_exchange_their_last_stages():
    given = students(2)
    given.members[1] = wide_resnet(10, 2, CLASSES)
    method = LayerwiseMutualContrastiveLearning(given)
    assert method(torch.randn(2, 3, 8, 8))["embeddings"].shape == (2, STAGES, 2, 128)


def test_networks_without_stages_are_refused():
    with pytest.raises(OptionError, match="method=lmcl: needs feature maps .* and Patches has none"):
        LayerwiseMutualContrastiveLearning(Students(Patches, 2, seed=0))


def test_mixed_labels_are_refused_unless_no_term_needs_labels():
    line = "method.vcl_weight=0.1: needs one label for each image, which augment.mixup .*; 0 leaves this term out"
    with pytest.raises(OptionError, match=line):
        LayerwiseMutualContrastiveLearning(students(2)).check_soft_labels()
    with pytest.raises(OptionError, match="method.icl_weight=2.0: needs one label"):
        LayerwiseMutualContrastiveLearning(students(2), vcl_weight=0.0, icl_weight=2.0).check_soft_labels()
    mixed = torch.full((4, CLASSES), 1 / CLASSES)
    method = LayerwiseMutualContrastiveLearning(students(2))
    outputs = method(torch.randn(4, 3, 8, 8))
    with pytest.raises(OptionError, match=line):
        method.loss(outputs, mixed)
    method = LayerwiseMutualContrastiveLearning(students(2), vcl_weight=0.0, icl_weight=0.0)
    method.check_soft_labels()
    assert method.loss(method(torch.randn(4, 3, 8, 8)), mixed)["loss"].isfinite()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"contrast_temperature": 0.0}, "method.contrast_temperature=0.0: must be a number, 0.001 or more"),
        ({"embedding_size": 0}, "method.embedding_size=0: must be a whole number, 1 or more"),
        ({"soft_icl_weight": -1.0}, "method.soft_icl_weight=-1.0: must be a number, 0 or more"),
        (dict.fromkeys(WEIGHTS, 0.0), "method.soft_icl_weight=0.0: leaves no contrastive term, since the other three"),
    ],
)
def test_options_out_of_range_are_refused(options, line):
    with pytest.raises(OptionError, match=line):
        LayerwiseMutualContrastiveLearning(students(2), **options)
