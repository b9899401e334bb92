"""The recipe: optimizer and learning rate schedule."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LambdaLR

from odcheap.layers.cheap_conv import CheapConv
from odcheap.utils.errors import OptionError

Schedule = Callable[[int, int], float]  # (step from 0, steps of the run) -> what the rate is multiplied by


@dataclass(frozen=True)
class Steps:
    """Multiplies the rate by `gamma` at each milestone, a fraction of the run's steps. Raises `OptionError`."""

    milestones: tuple[float, ...]
    gamma: float

    def __post_init__(self) -> None:
        if not all(0 < milestone < 1 for milestone in self.milestones):
            allowed = "must be fractions of the run: above 0, below 1"
            raise OptionError("optimizer.schedule.milestones", list(self.milestones), allowed)
        if not self.gamma > 0:
            raise OptionError("optimizer.schedule.gamma", self.gamma, "must be above 0")

    def __call__(self, step: int, steps: int) -> float:
        return self.gamma ** sum(step >= round(milestone * steps) for milestone in self.milestones)


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from 1 to 0. Source: Loshchilov, Hutter, "SGDR: stochastic gradient descent with warm restarts",
    2017, equation 5 without restarts.
    """

    def __call__(self, step: int, steps: int) -> float:
        return (1 + math.cos(math.pi * step / steps)) / 2


@dataclass(frozen=True)
class OneCycle:
    """Linear from `start` to 1 at the fraction `peak` of the run, then linear to `end`; momentum stays as it is.

    Source: Smith, Topin, "Super-convergence: very fast training of neural networks using large learning rates", 2018.
    Raises `OptionError` unless 0 < peak < 1, start and end are 0 or more.
    """

    start: float
    peak: float
    end: float

    def __post_init__(self) -> None:
        if not 0 < self.peak < 1:
            raise OptionError("optimizer.schedule.peak", self.peak, "must be a part of the run: above 0, below 1")
        for name, value in {"start": self.start, "end": self.end}.items():
            if not value >= 0:
                raise OptionError(f"optimizer.schedule.{name}", value, "must be 0 or more")

    def __call__(self, step: int, steps: int) -> float:
        done = step / steps
        if done < self.peak:
            return self.start + (1 - self.start) * done / self.peak
        return 1 + (self.end - 1) * (done - self.peak) / (1 - self.peak)


@dataclass(frozen=True)
class SGD:
    """SGD with momentum, its rate `lr` times the schedule's factor.

    `decay_norm=False` exempts batch norm's weights and biases from the weight decay, `decay_spatial=False` the spatial
    operators of DW and Group. Raises `OptionError`.
    """

    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float
    decay_norm: bool
    decay_spatial: bool
    schedule: Schedule

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise OptionError("optimizer.lr", self.lr, "must be above 0")
        if not 0 <= self.momentum < 1:
            raise OptionError("optimizer.momentum", self.momentum, "must be 0 or more, below 1")
        if self.nesterov and self.momentum == 0:
            raise OptionError("optimizer.nesterov", True, "needs a momentum above 0")
        if not self.weight_decay >= 0:
            raise OptionError("optimizer.weight_decay", self.weight_decay, "must be 0 or more")

    def build(self, network: nn.Module, total_steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """The schedule is to be stepped once a batch."""
        optimizer = torch.optim.SGD(
            parameter_groups(network, self.weight_decay, self.exempt(network)),
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            fused=True,  # one pass over the weights; the same arithmetic
        )
        optimizer._step_supports_amp_scaling = False  # with float16 the gradients are unscaled before the guard looks
        return optimizer, LambdaLR(optimizer, lambda step: self.schedule(step, total_steps))

    def exempt(self, network: nn.Module) -> list[nn.Parameter]:
        """What no weight decay is for. Raises `OptionError` where `decay_spatial=False` finds nothing."""
        norms = [] if self.decay_norm else [m for m in network.modules() if isinstance(m, _BatchNorm)]
        pairs = [] if self.decay_spatial else [m for m in network.modules() if isinstance(m, CheapConv)]
        spatial = [p for pair in pairs for p in pair.spatial.parameters() if p.requires_grad]
        if not (spatial or self.decay_spatial):
            allowed = "finds none of the spatial operators that block_type=DW or Group puts in"
            raise OptionError("optimizer.decay_spatial", False, allowed)
        return spatial + [p for norm in norms for p in norm.parameters()]


def parameter_groups(network: nn.Module, weight_decay: float, exempt: list[nn.Parameter]) -> list[dict]:
    trained, spared = [p for p in network.parameters() if p.requires_grad], {id(p) for p in exempt}
    groups = [{"params": [p for p in trained if id(p) not in spared], "weight_decay": weight_decay}]
    return groups + [{"params": [p for p in trained if id(p) in spared], "weight_decay": 0.0}] * bool(spared)
