import pytest

from odcheap import cli
from odcheap.cli import explained
from odcheap.utils.errors import OptionError


def test_the_reason_under_a_wrapped_error_is_told():
    error = RuntimeError("outer\nmore")
    error.__cause__ = OptionError("num_stu", 0, "must be 1 or more")
    assert explained(error) == "num_stu=0: must be 1 or more"


def test_unknown_options_get_the_nearest_names(command):
    result = command("num_sut=3")
    assert (result.status, result.out) == (1, "")
    assert result.err.count("\n") == 1
    assert "'num_sut'" in result.err
    assert "did you mean num_stu" in result.err


@pytest.mark.parametrize(
    ("gpu", "bf16", "accelerator", "expected"),
    [
        (False, False, "auto", "32-true"),
        (True, True, "auto", "bf16-mixed"),
        (True, True, "gpu", "bf16-mixed"),
        (True, False, "gpu", "32-true"),
        (True, True, "cpu", "32-true"),
    ],
)
def test_the_default_precision_is_what_the_device_computes_in(monkeypatch, gpu, bf16, accelerator, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: bf16)
    assert cli.precision(accelerator) == expected
