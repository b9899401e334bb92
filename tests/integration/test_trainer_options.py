"""Options of Lightning's `Trainer` that change when an epoch ends or when it is evaluated."""

import csv
import json

import pytest
import torch
from conftest import TINY

from odcheap.training.train_step import EagerStep


def read_rows(folder):
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def steps_of_an_epoch(rows):
    return int(rows[0]["step"])


def test_an_epoch_that_max_steps_cuts_short_has_no_held_out_figures(command, tmp_path):
    assert command(*TINY, "trainer.max_epochs=1", f"job_dir={tmp_path}/first").status == 0
    steps = steps_of_an_epoch(read_rows(tmp_path / "first"))
    run = command(*TINY, "trainer.max_epochs=5", f"+trainer.max_steps={steps + 2}", f"job_dir={tmp_path}/run")
    assert run.status == 0, run.err
    first, second = read_rows(tmp_path / "run")
    assert (int(first["step"]), int(second["step"])) == (steps, steps + 2)
    assert first["val/student_0/top1"] != ""
    assert second["val/student_0/top1"] == ""
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["selected"]["epoch"] == 0
    assert summary["last"]["students"][0]["val_top1"] is None


def test_epochs_without_evaluation_are_recorded_without_figures(command, tmp_path):
    options = ["trainer.max_epochs=3", "+trainer.check_val_every_n_epoch=2"]
    run = command(*TINY, *options, f"job_dir={tmp_path}/run")
    assert run.status == 0, run.err
    assert [row["val/student_0/top1"] != "" for row in read_rows(tmp_path / "run")] == [False, True, False]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["selected"]["epoch"] == 1


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("+trainer.max_steps=1", "trainer.max_steps=1: must be "),
        ("+trainer.check_val_every_n_epoch=3", "check_val_every_n_epoch=3: must be at most trainer.max_epochs=2"),
        ("+trainer.fast_dev_run=true", "trainer.fast_dev_run=true: is not an option"),
        ("+trainer.limit_test_batches=0", "trainer.limit_test_batches=0: is not an option"),
        ("+trainer.limit_train_batches=0", "trainer: its options ended the run before the first epoch"),
        ("+trainer.val_check_interval=0.4", "trainer: its options left out the evaluation of every epoch"),
    ],
)
def test_options_without_a_result_are_one_line(command, tmp_path, option, line):
    run = command(*TINY, option, f"job_dir={tmp_path}/run")
    assert run.status == 1
    assert line in run.err
    assert run.err.count("\n") == 1


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")  # before a first step of the optimizer
def test_an_epoch_of_skipped_steps_has_no_loss_and_ends_no_run(command, tmp_path, monkeypatch):
    def poison(step):
        for parameter in step.method.parameters():
            parameter.grad = torch.full_like(parameter, float("nan"))
        return update(step)

    update = EagerStep.update
    monkeypatch.setattr(EagerStep, "update", poison)
    run = command(*TINY, "on_nonfinite=skip", "max_skipped=1000", f"job_dir={tmp_path}/run")
    assert run.status == 0, run.err
    assert "every step was skipped" in run.out
