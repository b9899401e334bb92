"""Finds out before the training whether a network with a block type or backbone of the user can be exported."""

import contextlib
import copy
import io
import logging
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from odcheap.layers.cheap_conv import CheapConv
from odcheap.utils.errors import first_line


def find_export_problem(network: nn.Module, image_size: tuple[int, int, int], whole: bool) -> str | None:
    """Tries whether a network can be exported: traces it, and writes it, or a part of it, as ONNX in memory.

    Args:
        network: The network; it is not changed.
        image_size: The shape (C, H, W) of the images.
        whole: True writes the whole network as ONNX, which takes many seconds. False writes only its first cheap
            convolution (`CheapConv`); this is enough if all other layers are known to work.

    Returns:
        One line that says what failed, for the user; None if nothing failed.
    """
    network = copy.deepcopy(network).cpu().float().eval()
    images = torch.zeros(2, *image_size)
    pair = next((module for module in network.modules() if isinstance(module, CheapConv)), None)
    try:
        with quiet_exporters():
            exported = trace(network, images)
            if pair is not None and not whole:
                exported = trace(pair, find_input(network, pair, images))
            torch.onnx.export(exported, (), verbose=False)
    except Exception as error:  # the user's code, PyTorch's tracer and the ONNX exporter raise errors of any kind
        return describe_exporter_error(error)
    return None


@contextlib.contextmanager
def quiet_exporters() -> Generator[None]:
    """A context manager in which PyTorch's exporters print nothing; if they fail, their error is raised as usual."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def describe_exporter_error(error: BaseException) -> str:
    """Returns the type and the first line of the error with which a chain of errors (`__cause__`) began."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__  # the exporters' own messages only say that a step has failed
    return f"{type(cause).__name__}: {first_line(cause)}"


def trace(network: nn.Module, images: Tensor) -> Any:
    """Traces a network with images (N, C, H, W), and returns the `ExportedProgram`, which takes any N."""
    return torch.export.export(network, (images,), dynamic_shapes=({0: Dim.DYNAMIC},))


@torch.no_grad()
def find_input(network: nn.Module, module: nn.Module, images: Tensor) -> Tensor:
    """Returns the input that a module inside a network gets when the network runs on images.

    Args:
        network: The network.
        module: One of its modules.
        images: (N, C, H, W).
    """
    inputs: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    network(images)
    handle.remove()
    return inputs[0].clone()
