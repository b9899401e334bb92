"""Quantization-aware training: trains a network with simulated 8-bit rounding before it is converted to integers.

The graph of the ONNX file itself is trained, so that the training rounds exactly those tensors that will be 8-bit
integers. The float network is the teacher, and no labels are needed.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor
from torch.nn import functional as F

from odcheap.export.onnx import INPUT, OUTPUT
from odcheap.methods.losses import soft_kl
from odcheap.utils.errors import Failure

MAX_UINT8, MAX_INT8 = 255, 127
TEMPERATURE = 4.0  # of the predictions that are compared
BATCH_SIZE = 128
LR = 1e-4  # of Adam, for weights; it falls to zero along a cosine
SCALE_LR = 1e-2  # for the logarithms of the scales
MADE_FOR_OUTPUT = "_QuantizeLinear_Input"  # ONNX Runtime's suffix for the tensor before a quantized output

Round = Callable[[str, Tensor], Tensor]


class Scale(NamedTuple):
    """How the numbers x of a feature map become 8-bit integers: q = round(x / scale) + zero_point, from 0 to 255.

    Attributes:
        scale: The difference between the numbers that two neighboring integers stand for.
        zero_point: The integer that stands for 0.
    """

    scale: float
    zero_point: int


class RoundToUint8(torch.autograd.Function):
    """Rounds floats to the 256 values that 8-bit integers can stand for; the result is still floats.

    `RoundToUint8.apply(x, scale, zero_point)` takes a tensor x of any shape, the scale as a tensor with one number, and
    the zero point as an int from 0 to 255. It returns a tensor in the shape of x, and has gradients for x and scale.

    Source: Esser et al., "Learned step size quantization", 2020.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: int) -> Tensor:
        rounded = torch.fake_quantize_per_tensor_affine(x, float(scale), zero_point, 0, MAX_UINT8)
        ctx.save_for_backward(x, rounded, scale)
        ctx.zero_point = zero_point
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,), (x, rounded, scale) = gradients, ctx.saved_tensors
        low, high = -ctx.zero_point * scale, (MAX_UINT8 - ctx.zero_point) * scale
        inside = (x >= low) & (x <= high)
        # A number outside of the range becomes a limit, which is proportional to the scale; inside, the error of the
        # rounding is.
        slope = torch.where(inside, rounded - x, rounded) / scale
        return gradient * inside, (gradient * slope).sum(), None


def round_weight(weight: Tensor, axis: int) -> Tensor:
    """Rounds weights to multiples of a scale for each channel, from -127 to 127 times the scale, as ONNX Runtime does.

    Args:
        weight: The weights. In the backward pass they get the gradient of the result unchanged.
        axis: The dimension of `weight` that counts the channels.

    Returns:
        Floats in the shape of `weight`. The scale of each channel is its largest absolute weight divided by 127.
    """
    other = [dim for dim in range(weight.dim()) if dim != axis]
    scale = weight.detach().abs().amax(other) / MAX_INT8
    scale = scale.where(scale > 0, torch.ones_like(scale))
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, axis, -MAX_INT8, MAX_INT8)


def read_scales(quantized: onnx.ModelProto) -> dict[str, Scale]:
    """Reads the scales of the quantized feature maps from an ONNX model with 8-bit integers.

    Args:
        quantized: The model in the QDQ form: float operators between pairs of the operators QuantizeLinear and
            DequantizeLinear.

    Returns:
        The scale of each feature map, by the name of its tensor in the ONNX file with floats.
    """
    constants = {tensor.name: tensor for tensor in quantized.graph.initializer}
    scales = {}
    for node in quantized.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants:
            scale, zero_point = (numpy_helper.to_array(constants[name]) for name in node.input[1:3])
            scales[node.input[0].removesuffix(MADE_FOR_OUTPUT)] = Scale(float(scale), int(zero_point))
    return scales


def read_weight_axes(quantized: onnx.ModelProto) -> dict[str, int]:
    """Reads which dimension of each 8-bit weight tensor counts the channels from an ONNX model.

    Args:
        quantized: The model in the QDQ form: float operators between pairs of the operators QuantizeLinear and
            DequantizeLinear.

    Returns:
        The index of the dimension, by the name of the weight tensor in the ONNX file with floats.
    """
    types = {tensor.name: tensor.data_type for tensor in quantized.graph.initializer}
    axes = {}
    for node in quantized.graph.node:
        if node.op_type == "DequantizeLinear" and types.get(node.input[0]) == onnx.TensorProto.INT8:
            axes[node.input[0].removesuffix("_quantized")] = read_attributes(node).get("axis", 1)
    return axes


