"""A run is what it was: of the same images, and the same run for its loggers."""

import sqlite3
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from omegaconf import OmegaConf
from PIL import Image

from odcheap.config.command_line import prepare_arguments
from odcheap.runs.resume import Start
from odcheap.runs.settings import RunConfig, name_run
from odcheap.training.trackers import saved_logger_run
from odcheap.utils.parts import find_conf_dir

PICTURES = ["data=imagefolder", "data.image_size=16", "data.val_size=4", "data.load.test_size=6", "data.workers=0"]
PICTURES += ["data.batch_size=8", *TINY[2:4], "num_stu=1", "method=alone", "trainer=cpu", "trainer.max_epochs=1"]
PICTURES += ["logger=csv"]


@pytest.fixture
def folders(tmp_path):
    """Two folders of different images."""
    for name, brightness in (("A", 0), ("B", 100)):
        for k in range(24):
            path = tmp_path / name / ("cat", "dog")[k % 2] / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((20, 20, 3), 5 * k + brightness, np.uint8)).save(path)
    return tmp_path / "A", tmp_path / "B"


def test_a_sweep_over_folders_of_images_trains_on_each(folders, command, tmp_path):
    given = f"data_dir={folders[0]},{folders[1]}"  # as everywhere in Hydra
    result = command("-m", *PICTURES, given, f"hydra.sweep.dir={tmp_path}/sweep")
    assert result.status == 0, result.err
    assert len(list((tmp_path / "sweep").glob("*/summary.json"))) == 2
    result = command("-m", *PICTURES, given, f"hydra.sweep.dir={tmp_path}/sweep")
    assert result.out.count("nothing to do") == 2


def test_a_run_of_other_images_does_not_count_as_finished(folders, command, tmp_path):
    run = [*PICTURES, f"job_dir={tmp_path}/run", "resume=auto"]
    assert command(*run, f"data_dir={folders[0]}").status == 0
    result = command(*run, f"data_dir={folders[1]}")
    assert result.status == 1
    assert f"data_dir={folders[1]}: has other images than those with which the resumed run was started" in result.err
    folders[0].rename(tmp_path / "moved")
    assert "nothing to do" in command(*run, f"data_dir={tmp_path}/moved").out


def test_a_run_whose_images_are_not_there_any_more_says_where_they_were(folders, command, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert command(*PICTURES, "data_dir=../A", "job_dir=run").status == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "work").rename(tmp_path / "elsewhere" / "work")
    folders[0].rename(tmp_path / "moved")
    missing = "the run's images were in this folder (relative to where the run was started), which is not there now"
    for arguments in (["resume=work/run"], ["test_only=true", "resume=work/run"]):
        result = command(*arguments)
        assert (result.status, result.out) == (1, "")
        assert result.err == f"error: data_dir=../A: {missing}; data_dir=FOLDER says where they are\n"
    assert "nothing to do" in command("resume=work/run", f"data_dir={tmp_path}/moved").out
    assert command("test_only=true", "resume=work/run", "data_dir=../moved").status == 0


def test_a_run_with_the_default_folder_says_that_it_is_not_there(folders, command, tmp_path, monkeypatch):
    folders[0].rename(tmp_path / "data")
    assert command(*PICTURES, "job_dir=run").status == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = command("resume=../run")
    assert result.status == 1
    assert "data_dir=data: the run's images were in this folder (relative to where the run was started)" in result.err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["-m", "data_dir=a,b"], ["-m", "data_dir=a,b", "hydra.sweep.subdir='${run_name:data_dir}'"]),
        (["-m", "data_dir=a(1),b"], ["-m", 'data_dir="a(1)",b', "hydra.sweep.subdir='${run_name:data_dir}'"]),
        (["-m", "data_dir='a','b'"], ["-m", "data_dir='a','b'", "hydra.sweep.subdir='${run_name:data_dir}'"]),
        (["-m", "data_dir=there,is"], ["-m", 'data_dir="there,is"']),
        (["data_dir=a,b"], ['data_dir="a,b"']),
        (["-m", "weights=a=1,b=2/student"], ["-m", 'weights="a=1,b=2/student"']),
        (["-m", "weights=one,two"], ["-m", "weights=one,two"]),
        (["-m", "resume=one,two"], ["-m", 'resume="one,two"']),
    ],
    ids=str,
)
def test_paths_with_commas_are_a_sweep_or_one_path(tmp_path, monkeypatch, given, expected):
    monkeypatch.chdir(tmp_path)
    for name in ("there,is", "one", "two"):
        (tmp_path / name).touch()
    assert prepare_arguments(given, find_conf_dir()) == expected


