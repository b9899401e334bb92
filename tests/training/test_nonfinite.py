from types import SimpleNamespace

import pytest
import torch

from odcheap.training.nonfinite import CHECK_EVERY, NonfiniteGuard
from odcheap.training.train_step import StepResult
from odcheap.utils.errors import Failure

FINE, BAD = torch.tensor(1.0), torch.tensor(float("nan"))


def steps(guard, losses, device="cuda"):
    """Calls the guard's hook as Lightning does, once a loss; on a device where a look is a wait."""
    module = SimpleNamespace(device=SimpleNamespace(type=device))
    terms, finite = {"ce": FINE, "kl": FINE.clone(), "loss": FINE.clone()}, torch.tensor(True)
    for k, loss in enumerate(losses):
        trainer = SimpleNamespace(current_epoch=4, global_step=k + 1)
        for name in ("kl", "loss"):
            terms[name].copy_(loss)  # as a recorded step does, which writes its results over those before
        finite.copy_(torch.isfinite(loss))
        result = StepResult(terms, {}, finite, taken=True)
        guard.on_train_batch_end(trainer, module, {"loss": loss, "result": result}, None, k)
        yield k


def test_a_gpu_is_asked_now_and_then_and_the_first_bad_step_is_named():
    guard = NonfiniteGuard(skip=False, limit=0)
    taken = steps(guard, [FINE, FINE, BAD, BAD] + [FINE] * 20)
    for _ in range(CHECK_EVERY - 1):
        next(taken)
    with pytest.raises(Failure, match=r"^on_nonfinite=stop: epoch 5, step 3: kl is not finite; the last checkpoint"):
        next(taken)


def test_the_end_of_an_epoch_never_passes_unseen():
    guard = NonfiniteGuard(skip=False, limit=0)
    list(steps(guard, [FINE, BAD]))
    with pytest.raises(Failure, match="step 2: kl"):
        guard.on_train_epoch_end(None, None)


def test_a_cpu_is_asked_at_once():
    taken = steps(NonfiniteGuard(skip=False, limit=0), [FINE, BAD], device="cpu")
    next(taken)
    with pytest.raises(Failure, match="step 2: kl"):
        next(taken)


def test_skipped_steps_are_counted_at_once_up_to_the_limit(capsys):
    guard = NonfiniteGuard(skip=True, limit=1)
    taken = steps(guard, [FINE, BAD, FINE, BAD])
    assert [k for _, k in zip(range(3), taken, strict=False)] == [0, 1, 2]
    assert "skipped epoch 5, step 2: kl is not finite (1 of 1)" in capsys.readouterr().out
    with pytest.raises(Failure, match=r"more than max_skipped=1 times"):
        next(taken)
