"""The nearest pair, held against an alternating least-squares search and against kernels that are exactly a pair."""

import pytest
import torch

from odcheap.layers.cheap_conv import Shift, factorize_grouped
from odcheap.layers.spatial import Window


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
