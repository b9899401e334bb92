"""Converts networks to ExecuTorch programs (`.pte`) for phones, also with 8-bit integers, and runs them.

All layers are passed on ("delegated") to XNNPACK, a library of operators for CPUs. The extra `executorch` installs
ExecuTorch.
"""

import contextlib
import os
import sys
import warnings
from collections.abc import Generator, Iterable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.fx import GraphModule

from odcheap.export.onnx import Program, one_line, trace_network
from odcheap.models.exportable import quiet_exporters
from odcheap.predict import Predictor, pad_batches
from odcheap.utils.errors import Failure

EXPORTED_BATCH = 1  # images of a program if no other number is asked for


class ExecuTorchFile(NamedTuple):
    """An ExecuTorch program.

    Attributes:
        content: The content of the `.pte` file.
        portable: The names of the operators that XNNPACK does not have, so that ExecuTorch's slow "portable" operators
            run them. Empty if XNNPACK runs the whole network.
    """

    content: bytes
    portable: tuple[str, ...]


@contextlib.contextmanager
def quiet_executorch() -> Generator[None]:
    """A context manager in which ExecuTorch prints nothing and gives no warnings; errors are raised as usual."""
    with quiet_exporters(), quiet_descriptor(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def quiet_descriptor() -> Generator[None]:
    """A context manager that drops all text that C++ code writes to stderr, by redirecting file descriptor 2."""
    if sys.__stderr__ is None:  # the process was started without one, and its number may be that of another file
        yield
        return
    sys.__stderr__.flush()
    before = os.dup(2)
    try:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def to_pte(program: Program, image_size: tuple[int, int, int], batch: int | None = None) -> ExecuTorchFile:
    """Returns an ExecuTorch program whose layers are run by XNNPACK.

    Args:
        program: The traced network, from `export_program`. Weights must be constants of its graph, and not be computed
            in the graph, since XNNPACK takes only constants as weights.
        image_size: (C, H, W) of an image.
        batch: The number of images in each call of the program; None for one image.

    Raises:
        Failure: ExecuTorch cannot write the network.
    """
    with one_line("written for ExecuTorch"), quiet_executorch():
        return lower(keep_pooled_dimensions(program, image_size, batch), image_size, batch)


def to_int8_pte(
    program: Program, image_size: tuple[int, int, int], batches: Iterable[np.ndarray], batch: int | None = None
) -> ExecuTorchFile:
    """Quantizes a network to 8-bit weights and feature maps, and returns it as an ExecuTorch program.

    This is PyTorch's post-training quantization ("PT2E") with XNNPACK's rules. Weights have a scale for each channel.

    Args:
        program: The traced network, from `export_program`. Weights must be constants of its graph.
        image_size: (C, H, W) of an image.
        batches: Batches of images (n, C, H, W), float32 in [0, 1], with which the ranges of the feature maps are
            measured.
        batch: The number of images in each call of the program. All `batches` must then have this number of images.
            None for one image in a call; the batches may then have any number.

    Raises:
        Failure: The network cannot be quantized, or ExecuTorch cannot write it.
    """
    with one_line("quantized for ExecuTorch"), quiet_executorch():
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        rules: Any = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        # The others are for training with simulated integers, and it takes seconds to look for them.
        rules.SUPPORTED_PATTERNS = [pattern for pattern in rules.SUPPORTED_PATTERNS if not pattern.is_qat]
        graph = prepare_pt2e(keep_pooled_dimensions(program, image_size, batch), rules)
        with torch.no_grad():
            for images in batches:
                graph(torch.from_numpy(images))
        return lower(convert_pt2e(graph), image_size, batch)


def keep_pooled_dimensions(program: Program, image_size: tuple[int, int, int], batch: int | None) -> GraphModule:
    """Returns a network's graph, changed so that XNNPACK can run the global average pooling; outputs stay the same.

    XNNPACK has no mean over height and width that drops these two dimensions. Each such mean is replaced by a mean that
    keeps them, (n, C, 1, 1), and a flatten to (n, C).

    Args:
        program: The traced network, which is not changed.
        image_size: (C, H, W) of an image.
        batch: The number of images of a static graph; None if the number may vary.
    """
    graph: Any = program.exported.module()
    operators = torch.ops.aten
    for node in list(graph.graph.nodes):
        if node.target is not operators.mean.dim or len(node.args) > 2 or node.kwargs.get("keepdim"):
            continue
        images, dims = node.args
        if images.meta["val"].dim() == 4 and sorted(dim % 4 for dim in dims) == [2, 3]:
            with graph.graph.inserting_before(node):
                pooled = graph.graph.call_function(operators.mean.dim, (images, dims, True))
                node.replace_all_uses_with(graph.graph.call_function(operators.flatten.using_ints, (pooled, 1)))
            graph.graph.erase_node(node)
    graph.recompile()
    # Another trace gives the new nodes the shapes and types that the quantization reads.
    free = () if batch is not None else (0,)
    return trace_network(graph, image_size, free, batch or 2).module()


def lower(graph: GraphModule, image_size: tuple[int, int, int], batch: int | None) -> ExecuTorchFile:
    """Converts a graph to an ExecuTorch program in which XNNPACK runs as many layers as possible.

    Args:
        graph: The graph of a network, which maps images (n, C, H, W) to logits (n, K).
        image_size: (C, H, W) of an image.
        batch: The number of images in each call of the program; None for one image.
    """
    # ExecuTorch knows its operators on 8-bit integers, for layers that XNNPACK does not run, after the first import.
    import executorch.kernels.quantized  # noqa: F401
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    exported = trace_network(graph, image_size, (), batch or EXPORTED_BATCH)
    edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    operators = [node.target for node in edge.exported_program().graph.nodes if node.op == "call_function"]
    names = (str(getattr(operator, "__name__", operator)) for operator in operators)
    portable = sorted({name for name in names if name not in ("executorch_call_delegate", "getitem")})
    return ExecuTorchFile(edge.to_executorch().buffer, tuple(portable))


@cache
def load_runtime() -> Any:
    """Returns the object with which ExecuTorch loads programs, an `executorch.runtime.Runtime`."""
    with quiet_executorch():
        import executorch.kernels.quantized  # noqa: F401
        from executorch.runtime import Runtime

        return Runtime.get()


def set_threads(count: int) -> None:
    """Sets the number of CPU threads of ExecuTorch in this process.

    After this call, programs that were loaded before it cannot be run any more.
    """
    load_runtime()
    with quiet_executorch():
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

        _unsafe_reset_threadpool(count)


def create_predictor(content: bytes, batch: int | None) -> Predictor:
    """Returns a function that maps any number of images (n, C, H, W) to logits (n, K) with an ExecuTorch program.

    Args:
        content: The content of the `.pte` file.
        batch: The number of images for which the program was written; None for one image.

    Raises:
        Failure: ExecuTorch cannot load the program.
    """
    try:
        runtime = load_runtime()
        with quiet_executorch():  # it describes the CPU when it loads the first program
            program = runtime.load_program(content)
            method = program.load_method("forward")
    except Exception as error:  # ExecuTorch raises errors of several types
        raise Failure(f"ExecuTorch cannot load the file ({error})") from error

    def run(images: np.ndarray, program: Any = program) -> np.ndarray:  # the program has to live while it runs
        return method.execute([torch.from_numpy(images)])[0].numpy()

    return pad_batches(run, batch or EXPORTED_BATCH)
