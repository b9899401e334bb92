"""A callback that acts on losses and gradients that are not finite."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from odcheap.training.train_step import StepResult
from odcheap.utils.console import say
from odcheap.utils.errors import Failure

CHECK_EVERY = 10  # batches between looks at the device and at the clock: each look may have to wait


class NonfiniteGuard(pl.Callback):
    """Ends the run at a step whose gradient is not finite, or counts the steps that were skipped for it.

    The gradients decide, which all processes share; the loss terms only say where it began. A run that is to end need
    not know at once: a GPU is asked every `CHECK_EVERY` steps, and always before a checkpoint is written.

    Args:
        skip: Whether the training step leaves such steps out.
        limit: How many may be left out in the whole run.
    """

    def __init__(self, skip: bool, limit: int):
        self.skip, self.limit, self.skipped = skip, limit, 0
        self.pending: list[tuple[str, Tensor, dict[str, Tensor]]] = []  # place, finite, terms of each unchecked step

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.skipped = state_dict["skipped"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        result: StepResult = outputs["result"]
        if result.finite is not None:
            place = f"epoch {trainer.current_epoch}, step {trainer.global_step - 1}"
            # Copies: a recorded step overwrites its results at the next batch.
            terms = {name: term.clone() for name, term in result.terms.items() if name != "loss"}
            self.pending.append((place, result.finite.clone(), terms))
        if self.skip or pl_module.device.type == "cpu" or (batch_idx + 1) % CHECK_EVERY == 0:
            self.check()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.check()

    def check(self) -> None:
        """Looks at the steps since the last check.

        Raises:
            Failure: The run is to end: at the first step that was not finite, or after too many skipped ones.
        """
        pending, self.pending = self.pending, []
        if not pending or torch.stack([finite for _, finite, _ in pending]).all():
            return
        place, _, terms = next(step for step in pending if not step[1])
        where = f"{place}: {', '.join(name for name, t in terms.items() if not torch.isfinite(t)) or 'a gradient'}"
        self.skipped += 1
        if not self.skip or self.skipped > self.limit:
            what = f"on_nonfinite={'skip' if self.skip else 'stop'}: {where} is not finite"
            more = f" (more than max_skipped={self.limit} times)" if self.skip else ""
            raise Failure(f"{what}{more}; the last checkpoint is kept; try a lower optimizer.lr")
        say(f"skipped {where} is not finite ({self.skipped} of {self.limit})")
