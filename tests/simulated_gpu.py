"""A simulated GPU for the tests of which operators run as fused kernels."""

from types import SimpleNamespace

import pytest
import torch

from odcheap.layers import kernels


@pytest.fixture
def called(monkeypatch):
    """Simulates a GPU: the dispatch takes CPU tensors for its own, and the operators only list their calls."""
    names = []
    plain = SimpleNamespace(
        MAX_CHANNELS=64,
        MAX_GROUP=1,
        PAIR_TYPES=(torch.bfloat16, torch.float32),
        batch_norm_act=lambda x, *_: names.append("batch_norm_act") or x,
        depthwise3x3=lambda x, _: names.append("depthwise3x3") or x,
        shift3x3=lambda x: names.append("shift3x3") or x,
        pair_norm_act=lambda x, *_: names.append("pair_norm_act") or (x, x),
    )
    monkeypatch.setattr(kernels, "_mode", "auto")  # a run in another test may have set them
    monkeypatch.setattr(kernels, "is_on_current_device", lambda x: True)
    monkeypatch.setattr(kernels, "load_operators", lambda device_type: plain)
    return names
