import io

import pytest
from rich.console import Console

from odcheap.bench import goals


def result(device="cpu"):
    race = {
        "block_type": "DW",
        "precision": "32-true",
        "num_stu": 4,
        "batch_size": 128,
        "images_per_second": {"a": 50.0, "b": 110.0, "c": 100.0},
        "peak_bytes": {"a": 4 << 30, "b": None, "c": 5 << 30},
        "c_over_a": 2.0,
        "b_over_c": 1.1,
        "of_roofline": 0.25,
    }
    return {
        "machine": {"device": device, "gpu": None, "cpu": "a machine", "threads": 2},
        "races": [race],
        "inference": [
            {"block_type": name, "ms_1": 1.0, "ms_64": 30.0, "times_1": 2.9, "times_64": 3.2}
            for name in ("DW", "Group")
        ],
        "start_seconds": 7.5,
    }


@pytest.mark.parametrize(
    ("value", "least", "most", "met"),
    [
        (2.0, 2.0, None, True),
        (1.99, 2.0, None, False),
        (1.05, None, 1.05, True),
        (1.06, None, 1.05, False),
        (3.0, None, None, None),
        ("not measured: no GPU", None, 2.0, None),
    ],
)
def test_a_goal_is_met_missed_or_open(value, least, most, met):
    assert goals.goal("x", value, least, most)["met"] is met


def test_every_row_of_the_table_is_there():
    met = {row["what"]: row["met"] for row in goals.rows(result())}
    assert met == {
        "training, DW, 32-true: c/a": True,
        "cost of the shell, DW, 32-true: b/c": False,
        "memory, DW, 32-true: c/a": False,
        "part of the roofline, DW, 32-true: c": None,
        "ONNX Runtime, CPU, 1 pictures: DW over Standard": True,
        "ONNX Runtime, CPU, 64 pictures: DW over Standard": False,
        "time of 4 students over that of 1, GPU": None,
        "300 epochs with evaluation, GPU, projected, s": None,
        "second start of a CIFAR-10 run to its first step, s": True,
    }


def test_on_a_gpu_its_own_goals_count():
    found = result("cuda") | {"students": {1: 9000.0, 4: 4000.0, 8: 2000.0}, "recipe_seconds": 500.0}
    met = {row["what"]: row["met"] for row in goals.rows(found)}
    assert not met["training, DW, 32-true: c/a"]
    assert not met["time of 4 students over that of 1, GPU"]
    assert met["300 epochs with evaluation, GPU, projected, s"]


def test_tables_and_picture(tmp_path):
    shown = result()
    shown["goals"] = goals.rows(shown)
    text = io.StringIO()
    goals.show(shown, Console(file=text, width=120))
    assert "a machine, 2 threads" in text.getvalue()
    assert "missed" in text.getvalue()
    assert "Group" in text.getvalue()
    goals.plot(shown, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
