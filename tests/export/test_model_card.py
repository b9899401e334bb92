import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from export.test_load_run import SETTINGS, write_run
from markdown_it import MarkdownIt

from odcheap.export import card_accuracy, card_speed, model_card
from odcheap.export.card_speed import STANDARD
from odcheap.export.latency import Key
from odcheap.export.load_run import load_run_student
from odcheap.export.runtimes import DENSE, INT8, ONNX_RUNTIME, OPENVINO, PYTORCH
from odcheap.export.verify import Verification
from odcheap.layers.cheap_conv import DW, Standard
from odcheap.models import flops
from odcheap.models.cifar import CifarResNet
from odcheap.predict import Timing


def found(student, standard, dense=None):
    """Milliseconds of one picture and of 64."""
    times = {"student.onnx": student, STANDARD: standard} | ({DENSE: dense} if dense else {})
    spread = (0.98, 1.0, 1.01)  # of the rounds
    made = {
        Key(name, ONNX_RUNTIME, batch, threads): Timing(
            ms * (1 + threads) / 1e3, ms / 500, rounds=tuple(ms * (1 + threads) / 1e3 / part for part in spread)
        )
        for name, pair in times.items()
        for batch, ms in zip((1, 64), pair, strict=True)
        for threads in (0, 1)
    }
    return made | {
        Key(name, PYTORCH, batch, 1): Timing(0.001, 0.002, rounds=(0.001,) * 3)
        for name in ("the student", STANDARD)
        for batch in (1, 64)
    }


def pair(conv):
    networks = {"network": CifarResNet(8, conv, 3), "standard": CifarResNet(8, Standard(), 3)}
    return SimpleNamespace(**networks, image_size=(3, 32, 32), job_dir=Path("run"))


def test_a_faster_student_says_how_much():
    (line,) = card_speed.describe_speed(pair(DW()), found((1, 20), (3, 50)))
    assert (
        "in ONNX Runtime on this CPU the student is 3.00 (3.00 to 3.00) times as fast with 1 image and is 2.50" in line
    )
    assert "ranges: quartiles of 3 rounds" in line
    assert "could not be measured" not in line
    assert "PyTorch" not in line


def slow_down(timings, name, factors, runtime=ONNX_RUNTIME):
    """The timings in which one network took longer in each round by these factors."""
    return {
        key: t._replace(rounds=tuple(a * b for a, b in zip(t.rounds, factors, strict=True)))
        if (key.name, key.runtime) == (name, runtime)
        else t
        for key, t in timings.items()
    }


def slow_process(timings, running):
    """The timings of a process that ran in this fraction of the time."""
    return {key: timing._replace(running=running) for key, timing in timings.items()}


RATIO = re.compile(r"times as (fast|long)")


@pytest.mark.parametrize(
    ("timings", "running", "reason"),
    [
        (slow_down(found((1, 20), (3, 50)), STANDARD, (1, 2.4, 6.9)), 0.9, "the rounds of the measurement disagree."),
        (
            found((1, 20), (3, 50)),
            0.4,
            "the machine was busy (the calls waited for other programs for 60 % of the time).",
        ),
        (slow_down(found((1, 20), (3, 50), dense=(2, 40)), DENSE, (1, 2, 3)), 1.0, "the rounds of the measurement"),
    ],
    ids=["rounds", "busy", "dense"],
)
def test_an_uncertain_speed_is_not_stated(timings, running, reason):
    run, timings = pair(DW()), slow_process(timings, running)
    text = "\n".join(card_speed.describe_speed(run, timings))
    assert f"**The speed could not be measured**: {reason}" in text
    assert not RATIO.search(text)
    student, standard = (flops.count_macs(network, run.image_size) for network in (run.network, run.standard))
    assert f"needs {standard / student:.1f} times fewer multiply-accumulates" in text
    assert "On a quiet machine, `odcheap export JOB_DIR --overwrite` measures the speed" in text
    assert "`python predict.py --bench`" in text
    assert f"{card_speed.find_disturbance(run, timings)}.".startswith(reason)
    of_python = SimpleNamespace(**vars(run) | {"job_dir": None})
    assert "`export_student` with `overwrite=True`" in "\n".join(card_speed.describe_speed(of_python, timings))


