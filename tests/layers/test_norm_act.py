"""Which layers are fused; the fused operators themselves are tested in `test_gpu_kernels.py`."""

import copy

import pytest
import torch
from simulated_gpu import called  # noqa: F401 - a fixture
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from odcheap.layers import kernels, norm_act
from odcheap.layers.cheap_conv import DW, CheapConv, Shift
from odcheap.layers.norm_act import batch_norm_act, conv_norm_act
from odcheap.layers.spatial import Shift2d


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
    assert called == ["norm_forward", "depthwise3x3", "shift3x3"]


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


@pytest.mark.parametrize(
    "pair",
    [
        DW()(16, 8, 1).eval(),
        CheapConv(nn.Conv2d(16, 16, 3, 1, 1, groups=16), 16, 8),
        CheapConv(nn.Conv2d(16, 16, 3, 2, 1, groups=16, bias=False), 16, 8),
        CheapConv(nn.Conv2d(16, 16, 3, 1, 1, groups=4, bias=False), 16, 8),
        CheapConv(nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False, padding_mode="reflect"), 16, 8),
        CheapConv(Shift2d(5), 16, 8),
        CheapConv(Shift2d(3, stride=2), 16, 8),
        CheapConv(Shift2d(3, dilation=2), 16, 8),
        CheapConv(Shift2d(3, padding="valid"), 16, 8),
        CheapConv(Shift2d(3, padding_mode="reflect"), 16, 8),
    ],
)
def test_other_pairs_stay_plain(pair, called):  # noqa: F811
    x = maps()
    assert torch.equal(pair(x), pair.pointwise(pair.spatial(x)))
    assert not called


def test_autocast_casts_before_a_pair_as_before_a_convolution(called, monkeypatch):  # noqa: F811
    seen = []
    monkeypatch.setattr(kernels.load_operators("cuda"), "depthwise3x3", lambda x, _: seen.append(x.dtype) or x)
    pair, x = DW()(16, 8, 1), maps()
    with torch.autocast("cpu", torch.bfloat16):
        assert pair(x).dtype == torch.bfloat16
    pair(x)
    pair.double()(x.double())
    assert seen == [torch.bfloat16, torch.float32, torch.float64]
    assert not norm_act.fused_pair(x, pair.spatial, pair.pointwise, False)  # the module says what is wrong


def test_a_pair_and_its_batch_norm_are_one_unit(called):  # noqa: F811
    x, norm = maps(), nn.BatchNorm2d(8)
    for pair in (DW()(16, 8, 1), DW()(16, 8, 2), Shift()(16, 8, 1)):
        assert conv_norm_act(x, pair, norm)[1] is x
    assert called == ["pairs_norm_act"] * 3
    with torch.autocast("cpu", torch.bfloat16):
        y, again = conv_norm_act(x, DW()(16, 8, 1), norm)
    assert y.dtype == torch.bfloat16
    assert again is x
    assert called[3:] == ["pairs_norm_act"]
    conv_norm_act(x, DW()(16, 80, 1), nn.BatchNorm2d(80))  # more channels than a unit can have
    assert called[4:] == ["depthwise3x3", "norm_forward"]


@pytest.mark.parametrize(
    ("pair", "channels"),
    [
        (DW()(16, 80, 1), 80),
        (DW()(16, 8, 3), 8),
        (CheapConv(Shift2d(), 16, 8, bias=True), 8),
        (nn.Conv2d(16, 8, 1), 8),
        (type("Other", (CheapConv,), {})(Shift2d(), 16, 8), 8),
        (DW()(16, 8, 1).eval(), 8),
    ],
)
def test_other_pairs_are_no_unit(pair, channels, called):  # noqa: F811
    y, again = conv_norm_act(x := maps(), pair, nn.BatchNorm2d(channels))
    assert again is x
    assert y.shape[1] == channels
    assert "pairs_norm_act" not in called


def test_what_a_unit_is_not_made_of(called):  # noqa: F811
    x, pair, norm = maps(), DW()(16, 8, 1), nn.BatchNorm2d(8)
    conv_norm_act(x.contiguous(), pair, norm)
    conv_norm_act(x, pair, nn.BatchNorm2d(8).eval())
    conv_norm_act(x, pair, norm, torch.randn(2, 8, 6, 6))
    conv_norm_act(x.double(), copy.deepcopy(pair).double(), nn.BatchNorm2d(8).double())
    handle = pair.register_forward_hook(lambda *_: called.append("hook"))
    conv_norm_act(x, pair, norm)
    handle.remove()
    assert "pairs_norm_act" not in called
    assert called.count("hook") == 1


def test_without_kernels_a_block_is_plain_bit_for_bit(kernels_off):
    x, pair, norm = maps(), DW()(16, 8, 2), nn.BatchNorm2d(8)
    expected = nn.functional.relu(copy.deepcopy(norm)(pair(x)))
    assert torch.equal(conv_norm_act(x, pair, norm)[0], expected)
