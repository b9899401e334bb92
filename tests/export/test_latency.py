import time

import pytest
import torch
from torch import nn

from odcheap.export import latency, onnx
from odcheap.export.card_speed import find_opposites, format_speedup
from odcheap.export.latency import Key, Speedup, compare_timings, describe_disturbance
from odcheap.export.runtimes import ONNX_RUNTIME, PYTORCH
from odcheap.layers.cheap_conv import DW
from odcheap.models.cifar import CifarResNet
from odcheap.predict import Timing, summarize_rounds, time_alternately


def test_every_network_is_timed_with_one_thread_and_with_all():
    network = CifarResNet(8, DW(), 2).eval()
    content = onnx.to_onnx(onnx.export_program(network, (3, 8, 8)))
    works = latency.file_calls(ONNX_RUNTIME, {"a": content}, (3, 8, 8), (1, 3))
    works |= latency.torch_calls({"a": network}, (3, 8, 8), (1, 3))
    threads = torch.get_num_threads()
    found = time_alternately(works, seconds=0.01)
    assert torch.get_num_threads() == threads
    expected = {Key("a", runtime, batch, t) for runtime in (ONNX_RUNTIME, PYTORCH) for batch in (1, 3) for t in (0, 1)}
    assert {key for key in found if "GPU" not in key.runtime} == expected
    assert all(0 < timing.p50 <= timing.p95 < 10 for timing in found.values())


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


def test_times_are_seconds_of_one_call():
    timings = latency.measure_timings({"a": CifarResNet(8, DW(), 10)}, (3, 16, 16), (1, 64), seconds=0.05)
    assert 0 < timings["a", 1].p50 < timings["a", 64].p50 < 10


def test_a_speedup_is_the_median_of_the_rounds_ratios():
    standard = Timing(0, 0, rounds=(3.0, 6.0, 4.0))
    student = Timing(0, 0, rounds=(1.0, 1.5, 2.0))
    assert compare_timings(standard, student) == Speedup(3.0, 2.5, 3.5)
    assert compare_timings(Timing(3.0, 4.0), Timing(2.0, 4.0)) == Speedup(1.5, 1.5, 1.5)  # without rounds


def test_a_phase_in_which_the_machine_is_slow_does_not_change_the_ratio():
    standard = summarize_rounds([[3.0] * 5, [30.0] * 5, [3.0] * 5])
    student = summarize_rounds([[1.0] * 5, [10.0] * 5, [1.0] * 5])
    assert compare_timings(standard, student) == Speedup(3.0, 3.0, 3.0)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((7.28, 7.28, 20.65), "is 7 (7 to 21) times as fast"),  # one student on a busy machine, in two exports
        ((2.884, 2.86, 2.91), "is 2.88 (2.86 to 2.91) times as fast"),
        ((2.884, 2.8, 2.95), "is 2.9 (2.8 to 3.0) times as fast"),
        ((34.2, 12.1, 56.3), "is 34 (12 to 56) times as fast"),
        ((0.5, 0.4, 0.9), "takes 2 (1 to 2) times as long"),
        ((0.02, 0.019, 0.021), "takes 50 (48 to 53) times as long"),
        ((1.5, 0.9, 1.9), "is neither clearly faster nor slower (0.9 to 1.9 times as fast)"),
        ((1.0, 1.0, 1.0), "is neither clearly faster nor slower (1.00 to 1.00 times as fast)"),
    ],
)
def test_no_more_digits_are_written_than_are_known(values, text):
    assert format_speedup(Speedup(*values)) == text


def test_a_round_in_which_another_program_ran_changes_neither_the_ratio_nor_its_quartiles():
    standard, student = [3.0] * 15, [1.0] * 15
    standard[4], student[9] = 60.0, 30.0
    found = compare_timings(Timing(0, 0, rounds=tuple(standard)), Timing(0, 0, rounds=tuple(student)))
    assert found == Speedup(3.0, 3.0, 3.0)


def list_timings(running, threads=1):
    return {Key("student.onnx", ONNX_RUNTIME, batch, threads): Timing(1, 1, running=running) for batch in (1, 64)}


def test_a_busy_machine_and_rounds_that_disagree_are_named():
    steady, shaky = Speedup(2, 1.9, 2.1), Speedup(2, 1.5, 2.1)
    assert describe_disturbance([steady], list_timings(0.76)) == ""
    assert describe_disturbance([steady], list_timings(float("nan"))) == ""
    assert describe_disturbance([steady], list_timings(0.3, threads=0)) == ""  # it waited for its own threads
    both = "the machine was busy (the calls waited for other programs for 26 % of the time), and the rounds of the "
    assert describe_disturbance([steady, shaky], list_timings(0.74)) == both + "measurement disagree"


def test_calls_that_wait_are_known_by_the_time_in_which_they_ran(monkeypatch):
    clock = {"wall": 0.0, "running": 0.0}

    def advance(wall, running):
        clock["wall"] += wall
        clock["running"] += running

    monkeypatch.setattr(time, "perf_counter", lambda: clock["wall"])
    monkeypatch.setattr(time, "thread_time", lambda: clock["running"])
    monkeypatch.setattr(time, "sleep", lambda seconds: advance(seconds, 0.0))
    calls = {"waiting": lambda: advance(0.005, 0.001), "running": lambda: advance(0.005, 0.005)}
    timings = time_alternately(calls, 0.2)
    assert timings["waiting"].running == pytest.approx(0.2)
    assert timings["running"].running == pytest.approx(1.0)
    assert len(timings["running"].rounds) == len(timings["waiting"].rounds) >= 5


def test_slow_calls_are_made_in_fewer_rounds():
    timings = time_alternately({"slow": lambda: time.sleep(0.02)}, 0.01)
    assert len(timings["slow"].rounds) == 5


def test_opposites_are_clear_ones_only():
    first = {1: Speedup(2, 1.9, 2.1), 64: Speedup(0.5, 0.4, 0.6)}
    second = {1: Speedup(0.5, 0.4, 0.6), 64: Speedup(1.1, 0.9, 1.2), 8: Speedup(0.1, 0.1, 0.1)}
    assert find_opposites(first, second) == {1: second[1]}
