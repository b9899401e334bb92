"""Stands in for CUDA graphs on a CPU: a recording that computes nothing at first, and again with each replay."""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from odcheap.training.train_step import StepResult


class Recorder:
    def __init__(self, method: nn.Module, optimizer: torch.optim.Optimizer):
        self.method, self.optimizer = method, optimizer
        self.replays: list[int] = []

    def run(self, work: Callable[[], StepResult]) -> StepResult:
        return work()

    def record(self, work: Callable[[], StepResult]) -> tuple[Callable[[], None], StepResult]:
        rates = [group["lr"] for group in self.optimizer.param_groups]  # the places that a graph would read
        kept = [t for state in self.optimizer.state.values() for t in state.values()]
        kept += [*self.method.parameters(), *self.method.buffers()]
        before = [t.detach().clone() for t in kept]
        places = tree_map_only(torch.Tensor, torch.clone, work())
        with torch.no_grad():
            for tensor, old in zip(kept, before, strict=True):
                tensor.copy_(old)
        self.replays.append(0)
        number = len(self.replays) - 1

        def replay() -> None:
            given = [group["lr"] for group in self.optimizer.param_groups]
            self.set_rates(rates)
            for place, result in zip(leaves(places), leaves(self.again(work)), strict=True):
                place.copy_(result)
            self.set_rates(given)
            self.replays[number] += 1

        return replay, places

    def again(self, work: Callable[[], StepResult]) -> StepResult:
        return work()

    def set_rates(self, rates: list) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def leaves(result: StepResult) -> list[torch.Tensor]:
    return [*result.terms.values(), *(t for t in result.outputs.values() if t is not None), result.finite]
