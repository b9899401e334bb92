from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from odcheap.export import verify
from odcheap.export.evidence import Pictures
from odcheap.export.onnx import DIFFERENT
from odcheap.utils.errors import Failure

LOGITS = np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 1.0 + DIFFERENT, 0.0]], np.float32)
PICTURES = Pictures([Path(f"{k}.png") for k in range(3)], np.array([0, 1, 0]), LOGITS)


def test_the_largest_difference_is_told():
    other = LOGITS + np.array([[0, 5e-5, 0]], np.float32)
    assert verify.held("x", other, PICTURES) == pytest.approx(5e-5, rel=0.1)


@pytest.mark.parametrize("value", [2e-4, np.nan, np.inf, -np.inf])
def test_a_difference_that_is_too_large_names_its_picture(value):
    other = LOGITS.copy()
    other[1, 2] += value
    with pytest.raises(Failure, match=r"student.onnx: a logit differs .* on 1.png"):
        verify.held("student.onnx", other, PICTURES)


def test_large_logits_may_differ_by_what_float32_rounds():
    many = PICTURES._replace(logits=1e4 * LOGITS)
    assert verify.held("x", many.logits + np.array([[0.01, 0, 0]], np.float32) * (LOGITS > 0.9), many) > DIFFERENT


@pytest.mark.parametrize(
    ("precision", "summary", "fits"),
    [
        ("32-true", 2 / 3, True),
        ("32-true", 1.0, True),
        ("32-true", 0.0, False),
        ("bf16-mixed", 2 / 3 + 0.004, True),
        ("bf16-mixed", 0.1, False),
        ("32-true", None, True),
    ],
)
def test_the_accuracy_is_the_one_that_the_run_has_measured(precision, summary, fits):
    product = SimpleNamespace(test_top1=summary, config={"trainer": {"precision": precision, "accelerator": "cpu"}})
    if fits:
        verify.as_in_summary(product, PICTURES)  # one of the three is as good as a tie
        return
    with pytest.raises(Failure, match=r"test accuracy is 0.6667 here, .* other images than the run's"):
        verify.as_in_summary(product, PICTURES)


def test_a_file_that_its_runtime_cannot_load_is_named(tmp_path):
    (tmp_path / "student.onnx").write_bytes(b"?")
    with pytest.raises(Failure, match=r"student.onnx: ONNX Runtime cannot load the model"):
        verify.onnx_logits(tmp_path / "student.onnx", {}, PICTURES)
    (tmp_path / "student.safetensors").write_bytes(b"?")
    with pytest.raises(Failure, match=r"student.safetensors: a bare process cannot load or run it \(.*not a whole"):
        verify.bare_logits(tmp_path / "student.safetensors", {}, PICTURES)
