"""Fine-tuning with the rounding of 8-bit integers."""

import numpy as np
import onnx
import pytest
import torch
from export.test_quantize import IMAGES, run
from layers.test_fuse import settled
from onnx import numpy_helper
from torch import nn

from odcheap.export import command, qat, quantize
from odcheap.export import onnx as onnx_export
from odcheap.layers.cheap_conv import DW, CheapConv
from odcheap.models.cifar import CifarResNet
from odcheap.utils.errors import Failure

QUICK = ["--seconds", "0.005"]
CPU = torch.device("cpu")


def prepare(network, size=(3, 16, 16), batch=None):
    return quantize.prepare_model(onnx_export.to_onnx(onnx_export.export_program(network, size, batch)))


@pytest.fixture(scope="module")
def uneven():
    """A network whose channels have very different ranges, for which one scale for a feature map is too coarse."""
    torch.manual_seed(0)
    network = settled(CifarResNet(8, DW(), 10)).float()
    with torch.no_grad():
        for pair in network.modules():
            if isinstance(pair, CheapConv):
                factors = torch.exp(4 * torch.rand(pair.in_channels) - 2)
                pair.spatial.weight.mul_(factors[:, None, None, None])
                pair.pointwise.weight.div_(factors[:, None, None])
    prepared = prepare(network)
    return prepared, quantize.quantize_model(prepared, np.split(IMAGES, 4), quantize.QDQ)


class ManyOperators(nn.Module):
    """A network with the operators of torchvision's networks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, padding=(2, 1), bias=False)
        self.norm, self.group = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding="same", dilation=2, groups=4)
        self.gate, self.max = nn.Conv2d(16, 16, 1), nn.MaxPool2d(3, 2, 1, ceil_mode=True)
        self.average = nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)
        self.head = nn.Sequential(nn.Linear(16, 12), nn.Hardswish(), nn.Linear(12, 5))

    def forward(self, x):
        x = self.stem(x - 0.5)
        x = self.norm(torch.cat([x, self.average(x).relu()], 1))  # this batch norm cannot be folded
        x = nn.functional.relu6(self.group(self.max(x)))
        x = x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid() + nn.functional.hardsigmoid(x)
        return self.head(x.mean((2, 3)))


def test_the_graph_computes_the_same_in_pytorch_as_in_onnx_runtime():
    torch.manual_seed(0)
    network = ManyOperators().eval()
    model = onnx.load_from_string(prepare(network))
    operators = {node.op_type for node in model.graph.node}
    assert operators >= {"BatchNormalization", "Concat", "AveragePool", "MaxPool", "Clip", "Sigmoid", "HardSigmoid"}
    constants = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
    found = qat.run_graph(model.graph.node, constants, torch.from_numpy(IMAGES))
    np.testing.assert_allclose(found, run(model.SerializeToString()), atol=1e-5)


def test_an_operator_that_cannot_be_trained_is_named():
    nodes = [onnx.helper.make_node("Sin", ["images"], ["logits"])]
    with pytest.raises(
        Failure, match=r"--qat: the network has the operator Sin, which cannot be trained; known: Add, "
    ):
        qat.run_graph(nodes, {}, torch.zeros(1, 3, 16, 16))


def test_the_gradients_of_rounding_are_those_of_a_straight_through_estimator():
    x = torch.linspace(-3, 9, 101, requires_grad=True)
    scale = torch.tensor(0.02, requires_grad=True)
    factors = torch.randn(101, generator=torch.Generator().manual_seed(0))
    (qat.RoundToUint8.apply(x, scale, 40) * factors).sum().backward()
    found = x.grad.clone(), scale.grad.clone()
    x.grad = scale.grad = None
    steps = (x / scale + 40).clamp(0, 255)
    steps = steps + (steps.round() - steps).detach()  # the rounding has a gradient of 1
    (((steps - 40) * scale) * factors).sum().backward()
    torch.testing.assert_close(found, (x.grad, scale.grad))


def test_the_rounded_network_predicts_what_the_file_with_integers_predicts(uneven):
    prepared, integers = uneven
    with torch.no_grad():
        rounded = qat.RoundedNetwork(prepared, integers, CPU)(torch.from_numpy(IMAGES)).numpy()
    expected = run(integers)
    error = np.abs(run(prepared) - expected).mean()
    assert np.abs(rounded - expected).mean() < 0.5 * error  # some numbers are exactly between two integers


def test_weights_are_rounded_as_in_the_file_with_integers(uneven):
    prepared, integers = uneven
    network, model = qat.RoundedNetwork(prepared, integers, CPU), onnx.load_from_string(integers)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert len(network.axes) == 16
    for name, axis in network.axes.items():
        shape = [-1 if dim == axis else 1 for dim in range(tensors[f"{name}_quantized"].ndim)]
        expected = tensors[f"{name}_quantized"] * tensors[f"{name}_scale"].reshape(shape)
        found = qat.round_weight(network.weights[name], axis).detach()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)


def test_fine_tuning_brings_the_integers_nearer_to_the_floats(uneven):
    prepared, integers = uneven
    network, batches = qat.RoundedNetwork(prepared, integers, CPU), np.split(IMAGES, 2)
    tuned, scales = qat.fine_tune(network, lambda images: run(prepared, images), [batches] * 15, 30)
    expected = run(prepared)
    before = np.abs(run(integers) - expected).mean()
    for form in quantize.FORMATS:
        content = quantize.quantize_model(tuned, batches, form, scales)
        assert np.abs(run(content) - expected).mean() < 0.7 * before
    # The file has the learned scales, and none that were measured anew.
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(content).graph.initializer}
    assert tensors["conv2d_1_scale"] == pytest.approx(scales["conv2d_1"].scale)
    assert scales["conv2d_1"].scale != qat.read_scales(onnx.load_from_string(integers))["conv2d_1"].scale


@pytest.mark.parametrize(
    ("options", "line"), [(["--qat"], "--qat=3: needs --int8"), (["--int8", "--qat=-1"], "--qat=-1: must be 1 or more")]
)
def test_a_wrong_option_is_one_line(trained, capsys, options, line):
    job_dir = trained("trainer.max_epochs=1")
    capsys.readouterr()
    assert command.main([str(job_dir), *QUICK, *options]) == 1
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1
