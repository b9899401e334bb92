"""Options of Lightning's `Trainer` that change when an epoch ends or when it is evaluated."""

import csv
import json
import logging
import re

import pytest
import torch
from conftest import TINY

from odcheap.distributed import launch
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
    assert f"the training has ended in epoch 2 of 5: trainer.max_steps={steps + 2}\n" in run.out
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


def test_an_epoch_of_few_batches_has_the_schedule_of_a_whole_run_and_is_resumed(command, tmp_path):
    few = ["trainer.limit_train_batches=3", "scheduler.warmup=0", "trainer.max_epochs=4"]
    assert command(*TINY, *few, f"job_dir={tmp_path}/whole").status == 0
    rows = read_rows(tmp_path / "whole")
    assert [int(row["step"]) for row in rows] == [3, 6, 9, 12]
    assert [round(float(row["lr"]), 6) for row in rows] == [0.1, 0.1, 0.01, 0.001]
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    standard = summary["cost"]["training_macs"]
    assert command(*TINY, "trainer.max_epochs=4", f"job_dir={tmp_path}/long").status == 0
    longer = json.loads((tmp_path / "long" / "summary.json").read_text())["cost"]["training_macs"]
    batches = steps_of_an_epoch(read_rows(tmp_path / "long"))
    assert longer / standard == pytest.approx(437 / (3 * 64), rel=1e-6)
    assert batches == 7

    # The first two of the four epochs, and then the other two in another folder.
    checkpoint = tmp_path / "whole" / "checkpoints" / "epoch-0002.ckpt"
    assert command(f"resume={checkpoint}", "trainer=cpu", "logger=csv", f"job_dir={tmp_path}/again").status == 0
    again = read_rows(tmp_path / "again")
    names = ("step", "lr", "train/loss", "val/student_0/top1")
    assert [[row[name] for name in names] for row in again] == [[row[name] for name in names] for row in rows]
    refused = command(f"resume={tmp_path}/whole", "trainer.limit_train_batches=2")
    assert "trainer.limit_train_batches=2: would change the experiment" in refused.err


def test_a_limited_run_keeps_its_images_when_it_is_resumed(command, tmp_path):
    debug = [*TINY[:-2], "logger=csv", "experiment=debug", "data.limit=100", f"job_dir={tmp_path}/run"]
    run = command(*debug)
    assert run.status == 0, run.err
    assert "100 training, " in run.out
    assert "(data.limit=100)" in run.out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["images"] == {"train": 100, "val": 229, "test": 82}
    assert len(read_rows(tmp_path / "run")) == 1
    assert int(read_rows(tmp_path / "run")[0]["step"]) == 2
    again = command(f"resume={tmp_path}/run")
    assert again.status == 0, again.err
    assert "which is finished: nothing to do" in again.out
    refused = command(f"resume={tmp_path}/run", "data.limit=90")
    assert "data.limit=90: would change the experiment that is resumed" in refused.err


def test_a_training_ends_when_its_time_is_over(command, tmp_path):
    run = command(*TINY, "trainer.max_epochs=500", "+trainer.max_time={seconds:1}", f"job_dir={tmp_path}/run")
    assert run.status == 0, run.err
    assert re.search(r"the training has ended in epoch \d+ of 500: trainer.max_time=\{'seconds': 1\}\n", run.out)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["epochs"] < 500


def test_a_profiler_of_lightning_reports_and_fewest_steps_are_made(command, tmp_path, caplog):
    logging.getLogger("pytorch_lightning.profilers").addHandler(caplog.handler)  # Lightning's own prints on stderr
    options = ["trainer.max_epochs=1", "+trainer.profiler=simple", "+trainer.min_steps=5"]
    run = command(*TINY, *options, f"job_dir={tmp_path}/run")
    assert run.status == 0, run.err
    assert "run_training_epoch" in caplog.text
    assert "has ended" not in run.out


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("+trainer.max_time=soon", "trainer: `Timer(duration='soon')` is not a valid duration"),
        ("+trainer.profiler=none", "trainer: When passing string value for the `profiler` parameter"),
        ("+trainer.max_steps=1", "trainer.max_steps=1: must be "),
        ("+trainer.check_val_every_n_epoch=3", "check_val_every_n_epoch=3: must be at most trainer.max_epochs=2"),
        ("+trainer.fast_dev_run=true", "trainer.fast_dev_run=true: is not an option"),
        ("+trainer.limit_test_batches=0", "trainer.limit_test_batches=0: is not an option"),
        (
            "trainer.limit_train_batches=0",
            "limit_train_batches=0: must be a whole number, 1 or more, or a number,",
        ),
        ("trainer.limit_train_batches=1.5", "limit_train_batches=1.5: must be a whole number, 1 or more, or a number,"),
        ("trainer.accumulate_grad_batches=x", "trainer.accumulate_grad_batches=x: must be a whole number, 1 or more"),
        ("+trainer.max_steps=-5", "trainer.max_steps=-5: must be a whole number, -1 or more"),
        ("+trainer.check_val_every_n_epoch=0", "trainer.check_val_every_n_epoch=0: must be a whole number, 1 or more"),
        (
            "+trainer.val_check_interval=0",
            "val_check_interval=0: must be a whole number, 1 or more, or a number",
        ),
        (
            "+trainer.val_check_interval=1000",
            "val_check_interval=1000: must be at most 7, the number of batches",
        ),
        (
            "trainer.gradient_clip_algorithm=x",
            "gradient_clip_algorithm=x: must be one of norm, value, or null",
        ),
        (
            "trainer.gradient_clip_algorithm=value",
            "trainer.gradient_clip_algorithm=value: has no effect without trainer",
        ),
        ("+trainer.max_time={minutes:0}", "trainer: its options ended the run before the first epoch"),
        (
            "trainer.accelerator=gpu",
            "trainer.accelerator=gpu: PyTorch finds no GPU that it can use; trainer=cpu trains",
        ),
        ("+trainer.val_check_interval=0.4", "trainer: its options left out the evaluation of every epoch"),
    ],
)
def test_options_without_a_result_are_one_line(command, tmp_path, option, line):
    run = command(*TINY, option, f"job_dir={tmp_path}/run")
    assert run.status == 1
    assert line in run.err
    assert run.err.count("\n") == 1


@pytest.mark.skipif(launch.has_gpu(), reason="there is a GPU")
@pytest.mark.parametrize("option", ["trainer=gpu", "trainer.accelerator=gpu", "trainer.accelerator=cuda"])
def test_without_a_gpu_a_line_says_so(command, option):
    run = command(*(given for given in TINY if given != "trainer=cpu"), option)
    assert run.status == 1
    assert run.err.startswith(f"error: {option}: PyTorch finds no GPU that it can use; trainer=cpu ")
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
