import pytest
import torch
from torch import nn

from odcheap.bench.roofline import Machine, Work, measure, median_seconds, work_of
from odcheap.layers.cheap_conv import DW, Shift


def test_the_work_of_a_small_network_is_that_of_a_hand_count():
    network = nn.Sequential(nn.Conv2d(3, 18, 3, padding=1, bias=False), nn.ReLU(), DW()(18, 10, 2))
    work = work_of(network, (3, 8, 8))
    macs = 64 * 3 * 18 * 9 + 64 * 18 * 9 + 16 * 18 * 10
    moved = [(3 * 64, 18 * 64), (18 * 64, 18 * 64), (18 * 64, 10 * 16)]
    assert work == Work(6 * macs, sum(3 * given + 2 * made for given, made in moved))


def test_a_shift_moves_but_does_not_compute():
    work = work_of(Shift()(18, 10), (18, 4, 4))
    assert work == Work(6 * 16 * 180, 5 * 16 * 18 + 3 * 16 * 18 + 2 * 16 * 10)


@pytest.mark.parametrize(("machine", "seconds"), [(Machine(1e3, 1e12), 0.8), (Machine(1e12, 1e3), 0.5)])
def test_the_longer_of_moving_and_computing_counts(machine, seconds):
    assert machine.seconds(Work(50, 20), images=10, bytes_an_element=4) == pytest.approx(seconds)


def test_a_machine_is_measured():
    found = measure(torch.device("cpu"), torch.float32, repeats=1)
    assert 1e8 < found.bandwidth < 1e13
    assert 1e8 < found.rate < 1e15


def test_the_median_leaves_out_the_warm_up():
    waits = iter([0, 0, 0, 0, 0])
    assert median_seconds(lambda: next(waits), repeats=3, synchronise=lambda: None) < 0.1
    assert not list(waits)
