"""Decides whether layers run as fused GPU kernels, and checks whether they can. Triton is imported on first use."""

import importlib
import importlib.util
import os
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

Mode = Literal["auto", "off"]

# The parameters' type for each type of activations: under autocast to bfloat16 parameters stay float32.
PARAMETER_TYPES = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
MAX_ELEMENTS = 2**31  # the kernels count in 32 bits
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_mode: Mode = "auto"


def use(mode: Mode) -> Mode:
    """Sets for the whole process whether layers run as fused kernels. A recorded step stays as it is.

    Args:
        mode: "auto" for fused kernels wherever they can run, "off" for PyTorch's operators everywhere.

    Returns:
        The mode before.

    Raises:
        ValueError: `mode` is neither of the two.
    """
    global _mode
    if mode not in ("auto", "off"):
        raise ValueError(f'mode={mode!r}: must be "auto" or "off"')
    before, _mode = _mode, mode
    return before


def is_interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU (TRITON_INTERPRET=1), as in the tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def can_apply(x: Tensor, *modules: nn.Module) -> bool:
    """Whether fused kernels may replace the calls of these modules on this input.

    They may in training, on a GPU with Triton, on maps of a known type in channels-last memory format, unless something
    observes the modules or the operators (hooks, compilers, tracers, `torch.func`, counters).

    Args:
        x: The modules' input, (N, C, H, W).
        modules: The modules that would not be called.
    """
    if torch.compiler.is_compiling() or _mode == "off" or is_observed():
        return False
    if not (type(x) is Tensor and x.ndim == 4):
        return False
    if not (is_on_current_device(x) or (is_interpreted() and x.device.type == "cpu")):
        return False
    known = x.dtype in PARAMETER_TYPES and 0 < x.numel() < MAX_ELEMENTS
    if not (known and x.is_contiguous(memory_format=torch.channels_last)):
        return False
    if any(not module.training or any(getattr(module, hooks, None) for hooks in HOOKS) for module in modules):
        return False
    return load_operators() is not None


def is_on_current_device(x: Tensor) -> bool:
    """Whether a tensor is on the current CUDA device, on which Triton launches its kernels."""
    return x.is_cuda and x.device.index == torch.cuda.current_device()


def is_plain(parameter: object, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a kernel may read this parameter or buffer through its address.

    It may if this is a plain `Tensor` or `nn.Parameter` (no other subclass), contiguous, and of this type and device.
    """
    if not (isinstance(parameter, Tensor) and type(parameter) in (Tensor, nn.Parameter)):
        return False
    return parameter.is_contiguous() and (parameter.dtype, parameter.device) == (dtype, device)


def is_observed() -> bool:
    """Whether something follows PyTorch's operators one by one, which would not see the kernels.

    That is a tracer, a transformation of `torch.func`, a dispatch mode (such as a FLOP counter), or a hook on all
    modules.
    """
    return (
        torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or nn.modules.module._has_any_global_hook()
    )


@lru_cache
def load_operators() -> Any:
    """Returns the module `gpu` with the fused operators, or None if Triton cannot be imported."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return importlib.import_module("odcheap.layers.kernels.gpu")
    except (ImportError, OSError, RuntimeError):  # an installation without a working compiler or driver
        return None
