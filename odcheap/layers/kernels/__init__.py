"""Switches fused GPU kernels on and off, and checks whether they can replace layers.

Triton is imported when the kernels are used for the first time.
"""

import importlib
import importlib.util
import os
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

Mode = Literal["auto", "off"]

# The dtype of the parameters for each dtype of the activations: under autocast to bfloat16 parameters stay float32.
PARAMETER_TYPES = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
MAX_ELEMENTS = 2**31  # the kernels count in 32 bits
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_mode: Mode = "auto"


def use(mode: Mode) -> Mode:
    """Sets, for the whole process, whether layers use fused kernels.

    A training step that was recorded as a CUDA graph before does not change.

    Args:
        mode: "auto" to use fused kernels wherever they can run, "off" to use PyTorch's operators everywhere.

    Returns:
        The mode that was set before this call.

    Raises:
        ValueError: `mode` is neither "auto" nor "off".
    """
    global _mode
    if mode not in ("auto", "off"):
        raise ValueError(f'mode={mode!r}: must be "auto" or "off"')
    before, _mode = _mode, mode
    return before


def is_interpreted() -> bool:
    """Returns whether Triton interprets its kernels on the CPU (TRITON_INTERPRET=1), as in the tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def can_apply(x: Tensor, *modules: nn.Module) -> bool:
    """Returns whether fused kernels may run in place of these modules.

    They may run if all of this is true: the modules are in training mode and have no hooks, the input is a feature map
    (N, C, H, W) on a GPU, in channels-last memory format and with one of the dtypes in `PARAMETER_TYPES`, Triton is
    installed, and nothing observes PyTorch's operators (see `is_observed`).

    Args:
        x: The input of the modules.
        modules: The modules whose `forward` would not be called.
    """
    # What runs around the layers.
    if torch.compiler.is_compiling() or _mode == "off" or is_observed():
        return False
    # The input: its class (tracers use subclasses), device, dtype, size and memory format.
    if not (type(x) is Tensor and x.ndim == 4):
        return False
    if not (is_on_current_device(x) or (is_interpreted() and x.device.type == "cpu")):
        return False
    known = x.dtype in PARAMETER_TYPES and 0 < x.numel() < MAX_ELEMENTS
    if not (known and x.is_contiguous(memory_format=torch.channels_last)):
        return False
    # The modules, and at last Triton, which is imported here.
    if any(not module.training or any(getattr(module, hooks, None) for hooks in HOOKS) for module in modules):
        return False
    return load_operators() is not None


def is_on_current_device(x: Tensor) -> bool:
    """Returns whether a tensor is on the current CUDA device, on which Triton launches its kernels."""
    return x.is_cuda and x.device.index == torch.cuda.current_device()


def is_plain(parameter: object, dtype: torch.dtype, device: torch.device) -> bool:
    """Returns whether a kernel may read a parameter or buffer through its address.

    Args:
        parameter: It must be a contiguous `Tensor` or `nn.Parameter`, and not of another subclass of `Tensor`.
        dtype: The dtype that it must have.
        device: The device on which it must be.
    """
    if not (isinstance(parameter, Tensor) and type(parameter) in (Tensor, nn.Parameter)):
        return False
    return parameter.is_contiguous() and (parameter.dtype, parameter.device) == (dtype, device)


def is_observed() -> bool:
    """Returns whether something observes every operator of PyTorch, and would miss those that fused kernels replace.

    This may be a tracer, a transformation of `torch.func`, a dispatch mode (such as a FLOP counter), or a hook on all
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
