from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from odcheap.utils.arguments import check_arguments, check_value
from odcheap.utils.errors import OptionError

Rate = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]


@pytest.mark.parametrize(
    ("value", "annotation", "allowed"),
    [
        (0, Rate, "a number, above 0 and at most 1"),
        ("0.5", Rate, "a number"),
        (True, Rate, "a number"),
        (float("nan"), float, "a number"),
        (None, Rate, "a number"),
        (1.5, Rate | None, "a number, above 0 and at most 1, or null"),
        (2.0, Count, "a whole number, 1 or more"),
        (True, Count, "a whole number"),
        ("x", Literal["a", "b"], "one of a, b"),
        (1, bool, "true or false"),
        ([1, "2"], list[float], "a list of entries, each a number"),
        ([], Annotated[list[str], Field(min_length=1)], "a list of entries, each a string, not empty"),
        ([1], Annotated[list[int], Field(min_length=2)], "a list of entries, each a whole number, 2 entries or more"),
        ([1], Annotated[list[int], Field(min_length=2, max_length=2)], "a list of .* number, exactly 2 entries"),
        ((1.0,), tuple[float, float], "a list of exactly 2 entries, each a number"),
        ((1.0, 2), tuple[float, str], "a list of exactly 2 entries: a number, a string"),
        ((1.0, "a"), tuple[float, ...], "a list of entries, each a number"),
    ],
)
def test_refuses(value, annotation, allowed):
    with pytest.raises(OptionError, match=f"group.name=.*: must be {allowed}"):
        check_value("group.name", value, annotation)


@given(st.floats(min_value=1e-300, max_value=1) | st.just(1))
def test_accepts(value):
    check_value("x", value, Rate)
    check_value("x", None, Rate | None)


def test_the_decorator_checks_functions_and_constructors():
    @check_arguments("group")
    def call(first: object, rate: Rate = 0.5, kind: Literal["a", "b"] = "a") -> tuple:
        return first, rate, kind

    @check_arguments("")
    class Thing:
        def __init__(self, count: Count):
            self.count = count

    assert call("x", kind="b") == ("x", 0.5, "b")
    with pytest.raises(OptionError, match="^group.rate=2: must be"):
        call("x", 2)
    with pytest.raises(OptionError, match="^count=0: must be a whole number, 1 or more"):
        Thing(0)
    assert Thing(count=3).count == 3
    with pytest.raises(TypeError):
        Thing()
