"""`odcheap bench --exports`: what is refused, and the tables."""

import pytest

from odcheap.bench import command
from odcheap.bench.exports import format_exports


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--exports", "."], "--exports=.: is not an export with all files (preprocess.json: cannot be checked"),
        (["--exports", ".", "--threads", "0"], "--threads=0: must be 1 or more"),
        (["--exports", ".", "--seconds", "0"], "--seconds=0.0: must be above 0"),
        (["block_type=DW", "--exports", "."], "--exports=block_type=DW: must be a folder"),
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {line}")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_tables_have_what_was_measured_and_no_more():
    row = {"network": "DW, resnet20", "images": 1}
    floats = {
        "bytes": {"ONNX Runtime": 180_000, "ExecuTorch": 190_000},
        "top1": {"ONNX Runtime": 0.8, "ExecuTorch": 0.8},
    }
    integers = {"bytes": {"ONNX Runtime": 90_000}, "top1": {"ONNX Runtime": None}, "ms": {"ONNX Runtime": [1, 2.5, 3]}}
    floats["ms"] = {"ExecuTorch": [0.1, 0.2, 0.3]}
    text = format_exports([row | {"precision": "float"} | floats, row | {"precision": "int8"} | integers], 2, "a CPU")
    assert text.startswith("Milliseconds of a call, median (quartiles), on a CPU, with 2 threads:")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert cells == [
        ["", "numbers", "images", "ONNX Runtime", "ExecuTorch"],
        ["DW, resnet20", "float", "1", "", "0.2 (0.1 to 0.3)"],
        ["DW, resnet20", "int8", "1", "2.5 (1 to 3)", ""],
        ["", "numbers", ".onnx, MB", ".pte, MB", "top-1 in ONNX Runtime, %", "top-1 in ExecuTorch, %"],
        ["DW, resnet20", "float", "0.18", "0.19", "80.00", "80.00"],
        ["DW, resnet20", "int8", "0.09", "", "", ""],
    ]
