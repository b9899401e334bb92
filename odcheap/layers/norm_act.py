"""Batch norm, ReLU and a residual's sum as one call: fused on a GPU in training, the plain modules everywhere else."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odcheap.layers import kernels

Order = Literal["act_add", "add_act"]


def batch_norm_act(x: Tensor, norm: nn.BatchNorm2d, residual: Tensor | None = None, order: Order = "act_add") -> Tensor:
    """Batch norm, ReLU and, where there is a residual, the sum with it.

    The fused kernels round once, the plain modules after each operation: in bfloat16 the results differ by rounding.

    Args:
        x: (N, C, H, W).
        norm: the batch norm over C channels; where it updates its statistics, it does so either way.
        residual: (N, C, H, W), or None for relu(norm(x)).
        order: "act_add" for relu(norm(x)) + residual, "add_act" for relu(norm(x) + residual).

    Returns:
        (N, C, H, W).

    Raises:
        ValueError: where `order` is neither of the two, and as `nn.BatchNorm2d` does for one value a channel.
        RuntimeError: on a second derivative of the fused form.
    """
    if order not in ("act_add", "add_act"):
        raise ValueError(f'order={order!r}: must be "act_add" or "add_act"')
    if kernels.can_apply(x, norm) and is_fusible(x, x.shape, norm, residual):
        return kernels.load_operators().batch_norm_act(x, norm, residual, order)
    if residual is None:
        return F.relu(norm(x), inplace=True)
    if order == "act_add":
        return F.relu(norm(x), inplace=True) + residual
    return F.relu(norm(x) + residual, inplace=True)


def is_fusible(x: Tensor, shape: torch.Size, norm: nn.Module, residual: Tensor | None) -> bool:
    """Whether the fused kernels know this batch norm and this residual.

    Args:
        x: a tensor for which `kernels.can_apply` holds, of the type and on the device of the batch norm's input.
        shape: (N, C, H, W) of the batch norm's input.
        norm: any module.
        residual: (N, C, H, W) or None.

    Returns:
        False for other modules than `nn.BatchNorm2d`, for one without parameters, running statistics or momentum, for
        other types of parameters than autocast leaves, and for a residual that is not laid out as the input.
    """
    if not (type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats and norm.momentum is not None):
        return False
    own = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    dtype, channels = kernels.PARAMETERS[x.dtype], shape[1]
    if shape.numel() == channels:  # one value a channel: the module refuses it
        return False
    if not all(t is not None and kernels.is_plain(t, dtype, x.device) and t.numel() == channels for t in own):
        return False
    if not kernels.is_plain(norm.num_batches_tracked, torch.int64, x.device):
        return False
    if residual is None:
        return True
    alike = type(residual) is Tensor and residual.is_contiguous(memory_format=torch.channels_last)
    return alike and (residual.shape, residual.dtype, residual.device) == (shape, x.dtype, x.device)
