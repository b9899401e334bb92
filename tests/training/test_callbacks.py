import pytest
import torch
from rich.console import Console

from odcheap.training.callbacks import ProgressReporter, Record
from odcheap.training.module import Figures
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
