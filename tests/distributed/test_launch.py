import json
import os
from pathlib import Path

import pytest
from conftest import Begun
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from odcheap.distributed import cluster, launch
from odcheap.distributed.launch import needs_launch
from odcheap.distributed.signals import SignalListener
from odcheap.runs.resume import Start
from odcheap.runs.settings import RunConfig, quote_override
from odcheap.utils.errors import OptionError


@pytest.mark.parametrize("value", ["runs/a=b,c=d", "/tmp/with space/x", "plain", '"quoted=already"', "a(1)", "[a,b]"])
def test_quoted_paths_are_read_as_they_were_typed(value):
    override = OverridesParser.create().parse_override(quote_override(f"resume={value}"))
    assert not override.is_sweep_override()
    expected = ["a", "b"] if value == "[a,b]" else value.strip('"')
    assert override.value() == expected


ODD_PATHS = [
    "/data/josé",
    "/data/Tom's",
    "/data/C#",
    "/data/a&b",
    "/data/x[1]",
    '/a"b',
    '/a\\"b',
    "/a\\",
    "/a\\b",
    " a ",
]
ODD_PATHS += [" a ", "x{a}", "/a$b", "!x", "a;b", "ü~", "a\nb", "a, b", "(1)", "日本"]


@pytest.mark.parametrize("value", ODD_PATHS)
def test_any_path_is_read_as_it_was_typed_and_quoted_once(value):
    quoted = quote_override(f"data_dir={value}")
    assert OverridesParser.create().parse_override(quoted).value() == value
    assert quote_override(quoted) == quoted


@pytest.mark.parametrize("value", ["~/x", '"~/x"', "'~/x'", "~"])
def test_a_tilde_is_the_home_directory(value, monkeypatch):
    monkeypatch.setenv("HOME", "/home/josé")
    override = OverridesParser.create().parse_override(quote_override(f"job_dir={value}"))
    assert override.value() == "/home/josé" + value.strip("\"'")[1:]


def test_a_folder_whose_name_begins_with_a_bracket_is_a_path_and_a_list_is_a_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser = OverridesParser.create()
    assert parser.parse_override(quote_override("data_dir=[x]")).value() == ["x"]
    (tmp_path / "[x]").mkdir()
    assert parser.parse_override(quote_override("data_dir=[x]")).value() == "[x]"


def test_new_processes_get_the_paths_as_they_were_typed(monkeypatch):
    commands = []

    def popen(command, **options):
        commands.append(command)
        # A Ctrl-C in a terminal reaches every process of the session; these get it once, from the run that forwards it.
        assert options["start_new_session"]
        raise BlockingIOError("no process is started in a test")

    monkeypatch.setattr(launch.subprocess, "Popen", popen)
    given = {"data_dir": "/data/josé's #1 [x] & {y}", "weights": "~/a,b=c", "seed": 1}
    config = RunConfig(OmegaConf.create({"trainer": {"devices": 2}}), {}, [f"{key}={given[key]}" for key in given])
    with pytest.raises(BlockingIOError):
        launch.launch_processes(Start(config, Path("Zoë's [r] #2")), [], SignalListener())
    arguments = commands[0][commands[0].index("train") + 1 :]
    found = [OverridesParser.create().parse_override(argument) for argument in arguments]
    values = {override.key_or_group: override.value() for override in found}
    given |= {"weights": os.path.expanduser(given["weights"]), "job_dir": "./Zoë's [r] #2", "hydra.mode": "RUN"}
    assert values == given


def test_new_processes_find_the_parts_in_all_directories_of_the_user(monkeypatch):
    commands = []

    def popen(command, **_):
        commands.append(command)
        raise BlockingIOError("no process is started in a test")

    monkeypatch.setattr(launch.subprocess, "Popen", popen)
    config = RunConfig(OmegaConf.create({"trainer": {"devices": 2}}), {}, [])
    with pytest.raises(BlockingIOError):
        launch.launch_processes(Start(config, Path("run")), [Path("/a"), Path("/my b"), Path("/c,d")], SignalListener())
    assert "--config-dir=/a" in commands[0]
    (search,) = [argument for argument in commands[0] if argument.startswith("hydra.searchpath=")]
    found = OverridesParser.create().parse_override(search).value()
    assert [str(entry.text if hasattr(entry, "text") else entry) for entry in found] == ["file:///my b", "file:///c,d"]


@pytest.mark.parametrize(("devices", "nodes", "expected"), [(1, 1, False), (2, 1, True), (2, 2, False)])
def test_processes_are_started_for_several_devices_of_one_machine(devices, nodes, expected, alone, monkeypatch):
    cfg = OmegaConf.create({"trainer": {"devices": devices, "num_nodes": nodes}})
    assert needs_launch(cfg) == expected
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert not needs_launch(cfg)


@pytest.fixture
def alone(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)


def trainer(devices, nodes):
    return OmegaConf.create({"trainer": {"devices": devices, "num_nodes": nodes}})


def test_processes_that_torchrun_or_srun_has_started_are_counted(alone, monkeypatch):
    assert (cluster.count_nodes(), cluster.processes_per_node()) == (1, 1)
    with pytest.raises(OptionError, match="trainer=multinode: start it with torchrun --nnodes=N .* or with srun"):
        launch.check_trainer(trainer(1, 1), "multinode", in_sweep=False)
    for name, value in {"STEP_ID": 0, "STEP_NUM_TASKS": 6, "STEP_NUM_NODES": 3}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert (cluster.count_nodes(), cluster.processes_per_node()) == (3, 2)
    launch.check_trainer(trainer(2, 3), "multinode", in_sweep=False)
    launch.check_trainer(trainer(2, 3), "multinode", in_sweep=True)  # a task of submitit's
    with pytest.raises(OptionError, match="trainer=auto: 6 processes were started; trainer=multinode makes them one"):
        launch.check_trainer(trainer(1, 1), "auto", in_sweep=False)
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert (cluster.count_nodes(), cluster.processes_per_node()) == (4, 8)
    with pytest.raises(OptionError, match="trainer=ddp: a sweep starts its processes itself"):
        launch.check_trainer(trainer(8, 4), "ddp", in_sweep=True)


def test_each_run_of_a_sweep_has_two_processes_and_a_folder_of_its_own(tmp_path):
    several = ["num_stu=1,2", "trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "trainer.max_epochs=1"]
    run = Begun("hydra.mode=MULTIRUN", *several, f"hydra.sweep.dir={tmp_path}/sweep", cwd=tmp_path)
    assert run.end() == 0, run.said
    said = "".join(run.said)
    assert (said.count("; 2 x cpu, "), said.count("<- chosen")) == (2, 2)
    folders = sorted(path for path in (tmp_path / "sweep").iterdir() if path.is_dir())
    found = [len(json.loads((folder / "summary.json").read_text())["students"]) for folder in folders]
    assert found == [1, 2]
