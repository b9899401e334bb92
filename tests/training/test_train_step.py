from functools import partial

import pytest
import torch
from recorder import Recorder
from torch.optim.lr_scheduler import MultiStepLR

from odcheap.layers.cheap_conv import DW
from odcheap.methods import parallel
from odcheap.methods.od import OnlineDistillation
from odcheap.methods.students import Students
from odcheap.models.cifar import CifarResNet
from odcheap.training.optim import build_optimization
from odcheap.training.train_step import WARM_UP, CapturedStep, CudaGraphs, single_precision, take

RECIPE = (
    partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=2e-4, fused=True),
    partial(MultiStepLR, milestones=[0.5], fractions=["milestones"]),
)
SIZES = [8, 8, 8, 5, 8, 8, 5, 8, 8, 5, 5, 8, 5]  # each shape is recorded once it has been seen often enough


def made(dtype=torch.double, device="cpu"):
    torch.manual_seed(0)  # the teacher's head
    method = OnlineDistillation(Students(lambda: CifarResNet(8, DW(), 10), 2, seed=0)).to(device, dtype)
    return method, *build_optimization(method, *RECIPE, len(SIZES))


def batches(dtype=torch.double, device="cpu"):
    random = torch.Generator().manual_seed(0)
    for size in SIZES:
        images = torch.randn(size, 3, 16, 16, generator=random, dtype=torch.double)
        yield images.to(device, dtype), torch.randint(10, (size,), generator=random).to(device)


def plainly(dtype=torch.double, device="cpu"):
    method, optimizer, schedule = made(dtype, device)
    for images, target in batches(dtype, device):
        take(method, optimizer, images, target)
        schedule.step()
    return method.state_dict()


def test_a_step_equals_the_textbook_loop():
    method, optimizer, _ = made()
    other, theirs, _ = made()
    for images, target in batches():
        taken = take(method, optimizer, images, target)
        theirs.zero_grad()
        loss = other.loss(other(images), target)["loss"]
        loss.backward()
        theirs.step()
        assert torch.equal(taken.terms["loss"], loss.detach())
        assert taken.finite
        assert not any(t.requires_grad for t in [*taken.terms.values(), *taken.outputs.values()])
    assert all(torch.equal(a, b) for a, b in zip(method.parameters(), other.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_is_told():
    method, optimizer, _ = made()
    images, target = next(batches())
    assert not take(method, optimizer, images * float("nan"), target).finite


def captured(recorder, method, optimizer, schedule, dtype=torch.double, low=False):
    refusals = []
    step = CapturedStep(method, optimizer, recorder(method, optimizer), refusals.append)
    losses = []
    for images, target in batches(dtype):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            losses.append(step(images, target).terms["loss"].item())
        schedule.step()
    return step, refusals, losses


def test_recorded_steps_train_as_plain_ones_do():
    """Two shapes of batch, a rate that changes after the recording, weights and losses after every step."""
    method, optimizer, schedule = made()
    step, refusals, losses = captured(Recorder, method, optimizer, schedule)
    assert not refusals
    assert len(step.recordings) == 2
    assert sum(step.graphs.replays) == len(SIZES) - 2 * WARM_UP + 2  # and one trial each
    expected = plainly()
    for name, found in method.state_dict().items():
        torch.testing.assert_close(found, expected[name], atol=1e-9, rtol=1e-9, msg=name)
    assert len(set(losses)) == len(losses)
    assert {type(group["lr"]) for group in optimizer.param_groups} == {float}


@pytest.mark.parametrize("how", ["bfloat16", "without momentum", "vmap"])
def test_so_do_they_in_bfloat16_without_momentum_and_as_one_network(how, monkeypatch):
    if how == "without momentum":
        monkeypatch.setattr("training.test_train_step.RECIPE", (partial(RECIPE[0], momentum=0.0), RECIPE[1]))
    dtype = torch.float if how == "bfloat16" else torch.double
    (method, optimizer, schedule), (other, theirs, also) = made(dtype), made(dtype)
    other.students.run = method.students.run = parallel.vmap if how == "vmap" else parallel.sequential
    low = how == "bfloat16"
    step, refusals, _ = captured(Recorder, method, optimizer, schedule, dtype, low)
    for images, target in batches(dtype):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            take(other, theirs, images, target)
        also.step()
    assert not refusals
    assert len(step.recordings) == 2
    expected = other.state_dict()
    for name, found in method.state_dict().items():
        torch.testing.assert_close(found, expected[name], atol=1e-6, rtol=1e-6, msg=name)


class Stale(Recorder):
    """Keeps what the first replay computed, as with weights cast to bfloat16 before the recording."""

    def again(self, work):
        for p in self.method.parameters():
            p.data.mul_(1.1)
        done = work()
        return done


class Waiting(Recorder):
    def record(self, work):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize(
    ("recorder", "reason"), [(Stale, "its replay changes the weights otherwise"), (Waiting, "operation not permitted")]
)
def test_a_step_that_cannot_be_recorded_stays_plain_and_says_why(recorder, reason):
    method, optimizer, schedule = made()
    step, refusals, _ = captured(recorder, method, optimizer, schedule)
    assert len(refusals) == 1
    assert refusals[0].startswith(reason)
    assert "\n" not in refusals[0]
    assert not step.recordings
    expected = plainly()
    assert all(torch.equal(found, expected[name]) for name, found in method.state_dict().items())


def test_losses_are_computed_in_float32_where_the_network_ran_in_bfloat16():
    outputs = single_precision({"student_logits": torch.ones(1, dtype=torch.bfloat16), "teacher_logits": None})
    assert outputs["student_logits"].dtype == torch.float32
    assert outputs["teacher_logits"] is None
    assert single_precision({"a": torch.ones(1, dtype=torch.double)})["a"].dtype == torch.double


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.double, 1e-9), (torch.float, 1e-2)])
def test_a_cuda_graph_trains_as_plain_steps_do(dtype, tolerance):
    method, optimizer, schedule = made(dtype, "cuda")
    refusals = []
    step = CapturedStep(method, optimizer, CudaGraphs(), refusals.append)
    for images, target in batches(dtype, "cuda"):
        step(images, target)
        schedule.step()
    assert not refusals
    expected = plainly(dtype, "cuda")
    for name, found in method.state_dict().items():
        torch.testing.assert_close(found, expected[name], atol=tolerance, rtol=tolerance, msg=name)
