import pytest
import torch

from odcheap.bench.memory import Memory, in_use, with_peak

CPU = torch.device("cpu")


@pytest.mark.skipif(in_use() is None, reason="needs glibc")
def test_the_peak_is_what_was_in_use_at_once():
    kept = torch.ones(16 << 20)  # in use before: does not count

    def work() -> str:
        for _ in range(3):
            block = torch.ones(32 << 20)
            for _ in range(20):  # long enough to be sampled
                block.mul_(1.0)
            del block
        return "done"

    done, peak = with_peak(CPU, work)
    assert done == "done"
    assert 0.95 < peak / (128 << 20) < 1.1
    del kept


def test_where_nobody_counts_there_is_no_figure(monkeypatch):
    monkeypatch.setattr("odcheap.bench.memory.in_use", lambda: None)
    memory = Memory(CPU)
    memory.start()
    assert memory.peak() is None
