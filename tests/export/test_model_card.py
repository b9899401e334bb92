import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from export.test_load_run import SETTINGS, write_run
from markdown_it import MarkdownIt

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
    assert "Test accuracy 50.00 % on 360 images; 50.00 % by the run's summary, in 32-true." in opening
    assert "In 8-bit integers 47.00 %: a change of -3.00 percentage points." in opening
    assert "360 test images, from their files" in text
    assert "not verified" not in text.lower()
    assert "- `student.onnx`: 1.0e-06" in text


def test_without_data_it_says_so_twice(tmp_path):
    text = write_card(tmp_path, Verification(64, False, {}, {}, "data_dir=x: no such\nfolder"))
    assert "Test accuracy 50.00 % by the run's summary; **not verified on data** here." in text.split("```")[0]
    assert "**Not verified on data**: `data_dir=x: no such\\nfolder`." in text


def test_a_strangers_settings_are_shown_harmlessly(tmp_path):
    split = "x`\n\n# Owned\x1b[2J<img src=x>"
    text = write_card(tmp_path, Verification(64, False, {}, {}, ""), SETTINGS | {"split": split})
    assert "# Owned" not in text.replace("\\n\\n# Owned", "")
    assert "\x1b" not in text
    assert "`x'\\n\\n# Owned\\x1b[2J<img src=x>`" in text


HOSTILE = "<img src=x> ![a](b) https://x.example www.x.example me@x.example | *b* `c` $x$\n# Owned"
ADDRESS = re.compile(r"(?i)\b(https?|ftp|mailto):|\bwww\.|\w@\w")


def parse_markdown(text):
    """Returns the parts of a document: their types and their contents."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    return [(part.type, part.content.strip()) for token in tokens for part in (token, *(token.children or ()))]


def test_nothing_that_others_have_written_is_markup_in_the_card(tmp_path, monkeypatch):
    config = {"data": {"name": HOSTILE}, "trainer": {"precision": HOSTILE}, "backbone": {"part": HOSTILE, "x": HOSTILE}}
    path = write_run(tmp_path / "run", settings=SETTINGS | {"split": HOSTILE}, config=json.dumps(config))
    run = load_run_student(path)._replace(title=HOSTILE, job_dir=tmp_path / HOSTILE.replace("/", ""))
    run.standard.standard_note = HOSTILE
    run.settings["backbone"] = {"part": HOSTILE, "name": HOSTILE}  # the title of the card
    run.summary.update(data=HOSTILE, epochs=HOSTILE, versions={"torch": HOSTILE})
    timings = found((1, 20), (3, 50))
    for on_data in (True, False):
        seen = Verification(64, on_data, {}, {"student.onnx": 0.5} if on_data else {}, HOSTILE)
        text = model_card.write_card(run, tmp_path / "run", {}, timings, seen, HOSTILE, "(n, 3, height, width)")
        parts = parse_markdown(text)
        assert {kind for kind, _ in parts}.isdisjoint({"link_open", "image", "html_inline", "em_open"})
        html = {content for kind, content in parts if kind == "html_block"}
        assert html == {"<details><summary>All timings</summary>", "</details>"}
        # No address is outside of code without a backslash, which keeps it from becoming a link.
        outside = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
        assert ADDRESS.findall(outside) == []
        rows = [line for line in text.split("\n") if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 2  # of two tables
        assert len(re.findall("^# ", text, re.MULTILINE)) == 1


def test_the_card_names_no_folder_of_the_machine(tmp_path):
    options = {"data": {"part": "x", "load": {"data_dir": "/home/zqme/my data/flowers"}}}
    options |= {"method": {"part": "kd", "teacher_weights": "~/zqme/teacher.pt"}, "block_type": {"part": "../zqme/DW"}}
    path = write_run(tmp_path / "zqparent" / "run", config=json.dumps(options | {"trainer": {"precision": 32}}))
    run = load_run_student(path)._replace(job_dir=Path("zqparent/run"))  # as it is given on the command line
    run.summary.update(data="/home/zqme/flowers")
    seen = Verification(64, False, {}, {}, "data_dir=/home/zqme/flowers: no such folder")
    text = model_card.write_card(run, path, {}, found((1, 20), (3, 50)), seen, "a machine", "(n, 3, height, width)")
    assert "zq" not in text
    assert str(tmp_path) not in text
    assert "- student 1 of epoch 5 of the run `run`" in text
    assert "`data_dir=flowers: no such folder`" in text
    assert "data: `x load=data_dir=flowers`" in text
    assert "method: `kd teacher_weights=teacher.pt`" in text
