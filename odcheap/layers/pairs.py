"""A cheap pair's spatial operator and 1 x 1 convolution as fused kernels, where they can run."""

from typing import TypeGuard, cast

import torch
from torch import Tensor, nn

from odcheap.layers import kernels
from odcheap.layers.norm_act import batch_norm_act, is_fusible

MOST_CHANNELS = 64  # of a pair that runs as one unit with its batch norm


def conv_norm_act(
    x: Tensor, conv: nn.Module, norm: nn.BatchNorm2d, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A convolution, batch norm, ReLU and, where there is a residual, the sum with it; fused where kernels can run.

    Args:
        x: (N, C, H, W).
        conv: any module; one unit with the rest where its `fusible_parts` has a spatial operator and a 1 x 1
            convolution that the kernels know.
        norm: the batch norm over the O channels of what `conv` returns.
        residual: as what `conv` returns, or None.

    Returns:
        relu(norm(conv(x))) + residual, (N, O, H / stride, W / stride), and `x`: what also reads the input should read
        this one, such that a fused unit adds up the two gradients.
    """
    parts = getattr(conv, "fusible_parts", None)
    fused = None if parts is None else cheap_norm_act(x, conv, *parts, norm, residual)
    return (batch_norm_act(conv(x), norm, residual), x) if fused is None else fused


def cheap_norm_act(
    x: Tensor,
    pair: nn.Module,
    spatial: nn.Module,
    pointwise: nn.Module,
    is_shift: bool,
    norm: nn.BatchNorm2d,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """A cheap pair with batch norm, ReLU and residual as one unit of fused kernels, in training on a GPU.

    Args:
        x: (N, C, H, W).
        pair: the module that would call `spatial` and `pointwise`.
        spatial: the spatial operator, C -> C.
        pointwise: the 1 x 1 convolution, C -> O.
        is_shift: as for `fused_pair`.
        norm: the batch norm over O channels.
        residual: (N, O, H / stride, W / stride) or None.

    Returns:
        The output and the input as in `conv_norm_act`, or None where the kernels cannot stand for these modules.

    Raises:
        RuntimeError: on a second derivative.
    """
    if kernels.pointwise_mode() != "fused" or not kernels.can_apply(x, pair, spatial, pointwise, norm):
        return None
    if not (is_pointwise(pointwise) and (is_shift or is_depthwise3x3(spatial))):
        return None
    given, (x, expected) = x, as_convolved(x)
    (images, channels, height, width), (features, inputs, *_) = x.shape, pointwise.weight.shape
    stride, small = pointwise.stride[0], max(channels, features) <= MOST_CHANNELS
    known = pointwise.stride in ((1, 1), (2, 2)) and pointwise.bias is None and small and inputs == channels
    if expected is None or not known or (x.dtype == torch.float64 and not kernels.is_interpreted()):
        return None
    kernel = None if is_shift else cast(nn.Conv2d, spatial).weight
    weights = [pointwise.weight, *([] if kernel is None else [kernel])]
    if not all(kernels.is_plain(weight, expected, x.device) for weight in weights):
        return None
    shape = torch.Size((images, features, -(-height // stride), -(-width // stride)))
    if (kernel is not None and len(kernel) != channels) or shape.numel() >= kernels.MOST_ELEMENTS:
        return None
    if not is_fusible(x, shape, norm, residual):
        return None
    y, again = kernels.load_operators().pair_norm_act(x, kernel, pointwise.weight, norm, residual, stride)
    return y, again if x is given else given  # what else reads the input reads it in its own type


def fused_pair(x: Tensor, spatial: nn.Module, pointwise: nn.Module, is_shift: bool) -> Tensor | None:
    """A 3 x 3 depth-wise convolution or shift, then the 1 x 1 convolution, in training on a GPU.

    Args:
        x: (N, C, H, W).
        spatial: the spatial operator, C -> C.
        pointwise: the 1 x 1 convolution, C -> O.
        is_shift: whether `spatial` is a shift with a 3 x 3 window, stride 1, dilation 1 and zeros at the border.

    Returns:
        (N, O, H / stride, W / stride), or None where the kernels cannot stand for these modules.

    Raises:
        RuntimeError: on a second derivative.
    """
    if not (kernels.can_apply(x, spatial, pointwise) and (is_shift or is_depthwise3x3(spatial))):
        return None
    x, expected = as_convolved(x)
    if expected is None or not (is_shift or kernels.is_plain(spatial.weight, expected, x.device)):
        return None
    operators = kernels.load_operators()
    moved = operators.shift3x3(x) if is_shift else operators.depthwise3x3(x, spatial.weight)
    if kernels.pointwise_mode() == "matmul" and is_pointwise(pointwise):
        return operators.pointwise(moved, pointwise)
    return pointwise(moved)


def as_convolved(x: Tensor) -> tuple[Tensor, torch.dtype | None]:
    """A convolution's input in the type that it computes in, under autocast another than its own.

    Args:
        x: any map.

    Returns:
        The map, and the type that the weights must have; None where the kernels do not know the map's.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
        return x, kernels.PARAMETERS.get(x.dtype)
    return x, x.dtype


def is_depthwise3x3(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a module is the depth-wise convolution that the kernels know.

    Args:
        module: any module.

    Returns:
        True for an `nn.Conv2d` C -> C in C groups without bias: window 3 x 3, stride 1, padding 1 with zeros.
    """
    if type(module) is not nn.Conv2d or module.bias is not None or module.padding_mode != "zeros":
        return False
    window = (module.kernel_size, module.stride, module.padding, module.dilation)
    own = (module.in_channels, module.out_channels)
    return window == ((3, 3), (1, 1), (1, 1), (1, 1)) and own == (module.groups, module.groups)


def is_pointwise(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a module is a 1 x 1 convolution that can run as a matrix product.

    Args:
        module: any module.

    Returns:
        True for an `nn.Conv2d` with window 1 x 1, no padding and one group.
    """
    known = type(module) is nn.Conv2d and module.kernel_size == (1, 1) and module.groups == 1
    return known and module.padding == (0, 0)
