"""Cheap convolutions, batch norm, ReLU and the sum with a residual in one call.

In training this is one fused operator if `kernels` has one for the device; otherwise PyTorch's own modules and
functions are called.
"""

from typing import Any, Literal, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from odcheap.layers import kernels

Order = Literal["act_add", "add_act"]


def batch_norm_act(x: Tensor, norm: nn.BatchNorm2d, residual: Tensor | None = None, order: Order = "act_add") -> Tensor:
    """Computes batch norm, ReLU, and the sum with a residual if there is one.

    A fused kernel, one operator for all this, is used in training if it supports the arguments; otherwise PyTorch's
    modules. A fused kernel rounds once, PyTorch's modules round after each operation; in bfloat16 the results differ
    slightly.

    Args:
        x: (N, C, H, W).
        norm: The batch norm over C channels. In training its running statistics are updated.
        residual: (N, C, H, W), or None to compute relu(norm(x)).
        order: "act_add" computes relu(norm(x)) + residual, "add_act" computes relu(norm(x) + residual).

    Returns:
        (N, C, H, W).

    Raises:
        ValueError: `order` is neither "act_add" nor "add_act", or in training a channel has only one value
            (N = H = W = 1).
        RuntimeError: In the backward pass, if a fused kernel was used and a second derivative is computed.
    """
    if order not in ("act_add", "add_act"):
        raise ValueError(f'order={order!r}: must be "act_add" or "add_act"')
    if kernels.can_apply(x, norm) and is_fusible(x, x.shape, norm, residual):
        code = kernels.ADD_ACT if order == "add_act" else kernels.ACT_ADD
        code = kernels.NO_RESIDUAL if residual is None else code
        return BatchNormAct.apply(x, norm.weight, norm.bias, residual, norm, code)
    if residual is None:
        return F.relu(norm(x), inplace=True)
    if order == "act_add":
        return F.relu(norm(x), inplace=True) + residual
    return F.relu(norm(x) + residual, inplace=True)


class BatchNormAct(torch.autograd.Function):
    """The autograd function of `batch_norm_act`, whose passes are computed by fused kernels.

    Sums are computed in float32, or in float64 if the input is float64. The input and the statistics of the batch norm
    are saved for the backward pass. With the order `ADD_ACT` the output is saved too, and must not be changed in place.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, norm: nn.BatchNorm2d, order: int
    ) -> Tensor:
        y, saved = torch.empty_like(x), torch.empty(2, len(weight), dtype=weight.dtype, device=x.device)
        ctx.operators, ctx.order = kernels.load_operators(x.device.type), order
        ctx.operators.norm_forward(x, residual, y, norm, saved, order)
        # Autograd does not see that the kernels have changed the running statistics.
        torch.autograd.graph.increment_version(tuple(norm.buffers()))
        ctx.save_for_backward(x, weight, bias, saved, y if order == kernels.ADD_ACT else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, output = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx, dweight, dbias = (torch.empty_like(t) for t in inputs[:3])
        dresidual = None if output is None else torch.empty_like(dx)
        ctx.operators.norm_backward(dy, output, inputs, (dx, dresidual, dweight, dbias), ctx.order)
        # With ACT_ADD the residual is added last, so its gradient is `dy` itself.
        return dx, dweight, dbias, dy if ctx.order == kernels.ACT_ADD else dresidual, None, None


def is_fusible(x: Tensor, shape: torch.Size, norm: nn.Module, residual: Tensor | None) -> bool:
    """Returns True if the fused kernels can compute a given batch norm, and the sum with a given residual.

    The module must be an `nn.BatchNorm2d` with weight, bias, running statistics and a momentum. These tensors must have
    the dtype that `kernels.PARAMETER_TYPES` names for the dtype of the input. The residual must have the shape, dtype
    and device of the input, and must be contiguous in channels-last memory format.

    Args:
        x: A tensor with the dtype and the device of the batch norm's input, for which `kernels.can_apply` returned
            True. It need not be the input itself.
        shape: (N, C, H, W) of the batch norm's input.
        norm: The batch norm.
        residual: (N, C, H, W), or None if nothing is added.
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