def test_a_quiet_machine_has_no_mark():
    timings = slow_process(found((1, 20), (3, 50)), 0.9)
    assert RATIO.search("\n".join(card_speed.describe_speed(pair(DW()), timings)))
    assert card_speed.find_disturbance(pair(DW()), timings) == ""


def test_the_card_of_a_busy_machine_has_no_ratio(tmp_path):
    seen = Verification(64, {}, {}, "no data")
    text = write_card(tmp_path, seen, running=0.2)
    assert "**The speed could not be measured**: the machine was busy" in text.split("```")[0]
    assert "**The times are uncertain**: the machine was busy" in section(text, "Size and speed")
    assert not RATIO.search(text)


def test_where_pytorch_says_the_opposite_the_headline_says_both():
    timings = slow_down(found((1, 20), (3, 50)), "the student", (3.8, 3.6, 4.2), PYTORCH)
    (line,) = card_speed.describe_speed(pair(DW()), timings)
    assert "3.00 (3.00 to 3.00) times as fast with 1 image" in line
    assert "**In PyTorch on this CPU it is the opposite**: it takes 3.8 (3.7 to 4.0) times as long with 1 image" in line
    faster = slow_down(found((4, 60), (3, 50)), STANDARD, (2, 2, 2), PYTORCH)
    (line,) = card_speed.describe_speed(pair(DW()), faster)
    assert line.startswith("**Not faster than the standard network here**")
    assert "**In PyTorch on this CPU it is the opposite**: it is 2.00 (2.00 to 2.00) times as fast with 1 image" in line


@pytest.mark.parametrize("slow", [(4, 20), (1, 60)])
def test_a_slower_one_says_so_first_and_names_what_is_faster(slow):
    first, second = card_speed.describe_speed(pair(DW()), found(slow, (3, 50), dense=(2, 40)))
    assert first.startswith("**Not faster than the standard network here**")
    assert "student-dense.onnx" in second
    assert (
        "is 1.50 (1.50 to 1.50) times as fast with 1 image and is 1.25 (1.25 to 1.25) times as fast with 64" in second
    )


def add_int8(timings, times, runtime=ONNX_RUNTIME):
    """The timings with those of 8-bit integers: milliseconds of 1 image and of 64."""
    made = {
        key._replace(name=INT8, runtime=runtime): t._replace(rounds=tuple(ms * part / 1e3 for part in (0.98, 1, 1.01)))
        for key, t in timings.items()
        for batch, ms in zip((1, 64), times, strict=True)
        if key.name == "student.onnx" and key.batch == batch
    }
    return timings | made


@pytest.mark.parametrize(
    ("times", "line"),
    [
        (
            (1.3, 16),
            "**Slower than `student.onnx` here**: `student-int8.onnx` in ONNX Runtime takes 1.3",
        ),
        ((0.5, 16), "Compared with `student.onnx` on this CPU, `student-int8.onnx` in ONNX Runtime is 2.0"),
    ],
)
def test_the_card_says_if_8_bit_integers_are_slower_than_floats(times, line):
    (text,) = card_speed.describe_further_speeds(add_int8(found((1, 20), (3, 50)), times))
    assert text.startswith(line)
    assert "times as fast with 64 images." in text
    assert card_speed.describe_further_speeds(found((1, 20), (3, 50))) == []


def add_openvino(timings, times):
    """The timings with those of OpenVINO: milliseconds of `student.onnx` and of the standard network for 1 image."""
    rounds = {"student.onnx": times[0], STANDARD: times[1]}
    made = {
        Key(name, OPENVINO, 1, 1): Timing(ms / 1e3, ms / 500, rounds=tuple(ms * part / 1e3 for part in (0.98, 1, 1.01)))
        for name, ms in rounds.items()
    }
    return timings | made


