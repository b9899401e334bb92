import pytest

from odcheap.utils.text import (
    escape_control_chars,
    format_accuracy,
    format_count,
    format_macs,
    format_mean_deviation,
    format_seconds,
    hide_folders,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/data sets/images", "images"),
        ("/home/me/images/", "images"),
        ("~/images", "images"),
        ("data_dir=/home/me/images: no such folder", "data_dir=images: no such folder"),
        ("no file '/a/b.txt' (/c/d, ../me/e)", "no file 'b.txt' (d, e)"),
        ("file:///home/me/x", "x"),
        ("data_dir=/my data/set one: no such folder", "data_dir=set one: no such folder"),
        ("data/images and/or 3/4", "data/images and/or 3/4"),
        ("https://x.example/a/b", "https://x.example/a/b"),
        ("/", "/"),
        ("a / b", "a / b"),
    ],
)
def test_a_path_is_reduced_to_its_last_name(text, expected):
    assert hide_folders(text, ["/my data/set one"]) == expected


def test_durations():
    assert [format_seconds(s) for s in (7, 600, 36000)] == ["7 s", "10 min", "10.0 h"]


def test_numbers_and_their_absence():
    assert [format_accuracy(0.5), format_accuracy(0.5, "+"), format_accuracy(None)] == ["50.00", "+50.00", "-"]
    assert [format_count(1234), format_count(None)] == ["1,234", "-"]
    found = [format_mean_deviation(*pair) for pair in ((0.9, 0.01), (0.9, None), (None, None))]
    assert found == ["90.00 ± 1.00", "90.00", "-"]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"),
        (0, "0"),
        (999, "999"),
        (5_400, "5.40 k"),
        (999_499, "999 k"),
        (999_500, "1.00 M"),
        (9_996_000, "10.0 M"),
        (20_472_448, "20.5 M"),
        (125_747_840, "126 M"),
        (1.81e9, "1.81 G"),
        (3.2154e13, "32.2 T"),
        (1.77e15, "1.77 P"),
        (4.2e21, "4200 E"),
    ],
)
def test_multiply_accumulates_have_three_digits_and_a_prefix(count, text):
    assert format_macs(count) == text


def test_control_characters_become_visible():
    assert escape_control_chars("a\n\x1b[31mb") == "a\\n\\x1b[31mb"