def test_the_folder_of_images_is_in_a_name_only_if_it_is_varied():
    assert name_run(["data_dir=/x/a", "seed=1"]) == "seed=1"
    assert name_run(["data_dir='/x/a'", "seed=1"], ["data_dir"]) == "data_dir=-x-a,seed=1"


@pytest.mark.filterwarnings("ignore")  # of MLflow and its database
def test_a_continued_run_is_the_same_run_for_mlflow(command, tmp_path):
    pytest.importorskip("mlflow")
    # MLflow keeps databases open by their names, so a relative name would be the database of an earlier test's folder.
    mlflow = ["logger=[csv,mlflow]", f"logger.mlflow.tracking_uri=sqlite:///{tmp_path}/mlflow.db"]
    assert command(*TINY[:-1], *mlflow, f"job_dir={tmp_path}/run", "trainer.max_epochs=1").status == 0
    result = command(f"resume={tmp_path}/run", "trainer.max_epochs=2", "logger=csv")
    assert result.status == 0, result.err
    result = command(f"resume={tmp_path}/run", "trainer.max_epochs=3", *mlflow)
    assert result.status == 0, result.err
    assert count_mlflow_runs(tmp_path) == 1
    other = f"logger.mlflow.tracking_uri=sqlite:///{tmp_path}/other.db"
    result = command(f"resume={tmp_path}/run", "trainer.max_epochs=4", "logger=mlflow", other)
    assert "logger=mlflow: starts a new run, since the earlier one is not there" in result.out
    assert result.status == 0, result.err


def count_mlflow_runs(folder):
    with sqlite3.connect(folder / "mlflow.db") as database:
        return database.execute("select count(*) from runs").fetchone()[0]


def test_a_continued_run_is_the_same_run_for_wandb_and_resume_says_which_logger_it_had(command, tmp_path):
    pytest.importorskip("wandb")
    logger = ["logger=wandb", "logger.wandb.offline=true"]
    assert command(*TINY[:-1], *logger, f"job_dir={tmp_path}/run", "trainer.max_epochs=1").status == 0
    for given, epochs in (([], 2), (logger, 3)):
        result = command(f"resume={tmp_path}/run", f"trainer.max_epochs={epochs}", *given, default_logger=None)
        assert result.status == 0, result.err
        assert ("logger=wandb" in result.out.partition("(give them again to have them)")[0]) == (not given)
    runs = [path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert len(runs) == 2
    assert len({name.rpartition("-")[2] for name in runs}) == 1


@pytest.mark.parametrize(
    ("in_own_folder", "saved", "given", "expected"),
    [
        (True, "abc", None, {"id": "abc"}),
        (False, "abc", None, {}),  # a run that goes on in another folder is another run
        (True, "../abc", None, {}),
        (True, "abc", "mine", {}),
    ],
)
def test_a_run_id_is_taken_only_for_the_same_run(in_own_folder, saved, given, expected):
    config = RunConfig(OmegaConf.create({"logger": {"wandb": {"id": given}}}), {}, [])
    content = {"callbacks": {"LoggerRuns": {"wandb": saved}}}
    start = Start(config, Path("run"), content=content, in_own_folder=in_own_folder)
    assert saved_logger_run(start, "wandb") == expected


def test_options_beside_resume_belong_to_the_parts_of_the_resumed_run(tmp_path):
    """The name of the part follows its options: a message about one of them names the first override that sets it."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(
        "method: {part: kd}\ndata: {part: digits}\noptimizer: {part: '../x'}\ntrainer: {}\n"
    )

    def added(*arguments):
        prepared = prepare_arguments(list(arguments), find_conf_dir())
        assert [argument for argument in prepared if argument in arguments] == list(arguments)
        return [argument for argument in prepared if argument not in arguments]

    teacher = "method.teacher_weights=x"
    assert prepare_arguments([f"resume={run}", teacher, "seed=1"], find_conf_dir()) == [
        f"resume={run}",
        teacher,
        "method=kd",
        "seed=1",
    ]
    assert added(f"resume={run}/checkpoints/epoch-0001.ckpt", "data.workers=0", teacher) == ["data=digits", "method=kd"]
    assert added("resume=auto", f"job_dir={run}", "data.workers=0") == ["data=digits"]
    for unchanged in (
        [teacher],
        ["resume=auto", teacher],
        [f"resume={run}", teacher, "method=od"],
        [f"resume={run}", teacher, "experiment=short"],
        [f"resume={run}", "optimizer.lr=1", "augment.mixup=1", "trainer.devices=2"],
        [f"resume={tmp_path}", teacher],
        ["-m", f"resume={run}", teacher],
    ):
        assert added(*unchanged) == []
