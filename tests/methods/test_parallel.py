import copy

import pytest
import torch

from odcheap.layers.cheap_conv import DW, Group, Shift
from odcheap.methods import parallel
from odcheap.methods.od import OnlineDistillation
from odcheap.methods.students import Students
from odcheap.models.cifar import CifarResNet
from odcheap.training.optim import build_optimizer
from odcheap.utils.errors import OptionError


def trained(block_type, run, dtype, steps=10):
    """The method after some training steps on random images, the students run in that way."""
    torch.manual_seed(0)  # the teacher's head
    method = OnlineDistillation(Students(lambda: CifarResNet(14, block_type, 10), 3, seed=0, run=run)).to(dtype)
    optimizer = build_optimizer(torch.optim.SGD, method, lr=0.01, momentum=0.9, weight_decay=2e-4, fused=True)
    random = torch.Generator().manual_seed(0)
    for _ in range(steps):
        images = torch.randn(8, 3, 16, 16, generator=random, dtype=torch.double).to(dtype)
        target = torch.randint(10, (8,), generator=random)
        optimizer.zero_grad()
        method.loss(method(images), target)["loss"].backward()
        optimizer.step()
    return method


@pytest.mark.parametrize("block_type", [DW(), Shift(), Group(4)], ids=lambda b: type(b).__name__)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.double, 1e-9), (torch.float, 1e-3)], ids=["double", "float"])
def test_vmap_trains_as_one_after_another_does(block_type, dtype, tolerance):
    plain = trained(block_type, parallel.sequential, dtype).state_dict()
    batched = trained(block_type, parallel.vmap, dtype).state_dict()
    assert plain.keys() == batched.keys()
    for name in plain:
        torch.testing.assert_close(batched[name], plain[name], atol=tolerance, rtol=tolerance, msg=name)


def test_each_student_may_have_a_view_of_its_own():
    students = Students(lambda: CifarResNet(8, DW(), 10), 2, seed=0, run=parallel.sequential).eval().double()
    views = torch.randn(2, 4, 3, 16, 16, dtype=torch.double)
    batched = copy.copy(students)
    batched.run = parallel.vmap
    for (maps, logits), k in [(batched(views), 0), (batched(views), 1)]:
        torch.testing.assert_close(logits[k], students.members[k](views[k]))
        torch.testing.assert_close(maps[k], students.members[k].features(views[k]))


def test_a_run_on_streams_needs_a_gpu():
    with pytest.raises(OptionError, match="together=streams: needs a CUDA device; the run is on cpu"):
        parallel.check(parallel.streams, torch.device("cpu"))
    parallel.check(parallel.vmap, torch.device("cpu"))


def test_on_a_cpu_streams_are_one_after_another():
    """After training the costs are counted there."""
    students = Students(lambda: CifarResNet(8, DW(), 10), 2, seed=0, run=parallel.streams).eval()
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(students(images)[1], torch.stack([s(images) for s in students.members]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("run", [parallel.streams, parallel.vmap])
def test_on_a_gpu_too(run):
    method = OnlineDistillation(Students(lambda: CifarResNet(14, DW(), 10), 3, seed=0)).double().cuda()
    images, target = torch.randn(8, 3, 16, 16).double().cuda(), torch.randint(10, (8,)).cuda()
    found = []
    for way in (parallel.sequential, run):
        method.students.run = way
        method.zero_grad()
        method.loss(method(images), target)["loss"].backward()
        found.append([p.grad.clone() for p in method.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