def test_the_card_compares_openvino_with_onnx_runtime():
    timings = add_openvino(found((1, 20), (3, 50)), (4, 3))
    (line,) = card_speed.describe_further_speeds(timings)
    start = "**Slower than ONNX Runtime here**: `student.onnx` in OpenVINO takes "
    assert re.fullmatch(re.escape(start) + r"4\.\d+ \([\d.]+ to [\d.]+\) times as long with 1 image\.", line)
    assert card_speed.describe_further_speeds(found((1, 20), (3, 50))) == []
    (line,) = card_speed.describe_speed(pair(DW()), timings)
    assert "**In OpenVINO on this CPU it is the opposite**: it takes 1.3" in line


def test_a_busy_machine_has_no_line_about_integers_and_openvino():
    timings = add_openvino(add_int8(found((1, 20), (3, 50)), (1, 20)), (4, 3))
    assert len(card_speed.describe_further_speeds(slow_process(timings, 0.9))) == 2
    assert card_speed.describe_further_speeds(slow_process(timings, 0.4)) == []


def test_an_uncertain_speed_of_8_bit_integers_is_not_stated():
    timings = slow_down(add_int8(found((1, 20), (3, 50)), (1, 20)), INT8, (1, 2, 3))
    (text,) = card_speed.describe_further_speeds(timings)
    assert text.startswith("**The speed of `student-int8.onnx` in ONNX Runtime could not be measured**: the rounds of")
    assert not RATIO.search(text)


def test_the_standard_network_is_not_held_against_itself():
    assert card_speed.describe_speed(pair(Standard()), found((4, 20), (3, 50))) == [
        "This is the standard network itself."
    ]


@pytest.mark.parametrize("text", ["a`b", "line\nend", "\x1b[31mred", "<script>", "| cell |", "\udcff"])
def test_somebody_elses_text_is_no_markup(text):
    made = model_card.format_code(text)
    assert made.isprintable()
    assert made.count("`") == 2
    assert made.startswith("`")
    assert made.endswith("`")


def write_card(tmp_path, verification, settings=SETTINGS, running=1.0):
    run = load_run_student(write_run(tmp_path / "run", settings=settings))
    for name in ("student.onnx", "labels.json"):
        (tmp_path / name).write_bytes(b"12345")
    timings = slow_process(found((1, 20), (3, 50)), running)
    graph = "(n, 3, height, width)"
    return model_card.write_card(run, tmp_path / "run", {}, timings, verification, "a machine", graph)


def test_the_card_says_what_was_checked_and_on_what(tmp_path):
    top1 = {"student.onnx": 0.5, "student-int8.onnx": 0.47}
    seen = Verification(360, {"student.onnx": 1e-6}, top1, "", None, {INT8: 0.9}, {INT8: (3, 14)})
    text = write_card(tmp_path, seen)
    opening = text.split("```")[0]
    assert "Test accuracy 50.00 % on 360 images; 50.00 % by the run's summary, in 32-true." in opening
    change = "11 of 360 images fewer are classified correctly (3 gained, 14 lost), a difference that is resolved"
    assert f"In 8-bit integers 47.00 %: {change} (exact sign test, p = 0.01)." in opening
    assert "360 test images, from their files" in text
    assert "not verified" not in text.lower()
    assert "- `student.onnx`: 1.0e-06" in text


def test_without_data_it_says_so_twice(tmp_path):
    text = write_card(tmp_path, Verification(64, {}, {}, "data_dir=x: no such\nfolder"))
    assert "Test accuracy 50.00 % by the run's summary; **not verified on data** here." in text.split("```")[0]
    assert "**Not verified on data**: `data_dir=x: no such\\nfolder`." in text


def test_a_strangers_settings_are_shown_harmlessly(tmp_path):
    split = "x`\n\n# Owned\x1b[2J<img src=x>"
    text = write_card(tmp_path, Verification(64, {}, {}, "no data"), SETTINGS | {"split": split})
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
        seen = Verification(64, {}, {"student.onnx": 0.5} if on_data else {}, "" if on_data else HOSTILE)
        text = model_card.write_card(run, tmp_path / "run", {}, timings, seen, HOSTILE, "(n, 3, height, width)")
        parts = parse_markdown(text)
        assert {kind for kind, _ in parts}.isdisjoint({"link_open", "image", "html_inline", "em_open"})
        html = {content for kind, content in parts if kind == "html_block"}
        assert html == {"<details><summary>All timings</summary>", "</details>"}
        # No address is outside of code without a backslash, which keeps it from becoming a link.
        outside = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
        assert ADDRESS.findall(outside) == []
        rows = [line for line in text.split("\n") if line.startswith("|")]
        # Cells are as many in each row of a table: of classes, of files and of timings.
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 3
        assert len(re.findall("^# ", text, re.MULTILINE)) == 1


