"""Students of different shapes in one run: trained, resumed, tested, loaded, exported and reported."""

import json
from pathlib import Path

import pytest
import torch
from conftest import TINY, Begun
from omegaconf import OmegaConf

from odcheap import load_student
from odcheap.export.load_run import load_run_student
from odcheap.layers.fuse import has_branches
from odcheap.report.load_runs import load_run, name_students
from odcheap.utils.errors import OptionError
from odcheap.utils.parts import list_parts

MIXED = "students=[{block_type:RepDW,backbone:{expansion:2,width:12}},DW]"
NAMES = ["RepDW resnet20 expansion=2 width=12", "DW resnet20 expansion=1 width=16"]
GIVEN = [option for option in TINY if not option.startswith("num_stu")]
MIDDLE = Path("checkpoints", "epoch-0001-step-0000010.ckpt")


OFTEN = ["data.val_size=237", "checkpoint_every=0", "checkpoint_keep=100"]  # of 19 steps: saved after the tenth, last
TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]


def ends_equal(one, two):
    """The bits of the last checkpoint's weights and optimizer, of the selected student, and the students' figures."""
    contents = [torch.load(job / "checkpoints" / "epoch-0001.ckpt", weights_only=True) for job in (one, two)]
    states = [content["state_dict"] | flatten_state(content["optimizer_states"][0]["state"]) for content in contents]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert (one / "student.safetensors").read_bytes() == (two / "student.safetensors").read_bytes()
    found = [json.loads((job / "summary.json").read_text()) for job in (one, two)]
    assert found[0]["students"] == found[1]["students"]


def flatten_state(state):
    return {f"{k} {name}": value for k, own in state.items() for name, value in own.items() if torch.is_tensor(value)}


