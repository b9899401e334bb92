"""Runs the ONNX files of an export in OpenVINO on the CPU; OpenVINO is the extra `openvino`."""

import contextlib
import importlib.util
import sys
from collections.abc import Mapping
from functools import partial

import numpy as np

from odcheap import predict
from odcheap.export.latency import Calls, Key
from odcheap.utils.errors import Failure, first_line

OPENVINO = "OpenVINO"
# On CPUs with operations for 16-bit floats OpenVINO uses these by default: the logits of a ResNet-56 then differed by
# 0.08 from those of the trained network.
PRECISION = {"INFERENCE_PRECISION_HINT": "f32"}


def check_installed() -> None:
    """Raises `Failure` if OpenVINO is not installed."""
    if importlib.util.find_spec("openvino") is None:
        raise Failure("--openvino: OpenVINO is not installed; pip install 'odcheap[openvino]' installs it")


def create_predictor(model: bytes, threads: int = 0) -> predict.Predictor:
    """Returns a function that runs an ONNX file in OpenVINO: images (n, C, H, W) in [0, 1] to logits (n, K).

    Args:
        model: The content of the ONNX file.
        threads: The number of CPU threads; 0 for OpenVINO's own choice.

    Raises:
        Failure: OpenVINO cannot load the file.
    """
    # OpenVINO imports the package absl, which keeps the stream of errors to write to it, and closes it later unless it
    # is the one with which the process has started.
    with contextlib.redirect_stderr(sys.__stderr__):
        import openvino

    settings = PRECISION | {"PERFORMANCE_HINT": "LATENCY"} | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
    try:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(model), "CPU", settings)
    except RuntimeError as error:
        raise Failure(f"OpenVINO cannot load the model: {first_line(error)}") from error
    batch = compiled.input(0).partial_shape[0]

    def run(images: np.ndarray) -> np.ndarray:
        return compiled(images)[0]

    return predict.pad_batches(run, batch.get_length() if batch.is_static else None)


def openvino_calls(models: Mapping[str, bytes], size: tuple[int, int, int], batches: tuple[int, ...]) -> Calls:
    """Returns functions that run ONNX files in OpenVINO, with one CPU thread and with all threads, for measurements.

    Args:
        models: The contents of ONNX files by name.
        size: The shape (C, H, W) of an image.
        batches: The numbers of images in a call; there is a function for each.

    Returns:
        A dict from each `Key` to a function without arguments, which runs one file once on random images.

    Raises:
        Failure: OpenVINO cannot load a file.
    """
    calls: Calls = {}
    for name, model in models.items():
        for threads in (1, 0):
            predictor = create_predictor(model, threads)
            for batch in batches:
                images = predict.random_images(batch, size)
                calls[Key(name, OPENVINO, batch, threads)] = partial(predictor, images)
    return calls
