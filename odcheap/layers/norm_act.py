"""Batch norm, ReLU and the sum with a residual in one call.

In training this is one fused operator if `kernels` has one for the device; otherwise PyTorch's own modules and
functions are called.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odcheap.layers import kernels

Order = Literal["act_add", "add_act"]


def batch_norm_act(x: Tensor, norm: nn.BatchNorm2d, residual: Tensor | None = None, order: Order = "act_add") -> Tensor:
    """Computes batch norm, ReLU, and the sum with a residual if there is one.

    The fused kernels round once, PyTorch's modules after each operation, so the results differ slightly in bfloat16.

    Args:
        x: (N, C, H, W).
        norm: The batch norm over C channels. In training its running statistics are updated.
        residual: (N, C, H, W), or None to compute relu(norm(x)).
        order: "act_add" for relu(norm(x)) + residual, "add_act" for relu(norm(x) + residual).

    Returns:
        (N, C, H, W).

    Raises:
        ValueError: `order` is neither of the two, or in training a channel has only one value (N = H = W = 1).
        RuntimeError: In the backward pass, if the fused kernels ran and a second derivative is computed.
    """
    if order not in ("act_add", "add_act"):
        raise ValueError(f'order={order!r}: must be "act_add" or "add_act"')
    if kernels.can_apply(x, norm) and is_fusible(x, x.shape, norm, residual):
        return kernels.load_operators(x.device.type).batch_norm_act(x, norm, residual, order)
    if residual is None:
        return F.relu(norm(x), inplace=True)
    if order == "act_add":
        return F.relu(norm(x), inplace=True) + residual
    return F.relu(norm(x) + residual, inplace=True)


def is_fusible(x: Tensor, shape: torch.Size, norm: nn.Module, residual: Tensor | None) -> bool:
    """Returns whether the fused kernels can compute this batch norm, and the sum with this residual.

    The module must be an `nn.BatchNorm2d` with weight, bias, running statistics and a momentum; these tensors must have
    the dtype that `kernels.PARAMETER_TYPES` gives for the input's. The residual must have the shape, the dtype and the
    device of the input, and be contiguous in channels-last memory format.

    Args:
        x: A tensor with the dtype and the device of the batch norm's input; `kernels.can_apply` is true for it.
        shape: (N, C, H, W) of the batch norm's input.
        norm: The batch norm.
        residual: (N, C, H, W), or None.
    """
    # The module, and the number of values in each channel.
    if not (type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats and norm.momentum is not None):
        return False
    own = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    dtype, channels = kernels.PARAMETER_TYPES[x.dtype], shape[1]
    if shape.numel() == channels:  # one value a channel: `nn.BatchNorm2d` raises the error
        return False
    # The tensors that the kernels read and write through their addresses.
    if not all(t is not None and kernels.is_plain(t, dtype, x.device) and t.numel() == channels for t in own):
        return False
    if not kernels.is_plain(norm.num_batches_tracked, torch.int64, x.device):
        return False
    if residual is None:
        return True
    has_format = type(residual) is Tensor and residual.is_contiguous(memory_format=torch.channels_last)
    return has_format and (residual.shape, residual.dtype, residual.device) == (shape, x.dtype, x.device)
