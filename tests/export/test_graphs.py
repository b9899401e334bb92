from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from layers.test_fuse import settled

from odcheap import predict
from odcheap.export import graphs
from odcheap.export import onnx as onnx_export
from odcheap.layers.cheap_conv import DW
from odcheap.models.cifar import CifarResNet
from odcheap.models.wrappers import torchvision_backbone
from odcheap.utils.errors import OptionError


def operators(content):
    return Counter(node.op_type for node in onnx.load_from_string(content).graph.node)


def asked(content, images):
    return predict.create_predictor(predict.create_session(content))(images)


@pytest.fixture(scope="module")
def cheap():
    network = settled(CifarResNet(14, DW(), 5)).float()
    return onnx_export.to_onnx(onnx_export.program(network, (3, 16, 16)))


@pytest.mark.parametrize("backbone", ["ours", "torchvision"])
def test_an_old_opset_has_the_same_answers(backbone):
    if backbone == "ours":
        network = settled(CifarResNet(8, DW(), 5)).float()
    else:
        network = torchvision_backbone("resnet18", DW(), 5).eval()
    program = onnx_export.program(network, (3, 32, 32), batch=2)
    content = onnx_export.to_onnx(program, opset=11)
    model = onnx.load_from_string(content)
    assert model.opset_import[0].version == 11
    assert not operators(content).keys() & {"ReduceMean", "Reshape"}
    images = predict.random_images(2, (3, 32, 32))
    with torch.no_grad():
        expected = network(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(asked(content, images), expected, atol=1e-4)


@pytest.mark.parametrize(("opset", "line"), [(3, "must be 7 to"), (7, "cannot be written so"), (999, "must be 7 to")])
def test_an_impossible_opset_is_refused(cheap, opset, line):
    with pytest.raises(OptionError, match=f"--opset={opset}: .*{line}"):
        graphs.with_opset(onnx.load_from_string(cheap), opset)
