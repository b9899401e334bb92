"""The fused kernels against the plain modules: interpreted on the CPU in a process of its own, and on a GPU if any."""

import copy
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from odcheap.layers import kernels
from odcheap.layers.cheap_conv import DW, CheapConv, Shift, Standard
from odcheap.layers.norm_act import batch_norm_act, conv_norm_act
from odcheap.layers.spatial import Shift2d

HERE = kernels.is_interpreted()
GPU = torch.cuda.is_available() and not HERE
interpreted = pytest.mark.skipif(not HERE, reason="runs within test_the_kernels_as_interpreted_on_the_cpu")
on_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device")
device = torch.device("cuda" if GPU else "cpu")
SHAPES = [(3, 5, 6, 7), (2, 16, 8, 8), (2, 36, 3, 5), (1, 1, 2, 1)]
FORMS = [(False, "act_add"), (True, "act_add"), (True, "add_act")]
CLOSE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.skipif(HERE, reason="is this process")
@pytest.mark.parametrize(
    "selection", ["test_each_kernel_once", pytest.param("not test_each_kernel_once", marks=pytest.mark.slow)]
)
def test_the_kernels_as_interpreted_on_the_cpu(selection):
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-k", selection, __file__]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.fixture
def cut_small(monkeypatch):
    """Chunks of several tiles, as only large maps have them otherwise."""
    from odcheap.layers.kernels import gpu

    small = {"MAX_CHUNKS": 3, "FLOAT32_ROWS": 16, "NORM_PROGRAMS": 3, "MAX_NORM_ROWS": 16}
    small |= {"SUM_PROGRAMS": 2, "SUM_ROWS": 16, "MIN_ELEMENTS": 64, "MAX_ELEMENTS": 256}
    for name, value in small.items():
        monkeypatch.setattr(gpu, name, value)


def maps(shape, dtype, seed):
    made = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return made.to(device, dtype).contiguous(memory_format=torch.channels_last)


def norm_of(channels, dtype):
    """One in the middle of training: no weight, bias or statistic has its first value."""
    norm = nn.BatchNorm2d(channels, momentum=0.3, eps=1e-3)
    for k, t in enumerate([norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var]):
        t.copy_(torch.randn(channels, generator=torch.Generator().manual_seed(k)) * 0.5 + (k in (0, 3)))
    return norm.to(device, torch.float64 if dtype == torch.float64 else torch.float32)


