"""Functions that run the two operators of a `CheapConv` as fused kernels if that is possible."""

from typing import TypeGuard, cast

import torch
from torch import Tensor, nn

from odcheap.layers import kernels
from odcheap.layers.norm_act import batch_norm_act, is_fusible


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
        The result (N, O, H', W'), with the size of the output of `conv`, and `x`. Other layers that read `x`, such as a
        shortcut, should read this returned tensor: a fused backward pass then adds up the gradients of both itself.
    """
    parts = getattr(conv, "fusible_parts", None)
    fused = None if parts is None else fused_pair_norm_act(x, conv, *parts, norm, residual)
    return (batch_norm_act(conv(x), norm, residual), x) if fused is None else fused


def fused_pair_norm_act(
    x: Tensor,
    pair: nn.Module,
    spatial: nn.Module,
    pointwise: nn.Module,
    is_shift: bool,
    norm: nn.BatchNorm2d,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """Runs a `CheapConv` with batch norm, ReLU and residual as one fused operator, in training.

    Args:
        x: (N, C, H, W).
        pair: The `CheapConv`, whose forward pass would call `spatial` and `pointwise`.
        spatial: Its spatial operator, C -> C channels.
        pointwise: Its 1 x 1 convolution, C -> O channels.
        is_shift: Whether `spatial` is a `Shift2d` with a 3 x 3 window, stride 1, dilation 1 and zeros at the border.
        norm: The batch norm over O channels.
        residual: (N, O, H', W') with the size of the output of `pair`, or None to add nothing.

    Returns:
        The result and the input, see `conv_norm_act`; or None if the kernels cannot replace these modules.
    """
    # The modules: the kernels know two spatial operators, and 1 x 1 convolutions of few channels.
    if not kernels.can_apply(x, pair, spatial, pointwise, norm):
        return None
    if not (is_pointwise(pointwise) and (is_shift or is_depthwise3x3(spatial))):
        return None
    kernel = None if is_shift else cast(nn.Conv2d, spatial).weight
    cast_x, weight_type = cast_input(x)
    (images, channels, height, width), (features, inputs, *_) = x.shape, pointwise.weight.shape
    operators = kernels.load_operators(x.device.type)
    if inputs != channels or max(channels, features) > operators.MAX_CHANNELS:
        return None
    if kernel is not None and len(kernel) != channels:
        return None

    # The tensors: their dtypes, and an output whose elements can be counted in 32 bits.
    if weight_type is None or cast_x.dtype not in operators.PAIR_TYPES:
        return None
    weights = [pointwise.weight, *([] if kernel is None else [kernel])]
    if not all(kernels.is_plain(weight, weight_type, x.device) for weight in weights):
        return None
    stride = pointwise.stride[0]
    shape = torch.Size((images, features, -(-height // stride), -(-width // stride)))
    if shape.numel() >= kernels.MAX_ELEMENTS or not is_fusible(cast_x, shape, norm, residual):
        return None

    y, again = operators.pair_norm_act(cast_x, kernel, pointwise.weight, norm, residual, stride)
    return y, again if cast_x is x else x  # other layers read the input in its own dtype


def fused_pair(x: Tensor, spatial: nn.Module, pointwise: nn.Module, is_shift: bool) -> Tensor | None:
    """Runs the spatial operator of a `CheapConv` as a fused GPU kernel in training, then the 1 x 1 convolution.

    Args:
        x: (N, C, H, W).
        spatial: The spatial operator, C -> C channels.
        pointwise: The 1 x 1 convolution, C -> O channels.
        is_shift: Whether `spatial` is a `Shift2d` with a 3 x 3 window, stride 1, dilation 1 and zeros at the border.

    Returns:
        (N, O, H', W') with the size of the output of `pointwise`, or None if no kernel can replace the spatial
        operator.
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
    """Returns the input of a convolution, cast as autocast would cast it, and the dtype that the weights must have.

    The dtype is None if the kernels do not support the dtype to which autocast casts the input.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
        return x, kernels.PARAMETER_TYPES.get(x.dtype)
    return x, x.dtype


def is_depthwise3x3(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Returns whether a module is a depth-wise 3 x 3 `nn.Conv2d` without bias, with stride 1 and zero padding of 1."""
    if type(module) is not nn.Conv2d or module.bias is not None or module.padding_mode != "zeros":
        return False
    window = (module.kernel_size, module.stride, module.padding, module.dilation)
    return window == ((3, 3), (1, 1), (1, 1), (1, 1)) and module.in_channels == module.out_channels == module.groups


def is_pointwise(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Returns whether a module is a 1 x 1 `nn.Conv2d` without bias, padding and groups, with stride 1 or 2."""
    if type(module) is not nn.Conv2d or module.bias is not None or module.stride not in ((1, 1), (2, 2)):
        return False
    return (module.kernel_size, module.padding, module.groups) == ((1, 1), (0, 0), 1)
