"""Switches fused kernels on and off, and checks whether they can replace layers.

Triton, or the compiled C++ library for CPUs, is loaded when the kernels are used for the first time.
"""

import importlib
import importlib.util
import os
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from odcheap.layers.kernels.cpu_library import CompileError

Mode = Literal["auto", "off"]

# The dtype of the parameters for each dtype of the activations: under autocast to bfloat16 parameters stay float32.
PARAMETER_TYPES = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
MAX_ELEMENTS = 2**31  # the kernels count in 32 bits
# The orders in which an operator computes: relu(bn(x)); relu(bn(x)) + residual; relu(bn(x) + residual).
NO_RESIDUAL, ACT_ADD, ADD_ACT = 0, 1, 2
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_mode: Mode = "auto"


class Pair(NamedTuple):
    """The layers that one fused operator can compute: a spatial operator, a 1 x 1 convolution, and a batch norm.

    The spatial operator has a 3 x 3 window and C -> C channels, the 1 x 1 convolution has C -> O channels.

    Attributes:
        kernel: The weights (C, C / groups, 3, 3) of a grouped or depth-wise convolution with stride 1 and padding 1;
            None if the operator is a 3 x 3 `Shift2d`.
        weight: The weights (O, C, 1, 1) of the 1 x 1 convolution.
        norm: The batch norm over O channels.
        stride: The stride of the 1 x 1 convolution, 1 or 2.
    """

    kernel: Tensor | None
    weight: Tensor
    norm: nn.BatchNorm2d
    stride: int

    def output_shape(self, shape: torch.Size) -> torch.Size:
        """Returns the shape (N, O, H', W') of the output for an input of the given shape (N, C, H, W)."""
        images, _, height, width = shape
        return torch.Size((images, len(self.weight), -(-height // self.stride), -(-width // self.stride)))


def use(mode: Mode) -> Mode:
    """Switches fused kernels, which compute several layers at once, on or off for the whole process.

    A training step that was recorded as a CUDA graph before this call does not change.

    Args:
        mode: "auto" uses fused kernels wherever they can run, "off" uses PyTorch's operators everywhere.

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
    """Returns True if Triton runs its kernels on the CPU in its interpreter (TRITON_INTERPRET=1), as in the tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def can_apply(x: Tensor, *modules: nn.Module) -> bool:
    """Returns True if fused kernels may run in place of some modules. All of this must be true:

    - The modules are in training mode and have no hooks.
    - The input is a feature map (N, C, H, W) in channels-last memory format; it is bfloat16, float32 or float64.
    - The fused kernels can be loaded for the device of the input, and `use("off")` was not called.
    - Nothing compiles, traces or counts PyTorch's operators.

    Args:
        x: The input of the modules.
        *modules: The modules whose `forward` would not be called.
    """
    # What runs around the layers.
    if torch.compiler.is_compiling() or _mode == "off" or is_observed():
        return False
    # The input: its class (tracers use subclasses), device, dtype, size and memory format.
    if not (type(x) is Tensor and x.ndim == 4):
        return False
    if not (is_on_current_device(x) or x.device.type == "cpu"):
        return False
    known = x.dtype in PARAMETER_TYPES and 0 < x.numel() < MAX_ELEMENTS
    if not (known and x.is_contiguous(memory_format=torch.channels_last)):
        return False
    # The modules, and at last the kernels, which are loaded here.
    if any(not module.training or any(getattr(module, hooks, None) for hooks in HOOKS) for module in modules):
        return False
    return load_operators(x.device.type) is not None


def is_on_current_device(x: Tensor) -> bool:
    """Returns True if a tensor is on the current CUDA device, on which Triton runs its kernels."""
    return x.is_cuda and x.device.index == torch.cuda.current_device()


def is_plain(parameter: object, dtype: torch.dtype, device: torch.device, is_kernel: bool = False) -> bool:
    """Returns True if a fused kernel may read a parameter or a buffer through its memory address.

    Args:
        parameter: The object. It must be a contiguous `Tensor` or `nn.Parameter`, not another subclass of `Tensor`.
        dtype: The dtype that the parameter must have.
        device: The device on which the parameter must be.
        is_kernel: True allows the channels-last memory format too; the operator then makes a contiguous copy.
    """
    if not (isinstance(parameter, Tensor) and type(parameter) in (Tensor, nn.Parameter)):
        return False
    if not (parameter.is_contiguous() or (is_kernel and parameter.is_contiguous(memory_format=torch.channels_last))):
        return False
    return (parameter.dtype, parameter.device) == (dtype, device)


def is_observed() -> bool:
    """Returns True if something observes every operator of PyTorch, and would miss the operators of fused kernels.

    This may be a tracer, a transformation of `torch.func`, a dispatch mode such as a FLOP counter, or a hook on all
    modules.
    """
    return (
        torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or nn.modules.module._has_any_global_hook()
    )


def load_operators(device_type: str) -> Any:
    """Returns the module with the fused operators for a kind of device, or None if it cannot be loaded here.

    It is `odcheap.layers.kernels.gpu` for "cuda", and `odcheap.layers.kernels.cpu` for "cpu". If Triton's interpreter
    runs its kernels, it is the first module for both.

    Args:
        device_type: "cuda" or "cpu", the `type` of a `torch.device`.
    """
    return try_to_load(device_type)[0]


def reason_for_plain_layers(device_type: str) -> str | None:
    """Returns the reason why no fused kernels can run on a kind of device, such as "Triton is not installed".

    It returns None if they can run.

    Args:
        device_type: "cuda" or "cpu", the `type` of a `torch.device`.
    """
    return try_to_load(device_type)[1]


@lru_cache
def try_to_load(device_type: str) -> tuple[Any, str | None]:
    """Imports the module with the fused operators for a kind of device, "cuda" or "cpu".

    Returns:
        A tuple: the module and None; or, if the module cannot be imported, None and the reason in one line.
    """
    name = "gpu" if device_type == "cuda" or is_interpreted() else "cpu"
    if name == "gpu" and importlib.util.find_spec("triton") is None:
        return None, "Triton is not installed"
    try:
        return importlib.import_module(f"odcheap.layers.kernels.{name}"), None
    except (ImportError, OSError, RuntimeError, CompileError) as error:
        # An installation without a working compiler or driver.
        return None, str(error).strip().partition("\n")[0]


def empty_output(x: Tensor, channels: int, stride: int) -> Tensor:
    """Returns a new channels-last tensor, without values, for the output of a convolution of x with a stride."""
    images, _, height, width = x.shape
    shape = (images, channels, -(-height // stride), -(-width // stride))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
