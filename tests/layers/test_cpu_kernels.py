"""The fused CPU operators against the plain modules, which are computed in float64."""

import copy
import math
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from odcheap.layers import kernels
from odcheap.layers.cheap_conv import DW, CheapConv, Group, Shift
from odcheap.layers.kernels import cpu_library
from odcheap.layers.norm_act import BatchNormAct, batch_norm_act, conv_norm_act
from odcheap.layers.spatial import Shift2d
from odcheap.methods.od import OnlineDistillation
from odcheap.methods.students import Students
from odcheap.models.cifar import CheapBlock, CifarResNet

# Where there is a compiler, a library that cannot be compiled is a failure.
pytestmark = pytest.mark.skipif(
    kernels.is_interpreted() or platform.system() != "Linux" or shutil.which("g++") is None,
    reason="needs g++ on Linux",
)
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
CLOSE = {F64: 1e-12, F32: 5e-6, BF16: 2e-2}
FORMS = [(False, "act_add"), (True, "act_add"), (True, "add_act")]
# Channels: one, fewer than a vector has, no power of two, one vector, several vectors, more than registers hold.
MAPS = [(2, 1, 3, 1), (3, 5, 6, 7), (2, 24, 5, 9), (40, 16, 4, 4), (3, 64, 8, 8), (2, 100, 3, 3)]
# Images, channels, channels out, height, width, stride of the 1 x 1 convolution.
PAIRS = [
    (3, 16, 16, 5, 7, 1),
    (40, 16, 32, 8, 8, 2),  # more images than chunks
    (2, 24, 40, 6, 9, 1),
    (5, 5, 7, 9, 6, 2),
    (2, 128, 3, 3, 3, 1),
    (33, 64, 64, 8, 8, 1),
    (2, 20, 16, 1, 2, 1),  # one line
    (4, 32, 17, 7, 1, 2),  # one column
]
# The same for grouped convolutions, with the number of groups: fewer channels a group than a vector has, as many, more,
# and numbers that are no power of two.
GROUPED = [
    (3, 16, 16, 5, 7, 1, 4),
    (40, 32, 16, 4, 9, 2, 4),
    (2, 64, 64, 4, 11, 1, 4),
    (2, 18, 20, 3, 4, 1, 3),
    (2, 40, 8, 3, 2, 2, 4),
    (2, 32, 8, 3, 3, 2, 1),
]


def random_map(shape, dtype, seed):
    made = torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return made.to(dtype).contiguous(memory_format=torch.channels_last)


def norm_of(channels, dtype):
    """Returns a batch norm as in the middle of training: no weight, bias or statistic has its first value."""
    norm = nn.BatchNorm2d(channels, momentum=0.3, eps=1e-3)
    for k, t in enumerate([norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var]):
        t.copy_(torch.randn(channels, generator=torch.Generator().manual_seed(k)) * 0.5 + (k in (0, 3)))
    return norm.to(F64 if dtype == F64 else F32)


def assert_close(found, expected, dtype):
    """Asserts that the length of the difference is small, compared with the expected length."""
    assert found.shape == expected.shape
    apart = (found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    assert apart < CLOSE[dtype], f"{apart:.1e}"


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize(("has_residual", "order"), FORMS)
@pytest.mark.parametrize("shape", MAPS)
def test_batch_norm_act(shape, has_residual, order, dtype):
    results = []
    for mode, own in (("auto", dtype), ("off", F64)):
        # Values far from zero, at which variances by differences of squares would fail.
        x = (random_map(shape, dtype, 1) * 2 + 5).to(own).requires_grad_()
        residual = random_map(shape, dtype, 2).to(own).requires_grad_() if has_residual else None
        norm = norm_of(shape[1], own)
        before = kernels.use(mode)
        y = batch_norm_act(x, norm, residual, order)
        kernels.use(before)
        assert ("BatchNormAct" in type(y.grad_fn).__name__) == (mode == "auto")
        y.backward(random_map(shape, dtype, 3).to(own))
        results.append([y, *(t.grad for t in (x, residual, norm.weight, norm.bias) if t is not None), *norm.buffers()])
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected, dtype)
    # Rounding to bfloat16 makes values larger as often as smaller.
    lengths = [y.detach().double().abs().sum().item() for y, *_ in results]
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-3)
    assert results[0][-1].item() == 1
    assert results[0][0].is_contiguous(memory_format=torch.channels_last)


