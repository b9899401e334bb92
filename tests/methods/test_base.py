import math

import pytest
import torch

from odcheap.methods.base import RampUp
from odcheap.utils.errors import OptionError


def test_the_ramp_grows_over_its_part_of_the_epochs():
    ramp = RampUp(80 / 300)
    assert ramp.weight == 1
    weight = ramp.weight
    for epoch in (0, 20, 40, 79, 80, 299):
        ramp.start_epoch(epoch, 300)
        expected = math.exp(-5 * (1 - min(epoch, 80) / 80) ** 2)
        assert ramp.weight.item() == pytest.approx(expected, rel=1e-6)
    assert ramp.weight is weight  # in place: a recorded step reads it there
    ramp.start_epoch(1, 15)
    assert ramp.weight.item() == pytest.approx(math.exp(-5 * (1 - 1 / 4) ** 2), rel=1e-6)


def test_without_length_there_is_no_ramp():
    ramp = RampUp(0)
    ramp.start_epoch(0, 10)
    assert torch.equal(ramp.weight, torch.ones(()))


@pytest.mark.parametrize("length", [-0.1, 1.5])
def test_its_length_is_a_part_of_the_run(length):
    with pytest.raises(OptionError, match=f"method.ramp_up={length}: must be a number, 0 or more and at most 1"):
        RampUp(length)