def conv_norm_act(
    x: Tensor, conv: nn.Module, norm: nn.BatchNorm2d, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns relu(norm(conv(x))) + residual, and x.

    Args:
        x: (N, C, H, W).
        conv: Any module. If it is a `CheapConv` that the fused kernels can compute, its two operators, the batch norm,
            the ReLU and the sum with the residual are fused.
        norm: The batch norm over the O channels of the output of `conv`.
        residual: A feature map with the shape of the output of `conv`, or None to add nothing.

    Returns:
        A tuple: the result (N, O, H', W'), with the size of the output of `conv`, and `x`. Other layers that read `x`,
        such as a shortcut, should read this returned tensor: a fused backward pass then adds both gradients itself.
    """
    if (found := find_pair(x, x.shape, conv, norm, residual)) is None:
        return batch_norm_act(conv(x), norm, residual), x
    pair, cast_x = found
    y, again = kernels.load_operators(x.device.type).pairs_norm_act(cast_x, [pair], residual)
    return y, again if cast_x is x else x  # other layers read the input in its own dtype


def block_norm_act(
    x: Tensor,
    convs: tuple[nn.Module, nn.Module],
    norms: tuple[nn.BatchNorm2d, nn.BatchNorm2d],
    shortcut: nn.Module,
) -> Tensor:
    """Returns relu(norm2(conv2(relu(norm1(conv1(x)))))) + shortcut(x).

    If both convolutions are `CheapConv`s and the device is a CPU, one fused operator computes all this. It applies
    norm1 and the ReLU each time that conv2 reads a value, so relu(norm1(conv1(x))) is never stored in memory.

    Args:
        x: (N, C, H, W).
        convs: Two modules, conv1 and conv2.
        norms: The batch norms over the channels of their outputs, norm1 and norm2.
        shortcut: A module whose output has the shape of the output of conv2.

    Returns:
        (N, O, H', W'), with the size of the output of conv2.
    """
    first = find_pair(x, x.shape, convs[0], norms[0], None)
    if first is None or kernels.load_operators(x.device.type).MAX_PAIRS < 2:
        # The shortcut reads the returned x, so that a fused backward pass can add up both gradients.
        main, x = conv_norm_act(x, convs[0], norms[0])
        return conv_norm_act(main, convs[1], norms[1], shortcut(x))[0]
    (pair, cast_x), added = first, shortcut(x)
    second = find_pair(cast_x, pair.output_shape(x.shape), convs[1], norms[1], added)
    if second is None:
        main, _ = conv_norm_act(x, convs[0], norms[0])
        return conv_norm_act(main, convs[1], norms[1], added)[0]
    is_input, operators = added is cast_x, kernels.load_operators(x.device.type)
    return operators.pairs_norm_act(cast_x, [pair, second[0]], None if is_input else added, is_input)[0]


def find_pair(
    x: Tensor, shape: torch.Size, conv: nn.Module, norm: nn.BatchNorm2d, residual: Tensor | None
) -> tuple[kernels.Pair, Tensor] | None:
    """Finds out whether one fused operator can compute a `CheapConv` with its batch norm and ReLU.

    Args:
        x: A feature map with the dtype and the device of the convolution's input. It need not be the input itself.
        shape: (N, C, H, W) of the convolution's input.
        conv: Any module.
        norm: The batch norm over the O channels of the output of `conv`.
        residual: The feature map that is added after the batch norm and ReLU, or None.

    Returns:
        A tuple: the weights and the batch norm as a `kernels.Pair`, and `x`, cast as autocast would cast it. None if no
        fused operator can replace these modules.
    """
    # The modules: the kernels know three spatial operators, and 1 x 1 convolutions of few channels.
    parts = getattr(conv, "fusible_parts", None)
    if parts is None or not kernels.can_apply(x, conv, *parts[:2], norm):
        return None
    spatial, pointwise, is_shift = parts
    if not (is_pointwise(pointwise) and (is_shift or is_grouped3x3(spatial))):
        return None
    kernel = None if is_shift else cast(nn.Conv2d, spatial).weight
    pair = kernels.Pair(kernel, pointwise.weight, norm, pointwise.stride[0])
    operators = kernels.load_operators(x.device.type)
    (features, channels, *_), output_shape = pair.weight.shape, pair.output_shape(shape)
    if channels != shape[1] or max(channels, features) > operators.MAX_CHANNELS:
        return None
    if kernel is not None and len(kernel) != channels:
        return None
    # A vector instruction multiplies two bfloat16 numbers of a group at once.
    per_group = 1 if kernel is None else kernel.shape[1]
    if per_group > operators.MAX_GROUP or (per_group > 1 and per_group % 2):
        return None

    # The tensors: their dtypes, and an output whose elements can be counted in 32 bits.
    x, weight_type = cast_input(x)
    if weight_type is None or x.dtype not in operators.PAIR_TYPES:
        return None
    if not all(w is None or kernels.is_plain(w, weight_type, x.device, is_kernel=True) for w in (pair.weight, kernel)):
        return None
    if output_shape.numel() >= kernels.MAX_ELEMENTS or not is_fusible(x, output_shape, norm, residual):
        return None
    return pair, x


def fused_pair(x: Tensor, spatial: nn.Module, pointwise: nn.Module, is_shift: bool) -> Tensor | None:
    """Runs the spatial operator of a `CheapConv` by a GPU kernel of ours, then the 1 x 1 convolution by PyTorch.

    Args:
        x: (N, C, H, W).
        spatial: The spatial operator, C -> C channels.
        pointwise: The 1 x 1 convolution, C -> O channels.
        is_shift: Whether `spatial` is a `Shift2d` with a 3 x 3 window, stride 1, dilation 1 and zeros at the border.

    Returns:
        (N, O, H', W') with the size of the output of `pointwise`. None, without any computation, if no kernel can
        replace the spatial operator, such as on a CPU or in eval mode.
    """
    if not (kernels.can_apply(x, spatial, pointwise) and (is_shift or is_depthwise3x3(spatial))):
        return None
    operators = kernels.load_operators(x.device.type)
    if not hasattr(operators, "shift3x3"):  # on a CPU, PyTorch's operators are as fast
        return None
    x, weight_type = cast_input(x)
    if weight_type is None or not (is_shift or kernels.is_plain(spatial.weight, weight_type, x.device)):
        return None
    return pointwise(operators.shift3x3(x) if is_shift else operators.depthwise3x3(x, spatial.weight))


def cast_input(x: Tensor) -> tuple[Tensor, torch.dtype | None]:
    """Casts the input of a convolution as autocast would cast it. Outside autocast, the input is returned unchanged.

    Args:
        x: The input, of any shape.

    Returns:
        A tuple: the input, and the dtype that the weights must have if the fused kernels are to be used. Outside
        autocast this is the dtype of the input. Under autocast it is None if the fused kernels do not support the dtype
        to which the input was cast; the layers of PyTorch must be used then.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
        return x, kernels.PARAMETER_TYPES.get(x.dtype)
    return x, x.dtype


def is_grouped3x3(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Returns True if a module is a 3 x 3 `nn.Conv2d` that keeps the number of channels and the size of the image.

    It has stride 1, zero padding of 1, no bias, and any number of groups.
    """
    if type(module) is not nn.Conv2d or module.bias is not None or module.padding_mode != "zeros":
        return False
    window = (module.kernel_size, module.stride, module.padding, module.dilation)
    return window == ((3, 3), (1, 1), (1, 1), (1, 1)) and module.in_channels == module.out_channels


def is_depthwise3x3(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Returns True if a module is a depth-wise 3 x 3 `nn.Conv2d` with stride 1, zero padding of 1 and no bias."""
    return is_grouped3x3(module) and module.in_channels == module.groups


def is_pointwise(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Returns True if a module is a 1 x 1 `nn.Conv2d` with stride 1 or 2, and without bias, padding and groups."""
    if type(module) is not nn.Conv2d or module.bias is not None or module.stride not in ((1, 1), (2, 2)):
        return False
    return (module.kernel_size, module.padding, module.groups) == ((1, 1), (0, 0), 1)
