from types import SimpleNamespace

import pytest
import torch
from torch import nn

from odcheap.training.nonfinite import ASK_EVERY, Guard
from odcheap.utils.errors import Failure

FINE, BAD = torch.tensor(1.0), torch.tensor(float("nan"))


def steps(guard, losses, device="cuda", captured=True):
    """Runs the guard's hooks as Lightning does, one step a loss; on a device where looking is waiting."""
    method = nn.BatchNorm1d(1)
    module = SimpleNamespace(method=method, device=SimpleNamespace(type=device), captured=captured or None)
    optimizer = torch.optim.SGD(method.parameters(), 0.1)
    for k, loss in enumerate(losses):
        trainer = SimpleNamespace(current_epoch=4, global_step=k)
        terms = {"ce": FINE, "kl": loss.clone(), "loss": loss.clone()}
        guard.on_train_batch_start(trainer, module)
        if captured:
            module.taken = SimpleNamespace(terms=terms, finite=torch.isfinite(loss))
        else:
            module.latest = (terms, {}, None)
            method.weight.grad = loss.clone().view(1)
            guard.on_before_optimizer_step(trainer, module, optimizer)
        trainer.global_step += 1
        guard.on_train_batch_end(trainer, module, None, None, k)
        yield method.weight.grad


@pytest.mark.parametrize("captured", [True, False])
def test_a_gpu_is_asked_now_and_then_and_the_first_bad_step_is_named(captured):
    guard = Guard(skip=False, limit=0)
    taken = steps(guard, [FINE, FINE, BAD, BAD] + [FINE] * 20, captured=captured)
    for _ in range(ASK_EVERY - 1):
        next(taken)
    with pytest.raises(Failure, match=r"^on_nonfinite=stop: epoch 4, step 2: kl is not finite; the last checkpoint"):
        next(taken)


def test_the_end_of_an_epoch_never_passes_unseen():
    guard = Guard(skip=False, limit=0)
    list(steps(guard, [FINE, BAD]))
    with pytest.raises(Failure, match="step 1: kl"):
        guard.on_train_epoch_end()


def test_a_cpu_is_asked_at_once():
    taken = steps(Guard(skip=False, limit=0), [FINE, BAD], device="cpu", captured=False)
    next(taken)
    with pytest.raises(Failure, match="step 1: kl"):
        next(taken)


def test_skipping_asks_at_once_and_takes_the_gradients_away(capsys):
    guard = Guard(skip=True, limit=1)
    taken = steps(guard, [FINE, BAD, FINE, BAD], captured=False)
    assert [grad is None for _, grad in zip(range(3), taken, strict=False)] == [False, True, False]
    assert "skipped epoch 4, step 1: kl is not finite (1 of 1)" in capsys.readouterr().out
    with pytest.raises(Failure, match=r"more than max_skipped=1 times"):
        next(taken)
