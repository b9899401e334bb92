import pytest
import torch
from torch import nn

from odcheap.export import latency, onnx
from odcheap.export.latency import ONNX_RUNTIME, PYTORCH, Key
from odcheap.layers.cheap_conv import DW
from odcheap.models.cifar import CifarResNet
from odcheap.predict import Timing, time_alternately


def test_every_network_is_timed_with_one_thread_and_with_all():
    network = CifarResNet(8, DW(), 2).eval()
    content = onnx.to_onnx(onnx.export_program(network, (3, 8, 8)))
    works = latency.onnx_calls({"a": content}, (3, 8, 8), (1, 3))
    works |= latency.torch_calls({"a": network}, (3, 8, 8), (1, 3))
    threads = torch.get_num_threads()
    found = time_alternately(works, seconds=0.01)
    assert torch.get_num_threads() == threads
    expected = {Key("a", runtime, batch, t) for runtime in (ONNX_RUNTIME, PYTORCH) for batch in (1, 3) for t in (0, 1)}
    assert {key for key in found if "GPU" not in key.runtime} == expected
    assert all(0 < time.p50 <= time.p95 < 10 for time in found.values())


def test_the_better_number_of_threads_counts():
    found = {Key("a", ONNX_RUNTIME, 1, 1): Timing(1.0, 3.0), Key("a", ONNX_RUNTIME, 1, 0): Timing(2.0, 2.5)}
    found[Key("a", ONNX_RUNTIME, 64, 1)] = Timing(0.1, 0.1)
    found[Key("b", ONNX_RUNTIME, 1, 1)] = Timing(0.1, 0.1)
    assert latency.fastest(found, "a", ONNX_RUNTIME, 1) == Timing(1.0, 3.0)


def test_a_failing_network_leaves_the_threads_as_they_were():
    threads = torch.get_num_threads()
    work = latency.torch_call(nn.Linear(2, 2), torch.zeros(1, 3, 4, 4), threads + 1)
    with pytest.raises(RuntimeError):
        work()
    assert torch.get_num_threads() == threads


def test_times_are_milliseconds_of_one_call():
    times = latency.time_networks({"a": CifarResNet(8, DW(), 10)}, (3, 16, 16), (1, 64), seconds=0.05)
    assert 0 < times["a", 1] < times["a", 64] < 10_000
