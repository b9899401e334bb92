"""Least-squares factorization of a K x K kernel into a spatial operator and a 1 x 1 convolution.

There is no non-linearity between the two, so together they compute a convolution with one kernel. Kernels have the
shape (O, C, kh, kw) with O output and C input channels.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from odcheap.layers.cheap_conv import Window


def factorize_grouped(kernel: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Factorizes a kernel into a convolution in groups and a 1 x 1 convolution.

    In each group the kernel is a matrix O x (C/groups * kh * kw), and a pair can express each matrix of rank up to
    C/groups. The truncated singular value decomposition is the nearest such matrix (Eckart and Young, 1936). Each
    factor gets the square root of the singular values, so that weight decay treats both alike.

    Args:
        kernel: The kernel, (O, C, kh, kw).
        groups: Number of groups; C for a depth-wise convolution.

    Returns:
        Spatial weights (C, C/groups, kh, kw) and 1 x 1 weights (O, C, 1, 1). Channels beyond the rank of the matrix
        have 1 x 1 weights of zero. Their spatial weights are NaN, which the caller must replace: if they were zero too,
        both gradients would be zero.
    """
    # The decomposition of each group.
    out, channels, *size = kernel.shape
    width = channels // groups
    matrices = kernel.double().reshape(out, groups, width, *size).transpose(0, 1).flatten(2)
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    rank = min(width, s.shape[1])
    u, s, v = u[:, :, :rank], s[:, :rank], v[:, :rank]
    s = torch.where(s > 1e-9 * s[:, :1], s, 0)

    # Channels beyond the rank, or with a singular value of zero, keep NaN and 0.
    spatial = kernel.new_full((groups, width, v.shape[2]), torch.nan, dtype=torch.double)
    spatial[:, :rank] = torch.where(s[:, :, None] > 0, s.sqrt()[:, :, None] * v, torch.nan)
    pointwise = kernel.new_zeros((out, groups, width), dtype=torch.double)
    pointwise[:, :, :rank] = (u * s.sqrt()[:, None]).transpose(0, 1)
    return spatial.view(channels, width, *size).to(kernel), pointwise.view(out, channels, 1, 1).to(kernel)


def fit_pointwise(kernel: Tensor, spatial: Tensor) -> Tensor:
    """Returns the 1 x 1 weights (O, C, 1, 1) that come nearest to a kernel after a fixed spatial operator.

    Args:
        kernel: The kernel, (O, C, kh, kw).
        spatial: The fixed kernel of each channel, (C, 1, kh, kw).
    """
    fixed = spatial.double().squeeze(1)
    squares = fixed.square().sum((1, 2))
    products = torch.einsum("ochw,chw->oc", kernel.double(), fixed)
    return torch.where(squares > 0, products / squares, 0)[..., None, None].to(kernel)


@torch.no_grad()
def spatial_kernel(spatial: nn.Module, like: Tensor, window: "Window") -> Tensor:
    """Returns the kernel of a spatial operator: (C, C/groups, kh, kw) for an `nn.Conv2d`, else (C, 1, kh, kw).

    The kernel of another operator is read from its response to an image with a single pixel of one in each channel.

    Args:
        spatial: A linear operator that is an `nn.Conv2d` or treats each channel by itself.
        like: A tensor (O, C, ...) with the number of channels, the type and the device.
        window: The operator's kernel size, padding and dilation.
    """
    if isinstance(spatial, nn.Conv2d):
        return spatial.weight

    # An image with one pixel in the center, so far inside that padding does not reflect it.
    probe: Any = copy.deepcopy(spatial)
    if hasattr(probe, "stride"):
        probe.stride = (1, 1)
    reach = [d * (k - 1) for k, d in zip(window.kernel_size, window.dilation, strict=True)]
    if isinstance(window.padding, str):
        padding = [r // 2 if window.padding == "same" else 0 for r in reach]
    else:
        padding = list(window.padding)
    center = [r + p + 1 for r, p in zip(reach, padding, strict=True)]
    image = like.new_zeros(1, like.shape[1], *(2 * c + 1 for c in center))
    image[:, :, center[0], center[1]] = 1
    response = probe(image)[0]

    # Output y sums kernel[k] * image[y + dilation * k - padding]: entry k is at y = center + padding - dilation * k.
    rows, columns = (
        [c + p - d * k for k in range(size)]
        for c, p, d, size in zip(center, padding, window.dilation, window.kernel_size, strict=True)
    )
    return response[:, rows][:, :, columns][:, None]
