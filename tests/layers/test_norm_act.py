"""Which form runs where; the fused one itself is tested in `test_gpu_kernels.py`."""

import copy

import pytest
import torch
from simulated_gpu import called  # noqa: F401 - a fixture
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from odcheap.layers import kernels, norm_act
from odcheap.layers.cheap_conv import DW, Shift
from odcheap.layers.norm_act import batch_norm_act


def maps(channels=16, dtype=torch.float32):
    return torch.randn(2, channels, 6, 6, dtype=dtype).contiguous(memory_format=torch.channels_last)


def test_without_kernels_it_is_the_plain_modules_bit_for_bit(kernels_off):
    x, residual, norm = maps(), maps(), nn.BatchNorm2d(16)
    for found, expected in [
        (lambda n: batch_norm_act(x, n), lambda n: F.relu(n(x))),
        (lambda n: batch_norm_act(x, n, residual), lambda n: F.relu(n(x)) + residual),
        (lambda n: batch_norm_act(x, n, residual, "add_act"), lambda n: F.relu(n(x) + residual)),
    ]:
        one, other = copy.deepcopy(norm), copy.deepcopy(norm)
        assert torch.equal(found(one), expected(other))
        assert all(torch.equal(a, b) for a, b in zip(one.buffers(), other.buffers(), strict=True))


def test_in_training_on_a_gpu_it_is_fused(called):  # noqa: F811
    x = maps()
    batch_norm_act(x, nn.BatchNorm2d(16), maps())
    DW()(16, 8, 1)(x)
    Shift()(16, 8, 2)(x)
    assert called == ["batch_norm_act", "depthwise3x3", "shift3x3"]


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(16).eval(),
        nn.BatchNorm2d(16, affine=False),
        nn.BatchNorm2d(16, track_running_stats=False),
        nn.BatchNorm2d(16, momentum=None),
        nn.GroupNorm(4, 16),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_other_norms_stay_plain(norm, called):  # noqa: F811
    batch_norm_act(maps(), norm)
    assert not called


def test_parameters_of_other_types_are_not_known():
    assert norm_act.is_fusible(maps(), maps().shape, nn.BatchNorm2d(16), None)
    assert norm_act.is_fusible(maps().bfloat16(), maps().shape, nn.BatchNorm2d(16), maps().bfloat16())
    assert not norm_act.is_fusible(maps(), maps().shape, nn.BatchNorm2d(16).double(), None)
    assert not norm_act.is_fusible(maps().bfloat16(), maps().shape, nn.BatchNorm2d(16).bfloat16(), None)
    assert not norm_act.is_fusible(maps().bfloat16(), maps().shape, nn.BatchNorm2d(16), maps())


def test_other_maps_stay_plain(called):  # noqa: F811
    norm = nn.BatchNorm2d(16)
    batch_norm_act(maps().contiguous(), norm)
    batch_norm_act(maps(), norm, maps().contiguous())
    batch_norm_act(maps(), norm, torch.randn(2, 16, 1, 1))
    with pytest.raises(ValueError, match="more than 1 value"):
        batch_norm_act(torch.randn(1, 16, 1, 1), norm)
    assert not kernels.can_apply(maps().half(), norm)
    assert not called


def test_what_is_looked_at_stays_plain(called):  # noqa: F811
    x, norm = maps(), nn.BatchNorm2d(16)
    seen = []
    hook = norm.register_forward_hook(lambda *_: seen.append("hook"))
    batch_norm_act(x, norm)
    hook.remove()
    pair = DW()(16, 8, 1)
    for part in pair:
        part.register_forward_pre_hook(lambda *_: seen.append("hook"))
    pair(x)
    assert seen == ["hook"] * 3
    with FlopCounterMode(display=False) as counter:
        DW()(16, 8, 1)(x)
    assert counter.get_total_flops() > 0
    torch.vmap(lambda x: F.relu(x) if kernels.can_apply(x, norm) else x)(x[None])
    assert not called


def test_compiled_networks_are_plain(called):  # noqa: F811
    pair = DW()(16, 8, 1)
    compiled = torch.compile(pair, backend="eager", fullgraph=True)
    assert torch.equal(compiled(maps() * 0), torch.zeros(2, 8, 6, 6))
    norm = nn.BatchNorm2d(16)
    torch.compile(lambda x: batch_norm_act(x, norm), backend="eager", fullgraph=True)(maps())
    assert not called


def test_the_switch(called):  # noqa: F811
    pair, x = DW()(16, 8, 2), maps()
    assert kernels.use("off") == "auto"
    pair(x)
    assert not called
    assert kernels.use("auto") == "off"
    pair(x)
    assert called == ["depthwise3x3"]
    with pytest.raises(ValueError, match='mode=1: must be "auto" or "off"'):
        kernels.use(1)
    with pytest.raises(ValueError, match="order='add'"):
        batch_norm_act(x, nn.BatchNorm2d(16), x, "add")
