import subprocess
import sys

import pytest

from odcheap import cli
from odcheap.config.messages import describe_error
from odcheap.config.resolvers import default_precision
from odcheap.utils.errors import OptionError


def test_the_reason_below_a_wrapped_error_is_printed():
    error = RuntimeError("outer\nmore")
    error.__cause__ = OptionError("num_stu", 0, "must be 1 or more")
    assert describe_error(error) == "num_stu=0: must be 1 or more"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("num_sut=3", "num_stu"),
        ("lr=0.1", "optimizer.lr?"),
        ("batch_size=3", "data.batch_size?"),  # the same name in a group, and not also eval_batch_size
        ("epochs=2", "trainer.max_epochs"),
        ("seeds=1", "seed"),
    ],
)
def test_unknown_options_get_the_nearest_names(command, given, meant):
    result = command(given)
    assert (result.status, result.out) == (1, "")
    assert result.err.count("\n") == 1
    assert f"{given.partition('=')[0]}: there is no such option; did you mean {meant}" in result.err
    assert f"(+{given} adds it to the config" in result.err


@pytest.mark.parametrize("name", ["train", "evaluate", "export", "predict", "report", "bench"])
def test_each_command_has_its_help(capsys, name):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code in (0, None)
    assert capsys.readouterr().out


def test_commands_are_listed_and_an_unknown_one_is_one_line(capsys):
    assert cli.main([]) == 0
    assert "odcheap train block_type=DW num_stu=4" in capsys.readouterr().out
    assert cli.main(["trian"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("way", [["-m", "odcheap", "train"], ["train.py"]])
def test_the_package_and_the_script_are_the_same_command(way):
    done = subprocess.run([sys.executable, *way, "--cfg", "job", "num_stu=3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\nnum_stu: 3\n" in done.stdout


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
    assert default_precision(accelerator) == expected
