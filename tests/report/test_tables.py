"""Text of other people in the report's files."""

import csv
import io

import pandas as pd
import pytest

from odcheap.report import tables
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
    ],
)
def test_a_name_is_no_markup(text, expected):
    assert escape_markdown(text) == expected
