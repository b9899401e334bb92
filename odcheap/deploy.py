"""A network on a small device: its ONNX file, and how long an answer takes there."""

import tempfile
import time
from pathlib import Path

import onnxruntime
import torch
from torch import nn


def to_onnx(network: nn.Module, image_size: tuple[int, int, int]) -> bytes:
    """The network in eval mode, `images` (n, C, H, W) -> `logits` (n, K) for any n, with its weights inside."""
    network = network.eval().cpu()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        torch.onnx.export(
            network,
            (torch.zeros(2, *image_size),),
            path,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("n")},),
            external_data=False,
            verbose=False,
        )
        return path.read_bytes()


def latency(model: bytes, image_size: tuple[int, int, int], batch: int, seconds: float = 1.0) -> float:
    """The median time in seconds of a batch in ONNX Runtime on the CPU, over about so many seconds."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    images = {"images": torch.rand(batch, *image_size).numpy()}
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken) < 5:
        began = time.perf_counter()
        session.run(None, images)
        taken.append(time.perf_counter() - began)
    return sorted(taken[2:])[len(taken[2:]) // 2]
