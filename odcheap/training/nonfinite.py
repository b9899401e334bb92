"""A callback that handles training steps whose gradients are not finite (NaN or infinite)."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from odcheap.training.train_step import StepResult
from odcheap.utils.console import say
from odcheap.utils.errors import Failure

CHECK_EVERY = 10  # batches between checks, since a check waits for the GPU


class NonfiniteGuard(pl.Callback):
    """Ends the run after a training step whose gradients are not finite, or counts such steps if they are skipped.

    On a GPU the steps are checked every `CHECK_EVERY` batches, and always before a checkpoint is written. All processes
    have the same gradients, so they make the same decision.

    Args:
        skip: Whether such a step does not update the weights, and the run goes on.
        limit: The number of steps that may be skipped in the whole run; one more raises `Failure`.
    """

    def __init__(self, skip: bool, limit: int):
        self.skip, self.limit, self.skipped = skip, limit, 0
        self.pending: list[tuple[str, Tensor, dict[str, Tensor]]] = []  # step, whether finite, loss terms

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.skipped = state_dict["skipped"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        result: StepResult = outputs["result"]
        if result.finite is not None:
            place = f"epoch {trainer.current_epoch + 1}, step {trainer.global_step}"
            # They are copied, since a CUDA graph overwrites its results at the next batch.
            terms = {name: term.clone() for name, term in result.terms.items() if name != "loss"}
            self.pending.append((place, result.finite.clone(), terms))
        if self.skip or pl_module.device.type == "cpu" or (batch_idx + 1) % CHECK_EVERY == 0:
            self.check()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.check()

    def check(self) -> None:
        """Checks the gradients of all steps since the last call for NaN and infinity.

        Raises:
            Failure: The gradients of a step are not finite, and skipping is off or too many steps have been skipped.
        """
        # One transfer from the device for all steps; most often that is all.
        pending, self.pending = self.pending, []
        if not pending or torch.stack([finite for _, finite, _ in pending]).all():
            return
        # The message names the loss terms of the first such step that are not finite.
        place, _, terms = next(step for step in pending if not step[1])
        names = ", ".join(name for name, term in terms.items() if not torch.isfinite(term)) or "a gradient"
        self.skipped += 1
        if not self.skip or self.skipped > self.limit:
            what = f"on_nonfinite={'skip' if self.skip else 'stop'}: {place}: {names} is not finite"
            more = f" (more than max_skipped={self.limit} times)" if self.skip else ""
            raise Failure(f"{what}{more}; the last checkpoint is kept; try a lower optimizer.lr")
        say(f"skipped {place}: {names} is not finite ({self.skipped} of {self.limit})")
