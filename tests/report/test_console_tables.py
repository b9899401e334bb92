"""Tables of the console: short names, and columns that fit."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from odcheap.report.tables import build_console_table, shorten_names


def shorten(*names):
    return shorten_names([Path(name) for name in names])


def test_names_show_what_differs():
    names, shared = shorten("a=1,seed=0,x=y", "a=1,seed=1,x=y", "a=2,seed=1,x=y")
    assert (names, shared) == (["a=1,seed=0", "a=1,seed=1", "a=2,seed=1"], "x=y")
    assert shorten("a=1") == (["a=1"], "")
    assert shorten() == ([], "")


def test_names_are_without_the_groups_of_options():
    names, _ = shorten(
        "block_type=DW,experiment=[cifar10_od,short],trainer.max_epochs=5",
        "block_type=Shift,experiment=[cifar10_alone,short],trainer.max_epochs=5",
        "block_type=DW,experiment=[cifar10_od,short],trainer.max_epochs=6",
    )
    assert names == ["DW,[cifar10_od,short],max_epochs=5", "Shift,[cifar10_alone,short],max_epochs=5",
                     "DW,[cifar10_od,short],max_epochs=6"]  # fmt: skip


def test_groups_are_kept_if_names_would_be_the_same():
    assert shorten("a.lr=1", "b.lr=1")[0] == ["a.lr=1", "b.lr=1"]


def test_runs_in_different_folders_are_told_apart():
    names, shared = shorten("sweep/one/seed=0", "sweep/two/seed=0", "sweep/one/seed=1")
    assert (names, shared) == (["one/seed=0", "two/seed=0", "one/seed=1"], "")


ROWS = [{"run": "a" * 30, "gain": "1.00\n(not resolved)", "cost": "7", "time": "3 min"}]


@pytest.mark.parametrize(
    ("width", "shown", "left_out"),
    [
        (60, ["gain", "cost", "time"], ""),
        (59, ["gain", "cost"], "left out for lack of width: time"),
        (51, ["gain"], "left out for lack of width: cost, time"),
        (44, [], "left out for lack of width: gain, cost, time"),
    ],
)
def test_columns_are_dropped_in_the_order_of_importance(width, shown, left_out):
    out = io.StringIO()
    # 24 characters of the name, which may be wrapped, 14 + 4 + 5 of the others, three for each column, and one.
    table = build_console_table(ROWS, left=("run",), width=width, optional=("gain", "cost", "time"))
    Console(file=out, width=width, markup=False).print(table)
    heading = out.getvalue().splitlines()[1]
    assert [name for name in ("gain", "cost", "time") if name in heading] == shown
    assert max(map(len, out.getvalue().splitlines())) <= width
    assert " ".join(out.getvalue().split("┘")[1].split()) == left_out
