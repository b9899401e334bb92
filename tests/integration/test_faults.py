"""What may befall a run: a disk that fails at any of its calls, numbers that are none. Nothing is lost."""

import builtins
import errno
import json
import os

import pytest
import torch
from conftest import TINY

from odcheap.training.train_step import EagerStep
from odcheap.utils import files

NUMBERS = (errno.ENOSPC, errno.EIO, errno.ESTALE, errno.EBUSY, errno.ETIMEDOUT, errno.EPERM, errno.EFBIG)
EVERY = 24  # of the calls fail in the suite; all do in the long form


class Disk:
    """Counts the calls by which our files are written, and fails the one with this number."""

    def __init__(self, monkeypatch, fail=None, number=errno.ENOSPC):
        self.calls, self.fail, self.number = 0, fail, number
        self.open = builtins.open
        monkeypatch.setattr(files, "open", self.opened, raising=False)
        for name in ("fsync", "replace"):
            monkeypatch.setattr(files.os, name, self.counted(getattr(os, name)))

    def counted(self, call):
        def counting(*given, **more):
            self.calls += 1
            if self.calls - 1 == self.fail:
                raise OSError(self.number, os.strerror(self.number))
            return call(*given, **more)

        return counting

    def opened(self, path, mode="r", *given, **more):
        if "w" not in mode:
            return self.open(path, mode, *given, **more)
        file = self.counted(self.open)(path, mode, *given, **more)
        return Written(file, self)


class Written:
    """A file half of whose content is on the disk when a write fails."""

    def __init__(self, file, disk):
        self.file, self.flush = file, disk.counted(file.flush)
        self.whole = disk.counted(file.write)

    def write(self, content):
        self.file.write(content[: len(content) // 2])
        return self.whole(content[len(content) // 2 :])

    def fileno(self):
        return self.file.fileno()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


@pytest.fixture
def straight(command, tmp_path, monkeypatch):
    """An undisturbed run's student, and how many calls wrote its folder."""
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        assert command(*TINY, f"job_dir={tmp_path}/straight").status == 0
    assert disk.calls > 50
    return (tmp_path / "straight" / "student.safetensors").read_bytes(), disk.calls


def fails_and_goes_on(command, job_dir, monkeypatch, call, number):
    with monkeypatch.context() as patch:
        disk = Disk(patch, fail=call, number=number)
        result = command(*TINY, f"job_dir={job_dir}", "resume=auto")
    assert disk.calls > call
    assert result.status == 1, (call, result)
    assert result.err.startswith("error: "), (call, result.err)
    assert result.err.count("\n") == 1, (call, result.err)
    assert os.strerror(number) in result.err
    assert not list(job_dir.rglob("*.part"))
    for path in job_dir.rglob("*.ckpt"):
        assert torch.load(path, weights_only=True)["epoch"] in (0, 1)
    result = command(*TINY, f"job_dir={job_dir}", "resume=auto")
    assert result.status == 0, (call, result.err)
    assert "skipped:" not in result.out


def every_call_fails_in_turn(command, straight, tmp_path, monkeypatch, calls):
    expected, count = straight
    for call in calls(count):
        job_dir = tmp_path / f"run{call}"
        fails_and_goes_on(command, job_dir, monkeypatch, call, NUMBERS[call % len(NUMBERS)])
        assert (job_dir / "student.safetensors").read_bytes() == expected, call


def test_a_disk_that_fails_now_and_then_loses_nothing(command, straight, tmp_path, monkeypatch):
    every_call_fails_in_turn(command, straight, tmp_path, monkeypatch, lambda count: range(0, count, EVERY))


@pytest.mark.slow
def test_a_disk_that_fails_at_every_call_in_turn_loses_nothing(command, straight, tmp_path, monkeypatch):
    every_call_fails_in_turn(command, straight, tmp_path, monkeypatch, range)


def test_nan_at_a_chosen_step_ends_the_run_with_its_place_and_the_rest_is_as_if_nothing_had_been(
    command, straight, tmp_path, monkeypatch
):
    update, calls = EagerStep.update, []

    def poisoned(step):
        calls.append(step)
        if len(calls) == 10:
            next(step.method.parameters()).grad[0] = float("nan")
        return update(step)

    with monkeypatch.context() as patch:
        patch.setattr(EagerStep, "update", poisoned)
        result = command(*TINY, f"job_dir={tmp_path}/run")
    assert result.status == 1
    assert "on_nonfinite=stop: epoch 2, step 10: a gradient is not finite; the last checkpoint is kept" in result.err
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    assert command(*TINY, f"job_dir={tmp_path}/run", "resume=auto").status == 0
    assert (tmp_path / "run" / "student.safetensors").read_bytes() == straight[0]
