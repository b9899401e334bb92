import pytest
import torch

from odcheap.bench.measurement import PeakMemory, count_allocated_bytes

CPU = torch.device("cpu")


@pytest.mark.skipif(count_allocated_bytes() is None, reason="needs glibc")
def test_the_peak_is_what_was_in_use_at_once():
    kept = torch.ones(16 << 20)  # in use before: does not count
    memory = PeakMemory(CPU)
    memory.start()
    for _ in range(3):
        block = torch.ones(32 << 20)
        for _ in range(20):  # long enough to be sampled
            block.mul_(1.0)
        del block
    assert 0.95 < memory.stop() / (128 << 20) < 1.1
    del kept


def test_without_glibc_there_is_no_figure(monkeypatch):
    monkeypatch.setattr("odcheap.bench.measurement.count_allocated_bytes", lambda: None)
    memory = PeakMemory(CPU)
    memory.start()
    assert memory.stop() is None
