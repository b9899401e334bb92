"""Rewrites of ONNX graphs that leave what they compute as it is."""

import onnx
from onnx import helper, numpy_helper

from odcheap.utils.errors import OptionError, first_line


def pool_globally(model: onnx.ModelProto) -> None:
    """Means over height and width become global average pools, and what flattens these Flatten.

    Old opsets have these too, with the same attributes, and compilers know them.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    nodes, pooled = [], set()
    for node in graph.node:
        if is_mean_of_maps(node, constants):
            kept = next((a.i for a in node.attribute if a.name == "keepdims"), 1)
            name = node.output[0] if kept else f"{node.output[0]}.pooled"
            pooled.add(name)
            nodes.append(helper.make_node("GlobalAveragePool", node.input[:1], [name], name=name))
            if kept:
                continue
            node = helper.make_node("Flatten", [name], node.output[:1], name=f"{name}.flat")
        elif node.op_type == "Reshape" and node.input[0] in pooled and ranks.get(node.output[0]) == 2:
            node = helper.make_node("Flatten", node.input[:1], node.output[:1], name=node.name)
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)


def is_mean_of_maps(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> bool:
    if node.op_type != "ReduceMean" or len(node.input) != 2 or node.input[1] not in constants:
        return False
    return sorted(axis % 4 for axis in numpy_helper.to_array(constants[node.input[1]])) == [2, 3]


def with_opset(model: onnx.ModelProto, opset: int) -> None:
    """Declares another opset; `OptionError` where one of the graph's operators is written otherwise there.

    The operators of convolutional networks have changed between opsets in the types they take, seldom in more; that the
    file still computes the same is for the export's checks to see.
    """
    newest = onnx.defs.onnx_opset_version()
    if not 7 <= opset <= newest:
        raise OptionError("--opset", opset, f"must be 7 to {newest}")
    (ours,) = (entry for entry in model.opset_import if entry.domain == "")
    ours.version = opset
    model.ir_version = helper.find_min_ir_version_for(model.opset_import)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise OptionError("--opset", opset, f"this graph cannot be written so ({first_line(error)})") from error
