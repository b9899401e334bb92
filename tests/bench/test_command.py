import json
import os
import subprocess
import sys

import pytest
import torch
from process_server import popen

from odcheap.bench import command, operators
from odcheap.export import latency
from odcheap.predict import Timing

SMALL = ["backbone=resnet20", "backbone.depth=8", "num_stu=2", "data.batch_size=8", "trainer=cpu", "data_dir=none"]


@pytest.fixture
def quick(monkeypatch):
    """Without the start-up, and with inference times of a machine on which cheap networks are twice as fast."""
    monkeypatch.setattr(command, "measure_start", lambda: 7.5)
    monkeypatch.setattr(operators, "CALLS", 1)
    monkeypatch.setattr(operators, "MEMORY_BYTES", 2**20)

    def times(networks, size, batches, seconds):
        ms = {(name, batch): batch * (2.0 if name == "Standard" else 1.0) for name in networks for batch in batches}
        return {key: Timing(time / 1000, time / 1000) for key, time in ms.items()}

    monkeypatch.setattr(latency, "measure_timings", times)


def test_it_measures_prints_and_writes(quick, tmp_path, capsys):
    assert command.main(["--quick", "--out", str(tmp_path / "out"), *SMALL]) == 0
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [(row["block_type"], row["precision"]) for row in found["training"]] == [
        ("DW", "32-true"),
        ("DW", "bf16-mixed"),
    ]
    for row in found["training"]:
        rates, seconds = row["images_per_second"], row["seconds"]
        assert rates["trainer"] == pytest.approx(8 / sorted(seconds["trainer"])[1])
        for name, one, other in (
            ("speedup_over_2019", "loop_2019", "trainer"),
            ("time_over_bare", "trainer", "bare_loop"),
        ):
            ratios = sorted(x / y for x, y in zip(seconds[one], seconds[other], strict=True))
            assert list(row[name].values()) == pytest.approx([ratios[1], ratios[0], ratios[2]])
        assert row["num_stu"] == 2
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["start_seconds"] == 7.5
    assert {row["layer"] for row in found["operators"]} == set(operators.LAYERS)
    assert {row["dtype"] for row in found["operators"]} == {"float32", "bfloat16"}
    assert all(row["speedup"]["min"] <= row["speedup"]["median"] for row in found["operators"])
    for row in found["operators"]:
        passes = operators.LAYERS[row["layer"]]
        assert row["pass_over_copy"] * row["memory_copy_ms"] * passes == pytest.approx(row["fused_ms"])
    first, last = found["operators"][0], found["operators"][-1]  # float32, and bfloat16 with a quarter of the numbers
    assert first["memory_copy_ms"] == pytest.approx(8 * last["memory_copy_ms"])
    assert found["training"][0]["page_faults"]["trainer"] >= 0
    dw, standard = found["inference"]
    assert (dw["block_type"], dw["ms_64"], dw["speedup_1"], standard["speedup_64"]) == ("DW", 64, 2, 1)
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert (tmp_path / "out" / "bench.md").read_text() in out
    assert "Start-up to the first step: 7.5 s" in out
    assert "| DW           | bf16-mixed  |" in out


def test_the_block_type_can_be_chosen(quick, tmp_path):
    given = [*SMALL, "block_type=Group", "trainer.precision=32-true"]
    assert command.main(["--quick", "--out", str(tmp_path), *given]) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [(row["block_type"], row["precision"]) for row in found["training"]] == [("Group", "32-true")]


def test_a_block_type_of_a_user_can_be_measured(quick, tmp_path):
    (tmp_path / "block_type").mkdir()
    (tmp_path / "block_type" / "Mine.yaml").write_text("_target_: odcheap.layers.cheap_conv.DW\n")
    given = [*SMALL, "block_type=Mine", "trainer.precision=32-true", "--config-dir", str(tmp_path)]
    assert command.main(["--quick", "--out", str(tmp_path / "out"), *given]) == 0
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [row["block_type"] for row in found["training"] + found["inference"]] == ["Mine", "Mine", "Standard"]


def test_the_loops_of_other_projects_are_measured_when_asked_for(quick, tmp_path, capsys):
    given = [*SMALL, "block_type=DW", "trainer.precision=bf16-mixed"]
    assert command.main(["--quick", "--peers", "--out", str(tmp_path), *given]) == 0
    (row,) = json.loads((tmp_path / "bench.json").read_text())["peers"]
    assert list(row["seconds"]) == ["torchdistill", "lightning_template", "trainer"]
    for name, ratio in row["speedup"].items():
        ratios = sorted(a / b for a, b in zip(row["seconds"][name], row["seconds"]["trainer"], strict=True))
        assert list(ratio.values()) == pytest.approx([ratios[1], ratios[0], ratios[2]])
    assert (
        "| block_type   | precision   |   torchdistill |   Lightning template |   odcheap |" in capsys.readouterr().out
    )


def test_without_torchdistill_it_says_how_to_install_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "has_torchdistill", lambda: False)
    assert command.main(["--quick", "--peers", "--out", str(tmp_path)]) == 1
    assert "error: --peers needs torchdistill: pip install 'odcheap[bench]'\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("block_type=Foo", "error: block_type=Foo: unknown; must be one of DW, Group"),
        ("trainer.precision=16-mixed", "error: trainer.precision=16-mixed: must be 32-true or bf16-mixed here"),
        ("num_stuu=2", "error: "),
        ("block_type.groups=0", "error: "),
        ("trainer=gpu", "error: trainer"),
        ("data=imagefolder", "error: data=imagefolder: the benchmark needs data that fit in memory"),
    ],
)
def test_bad_options_are_one_line(override, line, tmp_path, capsys):
    assert command.main(["--quick", "--out", str(tmp_path / "out"), *SMALL, override]) == 1
    error = capsys.readouterr().err.partition("error: ")
    assert (error[1] + error[2]).startswith(line)
    assert error[2].count("\n") == 1


def test_nothing_but_the_error_is_printed_on_a_machine_with_nvcc(tmp_path):
    """PyTorch prints a line about it if `torch.utils.cpp_extension` is imported and there is no GPU."""
    (tmp_path / "nvcc").touch(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_HOME": str(tmp_path)}
    begun = [sys.executable, "-m", "odcheap", "bench", "students=[DW,Shift]"]
    process = popen(begun, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.communicate()[1].startswith("error: students=['DW', 'Shift']: must be null: the benchmark trains")
    assert process.returncode == 1


@pytest.mark.parametrize(("step", "measured"), [("torch.optim.SGD([p], lr=1.0).step()", True), ("", False)])
def test_the_start_is_timed_until_the_first_step(step, measured):
    seconds = command.measure_start(f"import torch\np = torch.nn.Parameter(torch.ones(1))\n{step}\n")
    assert 0 < seconds < 60 if measured else seconds is None
