import json

import pytest
import torch

from odcheap.bench import command, probes, roofline

SMALL = ["backbone=resnet20", "backbone.depth=8", "num_stu=2", "data.batch_size=8", "trainer=cpu", "data_dir=none"]
INFERENCE = [
    {"block_type": name, "ms_1": ms, "ms_64": 32 * ms, "times_1": 2 / ms, "times_64": 2 / ms}
    for name, ms in (("DW", 1.0), ("Standard", 2.0))
]


@pytest.fixture
def quick(monkeypatch):
    """Without the parts that take their time and have tests of their own."""
    monkeypatch.setattr(probes, "inference", lambda cfg, conv, seconds: INFERENCE)
    monkeypatch.setattr(roofline, "measure", lambda device, dtype: roofline.Machine(1e10, 1e11))


def test_it_measures_prints_and_writes(quick, tmp_path, capsys):
    assert command.main(["--quick", "--out", str(tmp_path / "out"), *SMALL]) == 0
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [(race["block_type"], race["precision"]) for race in found["races"]] == [
        ("DW", "32-true"),
        ("DW", "bf16-mixed"),
    ]
    again = found["races"][1]
    assert again["seconds"]["a"] == found["races"][0]["seconds"]["a"]
    assert again["c_over_a"] == pytest.approx(again["images_per_second"]["c"] / again["images_per_second"]["a"])
    for race in found["races"]:
        rates, seconds = race["images_per_second"], race["seconds"]
        assert rates["c"] == pytest.approx(8 / sorted(seconds["c"])[1])
        pairs = [(race["b_over_c"], "c", "b")] + [(race["c_over_a"], "a", "c")] * ("a" not in race)
        for value, one, other in pairs:
            rounds = [x / y for x, y in zip(seconds[one], seconds[other], strict=True)]
            assert value == pytest.approx(sorted(rounds)[1])
        assert race["num_stu"] == 2
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert [row["goal"] for row in found["goals"]][:2] == [">= 2", "<= 1.05"]
    assert (tmp_path / "out" / "bench.png").is_file()
    out = capsys.readouterr().out
    assert "not measured: no CIFAR-10 in data_dir=none" in out
    assert "cost of the shell, DW, 32-true: b/c" in out
    assert "training, DW, bf16-mixed: c/a, a of the race before" in out


def test_the_block_type_can_be_chosen(quick, tmp_path):
    given = [*SMALL, "block_type=Group", "trainer.precision=32-true"]
    assert command.main(["--quick", "--out", str(tmp_path), *given]) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [(race["block_type"], race["precision"]) for race in found["races"]] == [("Group", "32-true")]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("block_type=Foo", "error: block_type=Foo: unknown; must be one of DW, Group"),
        ("trainer.precision=16-mixed", "error: trainer.precision=16-mixed: the benchmark knows"),
        ("num_stuu=2", "error: "),
        ("block_type.groups=0", "error: "),
        ("trainer=gpu", "error: trainer"),
        ("data=imagefolder", "error: data=imagefolder: the benchmark is for sets that fit in memory"),
    ],
)
def test_bad_options_are_one_line(override, line, tmp_path, capsys):
    assert command.main(["--quick", "--out", str(tmp_path / "out"), *SMALL, override]) == 1
    error = capsys.readouterr().err
    assert error.startswith(line)
    assert error.count("\n") == 1
