from types import SimpleNamespace

import pytest
from rich.console import Console

from odcheap.training.callbacks import Narrator, Record
from odcheap.training.module import Figures
from odcheap.utils.text import format_seconds


def record(tmp_path, select="val"):
    return Record(tmp_path, select, "top1", every=None, keep=2)


def figures(top1, balanced=None):
    return Figures(top1, top1, balanced or top1, [])


def module(*top1):
    """A module of students with these accuracies and a better teacher."""
    method = SimpleNamespace(candidates=lambda: [None] * len(top1))
    return SimpleNamespace(figures={"val": figures([*top1, 0.99])}, method=method)


def test_ties_go_to_the_earlier_epoch_then_the_lower_student(tmp_path):
    watched = record(tmp_path)
    for epoch, top1 in enumerate([(0.5, 0.4), (0.6, 0.6), (0.6, 0.6), (0.1, 0.2)]):
        watched.choose(epoch, module(*top1))
    assert watched.selected == {"candidate": 0, "epoch": 1, "score": 0.6}


def test_the_teacher_is_never_selected(tmp_path):
    watched = record(tmp_path)
    watched.choose(0, module(0.3, 0.4))
    assert watched.selected["candidate"] == 1


def test_the_figure_that_decides_is_the_one_asked_for(tmp_path):
    watched = Record(tmp_path, "val", "balanced_accuracy", every=None, keep=2)
    students = module(0.9, 0.1)
    students.figures["val"] = figures([0.9, 0.1, 0.99], [0.3, 0.4, 0.5])
    watched.choose(0, students)
    assert watched.selected == {"candidate": 1, "epoch": 0, "score": 0.4}


def test_last_picks_nothing(tmp_path):
    watched = record(tmp_path, "last")
    for epoch, top1 in enumerate([(0.1, 0.9), (0.2, 0.3)]):
        watched.choose(epoch, module(*top1))
    assert watched.selected["candidate"] == 0
    assert watched.selected["epoch"] == 1


@pytest.mark.parametrize(
    ("device", "seconds", "hint"), [("cpu", 10.0, True), ("cpu", 0.01, False), ("cuda", 10.0, False)]
)
def test_a_long_run_on_a_cpu_is_told_of_a_shorter_recipe(tmp_path, capsys, device, seconds, hint):
    narrator = Narrator(record(tmp_path), Console(width=200), "experiment=short")
    trainer = SimpleNamespace(num_training_batches=100, max_epochs=10, global_step=25)
    narrator.expect(trainer, SimpleNamespace(device=SimpleNamespace(type=device)), seconds)
    said = capsys.readouterr().out
    assert ("experiment=short" in said) == hint
    assert format_seconds(seconds * 975) in said
