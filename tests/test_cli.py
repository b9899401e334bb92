import json
import re
import subprocess
import sys

import hydra
import pytest
from omegaconf import OmegaConf

from odcheap import cli
from odcheap.config.compose import default_precision
from odcheap.config.help import GROUPS, describe_part, is_root_reference, list_part
from odcheap.config.messages import describe_error
from odcheap.runs.settings import flatten
from odcheap.utils.errors import OptionError
from odcheap.utils.parts import find_conf_dir, list_parts


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
    assert "+" not in result.err  # an option that nothing reads cannot be added either


@pytest.mark.parametrize("chosen", ["experiment=imagefolder", "data=imagefolder"])
@pytest.mark.parametrize("given", ["data.imagesize", "imagesize", "data.ImageSize"])
def test_options_of_the_chosen_data_are_suggested_also_without_underscores(command, chosen, given):
    line = f"error: {given}: there is no such option; did you mean data.image_size?"
    assert command(chosen, f"{given}=64").err == f"{line} (odcheap train --help shows every option)\n"


def test_an_option_of_the_trainer_that_conf_does_not_list_needs_a_plus_sign(command):
    line = "trainer.max_time: must be given with a plus sign, since conf/ does not list it: +trainer.max_time=VALUE"
    assert command("trainer.max_time=soon").err == f"error: {line}\n"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("+traner.max_epochs=2", "; did you mean trainer.max_epochs?"),
        ("++max_epochs=2", "; did you mean trainer.max_epochs?"),
        ("+xyzzy=1", ""),
    ],
)
def test_an_added_option_that_nothing_reads_is_refused(command, given, meant, tmp_path):
    result = command("data=digits", given)
    assert (result.status, result.out) == (1, "")
    assert result.err == f"error: {given}: no part of the run reads this option{meant}\n"
    assert not list(tmp_path.iterdir())


def test_an_added_option_that_another_one_refers_to_is_not_refused(command):
    result = command("+width=0", "num_stu=${width}", "+hydra.job.env_set={A: b}")
    assert result.err.startswith("error: num_stu=0: must be a whole number, 1 or more")


def test_an_unknown_option_beside_resume_gets_the_nearest_names_too(command):
    result = command("resume=runs/a", "methd=od")
    assert result.err == command("methd=od").err
    assert "methd: there is no such option; did you mean method" in result.err
    result = command("resume=runs/a", "data.resolution=224")
    assert result.err.startswith("error: data.resolution: there is no such option; did you mean ")
    assert "? with resume, give its part too, such as data=imagefolder (" in result.err


SPACES = "write no spaces around = and commas"


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("--experiment=quickstart", "--experiment=quickstart: write experiment=quickstart, without --"),
        ("-m --method=od,alone", "--method=od,alone: write method=od,alone, without --"),
        ("--num_stu 2", "--num_stu: write num_stu=2, without --"),
        ("--fast num_stu=2", "--fast: there is no such flag"),
        ("method=alone,od seed=0,1", "method=alone,od: several values need a sweep: add -m"),
        ("logger=csv,wandb", "logger=csv,wandb: several values need a sweep: add -m, or write logger=[csv,wandb]"),
        ("-m seed=0, 1", f"1: {SPACES}"),
        ("num_stu = 2", f"num_stu: {SPACES}"),
        ("num_stu= 2", f"2: {SPACES}"),
        ("num_stu =2", f"num_stu: {SPACES}"),
        ("data_dir=my images", "images: write options as NAME=VALUE"),
    ],
)
def test_mistyped_arguments_are_answered_with_how_to_write_them(command, given, answer):
    result = command(*given.split())
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith(f"error: {answer}")
    assert result.err.count("\n") == 1


def test_flags_of_hydra_are_taken_with_their_values(command, tmp_path):
    result = command("--config-dir", str(tmp_path), "--package", "optimizer", "-c", "job", "~experiment", "seed=3")
    assert not result.status
    assert "lr: 0.1" in result.out


