"""ONNX files in 8-bit integers."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from odcheap.export.onnx import INPUT


class BatchReader(CalibrationDataReader):
    """Gives ONNX Runtime's calibration one batch after another."""

    def __init__(self, batches: Iterator[np.ndarray]):
        self.batches = batches

    def get_next(self) -> dict[str, np.ndarray]:
        images = next(self.batches, None)
        return {} if images is None else {INPUT: images}


def quantize_onnx(model: bytes, batches: Iterator[np.ndarray]) -> bytes:
    """Returns the ONNX file with 8-bit weights (a scale for each channel) and 8-bit feature maps.

    Source: Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only
    inference", 2018, in ONNX Runtime's implementation.

    Args:
        model: The content of an ONNX file.
        batches: Images (n, C, H, W), float32 in [0, 1]; the feature maps' ranges are those seen with them.
    """
    with tempfile.TemporaryDirectory() as folder:
        original, prepared, quantized = (Path(folder) / f"{name}.onnx" for name in ("original", "prepared", "int8"))
        original.write_bytes(model)
        quant_pre_process(original, prepared)
        quantize_static(
            prepared,
            quantized,
            BatchReader(batches),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return quantized.read_bytes()
