import pytest

from odcheap.export.speedup import Speedup, compare_timings, describe_disturbance, find_opposites, format_speedup
from odcheap.predict import Timing, summarize_rounds


def test_a_speedup_is_the_median_of_the_rounds_ratios():
    standard = Timing(0, 0, rounds=(3.0, 6.0, 4.0))
    student = Timing(0, 0, rounds=(1.0, 1.5, 2.0))
    assert compare_timings(standard, student) == Speedup(3.0, 2.0, 4.0)
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


def test_a_busy_machine_and_rounds_that_disagree_are_named(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    steady, shaky = Speedup(2, 1.9, 2.1), Speedup(2, 1.5, 2.1)
    assert describe_disturbance([steady], 4.0) == ""
    assert describe_disturbance([steady], None) == ""
    both = "the machine was busy, with a load of 4.1 on 4 cores, and the rounds of the measurement disagree"
    assert describe_disturbance([steady, shaky], 4.1) == both


def test_opposites_are_clear_ones_only():
    first = {1: Speedup(2, 1.9, 2.1), 64: Speedup(0.5, 0.4, 0.6)}
    second = {1: Speedup(0.5, 0.4, 0.6), 64: Speedup(1.1, 0.9, 1.2), 8: Speedup(0.1, 0.1, 0.1)}
    assert find_opposites(first, second) == {1: second[1]}
