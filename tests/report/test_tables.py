"""Text of other people in the report's files; tables of the console: short names, and columns that fit."""

import csv
import io
import re
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from odcheap.report import tables
from odcheap.report.load_runs import RunFolder
from odcheap.report.statistics import Latency, Spread
from odcheap.report.tables import build_console_table, shorten_names
from odcheap.utils.text import escape_markdown


@pytest.mark.parametrize("text", ["=1+1", "+cmd", "-cmd|x", "@SUM(A1)", "\t=1+1", " =1"])
def test_no_cell_is_a_formula(text):
    content = tables.to_csv(pd.DataFrame({"method": [text, "od"], "params": [5, -2.5]}, dtype=object))
    rows = list(csv.reader(io.StringIO(content)))
    assert rows[1][0] == f"'{text}"
    assert [row[1] for row in rows[1:]] == ["5", "-2.5"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<img src=x>", r"\<img src=x\>"),
        ("![x](y)", r"!\[x\](y)"),
        ("a|b", r"a\|b"),
        ("*b* &lt; $x$", r"\*b\* \&lt; \$x\$"),
        ("https://x.example", "https\\://x.example"),
        ("www.x.example", "www\\.x.example"),
        ("a@b.example", r"a\@b.example"),
        ("max_epochs a__b 1_000", "max_epochs a__b 1_000"),  # Markdown reads no emphasis within a word
        ("_a_ __b__ c_, _", r"\_a\_ \_\_b\_\_ c\_, \_"),
    ],
)
def test_a_name_is_no_markup(text, expected):
    assert escape_markdown(text) == expected


@pytest.mark.parametrize(
    ("column", "value", "text"),
    [
        ("ensemble", Spread(2, 0.91234, 0.0056), "91.23 ± 0.56"),
        ("ensemble", Spread(1, 0.9, None), "90.00"),
        ("gain", Spread(2, 0.01, 0.0), "+1.00 [+1.00, +1.00]"),
        ("gain", Spread(1, 0.01, None), "+1.00 (not resolved)"),
        ("macs", 235_648, "236 k"),
        ("training macs", 32_154_278_400_000, "32.2 T"),
        ("training seconds", 28.9, "29 s"),
        ("training seconds", 5869.2, "98 min"),
        ("latency ms", Latency(0.026, 0.02, 0.03), "0.0260"),
        ("latency ms", Latency(123.4, 0.02, 0.03), "123"),
        ("params", 40522, "40,522"),
        ("method", "od_", r"od\_"),
        ("gain", None, ""),
    ],
)
def test_cells_have_units_that_fit(column, value, text):
    assert tables.format_cell(column, value) == text


def test_names_in_the_text_of_a_report_are_no_markup_and_no_folders():
    hostile = "<img src=x>|[a](b) $x$ `<b>"
    folder = RunFolder(Path("/my zq/<b>run"), "failed", "/my zq/<b>run/x.json: <u>why `x`")
    runs = pd.DataFrame({"name": [hostile, "od"], "seed": [0, 0], "gain": [0.5, 0.0], "baseline": [False, True]})
    table = pd.DataFrame({"method": [hostile]})
    text = tables.format_report([folder], runs, table, {"gains": hostile}, "Test images", hostile)
    assert "zq" not in text
    outside_of_code = re.sub(r"`[^`\n]*`", "", text.replace("![gains](gains.png)", "").replace("\\`", ""))
    assert "img src" in outside_of_code
    assert re.findall(r"(?<!\\)[<>\[$]", outside_of_code) == []
    assert (
        len({len(re.findall(r"(?<!\\)\|", line)) for line in text.split("\n") if "seed 0" in line or "+50" in line})
        == 1
    )


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
