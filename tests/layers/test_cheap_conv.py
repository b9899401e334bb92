import io

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from odcheap.layers.cheap_conv import DW, Group, Shift, Standard, factorize_grouped
from odcheap.layers.spatial import Shift2d, Window
from odcheap.utils.errors import OptionError


def shifted_by_loops(x: np.ndarray, kernel_size: int = 3, dilation: int = 1, stride: int = 1) -> np.ndarray:
    """The definition, pixel by pixel."""
    _, channels, height, width = x.shape
    out = np.zeros_like(x)
    moved = channels // kernel_size**2 * kernel_size**2
    for c in range(channels):
        down = dilation * (c // kernel_size % kernel_size - kernel_size // 2) if c < moved else 0
        right = dilation * (c % kernel_size - kernel_size // 2) if c < moved else 0
        for h in range(height):
            for w in range(width):
                if 0 <= h + down < height and 0 <= w + right < width:
                    out[:, c, h, w] = x[:, c, h + down, w + right]
    return out[:, :, ::stride, ::stride]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels", [4, 9, 16, 20])
def test_shift_equals_its_definition_exactly(channels, dtype, layout):
    x = torch.randn(2, channels, 5, 7).to(dtype)
    expected = torch.from_numpy(shifted_by_loops(x.double().numpy()))
    assert torch.equal(Shift2d()(x.to(memory_format=layout)).double(), expected)


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_shift_with_other_kernels_dilations_and_strides(kernel_size, dilation, stride):
    x = torch.randn(2, 30, 8, 9, dtype=torch.double)
    expected = shifted_by_loops(x.numpy(), kernel_size, dilation, stride)
    assert np.array_equal(Shift2d(kernel_size, dilation, stride)(x).numpy(), expected)


def test_first_channels_read_from_up_left_and_up():
    x = torch.zeros(1, 9, 3, 3)
    x[:, :, 0, 0] = 1  # the corner's one moves against the offset it is read with
    places = [tuple(Shift2d()(x)[0, c].nonzero()[0].tolist()) for c in (0, 1, 3, 4)]
    assert places == [(1, 1), (1, 0), (0, 1), (0, 0)]


def test_shift_gradient_is_the_opposite_shift():
    x = torch.randn(2, 18, 4, 4, dtype=torch.double, requires_grad=True)
    towards = torch.randn_like(x)
    Shift2d()(x).backward(towards)
    for c, (down, right) in enumerate((c // 3 % 3 - 1, c % 3 - 1) for c in range(18)):
        for h in range(4):
            for w in range(4):
                inside = 0 <= h - down < 4 and 0 <= w - right < 4
                expected = towards[:, c, h - down, w - right] if inside else torch.zeros(2, dtype=torch.double)
                assert torch.equal(x.grad[:, c, h, w], expected)


def test_shift_compiles_whole():
    x = torch.randn(2, 18, 6, 6)
    assert torch.equal(torch.compile(Shift2d(), backend="aot_eager", fullgraph=True)(x), Shift2d()(x))


# torch.onnx's own code calls a part of torch that is deprecated
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_shift_exports_to_onnx():
    x = torch.randn(2, 20, 6, 6)
    program = torch.onnx.export(Shift2d().eval(), (x,), dynamo=True, verbose=False)
    content = io.BytesIO()
    program.save(content)
    session = onnxruntime.InferenceSession(content.getvalue())
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert np.array_equal(found, Shift2d()(x).numpy())


@pytest.mark.parametrize(
    ("block_type", "weights"),
    [(Standard(), 9 * 16 * 32), (Shift(), 16 * 32), (DW(), 9 * 16 + 16 * 32), (Group(4), 9 * 16 * 4 + 16 * 32)],
)
@pytest.mark.parametrize("stride", [1, 2])
def test_block_types_are_drop_ins(block_type, weights, stride):
    made = block_type(16, 32, stride)
    assert made(torch.randn(1, 16, 9, 9)).shape == nn.Conv2d(16, 32, 3, stride, 1)(torch.randn(1, 16, 9, 9)).shape
    assert sum(p.numel() for p in made.parameters()) == weights


@pytest.mark.parametrize("groups", [0, -1, 3, 32])
def test_groups_that_do_not_divide_are_refused(groups):
    reason = "must divide the layer's 16 channels" if groups > 0 else "must be a whole number, 1 or more"
    with pytest.raises(OptionError, match=rf"block_type.groups={groups}: {reason}"):
        Group(groups)(16, 32, 1)


def test_a_shift_keeps_its_kernels_only_for_what_they_fit():
    """One module for other channels and other types; first used while evaluating, then in training."""
    shift = Shift2d()
    with torch.inference_mode():
        shift(torch.randn(1, 9, 4, 4))
    for channels, dtype in [(9, torch.float), (18, torch.float), (18, torch.double), (9, torch.double)]:
        x = torch.randn(2, channels, 4, 4, dtype=dtype, requires_grad=True)
        assert torch.equal(shift(x), Shift2d()(x))
        shift(x).sum().backward()
        assert x.grad.dtype == dtype
    assert not shift.state_dict()


def composed(spatial, pointwise, groups):
    """The one kernel that the pair makes: W[o, i] = sum over c of P[o, c] G[c, i], c and i in one group."""
    width = len(spatial) // groups
    parts = [
        torch.einsum("oc,cihw->oihw", pointwise[:, c : c + width, 0, 0], spatial[c : c + width].nan_to_num())
        for c in range(0, len(spatial), width)
    ]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize(("channels", "groups"), [(6, 6), (6, 3), (6, 2), (8, 1)])
def test_a_kernel_of_the_cheap_form_is_reproduced(channels, groups):
    spatial = torch.randn(channels, channels // groups, 3, 5, dtype=torch.double)
    kernel = composed(spatial, torch.randn(7, channels, 1, 1, dtype=torch.double), groups)
    found = factorize_grouped(kernel, groups)
    torch.testing.assert_close(composed(*found, groups), kernel)


def test_no_other_pair_is_nearer():
    """Alternating least squares from many starts never finds a smaller error."""
    random = torch.Generator().manual_seed(0)
    kernel = torch.randn(10, 4, 3, 3, dtype=torch.double, generator=random)
    error = (composed(*factorize_grouped(kernel, 2), 2) - kernel).square().sum()
    best = torch.inf
    for _ in range(20):
        total = 0
        for block in kernel.split(2, dim=1):
            matrix, mix = block.flatten(1), torch.randn(10, 2, dtype=torch.double, generator=random)
            for _ in range(200):
                taps = torch.linalg.lstsq(mix, matrix).solution
                mix = torch.linalg.lstsq(taps.T, matrix.T).solution.T
            total += (mix @ taps - matrix).square().sum()
        best = min(best, total)
    assert error == pytest.approx(best.item(), rel=1e-6)


def test_channels_beyond_the_rank_are_left_to_the_caller():
    spatial, pointwise = factorize_grouped(torch.randn(2, 8, 3, 3), groups=2)  # 2 outputs use 2 of 4 channels a group
    unused = spatial.flatten(1).isnan().all(1)
    assert unused.tolist() == [False, False, True, True] * 2
    assert not pointwise[:, unused].any()


def test_a_shift_keeps_the_entry_that_it_reads():
    kernel = torch.randn(3, 5, 2, 2)
    pair = Shift().make_pair(5, 3, Window((2, 2), padding=(0, 0)))
    spatial, pointwise = Shift().factorize(kernel, pair)
    assert spatial is None
    for channel, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1), (1, 1)]):  # the last one is copied
        assert torch.equal(pointwise[:, channel, 0, 0], kernel[:, channel, row, column])
