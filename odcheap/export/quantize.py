"""Converts ONNX files to 8-bit integers, in the form that ONNX Runtime runs faster here."""

import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from odcheap import predict
from odcheap.export.latency import ONNX_RUNTIME, Timings, fastest, onnx_calls
from odcheap.export.onnx import INPUT
from odcheap.export.qat import Scale
from odcheap.utils.console import say

# The two forms of an ONNX file with 8-bit integers. In the first, each layer is one operator of integers, as ONNX
# Runtime runs it; the second has the operators of the float network, between pairs of QuantizeLinear and
# DequantizeLinear, which other runtimes and compilers can read too.
QOPERATOR, QDQ = "QOperator", "QDQ"
EPOCHS = "odcheap.fine_tuned_epochs"  # a property of an ONNX file
FORMATS = {QOPERATOR: QuantFormat.QOperator, QDQ: QuantFormat.QDQ}


class BatchReader(CalibrationDataReader):
    """Passes batches of images to the calibration of ONNX Runtime, one after the other.

    Args:
        batches: Batches of images (n, C, H, W), float32 in [0, 1].
    """

    def __init__(self, batches: Iterator[np.ndarray]):
        self.batches = batches

    def get_next(self) -> dict[str, np.ndarray]:
        """Returns the next batch by the name of the network's input; an empty dict after the last batch."""
        images = next(self.batches, None)
        return {} if images is None else {INPUT: images}


def prepare_model(model: bytes) -> bytes:
    """Returns the content of an ONNX file in the form that the quantization needs.

    Constants are computed, batch norms are folded into convolutions, and the shapes of all tensors are stated.

    Args:
        model: The content of the ONNX file.
    """
    with tempfile.TemporaryDirectory() as folder:
        original, prepared = Path(folder) / "original.onnx", Path(folder) / "prepared.onnx"
        original.write_bytes(model)
        quant_pre_process(original, prepared)
        return prepared.read_bytes()


def quantize_model(
    model: bytes, batches: Sequence[np.ndarray], form: str, scales: Mapping[str, Scale] | None = None
) -> bytes:
    """Returns an ONNX file with 8-bit weights, which have a scale for each channel, and 8-bit feature maps.

    Depth-wise convolutions have a scale for each channel, too.

    Source: Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only
    inference", 2018, in the implementation of ONNX Runtime.

    Args:
        model: The content of the ONNX file to quantize, from `prepare_model`.
        batches: Batches of images (n, C, H, W), float32 in [0, 1], with which the ranges of the feature maps are
            measured.
        form: "QOperator", in which each layer is one operator on integers; or "QDQ", in which float operators stand
            between pairs of the operators QuantizeLinear and DequantizeLinear, for other runtimes than ONNX Runtime.
        scales: The learned scales of feature maps, by the names of their tensors (see `qat.fine_tune`). The scales of
            all other feature maps are measured on `batches`.
    """
    learned = {
        name: [{"scale": np.array(scale.scale, np.float32), "zero_point": np.array(scale.zero_point, np.uint8)}]
        for name, scale in (scales or {}).items()
    }
    with tempfile.TemporaryDirectory() as folder:
        original, quantized = Path(folder) / "original.onnx", Path(folder) / "int8.onnx"
        original.write_bytes(model)
        quantize_static(
            original,
            quantized,
            BatchReader(iter(batches)),
            quant_format=FORMATS[form],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"TensorQuantOverrides": learned},
        )
        return quantized.read_bytes()


def choose_form(
    contents: Mapping[str, bytes], size: tuple[int, int, int], batches: tuple[int, ...], seconds: float
) -> str:
    """Returns the form, "QOperator" or "QDQ", in which ONNX Runtime runs a quantized network faster on this machine.

    Args:
        contents: The contents of the network's ONNX files in both forms, by "QOperator" and "QDQ".
        size: The shape (C, H, W) of an image.
        batches: The numbers of images in a call that are timed. The geometric mean of their ratios of times decides.
        seconds: The time for each measurement, in seconds.
    """
    ratio = compare_forms(predict.time_alternately(onnx_calls(contents, size, batches), seconds))
    form, other = (QOPERATOR, QDQ) if ratio > 1 else (QDQ, QOPERATOR)
    say(f"the {form} form of the 8-bit integers is kept, {max(ratio, 1 / ratio):.2f} times as fast as {other}")
    return form


def compare_forms(timings: Timings) -> float:
    """Returns how many times as fast the QOperator form is as the QDQ form in ONNX Runtime.

    Args:
        timings: The times of both forms, whose names in the keys are "QOperator" and "QDQ".

    Returns:
        The geometric mean, over the numbers of images in a call, of the ratio of the median times.
    """
    batches = sorted({key.batch for key in timings})
    times = {form: [fastest(timings, form, ONNX_RUNTIME, batch).p50 for batch in batches] for form in (QDQ, QOPERATOR)}
    return math.exp(
        statistics.mean(math.log(slow / fast) for slow, fast in zip(times[QDQ], times[QOPERATOR], strict=True))
    )


def read_form(content: bytes) -> str:
    """Returns "QOperator" or "QDQ", the form of an ONNX file with 8-bit integers."""
    nodes = onnx.load_from_string(content).graph.node
    return QOPERATOR if any(node.op_type.startswith("QLinear") for node in nodes) else QDQ


def write_epochs(content: bytes, epochs: int) -> bytes:
    """Returns an ONNX file with a property that says for how many epochs its network was fine-tuned with the rounding.

    Args:
        content: The content of an ONNX file.
        epochs: The number of epochs.
    """
    model = onnx.load_from_string(content)
    onnx.helper.set_model_props(model, {EPOCHS: str(epochs)})
    return model.SerializeToString()


def count_epochs(epochs: int) -> str:
    """Returns a number of epochs as text, such as "1 epoch" or "3 epochs"."""
    return "1 epoch" if epochs == 1 else f"{epochs} epochs"


def describe_origin(content: bytes) -> str:
    """Returns a text about an ONNX file with 8-bit integers, such as "QOperator form, fine-tuned for 3 epochs".

    Args:
        content: The content of the file.
    """
    properties = {entry.key: entry.value for entry in onnx.load_from_string(content).metadata_props}
    tuned = f", fine-tuned for {count_epochs(int(properties[EPOCHS]))}" if EPOCHS in properties else ""
    return f"{read_form(content)} form{tuned}"
