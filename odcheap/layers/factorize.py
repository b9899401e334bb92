"""The pair of spatial operator and 1 x 1 convolution that comes nearest to a given K x K kernel, in least squares.

Between the two there is no non-linearity, so together they are one kernel. Each function takes a kernel (O, I, kh, kw)
and returns the weights of the pair; what it cannot express is lost with the least squared error.
"""

import torch
from torch import Tensor


def one_tap(kernel: Tensor, taps: Tensor) -> Tensor:
    """Of a shift, which reads entry `taps[i]` of channel i's kernel: the 1 x 1 weights (O, I, 1, 1)."""
    entries = kernel.flatten(2)
    return entries.gather(2, taps.expand(len(kernel), -1)[:, :, None])[..., None]


def in_groups(kernel: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Of a spatial convolution in `groups`: its weights (I, I/groups, kh, kw), and the 1 x 1 weights (O, I, 1, 1).

    In each group the kernel is a matrix O x (I/groups * kh * kw), and the pair expresses the matrices of rank up to
    I/groups: its truncated singular value decomposition is nearest (Eckart and Young, 1936). With as many groups as
    channels this is the rank-1 form of each channel's kernels. The singular values are shared out evenly, as weight
    decay would have it. Channels beyond the matrix' rank stay unused: their 1 x 1 weights are zero, and their spatial
    weights are NaN for the caller to fill, since two zeros in a row would never learn.
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