def run_pair(make, sizes, dtype, mode, has_residual=True, bias=None):
    """Returns output, gradients and statistics of a pair with batch norm; the input has a second reader."""
    images, channels, out, height, width, stride, *groups = sizes
    own = dtype if mode == "auto" else F64
    torch.manual_seed(0)
    pair, norm = make(*groups)(channels, out, stride), norm_of(out, own)
    if bias is not None:
        norm.bias.data.copy_(bias)
    rounded = pair.to(BF16).float() if dtype == BF16 else pair
    pair = rounded.to(norm.weight.dtype)
    x = random_map((images, channels, height, width), dtype, 1).to(own).requires_grad_()
    shape = (images, out, -(-height // stride), -(-width // stride))
    residual = random_map(shape, dtype, 2).to(own).requires_grad_() if has_residual else None
    before = kernels.use(mode)
    with torch.autocast("cpu", BF16, enabled=own == BF16):
        y, again = conv_norm_act(x, pair, norm, residual)
    kernels.use(before)
    assert ("PairsNormAct" in type(y.grad_fn).__name__) == (mode == "auto")
    gradients = [random_map(t.shape, dtype, seed).to(own) for seed, t in ((3, y), (4, again))]
    torch.autograd.backward([y, again], gradients)
    return [
        y.detach(),
        *(t.grad for t in (x, residual, *pair.parameters(), *norm.parameters()) if t is not None),
        *norm.buffers(),
    ]


CASES = [(make, sizes) for make in (DW, Shift) for sizes in PAIRS] + [(Group, sizes) for sizes in GROUPED]


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize(("make", "sizes"), CASES)
def test_pair_norm_act(make, sizes, dtype):
    for has_residual in (True, False):
        found, expected = (run_pair(make, sizes, dtype, mode, has_residual) for mode in ("auto", "off"))
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, dtype)


def test_statistics_of_a_pair_far_from_zero():
    """Variances by differences of squares would lose all digits; a shift of fewer than nine channels copies them."""
    x, pair = random_map((40, 8, 4, 4), F32, 1) * 0.01 + 100, Shift()(8, 4, 1)
    norm = nn.BatchNorm2d(4, momentum=1.0)
    y = conv_norm_act(x.requires_grad_(), pair, norm)[0]
    assert "PairsNormAct" in type(y.grad_fn).__name__
    expected = nn.functional.conv2d(x.double(), pair.pointwise.weight.double()).var((0, 2, 3))
    torch.testing.assert_close(norm.running_var.double(), expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize(("make", "sizes"), CASES)
def test_pair_norm_act_in_bfloat16(make, sizes):
    """The norm's input is rounded: every channel is far from zero, so that each ReLU decides as in float64."""
    bias = torch.where(torch.arange(sizes[2]) % 3 == 0, -12.0, 12.0)
    found, expected = (run_pair(make, sizes, BF16, mode, bias=bias) for mode in ("auto", "off"))
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, BF16)


# Images, channels, channels out, height, width, stride.
BLOCKS = [(3, 16, 16, 5, 7, 1), (35, 24, 32, 4, 5, 2), (2, 24, 24, 3, 1, 1)]


def is_one_operator(y):
    """Returns whether a map was computed with the weights of two pairs: a pair alone has six inputs at most."""
    return len(y.grad_fn.next_functions) > 6


def run_block(make, sizes, dtype, mode, bias=None):
    """Returns output, gradients and statistics of a block whose two pairs are one operator."""
    images, channels, out, height, width, stride = sizes
    own = dtype if mode == "auto" else F64
    torch.manual_seed(0)
    block = CheapBlock(make(), channels, out, stride)
    block.bn1, block.bn2 = norm_of(out, own), norm_of(out, own)
    if bias is not None:
        for norm in (block.bn1, block.bn2):
            norm.bias.data.copy_(bias)
    rounded = block.to(BF16).float() if dtype == BF16 else block
    # As in training, where channels-last memory format changes the order of a grouped kernel's numbers too.
    block = rounded.to(norm_of(1, own).weight.dtype).to(memory_format=torch.channels_last)
    x = random_map((images, channels, height, width), dtype, 1).to(own).requires_grad_()
    before = kernels.use(mode)
    with torch.autocast("cpu", BF16, enabled=own == BF16):
        y = block(x)
    kernels.use(before)
    assert ("PairsNormAct" in type(y.grad_fn).__name__) == (mode == "auto")
    assert is_one_operator(y) == (mode == "auto")
    y.backward(random_map(y.shape, dtype, 3).to(own))
    return [y.detach(), x.grad, *(p.grad for p in block.parameters()), *block.buffers()]


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("sizes", BLOCKS)
@pytest.mark.parametrize("make", [DW, Shift, Group])
def test_block(make, sizes, dtype):
    """The map between the pairs is normalized while it is read."""
    for a, b in zip(*(run_block(make, sizes, dtype, mode) for mode in ("auto", "off")), strict=True):
        assert_close(a, b, dtype)


@pytest.mark.parametrize("make", [DW, Shift, Group])
def test_block_in_bfloat16(make):
    bias = torch.where(torch.arange(16) % 3 == 0, -12.0, 12.0)  # each ReLU decides as in float64
    results = (run_block(make, (3, 16, 16, 5, 7, 1), BF16, mode, bias) for mode in ("auto", "off"))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, BF16)


