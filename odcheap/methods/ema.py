"""Averages over the steps of the students' weights, which a method may offer as products beside the students."""

import copy

import torch
from torch import Tensor, nn

from odcheap.methods.students import Students
from odcheap.utils.errors import OptionError


class Averages(Students):
    """A copy of each student, whose weights follow it: a <- d a + (1 - d) w after each step g (from 0), with
    d = min(1 - 1 / (g + 1), decay): true means at first. Batch norm's statistics are those of its own forward passes on
    the training batches. Source: Tarvainen, Valpola, "Mean teachers are better role models", 2017, section 2.

    Raises `OptionError` unless 0 <= decay < 1.
    """

    steps: Tensor

    def __init__(self, students: Students, decay: float):
        nn.Module.__init__(self)  # nothing is built anew
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1:
            raise OptionError("method.average_decay", decay, "must be a number, 0 or more and below 1")
        self.members, self.run = copy.deepcopy(students.members).requires_grad_(False), students.run
        self.decay = decay
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """(S, N, K) of (N, C, H, W), or of a view for each, (S, N, C, H, W)."""
        return self(images)[1]

    @torch.no_grad()
    def follow(self, students: Students) -> None:
        """To be called after each step of the optimizer. `OptionError` where the weights have fewer than 32 bits."""
        self.steps += 1
        decay = (1 - 1 / self.steps).clamp(max=self.decay)
        pairs = zip(self.members.parameters(), students.members.parameters(), strict=True)
        for average, weight in pairs:
            refuse_few_bits(str(weight.dtype).removeprefix("torch."))
            average.lerp_(weight, (1 - decay).to(weight.dtype))

    def begin_with(self, students: Students) -> None:
        self.members.load_state_dict(students.members.state_dict())


def refuse_few_bits(precision: str) -> None:
    """Raises `OptionError` for a type, or a precision in Lightning's terms, whose weights have fewer than 32 bits."""
    if precision in ("bf16-true", "16-true", "bfloat16", "float16"):
        allowed = "averages, which move by thousandths, need weights in 32 bits (bf16-mixed has them)"
        raise OptionError("trainer.precision", precision, allowed)
