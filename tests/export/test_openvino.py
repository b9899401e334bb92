"""The ONNX files of an export in OpenVINO."""

import importlib.util
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from layers.test_fuse import settled

from odcheap import predict
from odcheap.export import command, quantize, runtimes
from odcheap.export import onnx as onnx_export
from odcheap.export.latency import Key, file_calls
from odcheap.export.runtimes import OPENVINO, create_predictor
from odcheap.layers.cheap_conv import DW
from odcheap.models.cifar import CifarResNet
from odcheap.utils.errors import Failure

QUICK = ["--seconds", "0.005"]
needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
# A process in which the packages of odcheap cannot be imported.
BARE = "import sys; sys.modules.update(dict.fromkeys(['torch', 'onnx', 'onnxruntime', 'PIL', 'odcheap']));"


@needs_openvino
@pytest.mark.parametrize("batch", [None, 4])
def test_a_file_computes_the_same_as_the_network(batch):
    torch.manual_seed(0)
    network = settled(CifarResNet(8, DW(), 10)).float()
    content = onnx_export.to_onnx(onnx_export.export_program(network, (3, 16, 16), batch))
    images = predict.random_images(6, (3, 16, 16))
    with torch.no_grad():
        expected = network(torch.from_numpy(images)).numpy()
    # On a CPU with 16-bit floats this needs OpenVINO's hint, without which the differences are about 1e-2.
    np.testing.assert_allclose(create_predictor(OPENVINO, content)(images), expected, atol=1e-4)
    calls = file_calls(OPENVINO, {"student.onnx": content}, (3, 16, 16), (batch or 2,))
    assert list(calls) == [Key("student.onnx", "OpenVINO", batch or 2, threads) for threads in (1, 0)]
    assert all(call().shape == (batch or 2, 10) for call in calls.values())


@needs_openvino
def test_an_export_is_checked_in_openvino_and_the_code_in_its_card_runs(trained, light, capsys):
    job_dir = trained("trainer.max_epochs=1")
    assert command.main([str(job_dir), *QUICK, "--int8", "--openvino"]) == 0
    folder = job_dir / "export"
    card = (folder / "README.md").read_text()
    difference = re.search(r"- `student.onnx` in OpenVINO: (\S+)", card)
    assert 0 < float(difference[1]) < 1e-4
    assert re.search(r"- `student-int8.onnx` in OpenVINO: accuracy [\d.]+ %", card)
    assert re.search(r"exported with: .*openvino=\d", card)
    # OpenVINO cannot run the other form.
    assert quantize.read_form((folder / "student-int8.onnx").read_bytes()) == "QDQ"
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "import openvino" in block)
    command_line = [sys.executable, "-c", f"{BARE}\n{code}"]
    done = subprocess.run(command_line, cwd=folder, capture_output=True, text=True)
    assert re.fullmatch(r"\d\n", done.stdout), done.stderr


@needs_openvino
def test_a_file_that_computes_something_else_in_openvino_is_an_error(trained, light, capsys, monkeypatch):
    create = runtimes.create_openvino_predictor

    def compute_other_logits(model, threads):
        predictor = create(model, threads)
        return lambda images: predictor(images) + 0.01

    monkeypatch.setattr(runtimes, "create_openvino_predictor", compute_other_logits)
    job_dir = trained("trainer.max_epochs=1")
    assert command.main([str(job_dir), *QUICK, "--openvino"]) == 1
    assert "error: student.onnx in OpenVINO: a logit differs from the trained network's" in capsys.readouterr().err
    assert not (job_dir / "export").exists()


@needs_openvino
def test_a_file_that_openvino_cannot_load_is_one_line():
    with pytest.raises(Failure, match=r"^OpenVINO cannot load the model: .*$"):
        create_predictor(OPENVINO, b"?")


def test_without_openvino_the_option_is_refused(trained, capsys, monkeypatch):
    job_dir = trained("trainer.max_epochs=1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command.main([str(job_dir), *QUICK, "--openvino"]) == 1
    line = "error: --openvino: OpenVINO is not installed; pip install 'odcheap[openvino]' installs it\n"
    assert capsys.readouterr().err == line
