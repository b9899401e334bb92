"""Loader processes that fail, that deliver nothing, or that another start method has started."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from odcheap.data import image_folder
from odcheap.data.image_folder import BrokenImages, Sample, Stream
from odcheap.data.transforms import Normalization
from odcheap.utils.errors import describe_external_failure


class Fixed(Dataset):
    """Black images. `broken` is what each sample reports as unreadable, `seconds` the time that each one takes."""

    def __init__(self, broken=(), seconds=0.0):
        self.broken, self.seconds = list(broken), seconds

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return Sample(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.tensor(0), self.broken)


def iterate(images):
    norm = Normalization((0.0,) * 3, (1.0,) * 3)
    stream = Stream(images, norm, torch.device("cpu"), 1, BrokenImages(10))
    return stream.batches([[0, 1], [2, 3]])


def load(images):
    return list(iterate(images))


def expect_line(images):
    with pytest.raises(RuntimeError) as caught:
        load(images)
    line = describe_external_failure(caught.value)
    assert line.startswith("data.workers: ")
    assert "/dev/shm" in line
    assert "\n" not in line


def test_a_batch_that_cannot_be_handed_over_ends_the_run(soon):
    """PyTorch reports a full /dev/shm in the same place as an object that cannot be pickled."""
    expect_line(Fixed(broken=[(lambda: "cannot be pickled", "")]))


def test_a_loader_that_delivers_nothing_ends_the_run(monkeypatch):
    assert 60 <= image_folder.BATCH_TIMEOUT <= 600  # seconds; 0 would be no limit
    monkeypatch.setattr(image_folder, "BATCH_TIMEOUT", 1)
    expect_line(Fixed(seconds=4))


def test_loader_processes_end_with_the_run_for_each_start_method():
    """The run ends within an epoch, as after an error: multiprocessing then ends its processes by a signal."""
    script = """
import multiprocessing
from tests.data.test_loader_processes import Fixed, iterate
if __name__ == "__main__":
    epochs = []
    for method in ("fork", "forkserver", "spawn"):
        multiprocessing.set_start_method(method, force=True)
        epochs.append(iterate(Fixed()))
        print(method, len(next(epochs[-1]).target))
"""
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=100
    )
    assert (run.returncode, run.stdout) == (0, "fork 2\nforkserver 2\nspawn 2\n"), run.stderr
