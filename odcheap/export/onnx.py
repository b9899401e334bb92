"""Converts networks to PyTorch programs and ONNX files."""

import contextlib
import io
from collections.abc import Generator
from typing import NamedTuple

import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from odcheap.models.exportable import describe_exporter_error, quiet_exporters
from odcheap.utils.errors import Failure, OptionError, first_line
from odcheap.utils.text import count_things

INPUT, OUTPUT = "images", "logits"
DIMENSIONS = ("n", "height", "width")
MAX_DIFFERENCE = 1e-4  # of a logit between two forms of one network
OLDEST_OPSET, DEFAULT_OPSET = 7, 18


class Program(NamedTuple):
    """A network that was traced to one graph.

    Attributes:
        exported: The graph.
        free: The names of the dimensions of the images that may vary, of "n", "height" and "width".
    """

    exported: ExportedProgram
    free: tuple[str, ...]


@contextlib.contextmanager
def one_line(what: str) -> Generator[None]:
    """A context manager that converts any error in it to a `Failure` with a message of one line.

    Args:
        what: What is done to the network, as a past participle, such as "traced". The message says that the network
            cannot be traced.
    """
    try:
        with quiet_exporters():
            yield
    except Exception as error:  # the network's own code and the exporters raise errors of any kind
        raise Failure(f"this network cannot be {what}: {describe_exporter_error(error)}") from error


def export_program(network: nn.Module, image_size: tuple[int, int, int], batch: int | None = None) -> Program:
    """Traces a network, which maps images (n, C, H, W) to logits (n, K), in eval mode.

    Args:
        network: The network; it is moved to the CPU and set to eval mode.
        image_size: (C, H, W) of an image.
        batch: The fixed number of images for a static graph, in which height and width are fixed, too. If it is None,
            any number of images can be given. Height and width may then also vary, if the graph computes the same as
            the network at other sizes.

    Raises:
        Failure: PyTorch cannot trace the network, or `batch` is None but the number of images cannot vary.
    """
    # Try the graph with the most freedom first.
    network = network.eval().cpu()
    with one_line("traced"), torch.no_grad():
        network(torch.zeros(batch or 2, *image_size))  # a Shift2d keeps its kernels, which are constants of the graph
    if batch is not None:
        with one_line("traced"):
            return Program(trace_network(network, image_size, (), batch), ())
    try:
        with quiet_exporters():
            exported = trace_network(network, image_size, (0, 2, 3))
        if is_same_at_other_sizes(network, exported, image_size):
            return Program(exported, DIMENSIONS)
    except (RuntimeError, ValueError, AssertionError, TypeError):  # PyTorch raises these if a size cannot vary
        pass
    with one_line("traced"):
        return Program(trace_network(network, image_size, (0,)), DIMENSIONS[:1])


def trace_network(
    network: nn.Module, image_size: tuple[int, int, int], free: tuple[int, ...], batch: int = 2
) -> ExportedProgram:
    """Traces a network, and removes from the graph all records of source code, which name files of this machine.

    Args:
        network: The network.
        image_size: (C, H, W) of an image.
        free: The positions of the dimensions that may vary: 0 for the number of images, 2 for height, 3 for width.
        batch: The number of images with which the network is run.
    """
    dims = dict.fromkeys(free, Dim.DYNAMIC)
    exported = torch.export.export(network, (torch.zeros(batch, *image_size),), dynamic_shapes=(dims,))
    # The tracer stores at each node the lines of code that made it, with the paths of their files, and the names of
    # functions, for which ExecuTorch refuses a graph that is traced again.
    for module in exported.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            for key in ("stack_trace", "custom"):
                node.meta.pop(key, None)
    return exported


@torch.no_grad()
def is_same_at_other_sizes(network: nn.Module, exported: ExportedProgram, image_size: tuple[int, int, int]) -> bool:
    """Returns whether a graph has the same outputs as the network at three image sizes.

    If the network or the graph cannot take one of the sizes, PyTorch's error is raised.

    Args:
        network: The network.
        exported: The graph, in which height and width may vary.
        image_size: (C, H, W) of an image; it is the first of the three sizes.
    """
    channels, height, width = image_size
    graph = exported.module()
    for size in ((height, width), (height + 24, width + 9), (2 * height, 2 * width)):
        images = torch.linspace(0, 1, 2 * channels * size[0] * size[1]).view(2, channels, *size)
        if not torch.allclose(graph(images), network(images), atol=MAX_DIFFERENCE, rtol=1e-4):
            return False
    return True


def to_pt2(program: Program) -> bytes:
    """Returns the content of a `.pt2` file, which `torch.export.load` can read without odcheap."""
    content = io.BytesIO()
    torch.export.save(program.exported, content)
    return content.getvalue()


