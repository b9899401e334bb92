import pytest
import torch
from methods.formulas import students
from methods.test_kd import teacher
from methods.test_losses import MAKERS

from odcheap.methods.alone import Alone
from odcheap.methods.ema import AveragedStudents
from odcheap.methods.kd import OfflineDistillation
from odcheap.methods.pcl import PeerCollaborativeLearning
from odcheap.utils.errors import OptionError


def test_averages_follow_the_weights_after_each_step():
    """True means at first, then with the decay."""
    given = students(2).double()
    averages = AveragedStudents(given, average_decay=0.75)
    weight, average = given.members[1].fc.weight, averages.members[1].fc.weight
    expected = average.clone()
    for step in range(8):
        with torch.no_grad():
            weight.copy_(torch.full_like(weight, step**2))
        averages.update(given)
        decay = min(1 - 1 / (step + 1), 0.75)
        expected = decay * expected + (1 - decay) * step**2
        torch.testing.assert_close(average, expected)


def test_sixteen_bits_are_too_few_for_an_average():
    with pytest.raises(
        OptionError, match="trainer.precision=bfloat16: averages, which move by thousandths, need weights in 32 bits"
    ):
        AveragedStudents(few := students(2).bfloat16(), 0.9).update(few)


@pytest.mark.parametrize("decay", [-0.1, 1.0, "x", False])
def test_the_decay_is_below_one(decay):
    with pytest.raises(
        OptionError, match=f"method.average_decay={str(decay).lower()}: must be a number, 0 or more and below 1"
    ):
        AveragedStudents(students(), decay)


def offline(given, **options):
    torch.manual_seed(0)
    return OfflineDistillation(given, teacher(), **options)


@pytest.mark.parametrize("make", [Alone, offline, *(m for m in MAKERS if m is not PeerCollaborativeLearning)])
def test_averages_on_request(make):
    """They follow the students and change nothing of what these learn."""
    torch.manual_seed(0)
    plain, averaged = make(students(2)).train(), make(students(2), average_decay=0.9).train()
    averaged.load_state_dict(plain.state_dict(), strict=False)
    images, target = torch.randn(4, 3, 8, 8), torch.arange(4)
    outputs = [method(images) for method in (plain, averaged)]
    losses = [method.loss(output, target)["loss"] for method, output in zip((plain, averaged), outputs, strict=True)]
    assert torch.equal(*losses)
    assert plain.candidates() == list(plain.students.members)
    assert averaged.candidates()[2:] == averaged.frozen_networks()[-2:] == list(averaged.averages.members)
    assert "average_logits" not in outputs[0]
    assert not outputs[1]["average_logits"].requires_grad
    with torch.no_grad():
        averaged.students.members[1].fc.bias.add_(1)
    averaged.after_step()  # the first one takes the weights as they are
    assert torch.equal(averaged.averages.members[1].fc.bias, averaged.students.members[1].fc.bias)
