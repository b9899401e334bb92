"""The recipe: optimizer and learning rate schedule."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class SGD:
    """SGD with momentum; the rate is multiplied by `gamma` at each milestone, a fraction of the run's steps.

    `decay_norm=False` exempts batch norm's weights and biases from the weight decay.
    """

    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float
    decay_norm: bool
    milestones: tuple[float, ...]
    gamma: float

    def build(self, network: nn.Module, total_steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """The schedule is to be stepped once a batch."""
        optimizer = torch.optim.SGD(
            parameter_groups(network, self.weight_decay, self.decay_norm),
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            fused=True,  # one pass over the weights; the same arithmetic
        )
        optimizer._step_supports_amp_scaling = False  # with float16 the gradients are unscaled before the guard looks
        passed = [round(milestone * total_steps) for milestone in self.milestones]
        return optimizer, LambdaLR(optimizer, lambda step: self.gamma ** sum(step >= at for at in passed))


def parameter_groups(network: nn.Module, weight_decay: float, decay_norm: bool) -> list[dict]:
    trained = [p for p in network.parameters() if p.requires_grad]
    if decay_norm:
        return [{"params": trained, "weight_decay": weight_decay}]
    of_norms = {id(p) for m in network.modules() if isinstance(m, _BatchNorm) for p in m.parameters()}
    decayed = [p for p in trained if id(p) not in of_norms]
    exempt = [p for p in trained if id(p) in of_norms]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