def read_attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Returns the attributes of a node of an ONNX graph, such as `strides` and `pads`, by their names."""
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def run_graph(
    nodes: Iterable[onnx.NodeProto], constants: Mapping[str, Tensor], images: Tensor, change: Round = lambda _, x: x
) -> Tensor:
    """Computes the logits (n, K) of an ONNX graph with PyTorch.

    Args:
        nodes: The nodes of the graph, in the order in which they are computed.
        constants: The constant tensors by name: weights, shapes and limits.
        images: Images (n, C, H, W) in [0, 1].
        change: A function that takes the name and the value of the input or of a node's output, and returns the tensor
            to use in its place. By default nothing is replaced.

    Raises:
        Failure: A node has an operator that is not in `OPERATORS`.
    """
    tensors = {**constants, INPUT: change(INPUT, images)}
    for node in nodes:
        operator = OPERATORS.get(node.op_type)
        if operator is None:
            line = f"--qat: the network has the operator {node.op_type}, which cannot be trained"
            raise Failure(f"{line}; known: {', '.join(OPERATORS)}")
        inputs = [tensors[name] if name else None for name in node.input]
        tensors[node.output[0]] = change(node.output[0], operator(read_attributes(node), *inputs))
    return tensors[OUTPUT]


def pad_images(options: dict[str, Any], x: Tensor, fill: float = 0.0) -> Tensor:
    """Returns feature maps with the padding around them that a node of an ONNX graph, such as a convolution, has.

    Args:
        options: The attributes of the ONNX node. Only `pads` is read: (top, left, bottom, right), in pixels.
        x: The feature maps (n, C, H, W).
        fill: The value of the padding.
    """
    top, left, bottom, right = options.get("pads", (0, 0, 0, 0))
    return F.pad(x, (left, right, top, bottom), value=fill) if any((top, left, bottom, right)) else x


def convolve(options: dict[str, Any], x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes the ONNX operator Conv in two dimensions, from the attributes of a node (`options`) and its inputs."""
    top, left, bottom, right = options.get("pads", (0, 0, 0, 0))
    padding: Any = (top, left)
    if padding != (bottom, right):
        x, padding = pad_images(options, x), 0
    strides, dilations = options.get("strides", 1), options.get("dilations", 1)
    return F.conv2d(x, weight, bias, strides, padding, dilations, options.get("group", 1))


def pool_maximum(options: dict[str, Any], x: Tensor) -> Tensor:
    """Computes the ONNX operator MaxPool, from the attributes of a node (`options`) and its input (n, C, H, W)."""
    padded, is_ceil = pad_images(options, x, -math.inf), bool(options.get("ceil_mode", 0))
    strides, dilations = options.get("strides", 1), options.get("dilations", 1)
    return F.max_pool2d(padded, options["kernel_shape"], strides, 0, dilations, is_ceil)


def pool_average(options: dict[str, Any], x: Tensor) -> Tensor:
    """Computes the ONNX operator AveragePool, from the attributes of a node (`options`) and its input (n, C, H, W)."""
    kernel, strides = options["kernel_shape"], options.get("strides", 1)
    padded, is_ceil = pad_images(options, x), bool(options.get("ceil_mode", 0))
    pooled = F.avg_pool2d(padded, kernel, strides, 0, is_ceil)
    if options.get("count_include_pad", 0) or padded is x:
        return pooled
    share = F.avg_pool2d(pad_images(options, torch.ones_like(x[:1, :1])), kernel, strides, 0, is_ceil)
    return pooled / share