def test_a_run_of_different_students_from_start_to_export(command, tmp_path):
    """In one run: branches in training, expansion and width, resume from an epoch's middle, and od's joined maps."""
    straight, again = tmp_path / "straight", tmp_path / "again"
    result = command(*GIVEN, *OFTEN, MIXED, f"job_dir={straight}")
    assert result.status == 0, result.err
    assert f"2 students ({', '.join(NAMES)})" in result.out + result.err
    result = command(f"resume={straight / MIDDLE}", "trainer=cpu", "logger=csv", f"job_dir={again}")
    assert result.status == 0, result.err
    ends_equal(straight, again)

    # Each student has its own costs; those of the run are the chosen student's, which is not the first here.
    summary = json.loads((straight / "summary.json").read_text())
    chosen, students = summary["selected"]["student"], summary["students"]
    assert [student["network"] for student in students] == NAMES
    assert (summary["num_stu"], len(students), chosen) == (2, 2, 1)
    assert summary["cost"]["params"] == students[chosen]["params"] != students[1 - chosen]["params"]
    assert summary["cost"]["standard"]["params"] == 78_042  # that of width 16
    # A new run reads the saved config, in which the shapes are complete.
    saved = OmegaConf.load(straight / "config.yaml").students
    assert [shape.block_type.part for shape in saved] == ["RepDW", "DW"]
    assert saved[0].backbone == {"part": "resnet20", "depth": 8, "expansion": 2, "width": 12}

    # Every student can be exported and loaded, with the shape that it has.
    images = torch.rand(2, 3, 8, 8)
    for number, k in ((None, chosen), (0, 0), (1, 1)):
        run = load_run_student(straight, number)
        assert run.settings["block_type"]["part"] == ["RepDW", "DW"][k]
        assert not has_branches(run.network)
        assert sum(p.numel() for p in run.network.parameters()) == students[k]["params"]
    loaded = load_student(straight / "student.safetensors")
    chosen_run = load_run_student(straight)
    torch.testing.assert_close(loaded.network(images), chosen_run.network(images), atol=1e-5, rtol=1e-5)

    # The report names the parts of all students; test_only reproduces the run; weights= needs the same shapes.
    options = load_run(straight).run.options
    assert (options["block_type.part"], options["backbone.part"]) == ("RepDW+DW", "resnet20")
    assert options["students"] == ", ".join(NAMES)
    assert command("test_only=true", f"resume={straight}", "trainer=cpu", "logger=csv").status == 0
    tested = json.loads((straight / "test.json").read_text())
    assert (tested["selected"], tested["students"]) == (summary["selected"], students)
    last = f"weights={straight}/checkpoints/epoch-0001.ckpt"
    refused = command(*GIVEN, last, f"job_dir={tmp_path}/none", "num_stu=2")
    assert "another architecture" in refused.err
    result = command(*GIVEN, last, MIXED, "test_only=true", f"job_dir={tmp_path}/tested")
    assert result.status == 0, result.err


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["students=[DW,Shift]", "num_stu=3"], "num_stu=3: must be 2, the number of entries of students"),
        (["students=[DW,Shift]", "block_type=Group"], "block_type=Group: is not used: each entry of students names"),
        (["students=[{backbone:{width:a}}]"], "students.0.backbone.width=a: must be a whole number"),
        (
            ["students=[DW,{block_type:{part:Group,groups:0}}]"],
            "students.1.block_type.groups=0: must be a whole number",
        ),
        (
            ["students=[DW,{block_type:{part:Group,groups:3}}]"],
            "students.1.block_type.groups=3: must divide the layer's 16 channels",
        ),
        (
            ["students=[Group,Shift]", "block_type=Group", "block_type.groups=3"],
            "block_type.groups=3: must divide the layer's 16 channels",
        ),
        (["students=[DW,{backbone:{depth:9}}]"], "students.1.backbone.depth=9: must be 6n + 2"),
        (["students=[{backbone:{depth:20}},DW]", "backbone.depth=9"], "backbone.depth=9: must be 6n + 2"),
        (["students=DW"], "students=DW: must be a list of 1 to 100 entries"),
        (["students=[DW,vgg16]", "method=dml"], "backbone=vgg16: pictures of 8 x 8 are too small"),
    ],
)
def test_students_that_make_no_sense_are_refused_in_one_line(command, tmp_path, options, line):
    result = command("data=digits", "backbone=resnet20", "trainer=cpu", *options, f"job_dir={tmp_path}/none")
    assert result.status == 1
    assert result.err.startswith(f"error: {line}")
    assert result.err.count("\n") == 1
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in list_parts("method") if name != "kd"])
def test_every_method_resumes_exactly_with_different_students(command, tmp_path, name):
    straight, again = tmp_path / "straight", tmp_path / "again"
    new, resumed = [*GIVEN, *OFTEN, MIXED, f"method={name}"], [f"resume={straight / MIDDLE}", "trainer=cpu"]
    for options, job_dir in ((new, straight), (resumed, again)):
        result = command(*options, f"job_dir={job_dir}", "logger=csv")
        assert result.status == 0, result.err
    ends_equal(straight, again)


@pytest.mark.slow
def test_two_processes_resume_exactly_with_different_students(tmp_path):
    straight, again = tmp_path / "straight", tmp_path / "again"
    new, resumed = [*GIVEN, *OFTEN, MIXED], [f"resume={straight / MIDDLE}", "logger=csv"]
    for options, job_dir in ((new, straight), (resumed, again)):
        run = Begun(*TWO, *options, f"job_dir={job_dir}", cwd=tmp_path, given=())
        assert run.end() == 0, run.said
    ends_equal(straight, again)


def test_the_option_of_a_run_is_checked_where_a_file_is_made_up(tmp_path):
    """A `config.yaml` of a stranger, as a report reads it."""
    with pytest.raises(OptionError, match="DIR=config.yaml: its students are not as odcheap writes them"):
        name_students({"students": [{"backbone": 3}]}, Path("config.yaml"))
