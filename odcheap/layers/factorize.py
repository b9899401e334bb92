"""Factorization of a K x K kernel into a spatial operator and a 1 x 1 convolution, nearest in least squares.

There is no non-linearity between the two, so together they are one kernel. Kernels are (O, C, kh, kw): O output and C
input channels.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from odcheap.layers.cheap_conv import Window


def factorize_grouped(kernel: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Factorizes a kernel into a convolution in groups and a 1 x 1 convolution.

    In each group the kernel is a matrix O x (C/groups * kh * kw), and a pair expresses the matrices of rank up to
    C/groups; the truncated singular value decomposition is the nearest (Eckart and Young, 1936). The square root of
    each singular value goes to either factor, so that weight decay treats both alike.

    Args:
        kernel: (O, C, kh, kw).
        groups: Number of groups; C for a depth-wise convolution.

    Returns:
        Spatial weights (C, C/groups, kh, kw) and 1 x 1 weights (O, C, 1, 1). Channels beyond the rank of the matrix
        have 1 x 1 weights of zero, and spatial weights of NaN for the caller to fill: with two zeros in a
        row they could not learn.
    """
    out, channels, *size = kernel.shape
    width = channels // groups
    matrices = kernel.double().reshape(out, groups, width, *size).transpose(0, 1).flatten(2)
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    rank = min(width, s.shape[1])
    u, s, v = u[:, :, :rank], s[:, :rank], v[:, :rank]
    s = torch.where(s > 1e-9 * s[:, :1], s, 0)
    spatial = kernel.new_full((groups, width, v.shape[2]), torch.nan, dtype=torch.double)
    spatial[:, :rank] = torch.where(s[:, :, None] > 0, s.sqrt()[:, :, None] * v, torch.nan)
    pointwise = kernel.new_zeros((out, groups, width), dtype=torch.double)
    pointwise[:, :, :rank] = (u * s.sqrt()[:, None]).transpose(0, 1)
    return spatial.view(channels, width, *size).to(kernel), pointwise.view(out, channels, 1, 1).to(kernel)


def fit_pointwise(kernel: Tensor, spatial: Tensor) -> Tensor:
    """Returns the 1 x 1 weights (O, C, 1, 1) that come nearest to a kernel after a fixed spatial operator.

    Args:
        kernel: (O, C, kh, kw).
        spatial: (C, 1, kh, kw): each channel's fixed kernel.
    """
    fixed = spatial.double().squeeze(1)
    squares = fixed.square().sum((1, 2))
    products = torch.einsum("ochw,chw->oc", kernel.double(), fixed)
    return torch.where(squares > 0, products / squares, 0)[..., None, None].to(kernel)


def select_taps(kernel: Tensor, taps: Tensor) -> Tensor:
    """Returns the 1 x 1 weights (O, C, 1, 1) after a shift: of each channel's kernel the entry that it reads.

    Args:
        kernel: (O, C, kh, kw).
        taps: (C,): the entries, counted row by row.
    """
    entries = kernel.flatten(2)
    return entries.gather(2, taps.expand(len(kernel), -1)[:, :, None])[..., None]


@torch.no_grad()
def spatial_kernel(spatial: nn.Module, like: Tensor, window: "Window") -> Tensor:
    """Returns the kernel of a spatial operator: (C, C/groups, kh, kw) of an `nn.Conv2d`, else (C, 1, kh, kw).

    Of an operator that is no convolution the kernel is its response to one pixel that is one, in each channel.

    Args:
        spatial: Linear; where it is no `nn.Conv2d`, it treats each channel by itself.
        like: (O, C, ...): its number of channels, type and device.
        window: The operator's kernel size, padding and dilation.
    """
    if isinstance(spatial, nn.Conv2d):
        return spatial.weight
    probe: Any = copy.deepcopy(spatial)
    if hasattr(probe, "stride"):
        probe.stride = (1, 1)
    reach = [d * (k - 1) for k, d in zip(window.kernel_size, window.dilation, strict=True)]
    if isinstance(window.padding, str):
        padding = [r // 2 if window.padding == "same" else 0 for r in reach]
    else:
        padding = list(window.padding)
    centre = [r + p + 1 for r, p in zip(reach, padding, strict=True)]  # too far inside for the border to reflect it
    image = like.new_zeros(1, like.shape[1], *(2 * c + 1 for c in centre))
    image[:, :, centre[0], centre[1]] = 1
    response = probe(image)[0]
    # Output y sums kernel[k] * image[y + dilation * k - padding]: entry k is at y = centre + padding - dilation * k.
    rows, columns = (
        [c + p - d * k for k in range(size)]
        for c, p, d, size in zip(centre, padding, window.dilation, window.kernel_size, strict=True)
    )
    return response[:, rows][:, :, columns][:, None]
