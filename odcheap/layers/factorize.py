"""Least-squares factorization of a K x K kernel into a spatial operator and a 1 x 1 convolution.

There is no non-linearity between these two operators, so together they compute a convolution with one kernel. A kernel
has the shape (O, C, kh, kw), with O output and C input channels.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from odcheap.layers.cheap_conv import Window


def factorize_grouped(kernel: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Factorizes a kernel into a grouped convolution and a 1 x 1 convolution.

    For the input channels of one group the kernel is a matrix O x (C/groups * kh * kw). The two convolutions together
    can compute every such matrix with a rank of C/groups or less. The truncated singular value decomposition is the
    nearest of them (Eckart and Young, 1936). Each of the two convolutions is multiplied by the square root of the
    singular values, so that weight decay has the same effect on both.

    Args:
        kernel: The kernel, (O, C, kh, kw).
        groups: The number of groups; C for a depth-wise convolution.

    Returns:
        The weights of the grouped convolution, (C, C/groups, kh, kw), and those of the 1 x 1 convolution, (O, C, 1, 1).
        If the rank of a group's matrix is less than C/groups, the remaining channels have 1 x 1 weights of zero and
        grouped weights of NaN. The caller must replace NaN by other numbers than zero: if both weights were zero, their
        gradients would be zero, too.
    """
    # The decomposition of each group's matrix, all at once: (groups, O, C/groups * kh * kw).
    out, channels, *size = kernel.shape
    width = channels // groups
    matrices = kernel.double().reshape(out, groups, width, *size).transpose(0, 1).flatten(2)
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    rank = min(width, s.shape[1])
    u, s, v = u[:, :, :rank], s[:, :rank], v[:, :rank]
    s = torch.where(s > 1e-9 * s[:, :1], s, 0)

    # Both factors are multiplied by the square roots. Channels beyond the rank, or with a singular value of zero, keep
    # NaN and 0.
    spatial = kernel.new_full((groups, width, v.shape[2]), torch.nan, dtype=torch.double)
    spatial[:, :rank] = torch.where(s[:, :, None] > 0, s.sqrt()[:, :, None] * v, torch.nan)
    pointwise = kernel.new_zeros((out, groups, width), dtype=torch.double)
    pointwise[:, :, :rank] = (u * s.sqrt()[:, None]).transpose(0, 1)
    return spatial.view(channels, width, *size).to(kernel), pointwise.view(out, channels, 1, 1).to(kernel)


def fit_pointwise(kernel: Tensor, spatial: Tensor) -> Tensor:
    """Returns the 1 x 1 weights (O, C, 1, 1) with which a fixed spatial operator best approximates a kernel.

    Args:
        kernel: The kernel to approximate in least squares, (O, C, kh, kw).
        spatial: The kernel of the fixed spatial operator in each channel, (C, 1, kh, kw).
    """
    # Each weight is the projection of the kernel's window on the channel's fixed window; 0 if that one is zero.
    fixed = spatial.double().squeeze(1)
    squares = fixed.square().sum((1, 2))
    products = torch.einsum("ochw,chw->oc", kernel.double(), fixed)
    return torch.where(squares > 0, products / squares, 0)[..., None, None].to(kernel)


@torch.no_grad()
def spatial_kernel(spatial: nn.Module, like: Tensor, window: "Window") -> Tensor:
    """Returns the kernel of a spatial operator.

    If the operator is not an `nn.Conv2d`, its kernel is read from its output for an image in which one pixel is 1 and
    all other pixels are 0.

    Args:
        spatial: An `nn.Conv2d`, or a linear operator that computes each output channel from the same input channel.
        like: A tensor (O, C, ...) with the number of channels, the dtype and the device of the kernel.
        window: The kernel size, padding and dilation of the operator.

    Returns:
        (C, C/groups, kh, kw) for an `nn.Conv2d`, otherwise (C, 1, kh, kw).
    """
    if isinstance(spatial, nn.Conv2d):
        return spatial.weight

    # An image with one pixel in the center, so far from the border that no padding mode copies it.
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
