"""A network for a device: its program in PyTorch's form and in ONNX, and how long an answer takes there."""

import io
import tempfile
from pathlib import Path
from typing import NamedTuple

import onnx
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from odcheap import predict
from odcheap.export import graphs
from odcheap.layers.fuse import cheap_form

INPUT, OUTPUT = "images", "logits"
SIZES = ("n", "height", "width")
DIFFERENT = 1e-4  # between logits of one network


class Program(NamedTuple):
    """A network as one graph; `free` says which of the images' dimensions ("n", "height", "width") may vary."""

    exported: ExportedProgram
    free: tuple[str, ...]


def program(network: nn.Module, image_size: tuple[int, int, int], batch: int | None = None) -> Program:
    """The network in eval mode, images (n, C, H, W) -> logits (n, K).

    Free are all sizes with which the graph was seen to compute what the network computes. With `batch` none is.
    """
    network = network.eval().cpu()
    if batch is not None:
        return Program(torch.export.export(network, (torch.zeros(batch, *image_size),)), ())
    try:
        made = traced(network, image_size, (0, 2, 3))
        if same_at_other_sizes(network, made, image_size):
            return Program(made, SIZES)
    except (RuntimeError, ValueError, AssertionError, TypeError):  # what PyTorch raises where a size cannot vary
        pass
    return Program(traced(network, image_size, (0,)), SIZES[:1])


def traced(network: nn.Module, image_size: tuple[int, int, int], free: tuple[int, ...]) -> ExportedProgram:
    dims = dict.fromkeys(free, Dim.DYNAMIC)
    return torch.export.export(network, (torch.zeros(2, *image_size),), dynamic_shapes=(dims,))


@torch.no_grad()
def same_at_other_sizes(network: nn.Module, made: ExportedProgram, image_size: tuple[int, int, int]) -> bool:
    """Raises what PyTorch raises where the graph or the network refuses a size."""
    channels, height, width = image_size
    graph = made.module()
    for size in ((height, width), (height + 24, width + 9), (2 * height, 2 * width)):
        images = torch.linspace(0, 1, 2 * channels * size[0] * size[1]).view(2, channels, *size)
        if not torch.allclose(graph(images), network(images), atol=DIFFERENT, rtol=1e-4):
            return False
    return True


def to_pt2(made: Program) -> bytes:
    """For `torch.export.load`, which needs nothing of ours."""
    content = io.BytesIO()
    torch.export.save(made.exported, content)
    return content.getvalue()


def to_onnx(made: Program, opset: int | None = None) -> bytes:
    """One file, `images` -> `logits`, with its weights inside. `OptionError` for an opset that it cannot have."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        torch.onnx.export(
            made.exported,
            (),
            path,
            input_names=[INPUT],
            output_names=[OUTPUT],
            external_data=False,
            verbose=False,
        )
        model = onnx.load(path)
    named(model, made.free)
    graphs.pool_globally(model)
    if opset is not None:
        graphs.with_opset(model, opset)
    return model.SerializeToString()


def named(model: onnx.ModelProto, free: tuple[str, ...]) -> None:
    """Free sizes by their names in place of the tracer's symbols."""
    graph = model.graph
    (images,) = graph.input
    dims = images.type.tensor_type.shape.dim
    names = {dims[k].dim_param: name for k, name in ((0, "n"), (2, "height"), (3, "width")) if name in free}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]


def fastest_onnx(network: nn.Module, image_size: tuple[int, int, int]) -> bytes:
    """The file that an export would write, without the normalisation."""
    return to_onnx(program(cheap_form(network), image_size))


def latency(model: bytes, image_size: tuple[int, int, int], batch: int, seconds: float = 1.0) -> float:
    """Seconds of a batch in ONNX Runtime on the CPU: the median over about so many seconds.

    With one thread or with all, whichever takes less: for one small picture that is often the one.
    """
    images = predict.random_images(batch, image_size)
    asks = {threads: predict.create_predictor(predict.create_session(model, threads)) for threads in (1, 0)}
    works = {threads: lambda ask=ask: ask(images) for threads, ask in asks.items()}
    return min(found.p50 for found in predict.time_alternately(works, seconds / 2).values())
