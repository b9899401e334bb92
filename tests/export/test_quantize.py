import numpy as np
import onnx
import torch
from layers.test_fuse import settled

from odcheap import predict
from odcheap.export import onnx as onnx_export
from odcheap.layers.cheap_conv import DW
from odcheap.models.cifar import CifarResNet


def test_integers_answer_nearly_as_floats_do():
    torch.manual_seed(0)
    content = onnx_export.to_onnx(onnx_export.export_program(settled(CifarResNet(8, DW(), 10)).float(), (3, 16, 16)))
    images = predict.random_images(64, (3, 16, 16))
    made = onnx_export.quantize_onnx(content, iter(np.split(images, 4)))
    whole, rounded = (predict.create_predictor(predict.create_session(c))(images) for c in (content, made))
    spread = np.abs(whole - whole.mean(0)).mean()
    assert 0 < np.abs(whole - rounded).mean() < 0.3 * spread
    weights = [t for t in onnx.load_from_string(made).graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert sum(np.prod(tensor.dims) for tensor in weights) > 5_000
