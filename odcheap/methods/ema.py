"""Exponential moving averages of the students' weights."""

import copy
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from odcheap.methods.students import Students
from odcheap.utils.arguments import check_arguments
from odcheap.utils.errors import OptionError

AverageDecay = Annotated[float, Field(ge=0, lt=1)]


@check_arguments("method")
class AveragedStudents(Students):
    """Copies of the students whose weights are exponential moving averages of the students' weights.

    After optimizer step g (from 0) each averaged weight becomes d times its old value plus (1 - d) times the student's
    weight, with d = min(1 - 1 / (g + 1), average_decay). In the first steps this is the plain mean of all steps.
    Source: Tarvainen, Valpola, "Mean teachers are better role models", 2017, section 2.

    The batch norm statistics are not averaged: the copies run on the training batches too, and collect their own.

    Args:
        students: The students; they are copied and not changed.
        average_decay: The largest d, in [0, 1).

    Attributes:
        steps: The number of updates so far, a scalar.
    """

    # `torch.optim.swa_utils.AveragedModel` cannot be used: it reads its step count from the GPU, which is not possible
    # in a CUDA graph, and it copies the students' batch norm statistics.

    steps: Tensor

    def __init__(self, students: Students, average_decay: AverageDecay):
        nn.Module.__init__(self)  # not that of `Students`, which would build new networks
        self.members, self.run = copy.deepcopy(students.members).requires_grad_(False), students.run
        self.decay = average_decay
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Returns the logits (S, N, K) of the S averaged networks, without gradients.

        Args:
            images: (N, C, H, W); or (S, N, C, H, W), in which each of the S copies has its own augmentation.
        """
        return self(images)[1]

    @torch.no_grad()
    def update(self, students: Students) -> None:
        """Updates the averages with the students' weights; call it after each step of the optimizer.

        Args:
            students: The students of which these are the averages.

        Raises:
            OptionError: The students' weights have fewer than 32 bits.
        """
        # The step count is a tensor, and nothing is read from the GPU, so that a CUDA graph can record the update.
        self.steps += 1
        decay = (1 - 1 / self.steps).clamp(max=self.decay)
        for average, weight in zip(self.members.parameters(), students.members.parameters(), strict=True):
            require_single_precision(str(weight.dtype).removeprefix("torch."))
            average.lerp_(weight, (1 - decay).to(weight.dtype))

    def copy_weights(self, students: Students) -> None:
        """Sets the averages to the weights of the given students, and copies their batch norm statistics too."""
        self.members.load_state_dict(students.members.state_dict())


def require_single_precision(precision: str) -> None:
    """Raises `OptionError` if this precision keeps the weights in fewer than 32 bits.

    Args:
        precision: A precision of Lightning, such as "bf16-true", or the name of a dtype, such as "bfloat16".
    """
    if precision in ("bf16-true", "16-true", "bfloat16", "float16"):
        allowed = "averages, which move by thousandths, need weights in 32 bits (bf16-mixed has them)"
        raise OptionError("trainer.precision", precision, allowed)
