"""Whether layers run as fused GPU kernels, and the conditions under which they can. Triton is imported on first use."""

import importlib
import importlib.util
import os
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

Mode = Literal["auto", "off"]
Pointwise = Literal["fused", "conv", "matmul"]

# the parameters' type for each type of activations; under autocast to bfloat16 parameters stay float32
PARAMETERS = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
MOST_ELEMENTS = 2**31  # the kernels count in 32 bits
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_settings: tuple[Mode, Pointwise] = ("auto", "fused")


def use(mode: Mode, pointwise: Pointwise = "fused") -> tuple[Mode, Pointwise]:
    """Sets, for the whole process, whether layers run as fused kernels. A recorded step stays as it is.

    Args:
        mode: "auto" for fused kernels wherever they can run, "off" for PyTorch's operators everywhere.
        pointwise: how the 1 x 1 convolution of a fused pair runs: "fused" in one kernel with the spatial operator where
            a batch norm with ReLU follows, and as a convolution elsewhere; "conv" or "matmul" as a convolution or as a
            matrix product everywhere.

    Returns:
        What was in force before, such that `use(*use("off"))` changes nothing.

    Raises:
        ValueError: where `mode` or `pointwise` is none of these.
    """
    global _settings
    if mode not in ("auto", "off"):
        raise ValueError(f'mode={mode!r}: must be "auto" or "off"')
    if pointwise not in ("fused", "conv", "matmul"):
        raise ValueError(f'pointwise={pointwise!r}: must be "fused", "conv" or "matmul"')
    before, _settings = _settings, (mode, pointwise)
    return before


def pointwise_mode() -> Pointwise:
    """How the 1 x 1 convolution of a fused pair runs.

    Returns:
        "fused", "conv" or "matmul", as set by `use`.
    """
    return _settings[1]


def is_interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU, as in the tests.

    Returns:
        Whether TRITON_INTERPRET=1 is set.
    """
    return os.environ.get("TRITON_INTERPRET") == "1"


def can_apply(x: Tensor, *modules: nn.Module) -> bool:
    """Whether fused kernels may stand for these modules on this input.

    Args:
        x: (N, C, H, W), the modules' input.
        modules: the modules that would not be called; each must be in training mode and without hooks.

    Returns:
        False outside training, on a CPU, in other memory formats or types than the kernels know, where something looks
        into the modules or the operators (hooks, compilers, tracers, `torch.func`, counters), and without Triton.
    """
    if torch.compiler.is_compiling() or _settings[0] == "off" or is_observed():
        return False
    if not (type(x) is Tensor and x.ndim == 4):
        return False
    if not (is_on_current_device(x) or (is_interpreted() and x.device.type == "cpu")):
        return False
    known = x.dtype in PARAMETERS and 0 < x.numel() < MOST_ELEMENTS
    if not (known and x.is_contiguous(memory_format=torch.channels_last)):
        return False
    if any(not module.training or any(getattr(module, hooks, None) for hooks in HOOKS) for module in modules):
        return False
    return load_operators() is not None


def is_on_current_device(x: Tensor) -> bool:
    """Whether Triton, which launches on the current device, would launch where `x` is.

    Args:
        x: any tensor.

    Returns:
        Whether `x` is on the current CUDA device.
    """
    return x.is_cuda and x.device.index == torch.cuda.current_device()


def is_plain(parameter: object, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a kernel may read this parameter or buffer through its address.

    Args:
        parameter: Anything.
        dtype: the type that the kernel expects.
        device: where the kernel runs.

    Returns:
        Whether it is a tensor, of no subclass of somebody else, of this type, on this device, and contiguous.
    """
    if not (isinstance(parameter, Tensor) and type(parameter) in (Tensor, nn.Parameter)):
        return False
    return parameter.is_contiguous() and (parameter.dtype, parameter.device) == (dtype, device)


def is_observed() -> bool:
    """Whether something follows PyTorch's operators one by one, which would not see the kernels.

    Returns:
        Whether a tracer, a transformation of `torch.func` or a dispatch mode (such as a FLOP counter) is active, or
        hooks are set on all modules.
    """
    return (
        torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or nn.modules.module._has_any_global_hook()
    )


@lru_cache
def load_operators() -> Any:
    """The fused operators.

    Returns:
        The module `gpu`, or None where Triton cannot be imported.
    """
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return importlib.import_module("odcheap.layers.kernels.gpu")
    except (ImportError, OSError, RuntimeError):  # an installation without a working compiler or driver
        return None
