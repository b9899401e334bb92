from types import SimpleNamespace

import pytest
from export.test_load_run import SETTINGS, write_run

from odcheap.export import model_card
from odcheap.export.latency import ONNX_RUNTIME, PYTORCH, Key
from odcheap.export.load_run import load_run_student
from odcheap.export.model_card import DENSE, STANDARD
from odcheap.export.verify import Verification
from odcheap.layers.cheap_conv import DW, Standard
from odcheap.models.cifar import CifarResNet
from odcheap.predict import Timing


def found(student, standard, dense=None):
    """Milliseconds of one picture and of 64."""
    times = {"student.onnx": student, STANDARD: standard} | ({DENSE: dense} if dense else {})
    made = {
        Key(name, ONNX_RUNTIME, batch, threads): Timing(ms * (1 + threads) / 1e3, ms / 500)
        for name, pair in times.items()
        for batch, ms in zip((1, 64), pair, strict=True)
        for threads in (0, 1)
    }
    return made | {
        Key(name, PYTORCH, batch, 1): Timing(0.001, 0.002) for name in ("the student", STANDARD) for batch in (1, 64)
    }


def pair(conv):
    return SimpleNamespace(network=CifarResNet(8, conv, 3), standard=CifarResNet(8, Standard(), 3))


def test_a_faster_student_says_how_much():
    (line,) = model_card.describe_speed(pair(DW()), found((1, 20), (3, 50)))
    assert "its speed is 3.00 times with one image, 2.50 times with 64 images" in line


@pytest.mark.parametrize("slow", [(4, 20), (1, 60)])
def test_a_slower_one_says_so_first_and_names_what_is_faster(slow):
    first, second = model_card.describe_speed(pair(DW()), found(slow, (3, 50), dense=(2, 40)))
    assert first.startswith("**Not faster than the standard network here**")
    assert "student-dense.onnx" in second
    assert "1.50 times with one image, 1.25 times with 64" in second


def test_the_standard_network_is_not_held_against_itself():
    assert model_card.describe_speed(pair(Standard()), found((4, 20), (3, 50))) == [
        "This is the standard network itself."
    ]


@pytest.mark.parametrize("text", ["a`b", "line\nend", "\x1b[31mred", "<script>", "| cell |", "\udcff"])
def test_somebody_elses_text_is_no_markup(text):
    made = model_card.format_code(text)
    assert made.isprintable()
    assert made.count("`") == 2
    assert made.startswith("`")
    assert made.endswith("`")


def write_card(tmp_path, verification, settings=SETTINGS):
    run = load_run_student(write_run(tmp_path / "run", settings=settings))
    for name in ("student.onnx", "labels.json"):
        (tmp_path / name).write_bytes(b"12345")
    timings = found((1, 20), (3, 50))
    return model_card.write_card(run, tmp_path / "run", {}, timings, verification, "a machine", "(n, 3, height, width)")


def test_the_card_says_what_was_checked_and_on_what(tmp_path):
    seen = Verification(360, True, {"student.onnx": 1e-6}, {"student.onnx": 0.5, "student-int8.onnx": 0.47}, "")
    text = write_card(tmp_path, seen)
    opening = text.split("```")[0]
    assert "Test accuracy 0.5000 on 360 images; 0.5000 by the run's summary, in 32-true." in opening
    assert "In 8-bit integers 0.4700: +0.0300 is lost." in opening
    assert "360 test images, from their files" in text
    assert "not verified" not in text.lower()
    assert "- `student.onnx`: 1.0e-06" in text


def test_without_data_it_says_so_twice(tmp_path):
    text = write_card(tmp_path, Verification(64, False, {}, {}, "data_dir=x: no such\nfolder"))
    assert "Test accuracy 0.5000 by the run's summary; **not verified on data** here." in text.split("```")[0]
    assert "**Not verified on data**: `data_dir=x: no such\\nfolder`." in text


def test_a_strangers_settings_are_shown_harmlessly(tmp_path):
    split = "x`\n\n# Owned\x1b[2J<img src=x>"
    text = write_card(tmp_path, Verification(64, False, {}, {}, ""), SETTINGS | {"split": split})
    assert "# Owned" not in text.replace("\\n\\n# Owned", "")
    assert "\x1b" not in text
    assert "`x'\\n\\n# Owned\\x1b[2J<img src=x>`" in text
