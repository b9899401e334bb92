import numpy as np
import pytest
import torch

from odcheap import deploy
from odcheap.backbones import CifarResNet
from odcheap.convs import DW, Shift

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("block_type", [DW(), Shift()], ids=repr)
def test_the_file_answers_as_the_network_does_for_any_number_of_images(block_type):
    network = CifarResNet(8, block_type, 10).eval()
    model = deploy.to_onnx(network, (3, 16, 16))
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    for count in (1, 5):
        images = torch.randn(count, 3, 16, 16)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        np.testing.assert_allclose(logits, network(images).detach().numpy(), atol=1e-5)
    assert 0 < deploy.latency(model, (3, 16, 16), batch=2, seconds=0.01) < 10