def to_onnx(program: Program, opset: int | None = None) -> bytes:
    """Returns the content of an ONNX file with the input `images`, the output `logits`, and the weights inside.

    Args:
        program: The traced network.
        opset: The version of ONNX's operators. None for 18, which ONNX Runtime 1.14 can run. If the network has newer
            operators, None leaves the version that PyTorch chooses.

    Raises:
        OptionError: The graph cannot be written with this opset.
        Failure: ONNX has no form of one of the network's operators.
    """
    with one_line("written as ONNX"):
        exported = torch.onnx.export(program.exported, (), input_names=[INPUT], output_names=[OUTPUT], verbose=False)
    assert exported is not None, "PyTorch returns the model if no file is given"
    model = exported.model_proto
    name_free_dimensions(model, program.free)
    use_global_pooling(model)
    if opset is not None:
        set_opset(model, opset)
    else:
        with contextlib.suppress(OptionError):  # a network with newer operators keeps PyTorch's opset
            set_opset(model, DEFAULT_OPSET)
    remove_traces(model)
    return model.SerializeToString()


def remove_traces(model: onnx.ModelProto) -> None:
    """Removes all comments and metadata from a model in place, such as the tracer's records of the source code."""
    graph, functions = model.graph, model.functions
    values = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
    nodes = (*graph.node, *(node for function in functions for node in function.node))
    for part in (model, graph, *nodes, *values, *functions):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")


def name_free_dimensions(model: onnx.ModelProto, free: tuple[str, ...]) -> None:
    """Renames the dimensions that may vary, in place, from the tracer's symbols to names such as "height".

    Args:
        model: The model, with images (n, C, H, W) as its only input.
        free: The names of the dimensions that may vary, of "n", "height" and "width".
    """
    graph = model.graph
    (images,) = graph.input
    dims = images.type.tensor_type.shape.dim
    names = {dims[k].dim_param: name for k, name in ((0, "n"), (2, "height"), (3, "width")) if name in free}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]


def use_global_pooling(model: onnx.ModelProto) -> None:
    """Replaces means over height and width by GlobalAveragePool, and a Reshape after them by Flatten, in place."""
    # These two operators are the same in old opsets, and compilers for embedded devices support them.
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    # A mean that drops its dimensions becomes two nodes: GlobalAveragePool keeps them.
    nodes, pooled = [], set()
    for node in graph.node:
        if is_spatial_mean(node, constants):
            keeps_dims = next((a.i for a in node.attribute if a.name == "keepdims"), 1)
            name = node.output[0] if keeps_dims else f"{node.output[0]}.pooled"
            pooled.add(name)
            nodes.append(helper.make_node("GlobalAveragePool", node.input[:1], [name], name=name))
            if keeps_dims:
                continue
            node = helper.make_node("Flatten", [name], node.output[:1], name=f"{name}.flat")
        elif node.op_type == "Reshape" and node.input[0] in pooled and ranks.get(node.output[0]) == 2:
            node = helper.make_node("Flatten", node.input[:1], node.output[:1], name=node.name)
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    # The lists of axes and the shapes are not inputs any more.
    used = {name for node in nodes for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)


def is_spatial_mean(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> bool:
    """Returns whether a node of a graph computes the mean of feature maps (n, C, H, W) over H and W.

    Args:
        node: The node.
        constants: The constant tensors of the graph by name.
    """
    if node.op_type != "ReduceMean" or len(node.input) != 2 or node.input[1] not in constants:
        return False
    return sorted(axis % 4 for axis in numpy_helper.to_array(constants[node.input[1]])) == [2, 3]


def set_opset(model: onnx.ModelProto, opset: int) -> None:
    """Changes the opset (version of operators) of a model in place; its nodes stay the same.

    Raises:
        OptionError: The opset is unknown, or a node does not exist in this form in that opset.
    """
    # In most cases the operators of convolutional networks differ between opsets only in the types that they accept. An
    # export then checks whether the file still computes the same.
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise OptionError("--opset", opset, f"must be {OLDEST_OPSET} to {newest}")
    (own,) = (entry for entry in model.opset_import if entry.domain == "")
    before = own.version, model.ir_version
    own.version = opset
    model.ir_version = helper.find_min_ir_version_for(model.opset_import)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        own.version, model.ir_version = before
        reason = f"this network cannot be written with this opset ({first_line(error)})"
        raise OptionError("--opset", opset, reason) from error


def describe_graph(content: bytes) -> str:
    """Returns a text such as "(n, 3, height, width), any number of images; ONNX opset 18" about an ONNX file."""
    model = onnx.load_from_string(content)
    (images,) = model.graph.input
    shape = [dim.dim_param or dim.dim_value for dim in images.type.tensor_type.shape.dim]
    batch = shape[0]
    exactly = f"a static graph for exactly {count_things(batch, 'image')}" if isinstance(batch, int) else ""
    (opset,) = (entry.version for entry in model.opset_import if entry.domain == "")
    return f"({', '.join(map(str, shape))}), {exactly or 'any number of images'}; ONNX opset {opset}"