def multiply_matrices(options: dict[str, Any], x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes the ONNX operators Gemm and MatMul, from the attributes of a node (`options`) and its inputs."""
    x = x.T if options.get("transA", 0) else x
    result = options.get("alpha", 1.0) * (x @ (weight.T if options.get("transB", 0) else weight))
    return result if bias is None else result + options.get("beta", 1.0) * bias


def reshape(options: dict[str, Any], x: Tensor, shape: Tensor) -> Tensor:
    """Computes the ONNX operator Reshape, but always keeps the size of the first dimension, the number of images.

    Args:
        options: The attributes of the ONNX node. They are not used.
        x: The input, (N, ...).
        shape: The sizes of the output. The first is ignored, -1 is computed, and 0 stands for the size of the input.
    """
    sizes = [x.shape[k] if size == 0 else size for k, size in enumerate(shape.tolist())]
    return x.reshape(x.shape[0], *sizes[1:])  # the number of images is that of the training, also for a static graph


# The operators of convolutional networks after `quantize.prepare_model`: functions of a node's attributes and inputs.
OPERATORS: dict[str, Callable[..., Tensor]] = {
    "Add": lambda options, a, b: a + b,
    "AveragePool": pool_average,
    "BatchNormalization": lambda options, x, scale, bias, mean, variance: F.batch_norm(
        x, mean, variance, scale, bias, eps=options.get("epsilon", 1e-5)
    ),
    "Clip": lambda options, x, low=None, high=None: x.clamp(low, high),
    "Concat": lambda options, *parts: torch.cat(parts, options["axis"]),
    "Conv": convolve,
    "Div": lambda options, a, b: a / b,
    "Flatten": lambda options, x: x.flatten(options.get("axis", 1)),
    "Gemm": multiply_matrices,
    "GlobalAveragePool": lambda options, x: x.mean((2, 3), keepdim=True),
    "HardSigmoid": lambda options, x: (options.get("alpha", 0.2) * x + options.get("beta", 0.5)).clamp(0, 1),
    "HardSwish": lambda options, x: F.hardswish(x),
    "Identity": lambda options, x: x,
    "MatMul": multiply_matrices,
    "MaxPool": pool_maximum,
    "Mul": lambda options, a, b: a * b,
    "Relu": lambda options, x: x.relu(),
    "Reshape": reshape,
    "Sigmoid": lambda options, x: x.sigmoid(),
    "Sub": lambda options, a, b: a - b,
}


class RoundedNetwork:
    """A trainable network from an ONNX file with floats. It rounds the tensors that are 8-bit in a second ONNX file.

    Args:
        model: The content of the ONNX file with floats, from `quantize.prepare_model`.
        quantized: The content of the same network's ONNX file with 8-bit integers in the QDQ form, from
            `quantize.quantize_model`.
        device: The device on which the network is trained.

    Attributes:
        weights: The weights and biases to train, by name.
        log_scales: For each rounded feature map, by its name, a scalar to train: the logarithm of the factor between
            its scale and its scale in `quantized`. It is 0 at the beginning.
    """

    def __init__(self, model: bytes, quantized: bytes, device: torch.device):
        self.proto, integers = onnx.load_from_string(model), onnx.load_from_string(quantized)
        arrays = {tensor.name: numpy_helper.to_array(tensor).copy() for tensor in self.proto.graph.initializer}
        self.constants = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        self.start = read_scales(integers)
        self.axes = {name: axis for name, axis in read_weight_axes(integers).items() if name in arrays}
        nodes = (node for node in self.proto.graph.node if node.op_type in ("Conv", "Gemm"))
        biases = {name for node in nodes for name in node.input[2:] if name in arrays}
        self.weights = {name: self.constants[name].requires_grad_() for name in [*self.axes, *sorted(biases)]}
        self.log_scales = {name: torch.zeros((), device=device, requires_grad=True) for name in self.start}

    def __call__(self, images: Tensor) -> Tensor:
        """Returns the logits (n, K) of images (n, C, H, W) in [0, 1], computed with the rounding."""
        rounded = {name: round_weight(self.weights[name], axis) for name, axis in self.axes.items()}
        return run_graph(self.proto.graph.node, self.constants | rounded, images, self.round)

    def round(self, name: str, x: Tensor) -> Tensor:
        """Returns the feature map x rounded with its learned scale; unchanged if no feature map `name` is rounded."""
        if name not in self.start:
            return x
        start = self.start[name]
        rounded = RoundToUint8.apply(x, start.scale * self.log_scales[name].exp(), start.zero_point)
        assert isinstance(rounded, Tensor)
        return rounded

    def finish(self) -> tuple[bytes, dict[str, Scale]]:
        """Returns the content of an ONNX file with the trained weights as floats, and the learned scales by name."""
        for tensor in self.proto.graph.initializer:
            if tensor.name in self.weights:
                array = self.weights[tensor.name].detach().cpu().numpy()
                tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))
        scales = {
            name: Scale(start.scale * math.exp(self.log_scales[name].item()), start.zero_point)
            for name, start in self.start.items()
        }
        return self.proto.SerializeToString(), scales


def fine_tune(
    network: RoundedNetwork,
    teacher: Callable[[np.ndarray], np.ndarray],
    epochs: Iterable[Iterator[np.ndarray]],
    steps: int,
) -> tuple[bytes, dict[str, Scale]]:
    """Trains a rounded network to predict what the float network predicts.

    Args:
        network: The rounded network.
        teacher: The float network: a function that maps images (n, C, H, W) in [0, 1] to logits (n, K).
        epochs: One iterator for each epoch, which yields batches of images (n, C, H, W), float32 in [0, 1].
        steps: The number of batches of all epochs together, over which the learning rate falls to zero.

    Returns:
        The content of an ONNX file with the trained weights, still as floats, and a dict with the learned scale of each
        feature map that will be quantized, by the name of its tensor.
    """
    weights, scales = list(network.weights.values()), list(network.log_scales.values())
    device = weights[0].device
    optimizer = torch.optim.Adam([{"params": weights, "lr": LR}, {"params": scales, "lr": SCALE_LR}])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for batches in epochs:
        for images in batches:
            expected = torch.from_numpy(teacher(images)).to(device)
            inputs = torch.from_numpy(images).to(device, memory_format=torch.channels_last)
            loss = soft_kl(network(inputs), expected, TEMPERATURE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return network.finish()
