"""A network's ONNX file in 8-bit integers."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process


class Batches(CalibrationDataReader):
    """What ONNX Runtime's calibration asks for inputs."""

    def __init__(self, batches: Iterator[np.ndarray]):
        self.batches = batches

    def get_next(self) -> dict[str, np.ndarray] | None:
        images = next(self.batches, None)
        return None if images is None else {"images": images}


def to_int8(model: bytes, batches: Iterator[np.ndarray]) -> bytes:
    """The file with 8-bit weights, a scale a channel, and 8-bit maps, whose ranges are those seen in `batches`.

    Source of the scheme: Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-
    only inference", 2018, as ONNX Runtime has it.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, folded, made = (Path(folder) / name for name in ("given.onnx", "folded.onnx", "int8.onnx"))
        given.write_bytes(model)
        quant_pre_process(given, folded)
        quantize_static(
            folded,
            made,
            Batches(batches),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return made.read_bytes()