def test_a_block_with_other_readers_is_not_one_operator():
    """A hook on a layer, or a layer in evaluation mode, needs the map between the pairs."""
    x = random_map((2, 16, 4, 4), F32, 1).requires_grad_()
    seen = []
    block = CheapBlock(DW(), 16, 16, 1)
    block.bn1.register_forward_hook(lambda *_: seen.append(1))
    assert not is_one_operator(block(x))
    assert seen
    block = CheapBlock(DW(), 16, 16, 1)
    block.bn2.eval()
    assert "PairsNormAct" not in type(block(x).grad_fn).__name__
    block = CheapBlock(DW(), 16, 16, 1)
    block.shortcut.register_forward_hook(lambda *_: seen.append(2))
    block(x).sum().backward()
    assert seen[-1] == 2


def test_gradients_are_those_of_finite_differences():
    x = random_map((2, 5, 4, 3), F64, 1).requires_grad_()
    residual = random_map((2, 5, 4, 3), F64, 2).requires_grad_()
    norm = norm_of(5, F64)

    def norm_act(x, residual, weight, bias, order):
        own = copy.deepcopy(norm)  # the running statistics change with each call
        own.weight, own.bias = nn.Parameter(weight), nn.Parameter(bias)
        return BatchNormAct.apply(x, weight, bias, residual, own, order)

    inputs = (x, residual, norm.weight, norm.bias)
    for order in (1, 2):
        assert torch.autograd.gradcheck(lambda *t, order=order: norm_act(*t, order), inputs, atol=1e-6)

    # Two pairs in one operator, with the sum with its input.
    x = random_map((2, 4, 4, 3), F64, 1).requires_grad_()
    for make in (DW(), Group(2), Shift()):
        pairs = [make(4, 4, 1).double() for _ in range(2)]
        norms = [norm_of(4, F64) for _ in pairs]
        kernel = [getattr(pair.spatial, "weight", None) for pair in pairs]

        def run(x, *parameters, norms=norms):
            own = [
                kernels.Pair(*parameters[k : k + 2], copy.deepcopy(norm), 1)
                for k, norm in zip((0, 4), norms, strict=True)
            ]
            return kernels.load_operators("cpu").PairsNormAct.apply(x, None, True, own, *parameters)

        parameters = [
            t for k, p, n in zip(kernel, pairs, norms, strict=True) for t in (k, p.pointwise.weight, n.weight, n.bias)
        ]
        assert torch.autograd.gradcheck(run, (x, *parameters), atol=1e-6)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_results_are_the_same_bits_with_each_number_of_threads(dtype):
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(run_pair(DW, (40, 16, 24, 9, 8, 1), dtype, "auto"))
        for make in (DW, Shift, Group):
            results[-1] += run_block(make, (35, 16, 16, 3, 4, 1), dtype, "auto")
        x, norm = random_map((9, 24, 9, 8), dtype, 1).requires_grad_(), norm_of(24, dtype)
        y = batch_norm_act(x, norm, random_map((9, 24, 9, 8), dtype, 2), "add_act")
        y.backward(random_map(y.shape, dtype, 3))
        results[-1] += [y, x.grad, norm.weight.grad, norm.running_var]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_value_that_is_not_finite_stays_visible(value, dtype):
    """A batch norm spreads it over its channel, as PyTorch's does; a training step can then refuse the update."""
    x = random_map((2, 16, 4, 4), dtype, 1)
    x[1, 3, 2, 2] = value
    found = batch_norm_act(x.requires_grad_(), nn.BatchNorm2d(16))
    assert found[:, 3].isnan().all()
    assert found[:, torch.arange(16) != 3].isfinite().all()
    pair = DW()(16, 8, 1)
    with torch.autocast("cpu", BF16, enabled=dtype == BF16):
        y = conv_norm_act(x, pair, nn.BatchNorm2d(8))[0]
    assert y.isnan().all()  # the 1 x 1 convolution has spread it
    y.sum().backward()
    assert pair.pointwise.weight.grad.isnan().any()


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for other processors of this family")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_processors_with_other_vectors_compute_the_same(processor, monkeypatch, tmp_path):
    """They have vectors of 16, 32 or 64 bytes, and no products of bfloat16 numbers."""
    if processor == "x86-64-v4" and "avx512f" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX-512")
    cpu_library.compile_library(cpu_library.find_compiler(), tmp_path / "cpu.so", (f"-march={processor}",))
    library = cpu_library.open_library(tmp_path / "cpu.so")
    monkeypatch.setattr(kernels.load_operators("cpu"), "load_library", lambda: library)
    for dtype in (F64, F32, BF16):
        for shape in MAPS:
            test_batch_norm_act(shape, True, "add_act", dtype)
            test_batch_norm_act(shape, True, "act_add", dtype)
    for make, sizes in CASES:
        test_pair_norm_act(make, sizes, F64)
        test_pair_norm_act(make, sizes, F32)
        test_pair_norm_act_in_bfloat16(make, sizes)
    for sizes in BLOCKS:
        test_block(DW, sizes, F64)


