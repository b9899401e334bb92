import numpy as np
import onnx
import pytest
import torch
from layers.test_fuse import settled

from odcheap import predict
from odcheap.export import onnx as onnx_export
from odcheap.export import quantize
from odcheap.layers.cheap_conv import DW
from odcheap.models.cifar import CifarResNet
from odcheap.predict import Timing

IMAGES = predict.random_images(64, (3, 16, 16))


def run(content, images=IMAGES):
    return predict.create_predictor(predict.create_session(content))(images)


@pytest.fixture(scope="module")
def float_model():
    torch.manual_seed(0)
    program = onnx_export.export_program(settled(CifarResNet(8, DW(), 10)).float(), (3, 16, 16))
    return onnx_export.to_onnx(program)


@pytest.fixture(scope="module")
def quantized(float_model):
    prepared, batches = quantize.prepare_model(float_model), np.split(IMAGES, 4)
    return {form: quantize.quantize_model(prepared, batches, form) for form in quantize.FORMATS}


@pytest.mark.parametrize("form", quantize.FORMATS)
def test_integers_answer_nearly_as_floats_do(float_model, quantized, form):
    expected, found = run(float_model), run(quantized[form])
    spread = np.abs(expected - expected.mean(0)).mean()
    assert 0 < np.abs(expected - found).mean() < 0.3 * spread
    weights = [
        t for t in onnx.load_from_string(quantized[form]).graph.initializer if t.data_type == onnx.TensorProto.INT8
    ]
    assert sum(np.prod(tensor.dims) for tensor in weights) > 5_000
    assert quantize.describe_origin(quantized[form]) == f"{form} form"
    marked = quantize.write_epochs(quantized[form], 3)
    assert quantize.describe_origin(marked) == f"{form} form, fine-tuned for 3 epochs"


@pytest.mark.parametrize("form", quantize.FORMATS)
def test_a_depthwise_layer_has_a_scale_for_each_channel(quantized, form):
    tensors = {t.name: t for t in onnx.load_from_string(quantized[form]).graph.initializer}
    weights = [name for name in tensors if name.endswith("spatial.weight_quantized")]
    assert len(weights) == 6
    for name in weights:
        assert tensors[name.replace("_quantized", "_scale")].dims == tensors[name].dims[:1]


@pytest.mark.parametrize(
    ("seconds", "form"), [({"QDQ": 2, "QOperator": 1}, "QOperator"), ({"QDQ": 1, "QOperator": 2}, "QDQ")]
)
def test_the_faster_form_is_kept(quantized, monkeypatch, capsys, seconds, form):
    def times(calls, _):
        for call in calls.values():
            call()
        # With 1 image both forms take as long: the mean of the ratios counts, and not the sum of the times. Of the two
        # numbers of threads the faster one counts.
        return {key: Timing(seconds[key.name] ** (key.batch > 1) * 2**key.threads, 9.0) for key in calls}

    monkeypatch.setattr(predict, "time_alternately", times)
    assert quantize.choose_form(quantized, (3, 16, 16), (1, 4), 0.01) == form
    assert f"the {form} form of the 8-bit integers is kept, 1.41 times as fast as" in capsys.readouterr().out
