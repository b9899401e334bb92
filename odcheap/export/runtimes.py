"""The files of an export, and the runtimes that run them: ONNX Runtime, OpenVINO, ExecuTorch and PyTorch."""

import contextlib
import importlib.util
import io
import sys

import numpy as np
import torch

from odcheap import predict
from odcheap.export import executorch
from odcheap.utils.errors import Failure, first_line

ONNX, DENSE, INT8 = "student.onnx", "student-dense.onnx", "student-int8.onnx"
PTE, PTE_INT8, PT2, WEIGHTS = "student.pte", "student-int8.pte", "student.pt2", "student.safetensors"
FILES = (ONNX, DENSE, INT8, PTE, PTE_INT8, PT2, WEIGHTS)
FLOAT_FILES = {INT8: ONNX, PTE_INT8: PTE}  # for each file with 8-bit integers, the one with floats
ONNX_RUNTIME, OPENVINO, EXECUTORCH, PYTORCH = "ONNX Runtime", "OpenVINO", "ExecuTorch", "PyTorch"
PACKAGES = {OPENVINO: ("openvino",), EXECUTORCH: ("executorch", "torchao")}  # of the extras
# On CPUs with operations for 16-bit floats OpenVINO uses these by default: the logits of a ResNet-56 then differed by
# 0.08 from those of the trained network.
OPENVINO_SETTINGS = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}


def is_installed(runtime: str) -> bool:
    """Returns whether a runtime, such as "OpenVINO", is installed. Only OpenVINO and ExecuTorch may be missing."""
    return all(importlib.util.find_spec(package) is not None for package in PACKAGES.get(runtime, ()))


def check_installed(runtime: str) -> None:
    """Raises `Failure` if a runtime is not installed; the message has the command that installs the runtime."""
    if not is_installed(runtime):
        extra = runtime.lower()
        raise Failure(f"--{extra}: {runtime} is not installed; pip install 'odcheap[{extra}]' installs it")


def create_predictor(runtime: str, content: bytes, batch: int | None = None, threads: int = 0) -> predict.Predictor:
    """Returns a function that runs an exported file on the CPU. It maps images (n, C, H, W) in [0, 1] to logits (n, K).

    Args:
        runtime: The name of the runtime. The file must be of its kind: an ONNX file for "ONNX Runtime" and "OpenVINO",
            a `.pte` file for "ExecuTorch", a `.pt2` file for "PyTorch".
        content: The content of the file.
        batch: The fixed number of images that a `.pt2` or `.pte` file takes. None if a `.pt2` file takes any number, or
            if a `.pte` file takes one image. ONNX files state their number themselves.
        threads: The number of CPU threads in ONNX Runtime and OpenVINO; 0 for the runtime's own choice.

    Raises:
        Failure, predict.PredictError: The runtime cannot load the file.
    """
    if runtime == OPENVINO:
        return create_openvino_predictor(content, threads)
    if runtime == EXECUTORCH:
        return executorch.create_predictor(content, batch)
    if runtime == ONNX_RUNTIME:
        return predict.create_predictor(predict.create_session(content, threads))
    graph = torch.export.load(io.BytesIO(content)).module()

    @torch.inference_mode()
    def run(images: np.ndarray) -> np.ndarray:
        return graph(torch.from_numpy(images)).numpy()

    return predict.pad_batches(run, batch)


def create_openvino_predictor(model: bytes, threads: int) -> predict.Predictor:
    """Returns a function that runs an ONNX file in OpenVINO; see `create_predictor`."""
    # OpenVINO imports the package absl, which keeps the stream of errors to write to it, and closes it later unless it
    # is the one with which the process has started.
    with contextlib.redirect_stderr(sys.__stderr__):
        import openvino

    settings = OPENVINO_SETTINGS | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
    try:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(model), "CPU", settings)
    except RuntimeError as error:
        raise Failure(f"OpenVINO cannot load the model: {first_line(error)}") from error
    batch = compiled.input(0).partial_shape[0]
    return predict.pad_batches(lambda images: compiled(images)[0], batch.get_length() if batch.is_static else None)
