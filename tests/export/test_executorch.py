"""Programs for ExecuTorch: XNNPACK runs all layers, the logits are those of the network, and an export checks that."""

import json
import re

import numpy as np
import pytest
import torch
from export.test_student import CLASSES, IMAGES, Net, by_brightness, samples  # noqa: F401
from layers.test_fuse import settled

from odcheap import cheapen, export_student, predict
from odcheap.bench import command as bench_command
from odcheap.export import command, runtimes, verify
from odcheap.export import executorch as executorch_export
from odcheap.export import onnx as onnx_export
from odcheap.export.card_speed import STANDARD, describe_further_speeds
from odcheap.export.latency import Key
from odcheap.export.runtimes import EXECUTORCH, ONNX_RUNTIME
from odcheap.layers.cheap_conv import DW, Group, RepDW, Shift, Standard
from odcheap.layers.fuse import cheap_form
from odcheap.models.cifar import CifarResNet
from odcheap.models.wrappers import TorchvisionBackbone
from odcheap.utils.errors import Failure, OptionError

needs_executorch = pytest.mark.skipif(
    not runtimes.is_installed(EXECUTORCH), reason="the extra executorch is not installed"
)


@needs_executorch
def test_an_export_has_checked_programs_that_the_card_s_code_runs(tmp_path, samples, capsys, monkeypatch):  # noqa: F811
    torch.manual_seed(0)
    network = by_brightness(cheapen(Net(), "Shift"))
    files = [path for path, _ in samples]
    folder = export_student(
        network, CLASSES, tmp_path / "out", samples=samples, calibration=files, executorch=True, **IMAGES
    )
    assert {path.name for path in folder.glob("*.pte")} == {"student.pte", "student-int8.pte"}
    out, card = capsys.readouterr().out, (folder / "README.md").read_text()
    assert "XNNPACK does not run" not in out  # also not the shift
    checks = card.partition("## Checks")[2].partition("##")[0]
    assert float(re.search(r"- `student.pte`: (\S+)", checks)[1]) < 1e-4
    assert re.search(r"- `student-int8.pte`: accuracy 100.00 %, \+0.00 percentage points against `student.pte`", checks)
    assert "In 8-bit integers (`student-int8.pte`) 100.00 %: the same images" in out
    assert json.loads((folder / "results.json").read_text())["top1"]["student-int8.pte"] == 1
    timed = re.findall(r"\| (\S.*?) +\| ExecuTorch +\| 1 +\| all ", card)
    assert timed == ["student.pte", "student-int8.pte", "the standard network"]
    # The files name no folder of this machine, and the code of the card runs as it stands.
    names = [str(tmp_path), str(command.__file__), "site-packages", "stack_trace"]
    assert [n for n in names for path in folder.glob("*.pte") if n.encode() in path.read_bytes()] == []
    code = re.search(r"```python\n(import json\n.*?executorch.*?)```", card, re.DOTALL)[1]
    monkeypatch.chdir(folder)
    exec(code, {})
    assert capsys.readouterr().out.strip() in CLASSES
    # All of its files are timed in every runtime.
    assert bench_command.main(["--exports", str(folder), "--seconds", "0.005", "--out", str(tmp_path / "bench")]) == 0
    out, found = capsys.readouterr().out, json.loads((tmp_path / "bench" / "exports.json").read_text())["exports"]
    assert [(row["precision"], row["top1"]["ExecuTorch"]) for row in found] == [("float", 1), ("int8", 1)]
    for row in found:
        low, median, high = row["ms"]["ExecuTorch"]
        assert 0 < low <= median <= high
        assert f"{median:.3g} ({low:.3g} to {high:.3g})" in out
    assert found[1]["bytes"]["ExecuTorch"] == (folder / "student-int8.pte").stat().st_size
    assert "with 1 thread:" in out


