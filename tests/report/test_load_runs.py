import json
import os
import socket

import pytest

from odcheap.report.load_runs import load_run, load_runs
from odcheap.utils.errors import OptionError

CONFIG = "job_dir: {}\nseed: 3\nmethod: {{part: od}}\n"


def plant(folder, summary=None, word=None, metrics="epoch,val/student_0/top1\n0,0.5\n1,\n"):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.format(folder))
    (folder / "metrics.csv").write_text(metrics)
    if summary is not None:
        (folder / "summary.json").write_text(summary if isinstance(summary, str) else json.dumps(summary))
    if word is not None:
        (folder / "status.json").write_text(json.dumps(word))
    return folder


def test_runs_are_found_at_any_depth_and_once(tmp_path):
    one = plant(tmp_path / "sweep" / "a", {"finished": True})
    plant(tmp_path / "sweep" / "b", {"finished": True})
    found = load_runs([tmp_path, tmp_path / "sweep", one])
    assert [entry.folder.name for entry in found] == ["a", "b"]
    run = found[0].run
    assert (run.options["seed"], run.options["method.part"], run.summary) == (3, "od", {"finished": True})
    assert run.history["epoch"].tolist() == [0.0, 1.0]
    assert run.history["val/student_0/top1"].dropna().tolist() == [0.5]


@pytest.mark.parametrize(
    ("summary", "word", "state", "reason"),
    [
        (None, {"state": "failed", "reason": "optimizer.lr=9: too much"}, "failed", "optimizer.lr=9: too much"),
        (None, {"state": "running", "host": "far", "pid": 1}, "running", "2 epochs done"),
        (None, {"state": "running", "host": socket.gethostname(), "pid": os.getpid()}, "running", "2 epochs done"),
        (None, {"state": "running", "host": socket.gethostname(), "pid": 2**22 + 1}, "stopped", "2 epochs done"),
        (None, None, "stopped", "nothing was saved yet"),
        ({"finished": True}, {"state": "running", "host": "far", "pid": 1}, "finished", ""),
        ('{"finished": tr', None, "unreadable", "Expecting value"),
        ("[1]", None, "unreadable", "its summary.json cannot be read: its content: input should be a valid dictionary"),
    ],
)
def test_what_became_of_a_run(tmp_path, summary, word, state, reason):
    folder = tmp_path / ("a_long_name" * 9)  # a reason is not cut because of the folder's name
    plant(folder / "run", summary, word)
    (entry,) = load_runs([folder])
    assert entry.state == state
    assert reason in entry.reason
    assert "far" not in entry.reason
    if state == "running":
        assert (entry.host, entry.process) == (word["host"], word["pid"])
    assert (entry.run is not None) == (state == "finished")


def test_a_stopped_run_says_which_command_continues_it(tmp_path):
    run = plant(tmp_path / "run")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "epoch-0001.ckpt").touch()
    assert load_run(run).reason == "2 epochs done; the same command with resume=auto continues it"
    (tmp_path / "sweep.json").write_text('{"count": 1}')
    assert load_run(run).reason == "2 epochs done; the same command continues it"


def test_a_run_that_failed_before_it_began_is_found(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").write_text('{"state": "failed", "reason": "num_stu=0"}')
    assert [entry.state for entry in load_runs([tmp_path])] == ["failed"]


def test_what_holds_no_run_is_refused(tmp_path):
    with pytest.raises(OptionError, match="holds no run of odcheap"):
        load_runs([tmp_path])
    with pytest.raises(OptionError, match="no such folder"):
        load_runs([tmp_path / "none"])


@pytest.mark.parametrize("config", ["!!python/object/apply:os.mkdir [owned]", "a: &x [*x]", "{", "${oops"])
def test_a_config_that_is_none_is_named_and_runs_nothing(tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(config)
    (tmp_path / "run" / "summary.json").write_text('{"finished": true}')
    assert [found.state for found in load_runs([tmp_path])] == ["unreadable"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
