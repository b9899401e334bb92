import io

import numpy as np
import onnx
import pytest
import torch
from layers.test_fuse import settled

from odcheap import predict
from odcheap.export import onnx as onnx_export
from odcheap.layers.cheap_conv import DW, Shift
from odcheap.models.cifar import CifarResNet, vgg16


def shape(content):
    (images,) = onnx.load_from_string(content).graph.input
    return [dim.dim_param or dim.dim_value for dim in images.type.tensor_type.shape.dim]


@pytest.mark.parametrize("block_type", [DW(), Shift()], ids=repr)
def test_both_files_answer_as_the_network_does_for_any_size(block_type):
    network = settled(CifarResNet(8, block_type, 10)).float()
    program = onnx_export.program(network, (3, 16, 16))
    content = onnx_export.to_onnx(program)
    assert shape(content) == ["n", 3, "height", "width"]
    session = predict.create_session(content)
    graph = torch.export.load(io.BytesIO(onnx_export.to_pt2(program))).module()
    for size in ((1, 16, 16), (5, 16, 16), (2, 33, 20)):
        images = torch.rand(size[0], 3, *size[1:])
        with torch.no_grad():
            expected, ours = network(images), graph(images)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        np.testing.assert_allclose(logits, expected, atol=1e-5)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_a_size_that_the_network_cannot_leave_is_fixed():
    network = vgg16(5).eval()  # at 32 pixels its last map is one pixel, which the tracer takes for granted
    program = onnx_export.program(network, (3, 32, 32))
    assert program.free == ("n",)
    assert shape(onnx_export.to_onnx(program)) == ["n", 3, 32, 32]


def test_a_static_graph_has_numbers_only():
    program = onnx_export.program(CifarResNet(8, DW(), 10), (3, 16, 16), batch=1)
    assert shape(onnx_export.to_onnx(program)) == [1, 3, 16, 16]


def test_latency_is_that_of_one_batch():
    network = CifarResNet(8, DW(), 10)
    content = onnx_export.fastest_onnx(network, (3, 16, 16))
    one, many = (onnx_export.latency(content, (3, 16, 16), batch, seconds=0.05) for batch in (1, 64))
    assert 0 < one < many < 10
