from functools import partial

import pytest
import torch
from recorder import Recorder
from torch.optim.lr_scheduler import MultiStepLR

from odcheap.data.base import Batch
from odcheap.layers.cheap_conv import DW
from odcheap.methods.alone import Alone
from odcheap.methods.od import OnlineDistillation
from odcheap.methods.students import Students
from odcheap.models.cifar import CifarResNet
from odcheap.training.optim import build_optimization
from odcheap.training.train_step import WARM_UP, CudaGraphs, EagerStep, GradientOptions, GraphStep, to_single_precision

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
        EagerStep(method, optimizer)(Batch(images, target))
        schedule.step()
    return method.state_dict()


def test_a_step_equals_the_textbook_loop():
    method, optimizer, _ = made()
    other, theirs, _ = made()
    for images, target in batches():
        taken = EagerStep(method, optimizer)(Batch(images, target))
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
    assert not EagerStep(method, optimizer)(Batch(images * float("nan"), target)).finite


def captured(recorder, method, optimizer, schedule, dtype=torch.double, low=False):
    refusals = []
    step = GraphStep(EagerStep(method, optimizer), recorder(method, optimizer), refusals.append)
    losses = []
    for images, target in batches(dtype):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            losses.append(step(Batch(images, target)).terms["loss"].item())
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


@pytest.mark.parametrize("how", ["bfloat16", "without momentum"])
def test_so_do_they_in_bfloat16_and_without_momentum(how, monkeypatch):
    if how == "without momentum":
        monkeypatch.setitem(globals(), "RECIPE", (partial(RECIPE[0], momentum=0.0), RECIPE[1]))
    dtype = torch.float if how == "bfloat16" else torch.double
    (method, optimizer, schedule), (other, theirs, also) = made(dtype), made(dtype)
    low = how == "bfloat16"
    step, refusals, _ = captured(Recorder, method, optimizer, schedule, dtype, low)
    for images, target in batches(dtype):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            EagerStep(other, theirs)(Batch(images, target))
        also.step()
    assert not refusals
    assert len(step.recordings) == 2
    expected = other.state_dict()
    for name, found in method.state_dict().items():
        torch.testing.assert_close(found, expected[name], atol=1e-6, rtol=1e-6, msg=name)


class Capturing(Recorder):
    """As PyTorch does on a GPU, it refuses to record an Adam whose groups are not `capturable`."""

    def record(self, work):
        if not all(group["capturable"] for group in self.optimizer.param_groups):
            raise RuntimeError("capturable is False")
        return super().record(work)


def test_adamw_is_recorded_too(monkeypatch):
    adamw = partial(torch.optim.AdamW, lr=0.01, fused=True)
    monkeypatch.setitem(globals(), "RECIPE", (adamw, RECIPE[1]))
    method, optimizer, schedule = made()
    step, refusals, _ = captured(Capturing, method, optimizer, schedule)
    assert (refusals, len(step.recordings)) == ([], 2)
    assert not any(group["capturable"] for group in optimizer.param_groups)  # a checkpoint can be loaded on a CPU
    expected = plainly()
    for name, found in method.state_dict().items():
        torch.testing.assert_close(found, expected[name], atol=1e-7, rtol=1e-7, msg=name)  # the rate is float32


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
    ("recorder", "reason"),
    [(Stale, "its replay changes the weights differently"), (Waiting, "operation not permitted")],
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
    outputs = to_single_precision({"student_logits": torch.ones(1, dtype=torch.bfloat16), "teacher_logits": None})
    assert outputs["student_logits"].dtype == torch.float32
    assert outputs["teacher_logits"] is None
    assert to_single_precision({"a": torch.ones(1, dtype=torch.double)})["a"].dtype == torch.double


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.double, 1e-9), (torch.float, 1e-2)])
@pytest.mark.parametrize("optimizer", [RECIPE[0], partial(torch.optim.AdamW, lr=0.01, fused=True)])
def test_a_cuda_graph_trains_as_plain_steps_do(dtype, tolerance, optimizer, monkeypatch):
    monkeypatch.setitem(globals(), "RECIPE", (optimizer, RECIPE[1]))
    method, optimizer, schedule = made(dtype, "cuda")
    refusals = []
    step = GraphStep(EagerStep(method, optimizer), CudaGraphs(), refusals.append)
    for images, target in batches(dtype, "cuda"):
        step(Batch(images, target))
        schedule.step()
    assert not refusals
    expected = plainly(dtype, "cuda")
    for name, found in method.state_dict().items():
        torch.testing.assert_close(found, expected[name], atol=tolerance, rtol=tolerance, msg=name)


