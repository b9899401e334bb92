import io
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from layers.test_fuse import settled

from odcheap import predict
from odcheap.export import onnx as onnx_export
from odcheap.layers.cheap_conv import DW, Shift
from odcheap.models.cifar import CifarResNet, vgg16
from odcheap.models.wrappers import TorchvisionBackbone
from odcheap.utils.errors import OptionError


def shape(content):
    (images,) = onnx.load_from_string(content).graph.input
    return [dim.dim_param or dim.dim_value for dim in images.type.tensor_type.shape.dim]


@pytest.mark.parametrize("block_type", [DW(), Shift()], ids=repr)
def test_both_files_answer_as_the_network_does_for_any_size(block_type):
    network = settled(CifarResNet(8, block_type, 10)).float()
    program = onnx_export.export_program(network, (3, 16, 16))
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
    program = onnx_export.export_program(network, (3, 32, 32))
    assert program.free == ("n",)
    assert shape(onnx_export.to_onnx(program)) == ["n", 3, 32, 32]


def test_the_kernels_of_a_shift_are_constants_of_the_graph():
    # ExecuTorch's XNNPACK does not run a convolution whose kernels are computed.
    program = onnx_export.export_program(CifarResNet(8, Shift(), 10), (3, 16, 16))
    called = {str(node.target) for node in program.exported.graph.nodes if node.op == "call_function"}
    assert "aten.conv2d.default" in called
    assert not [name for name in called if "arange" in name or "remainder" in name or "scatter" in name]


def test_a_static_graph_has_numbers_only():
    program = onnx_export.export_program(CifarResNet(8, DW(), 10), (3, 16, 16), batch=1)
    assert shape(onnx_export.to_onnx(program)) == [1, 3, 16, 16]


def operators(content):
    return Counter(node.op_type for node in onnx.load_from_string(content).graph.node)


def asked(content, images):
    return predict.create_predictor(predict.create_session(content))(images)


@pytest.fixture(scope="module")
def cheap():
    network = settled(CifarResNet(14, DW(), 5)).float()
    return onnx_export.to_onnx(onnx_export.export_program(network, (3, 16, 16)))


def test_without_an_opset_the_file_is_one_that_onnx_runtime_1_14_can_run(cheap):
    model = onnx.load_from_string(cheap)
    assert model.opset_import[0].version <= 18
    assert model.ir_version <= 8


@pytest.mark.parametrize("backbone", ["ours", "torchvision"])
def test_an_old_opset_has_the_same_answers(backbone):
    if backbone == "ours":
        network = settled(CifarResNet(8, DW(), 5)).float()
    else:
        network = TorchvisionBackbone("resnet18", DW(), 5).eval()
    program = onnx_export.export_program(network, (3, 32, 32), batch=2)
    content = onnx_export.to_onnx(program, opset=11)
    model = onnx.load_from_string(content)
    assert model.opset_import[0].version == 11
    assert not operators(content).keys() & {"ReduceMean", "Reshape"}
    images = predict.random_images(2, (3, 32, 32))
    with torch.no_grad():
        expected = network(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(asked(content, images), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("opset", "line"), [(3, "must be 7 to"), (7, "cannot be written with this opset"), (999, "must be 7 to")]
)
def test_an_impossible_opset_is_refused(cheap, opset, line):
    with pytest.raises(OptionError, match=f"--opset={opset}: .*{line}"):
        onnx_export.set_opset(onnx.load_from_string(cheap), opset)


@pytest.mark.parametrize("batch", [None, 2])
def test_a_pt2_names_no_folder_and_has_no_lines_of_code(batch):
    network = settled(CifarResNet(8, DW(), 5)).float()
    content = onnx_export.to_pt2(onnx_export.export_program(network, (3, 16, 16), batch))
    names = [str(Path(__file__).parents[2]), str(Path(torch.__file__).parent), "stack_trace", ".py"]
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        files = [content, *map(archive.read, archive.namelist())]
    assert [name for name in names for file in files if name.encode() in file] == []


def test_a_file_names_no_folder_and_has_no_lines_of_code(cheap):
    names = [str(Path(__file__).parents[2]), str(Path(torch.__file__).parent), "stack_trace"]
    assert [name for name in names if name.encode() in cheap] == []
    model = onnx.load_from_string(cheap)
    assert not any(part.metadata_props or part.doc_string for part in (model, model.graph, *model.graph.node))
