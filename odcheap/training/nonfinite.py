"""The guard against losses and gradients that are not finite."""

from typing import Any

import pytorch_lightning as pl
import torch

from odcheap.training.module import DistillationModule
from odcheap.training.train_step import all_finite
from odcheap.utils.errors import Failure

# Batches between looks at the device and at the clock: with several processes or a GPU each look is a wait.
ASK_EVERY = 10


class Guard(pl.Callback):
    """Acts on a loss or gradient that is not finite: stops the run, or skips the step up to `limit` times in all.

    The gradients, which all processes share, decide; the local loss terms only say where it began. A run that is to
    stop need not know at once: a GPU is asked every `ASK_EVERY` steps, and always before a checkpoint is written.
    """

    def __init__(self, skip: bool, limit: int):
        self.skip, self.limit, self.skipped = skip, limit, 0
        self.buffers: list[torch.Tensor] = []
        self.noted: list[tuple[str, torch.Tensor, dict[str, torch.Tensor]]] = []

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped = state["skipped"]

    def on_train_batch_start(self, trainer: pl.Trainer, module: DistillationModule, *_: Any) -> None:
        if self.skip:  # a bad batch has passed through batch norm's statistics before its loss is seen
            self.buffers = [buffer.clone() for buffer in module.method.buffers()]

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: DistillationModule, optimizer: Any) -> None:
        terms, _, _ = module.latest
        self.note(trainer, trainer.global_step, terms, all_finite(module.method))
        if (self.skip or module.device.type == "cpu") and not self.all_well():
            self.leave_out(module, optimizer)

    def note(self, trainer: pl.Trainer, step: int, terms: dict[str, torch.Tensor], finite: torch.Tensor) -> None:
        kept = {name: term.detach().clone() for name, term in terms.items() if name != "loss"}
        self.noted.append((f"epoch {trainer.current_epoch}, step {step}", finite.clone(), kept))

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: DistillationModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if module.captured is not None:
            self.note(trainer, trainer.global_step - 1, module.taken.terms, module.taken.finite)
        if (batch_idx + 1) % ASK_EVERY == 0:
            self.all_well()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.all_well()

    def all_well(self) -> bool:
        """Looks at the steps noted since the last look: False where one is to be skipped, `Failure` to stop."""
        noted, self.noted = self.noted, []
        if not noted or torch.stack([finite for _, finite, _ in noted]).all():
            return True
        place, _, terms = next(n for n in noted if not n[1])
        where = f"{place}: {', '.join(name for name, t in terms.items() if not torch.isfinite(t)) or 'a gradient'}"
        self.skipped += 1
        if not self.skip or self.skipped > self.limit:
            what = f"on_nonfinite={'skip' if self.skip else 'stop'}: {where} is not finite"
            more = f" (more than max_skipped={self.limit} times)" if self.skip else ""
            raise Failure(f"{what}{more}; the last checkpoint is kept; try a lower optimizer.lr")
        print(f"skipped {where} is not finite ({self.skipped} of {self.limit})", flush=True)
        return False

    def leave_out(self, module: DistillationModule, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=True)  # parameters without gradients are left alone, momentum too
        for buffer, before in zip(module.method.buffers(), self.buffers, strict=True):
            buffer.copy_(before)
        module.latest = None