def test_the_card_names_no_folder_of_the_machine(tmp_path):
    options = {"data": {"part": "x", "load": {"data_dir": "zqphotos"}}}  # relative to the folder of the training
    options |= {"method": {"part": "kd", "teacher_weights": "~/zqme/teacher.pt"}, "block_type": {"part": "../zqme/DW"}}
    path = write_run(tmp_path / "zqparent" / "run", config=json.dumps(options | {"trainer": {"precision": 32}}))
    run = load_run_student(path)._replace(job_dir=Path("zqparent/run"))  # as it is given on the command line
    run.summary.update(data="/home/zqme/flowers")
    seen = Verification(64, {}, {}, "data_dir=/home/zqme/flowers: no such folder")
    text = model_card.write_card(run, path, {}, found((1, 20), (3, 50)), seen, "a machine", "(n, 3, height, width)")
    assert "zq" not in text
    assert str(tmp_path) not in text
    assert "- student 1 of epoch 5 of the run `run`" in text
    assert "`data_dir=flowers: no such folder`" in text
    assert "data: `x`\n" in text
    assert "method: `kd teacher_weights=teacher.pt`" in text


def test_other_options_of_the_images_folder_stay_in_the_card():
    load = {"part": "list_class_folders", "data_dir": "my_photos", "test_size": 0.1}
    several = ["~/zq me/a", "../zq/b", 5]
    assert model_card.format_options({"part": "kd", "teacher_weights": several}) == "kd teacher_weights=[a, b, 5]"
    line = model_card.format_options({"part": "imagefolder", "load": load, "flip": True})
    assert line == "imagefolder load=list_class_folders test_size=0.1 flip=True"


CONFUSION = np.array([[0, 0, 7], [0, 0, 5], [0, 0, 7]])  # a student that calls everything a bird


def section(text, title):
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_a_student_that_says_one_class_to_everything_is_known_from_the_first_lines(tmp_path):
    seen = Verification(19, {}, {"student.onnx": 7 / 19}, "", CONFUSION)
    text = write_card(tmp_path, seen)
    opening = text.split("```")[0]
    assert "Test accuracy 36.84 % (95 % interval 19.15 to 58.96) on 19 images" in opening
    assert (
        "Always answering `cat` would give 36.84 % on the test images, no other class more: **the student is not"
        in opening
    )
    assert "**Every test image was classified as `bird`.**" in opening
    assert "**No test image of 2 of the 3 classes is recognized**: `cat`, `dog`." in opening
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in section(text, "Accuracy by class").splitlines()
    ]
    assert ["`cat`", "7", "0.00", "0.00 to 35.43", "0", "`bird` (7)"] in rows
    assert ["`bird`", "7", "100.00", "64.57 to 100.00", "19", ""] in rows


def test_a_better_student_is_called_so_only_if_the_images_show_it(tmp_path):
    counts = np.array([[5, 1, 0], [1, 3, 0], [0, 0, 2]])
    seen = Verification(12, {}, {"student.onnx": 10 / 12}, "", counts)
    assert "is 83.06 %." not in write_card(tmp_path, seen)  # the interval begins at 55 %, above 50 %
    assert "the balanced accuracy (mean recall of the classes) is 86.11 %." in write_card(tmp_path, seen)
    few = Verification(4, {}, {"student.onnx": 0.75}, "", np.array([[2, 0, 0], [0, 1, 0], [1, 0, 0]]))
    assert "so few test images do not show that the student is better" in write_card(tmp_path, few)


