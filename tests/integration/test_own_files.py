"""Files of the user: no command changes, replaces or removes them, and none writes through a link."""

import json
import os
import shutil
import socket

import pytest
from conftest import TINY
from PIL import Image

from odcheap import cli
from odcheap.runs import status
from odcheap.runs.folder import read_versions
from odcheap.runs.settings import name_run
from odcheap.training import experiment

NAMES = ("config.yaml", "metrics.csv", "summary.json", "test.json", "student.safetensors", "status.json", ".lock")
NAMES += ("confusion.csv", "split.csv", "multirun.yaml", ".film.mkv.part", ".summary.json.7.part", ".DS_Store")
NAMES += (
    "checkpoints/epoch-0000.ckpt",
    "checkpoints/epoch-0001-step-0000010.ckpt",
    "checkpoints/.epoch-0001.ckpt.7.part",
)
NAMES += ("tensorboard/events.out.tfevents.1", "wandb/latest-run", "report/report.md", "report/report.csv")
NAMES += ("report/curves.png", "report.md", "report.csv", "curves.png", "gains.svg", "labels.json", "preprocess.json")
NAMES += ("predict.py", "README.md", "student.onnx", "export/labels.json/thesis.tex", "export/README.md")
NAMES += (
    "evaluation.json",
    "confusion.png",
    "default/status.json",
    "seed=1/summary.json",
    "mlflow.db",
    "data/notes.txt",
)
STRANGE = ("not ours\n", "[1]", "{}", '{"finished": true}', '{"state": "running"}', "a: [", "epoch\n1\n")


@pytest.fixture
def finished(trained):
    return trained("trainer.max_epochs=1")


@pytest.fixture
def mine(tmp_path):
    """A folder full of the user's files, which have the names of odcheap's."""
    for k, name in enumerate(NAMES):
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STRANGE[k % len(STRANGE)])
    return tmp_path / "mine"


def contents(folder):
    """Every file below the folder with its bytes and its inode, every link with its target, and every folder."""
    found = {}
    for path in folder.rglob("*"):
        inode = path.lstat().st_ino
        what = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
        found[path.relative_to(folder)] = what, inode
    return found


