import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from odcheap.training.callbacks import CHECK_EVERY, NonfiniteGuard, ProgressReporter, Record
from odcheap.training.module import Figures
from odcheap.training.train_step import StepResult
from odcheap.utils.errors import Failure
from odcheap.utils.text import format_seconds


def record(tmp_path, select="val"):
    return Record(tmp_path, select, "top1", every=None, keep=2)


def figures(top1, balanced=None):
    return Figures(top1, top1, balanced or top1, [])


def test_ties_go_to_the_earlier_epoch_then_the_lower_student(tmp_path):
    watched = record(tmp_path)
    for epoch, top1 in enumerate([(0.5, 0.4), (0.6, 0.6), (0.6, 0.6), (0.1, 0.2)]):
        watched.select_best(epoch, figures([*top1, 0.99]), candidates=2)
    assert watched.selected == {"candidate": 0, "epoch": 1, "score": 0.6}


def test_the_teacher_is_never_selected(tmp_path):
    watched = record(tmp_path)
    watched.select_best(0, figures([0.3, 0.4, 0.99]), candidates=2)
    assert watched.selected["candidate"] == 1


def test_the_figure_that_decides_is_the_one_asked_for(tmp_path):
    watched = Record(tmp_path, "val", "balanced_accuracy", every=None, keep=2)
    watched.select_best(0, figures([0.9, 0.1, 0.99], [0.3, 0.4, 0.5]), candidates=2)
    assert watched.selected == {"candidate": 1, "epoch": 0, "score": 0.4}


def test_last_picks_nothing(tmp_path):
    watched = record(tmp_path, "last")
    for epoch, top1 in enumerate([(0.1, 0.9), (0.2, 0.3)]):
        watched.select_best(epoch, figures([*top1, 0.99]), candidates=2)
    assert watched.selected["candidate"] == 0
    assert watched.selected["epoch"] == 1


@pytest.mark.parametrize(
    ("device", "seconds", "hint"), [("cpu", 9750, True), ("cpu", 10, False), ("cuda", 9750, False)]
)
def test_a_long_run_on_a_cpu_is_told_of_a_shorter_recipe(tmp_path, capsys, device, seconds, hint):
    reporter = ProgressReporter(record(tmp_path), Console(width=200), "experiment=short")
    reporter.report_expected_time(seconds, 10, torch.device(device))
    out = capsys.readouterr().out
    assert ("experiment=short" in out) == hint
    assert f"about {format_seconds(seconds)} to go for 10 epochs" in out


def trainer(epoch=0, epochs=2, testing=False):
    counts = {"num_training_batches": 3, "num_val_batches": [4], "num_test_batches": [5]}
    loop = SimpleNamespace(batch_idx=-1)
    place = {"is_global_zero": True, "current_epoch": epoch, "max_epochs": epochs, "testing": testing}
    return SimpleNamespace(fit_loop=loop, **place, **counts)


def row(top1):
    return {"val/student_0/top1": top1, "train/loss": 1.0, "images_per_second": 100.0, "epoch": 0}


def reporter_on(tmp_path, **terminal):
    out = io.StringIO()
    return ProgressReporter(
        record(tmp_path), Console(width=160, file=out, color_system=None, **terminal), "experiment=short"
    ), out


def test_the_best_accuracy_so_far_is_shown_and_the_finished_bar_has_the_last_one(tmp_path):
    reporter, out = reporter_on(tmp_path, force_terminal=True)
    reporter.on_train_start(trainer(), None)
    for epoch, top1 in enumerate((0.75, 0.5)):
        for batch in range(3):
            reporter.on_train_batch_end(trainer(epoch), None, None, None, batch)
        reporter.record.history.append(row(top1))
        reporter.on_train_epoch_end(trainer(epoch), None)
    reporter.on_train_end(trainer(1), None)
    said = out.getvalue()
    assert "epoch 1/2  loss 1.0000  100 images/s  val top-1: student 0 75.00 %  best so far 75.00 %" in said
    assert "epoch 2/2  loss 1.0000  100 images/s  val top-1: student 0 50.00 %  best so far 75.00 %" in said
    finished = said.removesuffix("\x1b[?25h").rstrip().splitlines()[-1]  # without the sign that shows the cursor again
    assert "epoch 2/2  100 images/s  val top-1: student 0 50.00 %  best so far 75.00 %" in finished
    assert "6/6" in finished


def test_a_resumed_run_knows_the_best_accuracy_so_far(tmp_path):
    reporter, _ = reporter_on(tmp_path)
    reporter.record.history = [row(0.75), row(0.5)]
    reporter.on_train_start(trainer(2, 4), None)
    assert reporter.best == 0.75


def test_an_evaluation_has_a_bar_and_the_bar_of_the_training_stays(tmp_path):
    reporter, out = reporter_on(tmp_path, force_terminal=True)
    reporter.on_train_start(trainer(), None)
    reporter.on_validation_start(trainer(), None)
    for batch in range(4):
        reporter.on_validation_batch_end(trainer(), None, None, None, batch)
    reporter.bar.refresh()
    assert "validation" in out.getvalue()
    assert "4/4" in out.getvalue()
    reporter.on_validation_end(trainer(), None)
    assert [task.description for task in reporter.bar.tasks] == ["training"]
    reporter.on_train_end(trainer(), None)
    reporter.on_test_start(trainer(testing=True), None)
    assert [(task.description, task.total) for task in reporter.bar.tasks] == [("test", 5)]
    reporter.on_test_end(trainer(testing=True), None)
    assert reporter.bar is None


def test_a_long_evaluation_is_reported_where_there_is_no_terminal(tmp_path):
    reporter, out = reporter_on(tmp_path)
    reporter.on_test_start(trainer(testing=True), None)
    reporter.on_test_batch_end(trainer(testing=True), None, None, None, 0)
    assert out.getvalue() == ""
    reporter.reported -= 31
    reporter.on_test_batch_end(trainer(testing=True), None, None, None, 1)
    assert out.getvalue() == "  batch 2/5 of the test\n"


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