def assert_close(found, expected, dtype):
    """By the length of the difference over the expected length."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    apart = (found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    assert apart < CLOSE[dtype], f"{apart:.1e}"


def norm_results(shape, dtype, has_residual, order, mode, rounded=None):
    """Output, gradients, buffers; the input is far from zero, where one-pass variances would fail."""
    norm, rounded = norm_of(shape[1], dtype), rounded or dtype
    x = (maps(shape, rounded, 1) * 2 + 5).to(dtype).requires_grad_()
    residual = maps(shape, rounded, 2).to(dtype).requires_grad_() if has_residual else None
    before = kernels.use(mode)
    try:
        y = batch_norm_act(x, norm, residual, order)
        assert ("BatchNormAct" in type(y.grad_fn).__name__) == (mode == "auto")
        y.backward(maps(shape, rounded, 3).to(dtype))
    finally:
        kernels.use(before)
    gradients = [t.grad for t in (x, residual, norm.weight, norm.bias) if t is not None]
    return [y.detach(), *gradients, norm.running_mean, norm.running_var], norm.num_batches_tracked


def check_norm(shape, dtype, has_residual, order):
    """In bfloat16 the plain modules round before their ReLU, so that float64 says what is right."""
    found, tracked = norm_results(shape, dtype, has_residual, order, "auto")
    exact = torch.float64 if dtype == torch.bfloat16 else dtype
    expected, _ = norm_results(shape, exact, has_residual, order, "off", dtype)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b.to(a.dtype), dtype)
    assert tracked.item() == 1
    assert tracked.dtype == torch.int64


@interpreted
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("has_residual", "order"), FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_act(shape, dtype, has_residual, order):
    check_norm(shape, dtype, has_residual, order)


@interpreted
@pytest.mark.parametrize(("has_residual", "order"), FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_act_in_several_tiles(shape, has_residual, order, cut_small):
    from odcheap.layers.kernels.gpu import plan_norm

    check_norm(shape, torch.float64, has_residual, order)
    assert plan_norm(torch.empty(3, 5, 6, 7)).tiles == 3
    assert plan_norm(torch.empty(3, 5, 6, 7)).chunks == 3


@interpreted
def test_the_version_of_the_buffers_tells_of_their_change():
    norm = norm_of(4, torch.float32)
    before = [t._version for t in norm.buffers()]
    batch_norm_act(maps((2, 4, 3, 3), torch.float32, 0), norm)
    assert all(t._version > b for t, b in zip(norm.buffers(), before, strict=True))


def pair_results(pair, shape, dtype, mode):
    pair, x = copy.deepcopy(pair), maps(shape, dtype, 1).requires_grad_()
    before = kernels.use(mode)
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = pair(x)
        assert fused(y) == (mode == "auto")
        y.backward(maps(y.shape, y.dtype, 2))
    finally:
        kernels.use(before)
    return [y.detach(), x.grad, *(p.grad for p in pair.parameters())]


def fused(y):
    """Whether one of the fused operators is among what made `y`."""
    names, ahead = set(), [y.grad_fn]
    while ahead:
        node = ahead.pop()
        names.add(type(node).__name__)
        ahead += [before for before, _ in node.next_functions if before is not None]
    return bool(names & {"DepthwiseBackward", "ShiftFunctionBackward"})


def check_pair(block_type, shape, stride, dtype):
    pair = block_type(shape[1], 6, stride).to(device, memory_format=torch.channels_last)
    pair = pair.double() if dtype == torch.float64 else pair
    found = pair_results(pair, shape, dtype, "auto")
    for a, b in zip(found, pair_results(pair, shape, dtype, "off"), strict=True):
        assert_close(a, b, dtype)
    if shape[3] > 1:  # else both formats are the same, and PyTorch names it the other
        assert found[0].is_contiguous(memory_format=torch.channels_last)


@interpreted
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("block_type", [DW(), Shift()])
@pytest.mark.parametrize("shape", SHAPES)
def test_pairs(shape, block_type, stride):
    check_pair(block_type, shape, stride, torch.float64)


@interpreted
@pytest.mark.parametrize("block_type", [DW(), Shift()])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 70, 3, 4)])
def test_pairs_in_several_tiles(shape, block_type, cut_small):
    check_pair(block_type, shape, 1, torch.float32)


@interpreted
def test_depthwise_takes_float32_weights_with_bfloat16_maps():
    """The interpreter cuts bits off where a GPU rounds, so that this is no test of the rounding."""
    from odcheap.layers.kernels import gpu

    x, weight = maps((2, 16, 5, 5), torch.bfloat16, 0), torch.randn(16, 1, 3, 3, requires_grad=True)
    y = gpu.depthwise3x3(x, weight)
    assert_close(y, F.conv2d(x.float(), weight, padding=1, groups=16).bfloat16(), torch.bfloat16)
    y.sum().backward()
    assert weight.grad.dtype == torch.float32


@interpreted
def test_shift_is_exact_in_every_type():
    from odcheap.layers.kernels import gpu

    for dtype in CLOSE:
        x = maps((2, 20, 4, 5), dtype, 0)
        assert torch.equal(gpu.shift3x3(x), Shift2d()(x))


def unit_results(block_type, shape, features, stride, dtype, has_residual, mode, rounded=None, above=0.0):
    """Output, gradients, buffers of a pair with its batch norm; the input's gradient is a sum of two.

    Args:
        above: added to the batch norm's bias; far from zero, rounding changes no ReLU's sign.
    """
    torch.manual_seed(0)
    pair = block_type(shape[1], features, stride).to(device, memory_format=torch.channels_last)
    pair, norm, rounded = pair.double() if dtype == torch.float64 else pair, norm_of(features, dtype), rounded or dtype
    norm.bias.data += above
    x = (maps(shape, rounded, 1) + 1).to(dtype).requires_grad_()
    made = (shape[0], features, -(-shape[2] // stride), -(-shape[3] // stride))
    residual = maps(made, rounded, 2).to(dtype).requires_grad_() if has_residual else None
    before = kernels.use(mode)
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            y, again = conv_norm_act(x, pair, norm, residual)
        assert ("PairNormAct" in type(y.grad_fn).__name__) == (mode == "auto")
        dy, dx = maps(made, rounded, 3).to(dtype), maps(shape, rounded, 4).to(dtype)
        torch.autograd.backward([y, again * 1], [dy, dx])
    finally:
        kernels.use(before)
    leaves = [t for t in (x, residual, *pair.parameters(), norm.weight, norm.bias) if t is not None]
    return [y.detach(), *(t.grad for t in leaves), norm.running_mean, norm.running_var], norm.num_batches_tracked


def check_unit(block_type, shape, features, stride, dtype, has_residual):
    found, tracked = unit_results(block_type, shape, features, stride, dtype, has_residual, "auto")
    expected, _ = unit_results(block_type, shape, features, stride, dtype, has_residual, "off")
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, dtype)
    assert tracked.item() == 1
    assert found[0].is_contiguous(memory_format=torch.channels_last)


@interpreted
@pytest.mark.parametrize(("block_type", "stride"), [(DW(), 2), (Shift(), 1)])
def test_each_kernel_once(block_type, stride):
    """The part of the interpreted tests that runs in the ordinary suite."""
    check_norm((2, 5, 3, 4), torch.float64, stride == 2, "add_act" if stride == 2 else "act_add")
    check_pair(block_type, (2, 5, 3, 4), stride, torch.float64)
    check_unit(block_type, (2, 5, 3, 4), 6, stride, torch.float64, True)


UNITS = [((3, 5, 6, 7), 6), ((2, 16, 4, 4), 16), ((1, 36, 3, 5), 64)]


@interpreted
@pytest.mark.parametrize(
    ("stride", "has_residual", "dtype"),
    [(1, False, torch.float64), (1, True, torch.float32), (2, False, torch.float32), (2, True, torch.float64)],
)
@pytest.mark.parametrize("block_type", [DW(), Shift()])
@pytest.mark.parametrize(("shape", "features"), UNITS)
def test_pairs_with_their_batch_norm(shape, features, block_type, stride, has_residual, dtype):
    check_unit(block_type, shape, features, stride, dtype, has_residual)


@interpreted
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("block_type", [DW(), Shift()])
@pytest.mark.parametrize(("shape", "features"), [UNITS[0], ((2, 16, 9, 9), 24)])
def test_pairs_with_their_batch_norm_in_several_tiles(shape, features, block_type, stride, cut_small):
    from odcheap.layers.kernels.gpu import plan_pair

    check_unit(block_type, shape, features, stride, torch.float64, True)
    plan = plan_pair(torch.empty(2, 16, 9, 9), False, 24, 1)
    assert (plan.chunks, plan.tiles, plan.tile_rows) == (3, 4, 16)


@interpreted
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("block_type", [DW(), Shift()])
def test_pairs_with_their_batch_norm_in_bfloat16(block_type, stride):
    """The interpreter cuts bits off where a GPU rounds, hence the wide limit."""
    sizes = (block_type, (2, 16, 5, 6), 20, stride)
    found, _ = unit_results(*sizes, torch.bfloat16, True, "auto", above=9.0)
    expected, _ = unit_results(*sizes, torch.float64, True, "off", torch.bfloat16, above=9.0)
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() < 5e-2 * b.norm()
    assert [t.dtype for t in found[:3]] == [torch.bfloat16] * 3


@interpreted
def test_a_pair_takes_the_gradient_of_either_result():
    pair, norm = DW()(16, 16, 1), nn.BatchNorm2d(16)
    x = maps((2, 16, 4, 4), torch.float32, 0).requires_grad_()
    y, again = conv_norm_act(x, pair, norm)
    (gradient,) = torch.autograd.grad(again.sum(), x, retain_graph=True)
    assert torch.equal(gradient, torch.ones_like(x))
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    before = kernels.use("off")
    (expected,) = torch.autograd.grad(conv_norm_act(x, pair, norm)[0].square().sum(), x)
    kernels.use(before)
    assert_close(gradient, expected, torch.float32)


@interpreted
def test_second_derivatives_are_refused():
    x = maps((2, 16, 4, 4), torch.float32, 0).requires_grad_()
    unit, _ = conv_norm_act(x, DW()(16, 6, 1), nn.BatchNorm2d(6))
    for made in (batch_norm_act(x, nn.BatchNorm2d(16)), DW()(16, 6, 1)(x), Shift()(16, 6, 1)(x), unit):
        (gradient,) = torch.autograd.grad(made.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


@interpreted
def test_gradients_of_other_layouts_are_taken():
    """A mean over the pixels gives a gradient without memory of its own."""
    x = maps((2, 16, 4, 4), torch.float64, 0)
    grads = []
    for mode in ("auto", "off"):
        before, norm, leaf = kernels.use(mode), nn.BatchNorm2d(16).double(), x.clone().requires_grad_()
        batch_norm_act(leaf, norm).mean((2, 3))[:, 3].sum().backward()
        kernels.use(before)
        grads.append(leaf.grad)
    assert_close(*grads, torch.float64)


@interpreted
@pytest.mark.parametrize("block_type", [DW(), Shift(), Standard()])
def test_a_network_learns_the_same(block_type):
    from odcheap.models.cifar import CifarResNet

    torch.manual_seed(0)
    network = CifarResNet(8, block_type, 3).double().to(memory_format=torch.channels_last)
    images, found = maps((3, 3, 8, 8), torch.float64, 0), []
    for mode in ("auto", "off"):
        before, student = kernels.use(mode), copy.deepcopy(network)
        student(images).square().sum().backward()
        kernels.use(before)
        found.append([*(p.grad for p in student.parameters()), *student.buffers()])
        assert list(student.state_dict()) == list(network.state_dict())
    for a, b in zip(*found, strict=True):
        assert_close(a.double(), b.double(), torch.float64)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 16, 32, 32), (128, 32, 16, 16), (77, 64, 8, 8), (3, 5, 6, 7)])
def test_on_a_gpu(shape, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for has_residual, order in FORMS:
        check_norm(shape, dtype, has_residual, order)
    for block_type in (DW(), Shift()):
        for stride in (1, 2):
            check_pair(block_type, shape, stride, dtype)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "features"), [((128, 16, 32, 32), 16), ((128, 32, 16, 16), 64), ((77, 64, 7, 9), 64)]
)
@pytest.mark.parametrize("block_type", [DW(), Shift()])
def test_pairs_with_their_batch_norm_on_a_gpu(block_type, shape, features, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for stride in (1, 2):
        sizes = (block_type, shape, features, stride)
        found, _ = unit_results(*sizes, dtype, True, "auto", above=9.0)
        again, _ = unit_results(*sizes, dtype, True, "auto", above=9.0)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
        expected, _ = unit_results(*sizes, torch.float64, True, "off", dtype, above=9.0)
        for a, b in zip(found, expected, strict=True):
            assert (a.double() - b).norm() < (2e-2 if dtype == torch.bfloat16 else 1e-4) * b.norm()


@on_gpu
def test_twice_the_same_on_a_gpu():
    first, again = (norm_results((128, 16, 32, 32), torch.bfloat16, True, "add_act", "auto")[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    pair: CheapConv = DW()(16, 16, 1).to(device)
    first, again = (pair_results(pair, (128, 16, 32, 32), torch.bfloat16, "auto")[1] for _ in range(2))
    assert torch.equal(first, again)


@on_gpu
def test_depthwise_weights_are_rounded_as_autocast_does_on_a_gpu():
    from odcheap.layers.kernels import gpu

    x, weight = torch.zeros(1, 16, 5, 5, device=device, dtype=torch.bfloat16), torch.randn(16, 1, 3, 3, device=device)
    x[..., 2, 2] = 1
    x = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(gpu.depthwise3x3(x, weight), F.conv2d(x, weight.bfloat16(), padding=1, groups=16))
