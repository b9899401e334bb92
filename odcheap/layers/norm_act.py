"""Batch norm, ReLU and a residual's sum in one call: fused in training on a GPU, the plain modules everywhere else."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odcheap.layers import kernels

Order = Literal["act_add", "add_act"]


def batch_norm_act(x: Tensor, norm: nn.BatchNorm2d, residual: Tensor | None = None, order: Order = "act_add") -> Tensor:
    """Returns batch norm, then ReLU, and the sum with a residual if there is one.

    The fused kernels round once, the plain modules after each operation: in bfloat16 the results differ by rounding.

    Args:
        x: (N, C, H, W).
        norm: The batch norm over C channels. Its statistics are updated in both forms.
        residual: (N, C, H, W), or None for relu(norm(x)).
        order: "act_add" for relu(norm(x)) + residual, "add_act" for relu(norm(x) + residual).

    Raises:
        ValueError: `order` is neither of the two, or there is only one value a channel, as in `nn.BatchNorm2d`.
        RuntimeError: A second derivative of the fused form is asked for.
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
    """Whether the fused kernels can compute this batch norm and the sum with this residual.

    They can for an `nn.BatchNorm2d` with parameters of the type that autocast leaves, running statistics and a
    momentum, and for a residual with the memory format of the input.

    Args:
        x: A tensor with type and device of the batch norm's input, for which `kernels.can_apply` holds.
        shape: (N, C, H, W) of the batch norm's input.
        norm: The module.
        residual: (N, C, H, W) or None.
    """
    if not (type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats and norm.momentum is not None):
        return False
    own = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    dtype, channels = kernels.PARAMETER_TYPES[x.dtype], shape[1]
    if shape.numel() == channels:  # one value a channel, which the module refuses
        return False
    if not all(t is not None and kernels.is_plain(t, dtype, x.device) and t.numel() == channels for t in own):
        return False
    if not kernels.is_plain(norm.num_batches_tracked, torch.int64, x.device):
        return False
    if residual is None:
        return True
    has_format = type(residual) is Tensor and residual.is_contiguous(memory_format=torch.channels_last)
    return has_format and (residual.shape, residual.dtype, residual.device) == (shape, x.dtype, x.device)
