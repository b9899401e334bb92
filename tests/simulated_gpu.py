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
        MAX_PAIRS=1,
        MAX_GROUP=1,
        MAX_CHANNELS=64,
        PAIR_TYPES=(torch.bfloat16, torch.float32),
        norm_forward=lambda *_: names.append("norm_forward"),
        depthwise3x3=lambda x, _: names.append("depthwise3x3") or x,
        shift3x3=lambda x: names.append("shift3x3") or x,
        pairs_norm_act=lambda x, *_: names.append("pairs_norm_act") or (x, x),
    )
    monkeypatch.setattr(kernels, "_mode", "auto")  # a run in another test may have set them
    monkeypatch.setattr(kernels, "is_on_current_device", lambda x: True)
    monkeypatch.setattr(kernels, "load_operators", lambda device_type: plain)
    return names