def test_no_command_changes_a_byte_of_a_folder_full_of_the_user_s_files(finished, mine, command, light, capsys):
    newest = finished / "checkpoints" / "epoch-0000.ckpt"
    assert cli.main(["export", str(finished), "--seconds=0.01"]) == 0
    shutil.copy(newest, mine / "checkpoints" / "epoch-0002.ckpt")  # a download in the user's checkpoints folder
    before, here, run = contents(mine), f"job_dir={mine}", contents(finished)

    trainings = [[*TINY, here], [*TINY, here, "overwrite=true"], [*TINY, here, "resume=auto"]]
    trainings += [
        ["-m", *TINY, f"hydra.sweep.dir={mine}"],
        ["-m", *TINY, "seed=1", f"hydra.sweep.dir={mine}", "overwrite=true"],
    ]
    trainings += [[f"resume={mine}"], [f"resume={mine}/checkpoints/epoch-0002.ckpt", "trainer.max_epochs=2"]]
    trainings += [["test_only=true", f"resume={mine}"], ["test_only=true", f"resume={finished}", here]]
    trainings += [["test_only=true", f"resume={mine}/checkpoints/epoch-0002.ckpt"], [f"resume={newest}", here]]
    trainings += [[*TINY, "test_only=true", f"weights={finished}/student.safetensors", here]]
    trainings += [[*TINY, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", here]]
    for arguments in trainings:
        result = command(*arguments)
        assert (result.status, result.err[:7], result.err.count("\n")) == (1, "error: ", 1), (arguments, result)
        assert contents(mine) == before, arguments

    others = [["export", str(mine)], ["export", str(finished), "--out", str(mine)]]
    others += [["export", str(finished), "--out", str(mine), "--overwrite"], ["report", str(mine)]]
    others += [["export", str(finished), "--out", str(mine / "export"), "--overwrite"]]
    others += [["report", str(finished), "--out", str(mine)], ["report", str(finished), "--out", str(mine / "report")]]
    (mine.parent / "digits" / "0").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(mine.parent / "digits" / "0" / "x.png")
    evaluated = ["evaluate", str(finished), str(mine.parent / "digits"), "--out"]
    others += [[*evaluated, str(mine)], [*evaluated, str(mine / "README.md")], ["evaluate", str(mine), str(mine)]]
    others += [["predict", str(mine), str(mine)], ["predict", str(finished / "export"), str(mine)]]
    for arguments in others:
        assert cli.main(arguments + (["--no-latency"] if arguments[0] == "report" else [])) == 1, arguments
        assert "Traceback" not in "".join(capsys.readouterr())
        assert contents(mine) == before, arguments
    assert contents(finished) == run


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard", "wandb"])
def test_a_folder_of_a_run_that_is_a_link_is_refused(finished, command, tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    for file in ("epoch-0000.ckpt", "events.out.tfevents.1"):
        (tmp_path / "elsewhere" / file).write_text("precious")
    shutil.rmtree(finished / name, ignore_errors=True)
    (finished / name).symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path)
    result = command(*TINY, f"job_dir={finished}", "overwrite=true")
    assert f"its {name} must be a folder, not a link or a file" in result.err
    assert result.err.count("\n") == 1
    assert contents(tmp_path) == before


def test_files_are_replaced_and_never_written_through_a_link(finished, command, tmp_path):
    """Symbolic links and hard links in a run's folder, also dangling ones, and the lock."""
    outside = tmp_path / "outside"
    outside.mkdir()
    for k, name in enumerate(["config.yaml", "metrics.csv", "summary.json", "confusion.csv", "student.safetensors"]):
        (outside / name).write_text("precious")
        (finished / name).unlink()
        (finished / name).symlink_to(outside / name) if k % 2 else os.link(outside / name, finished / name)
    (finished / "split.csv").symlink_to(outside / "not-there")
    (finished / ".lock").unlink()
    (outside / "lock").write_text("precious")
    os.link(outside / "lock", finished / ".lock")
    before = contents(outside)
    assert command(*TINY, f"job_dir={finished}", "overwrite=true").status == 0
    assert contents(outside) == before
    assert not (finished / "metrics.csv").is_symlink()
    (finished / ".lock").unlink()
    (finished / ".lock").symlink_to(outside / "lock")
    result = command(*TINY, f"job_dir={finished}", "overwrite=true")
    assert "its lock .lock cannot be opened" in result.err
    assert result.err.count("\n") == 1
    assert contents(outside) == before


def test_overwrite_removes_the_files_of_the_run_and_leaves_the_user_s(finished, command):
    own = ["notes.txt", "checkpoints/best.ckpt", "checkpoints/epoch-best.ckpt", ".film.mkv.part", "tensorboard/me/x"]
    for name in own:
        (finished / name).parent.mkdir(parents=True, exist_ok=True)
        (finished / name).write_text("mine")
    (finished / "checkpoints" / "epoch-0009.ckpt").write_text("the run's")
    assert command(*TINY, "trainer.max_epochs=1", f"job_dir={finished}", "overwrite=true").status == 0
    assert [name for name in own if (finished / name).read_text() != "mine"] == []
    assert not (finished / "checkpoints" / "epoch-0009.ckpt").exists()


def test_a_folder_with_nothing_but_dotfiles_is_empty(command, tmp_path):
    (tmp_path / "run").mkdir()
    for name in (".DS_Store", ".lock"):
        (tmp_path / "run" / name).write_text("mine")
    assert command(*TINY, "trainer.max_epochs=1", f"job_dir={tmp_path}/run").status == 0
    assert {(tmp_path / "run" / name).read_text() for name in (".DS_Store", ".lock")} == {"mine"}


def test_a_run_starts_where_weights_were_tested(finished, command, tmp_path):
    weights = [f"weights={finished}/student.safetensors", f"job_dir={tmp_path}/other"]
    assert command(*TINY, "test_only=true", *weights).status == 0
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["test.json"]
    assert command(*TINY, "trainer.max_epochs=1", *weights).status == 0


@pytest.mark.parametrize("more", [[], ["overwrite=true"], ["resume=auto"]])
def test_what_was_decided_holds_under_the_lock_too(finished, command, tmp_path, monkeypatch, more):
    """Another run begins and ends in the folder while this one reads its data."""
    job_dir, read = tmp_path / "second", experiment.load_start_weights

    def slowly(*arguments):
        shutil.copytree(finished, job_dir, dirs_exist_ok=True)
        slowly.after = contents(job_dir)
        return read(*arguments)

    monkeypatch.setattr(experiment, "load_start_weights", slowly)
    result = command(*TINY, f"job_dir={job_dir}", *more)
    assert result.status == 1
    assert "another process has written here since this one was started; start the same command again" in result.err
    assert contents(job_dir) == slowly.after


def test_a_second_start_of_a_sweep_leaves_the_status_of_a_run_that_trains(command, tmp_path):
    job_dir = tmp_path / "sweep" / name_run(TINY)
    job_dir.mkdir(parents=True)
    with status.lock_folder(job_dir):
        running = {"state": "running", "reason": "", "host": socket.gethostname(), "pid": os.getppid()}
        (job_dir / "status.json").write_text(json.dumps(running))
        before = (job_dir / "status.json").read_bytes()
        result = command("-m", *TINY, f"hydra.sweep.dir={tmp_path}/sweep")
        assert result.status == 1
        assert "another process trains here" in result.err
        assert (job_dir / "status.json").read_bytes() == before


def test_the_versions_of_a_run_s_files_change_with_them(tmp_path):
    assert read_versions(tmp_path) == {}
    (tmp_path / "summary.json").write_text(json.dumps({}))
    first = read_versions(tmp_path)
    os.utime(tmp_path / "summary.json", (1, 1))
    assert read_versions(tmp_path) != first
