from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.optim.lr_scheduler import MultiStepLR
from torchmetrics.classification import MulticlassAccuracy

from odcheap.layers.cheap_conv import DW
from odcheap.methods.od import OnlineDistillation
from odcheap.methods.pcl import PeerCollaborativeLearning
from odcheap.methods.students import Students
from odcheap.models.cifar import CifarResNet
from odcheap.training.module import DistillationModule, MemberScores, TermMeans

RECIPE = (
    partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=2e-4, fused=True),
    partial(MultiStepLR, milestones=[0.5], fractions=["milestones"]),
)


def made(classes):
    method = OnlineDistillation(Students(lambda: CifarResNet(8, DW(), classes), 2, seed=0))
    return DistillationModule(method, *RECIPE, steps=100, classes=classes)


def logits(classes, images=30):
    random = torch.Generator().manual_seed(0)
    return {
        "student_logits": torch.randn(2, images, classes, generator=random),
        "teacher_logits": torch.randn(images, classes, generator=random),
    }


@pytest.mark.parametrize("classes", [5, 6])
def test_top5_is_null_with_five_classes_or_fewer(classes):
    module = made(classes)
    module.scores["val_"].update(module.member_logits(logits(classes)), torch.arange(30) % classes)
    figures = module.compute_figures("val")
    assert all((value is None) == (classes == 5) for value in figures.top5)
    assert all(0 <= value <= 1 for value in figures.top1 + figures.balanced_accuracy)


def test_the_ensemble_is_the_mean_softmax_of_the_students():
    outputs = logits(7)
    module = made(7)
    assert module.members == ["student_0", "student_1", "teacher", "ensemble"]
    members = module.member_logits(outputs)
    probabilities = outputs["student_logits"].softmax(-1)
    torch.testing.assert_close(members[3].softmax(-1), (probabilities[0] + probabilities[1]) / 2)
    assert torch.equal(members[2], outputs["teacher_logits"])


def test_averages_stand_behind_the_students():
    method = PeerCollaborativeLearning(Students(lambda: CifarResNet(8, DW(), 5), 2, seed=0))
    module = DistillationModule(method, *RECIPE, steps=100, classes=5)
    assert module.members == ["student_0", "student_1", "average_0", "average_1", "teacher", "ensemble"]
    outputs = logits(5) | {"average_logits": torch.full((2, 30, 5), 7.0)}
    members = module.member_logits(outputs)
    assert torch.equal(members[2:4], outputs["average_logits"])
    assert torch.equal(members[4], outputs["teacher_logits"])
    torch.testing.assert_close(members[5].softmax(-1), outputs["student_logits"].softmax(-1).mean(0))


def test_a_teacher_that_saw_the_held_out_images_has_no_figure_there():
    method = OnlineDistillation(Students(lambda: CifarResNet(8, DW(), 5), 2, seed=0))
    module = DistillationModule(method, *RECIPE, steps=100, classes=5, teacher_saw_val=True)
    for stage in ("val", "test"):
        module.scores[f"{stage}_"].update(module.member_logits(logits(5)), torch.arange(30) % 5)
        figures = module.compute_figures(stage)
        for name in ("top1", "balanced_accuracy"):
            assert [value is None for value in getattr(figures, name)] == [False, False, stage == "val", False]


def test_every_process_evaluates_with_the_first_one_s_statistics(monkeypatch):
    module, sent = made(5), []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda buffer, src: sent.append((id(buffer), src)))
    module._trainer = SimpleNamespace(world_size=2)
    for start in (module.on_validation_epoch_start, module.on_test_epoch_start):
        sent.clear()
        start()
        assert sent == [(id(buffer), 0) for buffer in module.method.buffers()]


def test_only_the_method_s_weights_are_in_a_checkpoint():
    module = made(5)
    content = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(content)
    assert content["state_dict"].keys() == {f"method.{name}" for name in module.method.state_dict()}
    other = made(5)
    other.load_state_dict(content["state_dict"])
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("classes", [6, 10])
def test_scores_equal_torchmetrics(classes):
    torch.manual_seed(0)
    scores = MemberScores(members=3, classes=classes)
    theirs = {
        "top1": [MulticlassAccuracy(classes, average="micro") for _ in range(3)],
        "top5": [MulticlassAccuracy(classes, average="micro", top_k=5) for _ in range(3)],
        "recall": [MulticlassAccuracy(classes, average="none") for _ in range(3)],
    }
    for size in (40, 17, 1):
        logits, target = torch.randn(3, size, classes), torch.randint(classes, (size,))
        scores.update(logits, target)
        for metrics in theirs.values():
            for k, metric in enumerate(metrics):
                metric.update(logits[k], target)
    found = scores.compute()
    for name, metrics in theirs.items():
        expected = torch.stack([metric.compute() for metric in metrics])
        torch.testing.assert_close(found[name].float(), expected, msg=name)


def test_terms_are_means_over_images():
    terms = TermMeans()
    assert terms.summed_state()["images"] == 0
    terms.update({"loss": torch.tensor(2.0), "ce": torch.tensor(1.0)}, images=3)
    terms.update({"loss": torch.tensor(6.0), "ce": torch.tensor(5.0)}, images=1)
    assert terms.compute() == {"ce": 2.0, "loss": 3.0}
