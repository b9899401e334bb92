"""The fused operators of training steps on channels-last feature maps, for CPUs; `cpu_kernels.cpp` has the loops.

They have the same arguments and results as the GPU kernels. Their results do not depend on the number of threads.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from odcheap.layers.kernels.cpu_library import load_library

Order = Literal["act_add", "add_act"]

PAIR_TYPES = (torch.bfloat16, torch.float32, torch.float64)  # the dtypes that `pair_norm_act` supports
NO_RESIDUAL, ACT_ADD, ADD_ACT = 0, 1, 2  # relu(bn(x)); relu(bn(x)) + residual; relu(bn(x) + residual)
MAX_CHANNELS = 128  # of a pair: with more, the gradient of the 1 x 1 convolution does not stay in a core's cache

load_library()  # the import fails if this machine cannot compile it


def call(name: str, dtype: torch.dtype, *arguments: Tensor | float | None) -> None:
    """Calls a function of the library for feature maps of a dtype, with the addresses of tensors and with numbers."""
    function = getattr(load_library(), f"{name}_{str(dtype).removeprefix('torch.')}")
    function(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments), torch.get_num_threads())


def make_channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class BatchNormAct(torch.autograd.Function):
    """The autograd function of `batch_norm_act`.

    It saves the input and the statistics of the batch norm; with ADD_ACT also the output.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, norm: nn.BatchNorm2d, order: int
    ) -> Tensor:
        y, saved = torch.empty_like(x), torch.empty(2, x.shape[1], dtype=weight.dtype)
        rows, channels = x.numel() // x.shape[1], x.shape[1]
        buffers = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
        tensors = (x, residual, y, weight, bias, *buffers, saved)
        call("norm_forward", x.dtype, *tensors, rows, channels, norm.eps, norm.momentum, order)
        # Autograd does not see that the buffers have changed.
        torch.autograd.graph.increment_version(buffers)
        ctx.order = order
        ctx.save_for_backward(x, weight, bias, saved, *([y] if order == ADD_ACT else []))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, saved, *output = ctx.saved_tensors
        dy = make_channels_last(dy)
        dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
        y, dresidual = (output[0], torch.empty_like(x)) if ctx.order == ADD_ACT else (None, None)
        tensors = (dy, x, y, weight, bias, saved, dx, dresidual, dweight, dbias)
        call("norm_backward", x.dtype, *tensors, x.numel() // x.shape[1], x.shape[1], ctx.order)
        # The gradient of the residual: with ACT_ADD it is added last, so its gradient is `dy` itself.
        through = {NO_RESIDUAL: None, ACT_ADD: dy, ADD_ACT: dresidual}[ctx.order]
        return dx, dweight, dbias, through, None, None


def batch_norm_act(x: Tensor, norm: nn.BatchNorm2d, residual: Tensor | None = None, order: Order = "act_add") -> Tensor:
    """Computes batch norm in training mode, ReLU, and the sum with a residual if there is one.

    The running statistics and `num_batches_tracked` of `norm` are updated. Sums are computed in float32, or in float64
    if `x` is float64.

    Args:
        x: (N, C, H, W), contiguous in channels-last memory format, with two or more values in each channel; bfloat16,
            float32 or float64.
        norm: The batch norm, with weight, bias, running statistics and a momentum; these tensors are float64 if `x` is,
            otherwise float32.
        residual: A tensor with the shape, dtype and memory format of `x`; None to compute relu(norm(x)).
        order: "act_add" for relu(norm(x)) + residual, "add_act" for relu(norm(x) + residual).

    Returns:
        (N, C, H, W), with the dtype and memory format of `x`. With "add_act" it must not be changed in place before the
        backward pass.

    Raises:
        RuntimeError: In the backward pass, if a second derivative is computed.
    """
    code = NO_RESIDUAL if residual is None else ACT_ADD if order == "act_add" else ADD_ACT
    return BatchNormAct.apply(x, norm.weight, norm.bias, residual, norm, code)


class PairNormAct(torch.autograd.Function):
    """The autograd function of `pair_norm_act`.

    It saves its inputs, the output of the 1 x 1 convolution, and the statistics of the batch norm.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kernel: Tensor | None,
        weight: Tensor,
        gamma: Tensor,
        beta: Tensor,
        residual: Tensor | None,
        norm: nn.BatchNorm2d,
        stride: int,
    ) -> tuple[Tensor, Tensor]:
        images, channels, height, width = x.shape
        shape = (images, len(weight), -(-height // stride), -(-width // stride))
        z = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        y, saved = torch.empty_like(z), torch.empty(2, len(weight), dtype=gamma.dtype)
        buffers = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
        tensors = (x, kernel, weight, residual, gamma, beta, *buffers, z, y, saved)
        sizes = (images, height, width, channels, len(weight), stride)
        call("pair_norm_forward", x.dtype, *tensors, *sizes, norm.eps, norm.momentum)
        torch.autograd.graph.increment_version(buffers)
        # The second output is the input again, so that its gradient arrives here and can be added to dx. It is None,
        # not zeros, if nothing reads that output.
        ctx.set_materialize_grads(False)
        ctx.sizes, ctx.has_residual = sizes, residual is not None
        ctx.save_for_backward(x, kernel, weight, gamma, beta, z, saved)
        return y, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dinput: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return dinput, *(None,) * 7
        x, kernel, weight, gamma, beta, z, saved = ctx.saved_tensors
        dy = make_channels_last(dy)
        added = None if dinput is None else make_channels_last(dinput)
        dx, dweight, dgamma, dbeta = (torch.empty_like(t) for t in (x, weight, gamma, beta))
        dkernel = None if kernel is None else torch.empty_like(kernel)
        tensors = (dy, z, x, kernel, weight, gamma, beta, saved, added, dx, dkernel, dweight, dgamma, dbeta)
        call("pair_norm_backward", x.dtype, *tensors, *ctx.sizes)
        return dx, dkernel, dweight, dgamma, dbeta, dy if ctx.has_residual else None, None, None


def pair_norm_act(
    x: Tensor, kernel: Tensor | None, weight: Tensor, norm: nn.BatchNorm2d, residual: Tensor | None, stride: int
) -> tuple[Tensor, Tensor]:
    """Returns relu(norm(conv1x1(spatial(x)))) + residual in training mode, and x.

    Sums are computed in float32, or in float64 if `x` is float64. The weights are rounded as autocast rounds them;
    their gradients are not rounded. On a processor with products of bfloat16 numbers (AVX512-BF16), the factors of the
    1 x 1 convolution and of its gradients are rounded to bfloat16 if `x` is bfloat16.

    Args:
        x: (N, C, H, W), contiguous in channels-last memory format; bfloat16, float32 or float64.
        kernel: The weights (C, 1, 3, 3) of the depth-wise convolution, which has stride 1 and padding 1; None if the
            spatial operator is a 3 x 3 `Shift2d`.
        weight: The weights (O, C, 1, 1) of the 1 x 1 convolution.
        norm: The batch norm over O channels; see `batch_norm_act`.
        residual: (N, O, ceil(H / stride), ceil(W / stride)) with the dtype and memory format of `x`; None to add
            nothing.
        stride: The stride of the 1 x 1 convolution, 1 or 2.

    Returns:
        The result (N, O, ceil(H / stride), ceil(W / stride)), and `x`. Other layers that read `x` should read this
        returned tensor: its gradient is then added without another pass over memory.

    Raises:
        RuntimeError: In the backward pass, if a second derivative is computed.
    """
    return PairNormAct.apply(x, kernel, weight, norm.weight, norm.bias, residual, norm, stride)
