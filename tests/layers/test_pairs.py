"""Which pairs are fused; the fused operators themselves are tested in `test_gpu_kernels.py`."""

import copy

import pytest
import torch
from simulated_gpu import called  # noqa: F401 - a fixture
from torch import nn

from odcheap.layers import kernels, pairs
from odcheap.layers.cheap_conv import DW, CheapConv, Shift, Shift2d


def maps(channels=16, dtype=torch.float32):
    return torch.randn(2, channels, 6, 6, dtype=dtype).contiguous(memory_format=torch.channels_last)


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
    assert not pairs.fused_pair(x, pair.spatial, pair.pointwise, False)  # the module says what is wrong


def test_a_pair_and_its_batch_norm_are_one_unit(called):  # noqa: F811
    x, norm = maps(), nn.BatchNorm2d(8)
    for pair in (DW()(16, 8, 1), DW()(16, 8, 2), Shift()(16, 8, 1)):
        assert pairs.conv_norm_act(x, pair, norm)[1] is x
    assert called == ["pair_norm_act"] * 3
    with torch.autocast("cpu", torch.bfloat16):
        y, again = pairs.conv_norm_act(x, DW()(16, 8, 1), norm)
    assert y.dtype == torch.bfloat16
    assert again is x
    assert called[3:] == ["pair_norm_act"]
    pairs.conv_norm_act(x, DW()(16, 80, 1), nn.BatchNorm2d(80))  # more channels than a unit can have
    assert called[4:] == ["depthwise3x3", "batch_norm_act"]


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
    y, again = pairs.conv_norm_act(x := maps(), pair, nn.BatchNorm2d(channels))
    assert again is x
    assert y.shape[1] == channels
    assert "pair_norm_act" not in called


def test_what_a_unit_is_not_made_of(called):  # noqa: F811
    x, pair, norm = maps(), DW()(16, 8, 1), nn.BatchNorm2d(8)
    pairs.conv_norm_act(x.contiguous(), pair, norm)
    pairs.conv_norm_act(x, pair, nn.BatchNorm2d(8).eval())
    pairs.conv_norm_act(x, pair, norm, torch.randn(2, 8, 6, 6))
    pairs.conv_norm_act(x.double(), copy.deepcopy(pair).double(), nn.BatchNorm2d(8).double())
    handle = pair.register_forward_hook(lambda *_: called.append("hook"))
    pairs.conv_norm_act(x, pair, norm)
    handle.remove()
    assert "pair_norm_act" not in called
    assert called.count("hook") == 1


def test_without_kernels_a_block_is_plain_bit_for_bit(kernels_off):
    x, pair, norm = maps(), DW()(16, 8, 2), nn.BatchNorm2d(8)
    expected = nn.functional.relu(copy.deepcopy(norm)(pair(x)))
    assert torch.equal(pairs.conv_norm_act(x, pair, norm)[0], expected)