def test_second_derivatives_are_refused():
    x, norm = random_map((2, 16, 4, 4), F32, 1).requires_grad_(), nn.BatchNorm2d(16)
    for y in (batch_norm_act(x, norm), conv_norm_act(x, DW()(16, 16, 1), norm)[0]):
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def test_what_stays_with_the_plain_modules():
    x, norm = random_map((2, 16, 6, 6), F32, 1).requires_grad_(), nn.BatchNorm2d(16)
    assert "Relu" in type(batch_norm_act(x, norm.eval()).grad_fn).__name__
    norm.train()
    for pair in (
        DW()(16, 16, 1).eval(),
        DW()(16, 16, 3),
        CheapConv(Shift2d(5), 16, 16),
        CheapConv(nn.Conv2d(16, 16, 3, padding=1, groups=16), 16, 16),  # a bias
        CheapConv(nn.Conv2d(16, 16, 3, padding=1, groups=4), 16, 16),
        DW()(16, 16, 1).register_forward_hook(lambda *_: None) and nn.Conv2d(16, 16, 1),
    ):
        assert "BatchNormAct" in type(conv_norm_act(x, pair, norm)[0].grad_fn).__name__  # the norm alone is fused
    odd = Group(2)(6, 16, 1)  # three channels a group
    narrow = random_map((2, 6, 6, 6), F32, 1).requires_grad_()
    assert "BatchNormAct" in type(conv_norm_act(narrow, odd, norm)[0].grad_fn).__name__
    wide = DW()(16, 200, 1)
    assert "BatchNormAct" in type(conv_norm_act(x, wide, nn.BatchNorm2d(200))[0].grad_fn).__name__
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly(check_nan=True):
        conv_norm_act(x, DW()(16, 16, 1), norm)[0].sum().backward()


@pytest.mark.parametrize("precision", [F32, BF16])
@pytest.mark.parametrize("make", [DW, Shift, Group])
def test_ten_training_steps_stay_within_rounding(make, precision):
    def train(mode):
        torch.manual_seed(0)  # of the teacher
        students = Students(lambda: CifarResNet(8, make(), num_classes=10), 2, seed=0)
        method = OnlineDistillation(students).to(memory_format=torch.channels_last).train()
        optimizer = torch.optim.SGD(method.parameters(), 0.01, momentum=0.9)
        images, target = random_map((16, 3, 16, 16), F32, 5), torch.arange(16) % 10
        losses = []
        before = kernels.use(mode)
        for _ in range(10):
            with torch.autocast("cpu", BF16, enabled=precision == BF16):
                loss = method.loss(method(images), target)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        kernels.use(before)
        return torch.tensor(losses), method

    (found, fused), (expected, plain) = train("auto"), train("off")
    assert expected[-1] < expected[0]
    torch.testing.assert_close(found, expected, rtol=1e-4 if precision == F32 else 0.05, atol=0)
    if precision == F32:
        for (name, a), b in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_without_a_compiler_the_reason_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(cpu_library.CompileError, match=r"no C\+\+ compiler no-such-compiler on the PATH"):
        cpu_library.find_compiler()
    with pytest.raises(cpu_library.CompileError, match="false fails"):
        cpu_library.compile_library("/bin/false", tmp_path / "cache" / "cpu.so")
    assert not list((tmp_path / "cache").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(cpu_library.CompileError, match="cannot be written"):
        cpu_library.compile_library("g++", tmp_path / "file" / "cpu.so")


def test_without_a_compiler_layers_are_plain():
    script = """
import torch
from odcheap.layers import kernels
from odcheap.layers.norm_act import batch_norm_act
x = torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
print(type(batch_norm_act(x, torch.nn.BatchNorm2d(16)).grad_fn).__name__, kernels.reason_for_plain_layers("cpu"))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env={"CXX": "none"}, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith("ReluBackward0 there is no C++ compiler none"), done.stdout + done.stderr
