import hydra
import pytest
import torch
from torch.nn import functional as F

from odcheap.bench.loops import random_images
from odcheap.bench.peers import build_distillation, create_template_loop, create_torchdistill_loop
from odcheap.utils.parts import find_conf_dir

SMALL = ["backbone=resnet20", "backbone.depth=8", "data.batch_size=8", "select=last", "data.val_size=0"]
CPU = torch.device("cpu")


@pytest.fixture
def cfg():
    with hydra.initialize_config_dir(str(find_conf_dir()), version_base="1.3"):
        return hydra.compose("config", [*SMALL, "job_dir=unused", "trainer=cpu"])


@pytest.mark.parametrize("create", [create_torchdistill_loop, create_template_loop])
def test_a_peer_trains_the_student_and_not_the_teacher(create, cfg):
    method = build_distillation(cfg)
    step = create(cfg, method, random_images(cfg, 40), CPU)
    student = [p.detach().clone() for p in method.students.parameters()]
    teacher = [p.detach().clone() for p in method.teacher.network.parameters()]
    for _ in range(6):  # more than an epoch
        step()
    assert all(not torch.equal(a, b) for a, b in zip(student, method.students.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(teacher, method.teacher.network.parameters(), strict=True))


def test_torchdistill_has_the_loss_of_kd(cfg):
    from torchdistill.losses.mid_level import KDLoss

    method = build_distillation(cfg)
    student, teacher, target = torch.randn(8, 10), torch.randn(8, 10), torch.arange(8)
    ours = method.loss({"student_logits": student[None], "teacher_logits": teacher}, target)["loss"]
    theirs = KDLoss(".", "output", ".", "output", temperature=4.0, alpha=0.1)
    torch.testing.assert_close(ours, theirs({".": {"output": student}}, {".": {"output": teacher}}, target))


def test_an_error_in_the_thread_of_the_template_is_raised(cfg, monkeypatch):
    method = build_distillation(cfg)
    monkeypatch.setattr(method, "loss", lambda *_: F.cross_entropy(torch.ones(1, 2), torch.ones(3)))
    with pytest.raises(ValueError, match="batch_size"):
        create_template_loop(cfg, method, random_images(cfg, 40), CPU)()
