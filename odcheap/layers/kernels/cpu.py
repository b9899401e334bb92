"""The fused operators of training steps on channels-last feature maps, for CPUs; `cpp/` has the loops.

They have the same arguments and results as the GPU kernels. Their results do not depend on the number of threads.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from odcheap.layers.kernels import ACT_ADD, NO_RESIDUAL, Pair, empty_output
from odcheap.layers.kernels.cpu_library import load_library

# What `pairs_norm_act` supports.
MAX_PAIRS = 2  # successive pairs in one operator: those of a block
MAX_GROUP = 32  # channels of a group: with more, its gradients do not stay in a core's cache
MAX_CHANNELS = 128  # of a pair, for the same reason
PAIR_TYPES = (torch.bfloat16, torch.float32, torch.float64)

load_library()  # the import fails if this machine cannot compile it


def call(name: str, dtype: torch.dtype, *arguments: Tensor | float | None) -> None:
    """Calls a C++ function of the compiled library, which writes its results to some of the given tensors.

    Args:
        name: The name of the function in `cpu_library.SIGNATURES`, such as "norm_forward".
        dtype: The dtype of the feature maps. There is one version of the function for each dtype.
        *arguments: The function's arguments, except the number of threads: tensors, whose addresses are passed, None
            for no tensor, and numbers.
    """
    function = getattr(load_library(), f"{name}_{str(dtype).removeprefix('torch.')}")
    function(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments), torch.get_num_threads())


def norm_forward(
    x: Tensor, residual: Tensor | None, y: Tensor, norm: nn.BatchNorm2d, saved: Tensor, order: int
) -> None:
    """Writes batch norm, ReLU and the sum with a residual to `y`, and updates the running statistics.

    Args:
        x: The input, (N, C, H, W).
        residual: The feature map that is added, or None.
        y: The tensor to which the output is written.
        norm: The batch norm.
        saved: (2, C), to which mean and 1 / standard deviation of each channel are written.
        order: `NO_RESIDUAL`, `ACT_ADD` (the residual is added after the ReLU) or `ADD_ACT` (before it).
    """
    tensors = (x, residual, y, norm.weight, norm.bias, *norm.buffers(), saved)
    call("norm_forward", x.dtype, *tensors, x.numel() // x.shape[1], x.shape[1], norm.eps, norm.momentum, order)


def norm_backward(
    dy: Tensor, y: Tensor | None, inputs: Sequence[Tensor], gradients: Sequence[Tensor | None], order: int
) -> None:
    """Writes the gradients of batch norm, ReLU and the sum with a residual, which `norm_forward` computed.

    Args:
        dy: The gradient of the output.
        y: The output; None unless the order is `ADD_ACT`.
        inputs: Four tensors: the input, the weight and the bias of the batch norm, and `saved` of `norm_forward`.
        gradients: Four tensors to which the gradients are written: those of the input, of the residual (None unless the
            order is `ADD_ACT`), of the weight and of the bias.
        order: `NO_RESIDUAL`, `ACT_ADD` (the residual is added after the ReLU) or `ADD_ACT` (before it).
    """
    x, *others = inputs
    call("norm_backward", x.dtype, dy, x, y, *others, *gradients, x.numel() // x.shape[1], x.shape[1], order)


class PairsNormAct(torch.autograd.Function):
    """The autograd function of `pairs_norm_act`.

    Its last arguments are, for each pair, the weights of the spatial operator (or None) and of the 1 x 1 convolution,
    and gamma and beta, the weight and bias of the batch norm. It saves its inputs, and for each pair the output of the
    1 x 1 convolution, the statistics of the batch norm, and the output of a grouped convolution. The normalized maps
    between two pairs are never written.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        adds_input: bool,
        pairs: Sequence[Pair],
        *parameters: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        source, before = x, (None, None, None)  # of a pair: its input, and the batch norm that it applies to it
        saved: list[Tensor | None] = []
        ctx.sizes = []
        for k, pair in enumerate(pairs):
            images, channels, height, width = source.shape
            kernel, weight, gamma, beta = (None if t is None else t.contiguous() for t in parameters[4 * k : 4 * k + 4])
            features, norm = len(weight), pair.norm
            per_group = 0 if kernel is None else kernel.shape[1]
            sizes = (images, height, width, channels, features, pair.stride, per_group and channels // per_group)
            # A grouped convolution takes longer to compute again than to read.
            s = torch.empty_like(source) if per_group > 1 else None
            z = empty_output(source, features, pair.stride)
            statistics = torch.empty(2, features, dtype=norm.weight.dtype)
            buffers = tuple(norm.buffers())
            tensors = (source, *before, kernel, weight, *buffers, s, z, statistics)
            call("pair_forward", x.dtype, *tensors, *sizes, norm.eps, norm.momentum)
            # Autograd does not see that the buffers have changed.
            torch.autograd.graph.increment_version(buffers)
            ctx.sizes.append(sizes)
            saved += [kernel, weight, gamma, beta, s, z, statistics]
            source, before = z, (statistics, gamma, beta)
        y, added = torch.empty_like(source), x if adds_input else residual
        order = NO_RESIDUAL if added is None else ACT_ADD
        call("normalize", x.dtype, source, added, y, gamma, beta, statistics, y.numel() // features, features, order)
        # The second output is the input again, so that its gradient arrives here and can be added to dx. It is None,
        # not zeros, if nothing reads that output.
        ctx.set_materialize_grads(False)
        ctx.adds_input, ctx.has_residual = adds_input, residual is not None
        ctx.save_for_backward(x, *saved)
        return y, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dinput: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        if dy is None:
            return dinput, *(None,) * (3 + 4 * len(ctx.sizes))
        dy = dy.contiguous(memory_format=torch.channels_last)
        dresidual = dy if ctx.has_residual else None
        dinput = None if dinput is None else dinput.contiguous(memory_format=torch.channels_last)
        if ctx.adds_input:
            dinput = dy if dinput is None else dinput + dy
        gradients: list[Tensor | None] = []
        for k in reversed(range(len(ctx.sizes))):
            kernel, weight, gamma, beta, s, z, statistics = saved[7 * k : 7 * k + 7]
            if k == len(ctx.sizes) - 1:
                dgamma, dbeta = torch.empty_like(gamma), torch.empty_like(beta)
                rows = z.numel() // len(gamma)
                call("gradient_sums", x.dtype, dy, z, gamma, beta, statistics, dgamma, dbeta, rows, len(gamma))
            # The input of the first pair is x; that of the others is normalized, and they sum up the gradients of that
            # batch norm.
            source, before, dbefore = x, (None, None, None), (None, None)
            if k > 0:
                *_, in_gamma, in_beta, _, source, in_statistics = saved[: 7 * k]
                before = (in_statistics, in_gamma, in_beta)
                dbefore = (torch.empty_like(in_gamma), torch.empty_like(in_beta))
            dx, dweight = torch.empty_like(source), torch.empty_like(weight)
            dkernel = None if kernel is None else torch.empty_like(kernel)
            tensors = (dy, z, gamma, beta, statistics, dgamma, dbeta, source, *before, kernel, weight, s)
            results = (dx, dkernel, dweight, *dbefore)
            call("pair_backward", x.dtype, *tensors, dinput if k == 0 else None, *results, *ctx.sizes[k])
            gradients = [dkernel, dweight, dgamma, dbeta, *gradients]
            dy, (dgamma, dbeta) = dx, dbefore
        return dy, dresidual, None, None, *gradients


def pairs_norm_act(
    x: Tensor, pairs: Sequence[Pair], residual: Tensor | None = None, adds_input: bool = False
) -> tuple[Tensor, Tensor]:
    """Computes one or two successive cheap convolutions, each with batch norm and ReLU, and the sum with a residual.

    A cheap convolution with its batch norm is a `Pair`; it computes relu(norm(conv1x1(spatial(x)))) in training mode.

    Sums are computed in float32, or in float64 if `x` is float64. The weights are rounded as autocast rounds them;
    their gradients are not rounded. On a processor with products of bfloat16 numbers (AVX512-BF16), the factors of the
    1 x 1 and grouped convolutions and of their gradients are rounded to bfloat16 if `x` is bfloat16.

    Args:
        x: (N, C, H, W), contiguous in channels-last memory format; bfloat16, float32 or float64.
        pairs: The pairs; each of them has the number of channels of the result before it.
        residual: (N, O, H', W') with the size of the result, and the dtype and memory format of `x`; None to add
            nothing.
        adds_input: True adds `x` to the result, which must have the size of `x`; `residual` must then be None.

    Returns:
        A tuple: the result (N, O, H', W'), and `x`. Other layers that read `x` should read this returned tensor: its
        gradient is then added without another pass over memory.

    Raises:
        RuntimeError: In the backward pass, if a second derivative is computed.
    """
    parameters = [t for p in pairs for t in (p.kernel, p.weight, p.norm.weight, p.norm.bias)]
    return PairsNormAct.apply(x, residual, adds_input, pairs, *parameters)