@needs_executorch
@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["resnet8", "resnet18"])
@pytest.mark.parametrize("block_type", [Shift(), DW(), RepDW(), Group(), Standard()], ids=repr)
def test_xnnpack_runs_every_layer_with_the_network_s_logits(block_type, backbone):
    torch.manual_seed(0)
    network, size = CifarResNet(8, block_type, 10), (3, 32, 32)
    if backbone == "resnet18":
        network, size = TorchvisionBackbone("resnet18", block_type, 10), (3, 64, 64)
    network = cheap_form(settled(network).float())
    program = onnx_export.export_program(network, size)
    images = predict.random_images(32, size)
    with torch.no_grad():
        expected = network(torch.from_numpy(images)).numpy()
    floats = executorch_export.to_pte(program, size)
    integers = executorch_export.to_int8_pte(program, size, iter(np.split(images, 2)))
    assert (floats.portable, integers.portable) == ((), ())
    assert len(integers.content) < len(floats.content)
    logits, rounded = (executorch_export.create_predictor(f.content, None)(images[:8]) for f in (floats, integers))
    np.testing.assert_allclose(logits, expected[:8], atol=1e-4, rtol=1e-5)
    # Not compared with the spread over images: that of an untrained network can be below one step of 8-bit logits.
    assert 0 < np.abs(rounded - expected[:8]).mean() < 0.1 * np.abs(expected).mean()


@needs_executorch
def test_a_file_that_is_no_program_is_one_line(tmp_path):
    (tmp_path / "student.pte").write_bytes(b"no program" * 20)
    with pytest.raises(Failure, match=r"^student.pte: ExecuTorch cannot load the file \(.*\)$") as caught:
        verify.compute_logits(tmp_path / "student.pte", EXECUTORCH, {}, None, None)
    assert "\n" not in str(caught.value)


def test_without_executorch_a_line_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(runtimes.PACKAGES, EXECUTORCH, ("no_such_package",))
    with pytest.raises(Failure, match=r"^--executorch: .* pip install 'odcheap\[executorch\]'"):
        command.check_options(command.parse_arguments(["run", "--executorch", "--out", str(tmp_path / "out")]))
    with pytest.raises(OptionError, match=r"--batch=600: must be at most 512 with --executorch"):
        command.check_options(command.parse_arguments(["run", "--executorch", "--batch", "600"]))


def timings(program, int8, standard, spread=1.0):
    """Timings of one image in milliseconds, which disagree between rounds by a factor."""
    names = {"student.pte": program, "student-int8.pte": int8, STANDARD: standard}
    found = {
        Key(name, EXECUTORCH, 1, 0): predict.Timing(ms / 1e3, ms / 1e3, rounds=(ms / 1e3, ms * spread / 1e3))
        for name, ms in names.items()
    }
    return found | {Key("student.onnx", ONNX_RUNTIME, 1, threads): predict.Timing(2e-4, 2e-4) for threads in (0, 1)}


def test_the_card_has_the_speed_in_executorch_beside_onnx_runtime():
    lines = describe_further_speeds(timings(0.3, 0.4, 0.9))
    assert lines == [
        "Compared with the standard network on this CPU, `student.pte` in ExecuTorch is 3.00 (3.00 to 3.00) times as "
        "fast with 1 image.",
        "**Slower than `student.pte` here**: `student-int8.pte` in ExecuTorch takes 1.33 (1.33 to 1.33) times as long "
        "with 1 image.",
        "Times of 1 image in ExecuTorch, with the number of threads that it takes by itself: 0.9 ms for the standard "
        "network, 0.3 ms for `student.pte`, 0.4 ms for `student-int8.pte`, 0.2 ms for `student.onnx` in ONNX Runtime.",
    ]
    assert describe_further_speeds({}) == []


def test_an_uncertain_speed_in_executorch_is_not_stated():
    uncertain = timings(0.3, 0.4, 0.9) | {
        key: timing for key, timing in timings(0.3, 0.4, 0.9, spread=3).items() if key.name == STANDARD
    }
    line, *_ = describe_further_speeds(uncertain)
    assert line.startswith(
        "**The speed of `student.pte` in ExecuTorch could not be measured**: the rounds of the measurement disagree"
    )