@pytest.mark.parametrize("arguments", [["--help"], ["method=kd", "-h"], ["data=imagefolder", "--help"]])
def test_the_help_of_train_shows_every_option_and_recipe(arguments, capsys):
    assert cli.main(["train", *arguments]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 120
    chosen = [argument for argument in arguments if "=" in argument]
    with hydra.initialize_config_dir(str(find_conf_dir()), version_base="1.3"):
        options = flatten(OmegaConf.to_container(hydra.compose("config", chosen), resolve=False))
    known = [name for name, value in options.items() if "._" not in name and not is_root_reference(value)]
    shown = re.findall(r"^  ([\w.]+)(?:=| |$)", said, re.MULTILINE)
    assert {*known, "job_dir"} <= {*shown, "experiment"}
    assert {*list_parts("experiment")} <= {*shown}


@pytest.mark.parametrize("group", GROUPS)
def test_each_option_has_a_line_of_what_it_does(group):
    for part in list_parts(group):
        assert [name for name, _, text in list_part(group, part, []) if not text] == []
    assert all(describe_part("experiment", name) for name in list_parts("experiment"))


def test_the_help_of_train_has_the_choices_of_an_option(capsys):
    cli.main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "selects nothing; test selects on the test images, as the 2019 code; one of val, last, test" in said
    assert "data.select_by=top1 balanced: the mean of the classes' recalls; one of top1, balanced" in said
    assert "data.batch_size=128 of all processes together" in said
    assert "method=od; the choices are alone, dml, ffl, kd, kdcl, lmcl, od, okddip, one, pcl:" in said


@pytest.mark.parametrize("name", ["evaluate", "export", "predict", "demo", "push", "report", "bench"])
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


REFUSED = [
    (["method.temperature=-1"], "method.temperature=-1: must be a number, 1e-06 or more and at most 1e+06"),
    (["trainer.max_epochs=0"], "trainer.max_epochs=0: must be a whole number, 1 or more"),
    (["block_type=Group", "block_type.groups=0"], "block_type.groups=0: must be a whole number, 1 or more"),
    (["data=digits", "data.crop_padding=-1"], "data.crop_padding=-1: must be a whole number, 0 or more"),
    (["data.batch_size=0"], "data.batch_size=0: must be a whole number, 1 or more"),
    (["data.load.train_images=x"], "data.load.train_images=x: must be a whole number, 1 or more"),
    (["optimizer.lr=x"], "optimizer.lr=x: must be a number, above 0"),
    (["+optimizer.dampening=x"], "optimizer.dampening=x: must be a number"),
    (["+optimizer.foo=1"], "optimizer.foo=1: is not an option of this optimizer"),
    (["scheduler.gamma=0"], "scheduler.gamma=0: must be a number, above 0, or null"),
    (["scheduler=cosine", "scheduler.T_max=7"], "scheduler.T_max=7: must be a number, 0 or more and at most 1"),
    (["scheduler=cosine", "+scheduler.foo=1"], "scheduler.foo=1: is not an option of this scheduler"),
    (["+trainer.foo=1"], "trainer.foo=1: is not an option of this trainer"),
    (["+trainer.fast_dev_run=x"], "trainer.fast_dev_run=x: must be a whole number or true or false"),
    (
        ["trainer.fast_dev_run=1"],
        "trainer.fast_dev_run: must be given with a plus sign, since conf/ does not list it: "
        "+trainer.fast_dev_run=VALUE",
    ),
    (["resume=nowhere/run"], "resume=nowhere/run: no such file"),
    (["weights=nowhere.ckpt"], "weights=nowhere.ckpt: no such file"),
    (["method=kd"], "method.teacher_weights=???: must be given"),
]


def test_a_refused_option_needs_no_import_of_pytorch():
    # One process for all of them; each is a call of the command.
    code = "import json, sys, odcheap.cli\nfor arguments in json.loads(sys.argv[1]):\n    try:\n"
    code += "        print(odcheap.cli.main(['train', *arguments]))\n"
    code += "    except SystemExit as stop:\n        print(stop.code)\n"
    code += "print({'torch', 'torchvision', 'pytorch_lightning'} & set(sys.modules))"
    given = json.dumps([arguments for arguments, _ in REFUSED])
    done = subprocess.run([sys.executable, "-c", code, given], capture_output=True, text=True)
    assert done.stderr.splitlines() == [f"error: {message}" for _, message in REFUSED]
    assert done.stdout.split() == ["1"] * len(REFUSED) + ["set()"]


def test_the_help_of_a_command_and_the_status_of_runs_need_no_import_of_pytorch(tmp_path):
    (tmp_path / "sweep.json").write_text('{"count": 1, "runs": ["seed=0"]}')
    commands = ["", "train", "evaluate", "export", "predict", "demo", "push", "report", "bench"]
    code = f"import sys, odcheap.cli\nfor command in {commands}:\n"
    code += "    try:\n        odcheap.cli.main([*filter(None, [command]), '--help'])\n"
    code += "    except SystemExit:\n        pass\n"
    code += "odcheap.cli.main(['report', '--status', sys.argv[1]])\n"
    code += "print({'torch', 'torchvision', 'pytorch_lightning', 'onnx', 'onnxruntime', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stderr == ""
    assert "not begun" in done.stdout
    assert done.stdout.count("usage: ") == len(commands)
    assert done.stdout.endswith("\nset()\n")