def test_without_data_the_card_has_the_recalls_of_the_summary(tmp_path):
    run = load_run_student(write_run(tmp_path / "run"))
    parts = {"cat": (8, 2, 4), "dog": (8, 2, 4), "bird": (4, 1, 2)}
    run.summary["classes"] = {n: dict(zip(("train", "val", "test"), p, strict=True)) for n, p in parts.items()}
    run.summary["images"] = {"train": 20, "val": 5, "test": 10}
    run.summary["selected"]["selected_on"] = "test"
    run.summary["unreadable"] = ["/home/zqme/x.png"]
    run = run._replace(recall={"cat": 1.0, "dog": 0.25, "bird": 0.0})
    text = model_card.write_card(
        run, tmp_path / "run", {}, found((1, 20), (3, 50)), Verification(64, {}, {}, "no"), "a machine", "(n)"
    )
    assert "Test accuracy 50.00 % by the run's summary (95 % interval 23.66 to 76.34); **not verified" in text
    assert "**No test image of 1 of the 3 classes is recognized**: `bird`." in text
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in section(text, "Accuracy by class").splitlines()
    ]
    assert ["`dog`", "8", "2", "4", "25.00", "4.56 to 69.94"] in rows
    training = section(text, "Training data")
    assert "20 images for the training, 5 held out, 10 test images" in training
    assert "selected **on the test images**" in training
    assert "1 images could not be read" in training
    assert "zq" not in text


def test_limits_of_use_follow_from_how_the_student_was_made(tmp_path):
    limits = section(
        write_card(tmp_path, Verification(19, {}, {"student.onnx": 7 / 19}, "", CONFUSION)), "Limits of use"
    )
    assert "one of its 3 classes for every image, also for an image of something else" in limits
    assert "sees 16 x 16 pixels from the middle of an image that is reduced to 18 pixels" in limits
    assert "fewer than 30 test images, so their recall is known roughly only: `cat`, `dog`, `bird`" in limits
    many = np.diag([100, 100, 100])
    limits = section(write_card(tmp_path, Verification(300, {}, {"student.onnx": 1.0}, "", many)), "Limits of use")
    assert "fewer than" not in limits


def test_eight_bits_are_among_the_checks_with_their_loss(tmp_path):
    top1 = {"student.onnx": 0.5, "student-int8.onnx": 0.47}
    seen = Verification(360, {"student.onnx": 1e-6}, top1, "", None, {INT8: 0.9125}, {INT8: (3, 14)})
    checks = section(write_card(tmp_path, seen), "Checks")
    assert "- `student-int8.onnx`: accuracy 47.00 %, -3.00 percentage points against `student.onnx`" in checks
    assert "the same class as the trained network for 91.25 % of them" in checks


@pytest.mark.parametrize(
    ("gained", "lost", "text"),
    [
        (0, 0, "the same images are classified correctly"),
        (1, 0, "1 of 24 images more is classified correctly (1 gained, 0 lost), a difference that is **not resolved**"),
        (2, 2, "as many images are classified correctly (2 gained, 2 lost), a difference that is **not resolved**"),
        (0, 5, "5 of 24 images fewer are classified correctly (0 gained, 5 lost), a difference that is **not resolved"),
        (0, 6, "6 of 24 images fewer are classified correctly (0 gained, 6 lost), a difference that is resolved"),
    ],
)
def test_a_change_of_a_few_images_is_not_resolved(gained, lost, text):
    assert card_accuracy.describe_change(gained, lost, 24).startswith(text)


def test_of_very_many_classes_those_with_the_lowest_recall_are_shown(tmp_path):
    names = [f"class {k}" for k in range(200)]
    network = CifarResNet(8, DW(), 200)
    run = load_run_student(write_run(tmp_path / "run", network, SETTINGS | {"classes": names}))
    counts = 10 * np.eye(200, dtype=int)
    counts[150, 150:152] = 0, 10
    seen = Verification(2000, {}, {"student.onnx": 0.995}, "", counts)
    text = model_card.write_card(run, tmp_path / "run", {}, found((1, 20), (3, 50)), seen, "a machine", "(n)")
    rows = [line for line in section(text, "Accuracy by class").splitlines() if line.startswith("| `")]
    assert len(rows) == 50
    assert rows[0].startswith("| `class 150` ")
    assert "These are the 50 of 200 classes with the lowest recall" in text