def textbook(method, optimizer, batches):
    """A step on the gradients of several batches, averaged."""
    optimizer.zero_grad()
    for images, target in batches:
        (method.loss(method(images), target)["loss"] / len(batches)).backward()


def test_gradients_are_accumulated_over_batches():
    (method, optimizer, _), (other, theirs, _) = made(), made()
    several = list(batches())[:3]
    step = EagerStep(method, optimizer, GradientOptions(accumulate_grad_batches=3))
    results = [step(Batch(*batch), update=k == 2) for k, batch in enumerate(several)]
    assert [(result.taken, result.finite is None) for result in results] == [(False, True)] * 2 + [(True, False)]
    textbook(other, theirs, several)
    theirs.step()
    for a, b in zip(method.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_a_process_s_share_of_the_batch_weighs_its_loss():
    (method, optimizer, _), (other, theirs, _) = made(), made()
    batch = next(batches())
    EagerStep(method, optimizer)(Batch(*batch, share=1.25))
    theirs.zero_grad()
    (1.25 * other.loss(other(batch[0]), batch[1])["loss"]).backward()
    theirs.step()
    assert all(torch.equal(a, b) for a, b in zip(method.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(("algorithm", "together"), [("norm", True), ("norm", False), ("value", True)])
def test_gradients_are_clipped(algorithm, together):
    students = Students(lambda: CifarResNet(8, DW(), 10), 2, seed=0)
    method = (OnlineDistillation if together else Alone)(students)
    options = GradientOptions(gradient_clip_val=1e-3, gradient_clip_algorithm=algorithm)
    step = EagerStep(method, torch.optim.SGD(method.parameters(), lr=0.1), options)
    step(Batch(*next(batches(torch.float))))
    if algorithm == "value":
        # The largest values are at the limit; with a limit of the norm all of them would be below.
        assert max(p.grad.abs().max().item() for p in method.parameters()) == pytest.approx(1e-3, rel=1e-6)
        return
    norms = [torch.nn.utils.get_total_norm([p.grad for p in s.parameters()]) for s in students.members]
    assert [norm.item() == pytest.approx(1e-3, rel=1e-3) for norm in norms] == [not together] * 2
    whole = torch.nn.utils.get_total_norm([p.grad for p in method.parameters()])
    assert (whole.item() == pytest.approx(1e-3, rel=1e-3)) == together


def test_a_step_that_is_not_finite_is_left_out_with_its_statistics():
    method, optimizer, _ = made()
    step = EagerStep(method, optimizer, GradientOptions(skip_nonfinite=True))
    images, target = next(batches())
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    result = step(Batch(images * float("nan"), target))
    assert (result.taken, bool(result.finite)) == (False, False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())
    assert step(Batch(images, target)).taken


def test_scaled_gradients_of_float16_are_unscaled_before_they_are_checked_and_clipped():
    method, optimizer, _ = made(torch.float)
    before = [p.detach().clone() for p in method.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    options = GradientOptions(gradient_clip_val=0.1)
    step = EagerStep(method, optimizer, options, scaler, lambda loss: scaler.scale(loss).backward())
    assert step(Batch(*next(batches(torch.float)))).finite
    assert torch.nn.utils.get_total_norm([p.grad for p in method.parameters()]) < 0.11
    assert all(not torch.equal(a, b) for a, b in zip(before, method.parameters(), strict=True))
    result = step(Batch(next(batches(torch.float))[0] * float("inf"), next(batches())[1]))
    assert not result.finite
    assert scaler.get_scale() == 512.0
