import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY
from omegaconf import OmegaConf
from rich.console import Console

import train
from odcheap.report.command import main as report
from odcheap.report.tables import show_sweep
from odcheap.runs.sweep import KILLED, Outcome, SweepFolder
from odcheap.training.experiment import Experiment


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_outcomes_are_read_from_the_folders_of_the_runs(tmp_path):
    """A killed run is known by its process, which is gone; failures of an earlier sweep are not shown again."""
    here = {"host": socket.gethostname(), "reason": ""}
    write(tmp_path / "old_failure" / "status.json", {"state": "failed", "reason": "x"})
    write(tmp_path / "was_finished" / "summary.json", {"finished": True})
    write(tmp_path / "tested" / "summary.json", {"finished": True})
    sweep = SweepFolder(tmp_path)
    write(tmp_path / "a" / "status.json", here | {"state": "failed", "reason": "num_stu=0"})
    write(tmp_path / "b" / "status.json", here | {"state": "running", "pid": 2**22 + 1})
    write(tmp_path / "c" / "status.json", here | {"state": "running", "pid": os.getpid()})
    write(tmp_path / "d" / "status.json", here | {"state": "stopped", "reason": "SIGTERM"})
    write(tmp_path / "e" / "summary.json", {"finished": True, "epochs": 1})
    write(tmp_path / "tested" / "test.json", {"selected": {}})
    write(tmp_path / "f" / "summary.json", {"finished": True, "epochs": "x"})
    write(tmp_path / "g" / "test.json", {"selected": {"epoch": -1}})
    found = {Path(outcome.job_dir).name: (outcome.text, outcome.summary) for outcome in sweep.read_outcomes()}
    for name, field in (("f", "summary.json: epochs: "), ("g", "test.json: selected.epoch: ")):
        text, summary = found.pop(name)
        assert text.startswith(f"failed: job_dir={tmp_path / name}/{field}")
        assert summary is None
    assert found == {
        "a": ("failed: num_stu=0", None),
        "b": (KILLED, None),
        "c": ("running", None),
        "d": ("stopped: SIGTERM", None),
        "e": ("finished", {"finished": True, "epochs": 1}),
        "tested": ("finished", {"selected": {}}),
        "was_finished": ("was finished", {"finished": True}),
    }


def test_outcomes_of_other_sweeps_in_the_folder_are_only_counted(tmp_path):
    sweep = SweepFolder(tmp_path, runs=["seed=0", "seed=1", "seed=2"])
    for name in ("seed=0", "method=od", "method=kd"):
        write(tmp_path / name / "summary.json", {"finished": True})
    assert [Path(outcome.job_dir).name for outcome in sweep.read_outcomes()] == ["seed=0"]
    assert sweep.count_others == 2


SEARCH = ("hydra/sweeper=optuna", "seed=interval(0,9)")


@pytest.mark.filterwarnings("error:Callback")
@pytest.mark.parametrize(
    ("mistyped", "answer"),
    [
        (("method=alone,odd", "seed=0,1"), "method=odd: unknown; must be one of alone, "),
        (("method=alone,od", "seeds=0,1"), "seeds: there is no such option; did you mean seed"),
        (("method=od,alone", "method.temperature=2,3"), "method.temperature: there is no such option; did you mean "),
        (("method=alone,od", "seed=0,,1"), "Error parsing override 'seed=0,,1'"),
        ((*SEARCH, "method=choice(alone,odd)"), "method=odd: unknown; must be one of alone, "),
    ],
)
def test_a_mistyped_sweep_says_and_writes_nothing_else(command, tmp_path, mistyped, answer):
    (tmp_path / "runs" / "sweep").mkdir(parents=True)
    result = command("-m", *mistyped, "experiment=quickstart")
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith(f"error: {answer}")
    assert result.err.count("\n") == 1
    assert [*(tmp_path / "runs").rglob("*")] == [tmp_path / "runs" / "sweep"]


def run(folder, method, seed, value):
    folder.mkdir()
    config = {"job_dir": str(folder), "seed": seed, "method": {"part": method}}
    (folder / "config.yaml").write_text(json.dumps(config))
    student = {"val_top1": value, "test_top1": value}
    summary = {"teacher": None, "selected": student, "last": {"students": [student]}}
    return Outcome(str(folder), "finished", summary)


@pytest.mark.slow
def test_several_runs_at_once_each_with_its_share_of_the_threads(tmp_path):
    """joblib; a failing run does not end the others."""
    command = [sys.executable, train.__file__, "-m", "hydra/launcher=joblib", *TINY, "num_stu=0,1", "seed=0,1"]
    asked = [*command, f"hydra.sweep.dir={tmp_path}/sweep"]
    done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stdout.count("│ finished") == 2
    assert done.stdout.count("failed: num_stu=0: must be") == 2


@pytest.mark.slow
def test_joblib_s_processes_save_and_end_where_their_leader_is_killed_and_begin_no_other_run(tmp_path):
    sweep = [sys.executable, train.__file__, "-m", "hydra/launcher=joblib", *TINY, "seed=0,1,2,3"]
    sweep += ["trainer.max_epochs=500", f"hydra.sweep.dir={tmp_path}/sweep"]
    with open(tmp_path / "said", "w") as file:
        leader = subprocess.Popen(sweep, cwd=tmp_path, stdout=file, stderr=file, start_new_session=True)
    until(lambda: (tmp_path / "said").read_text().count("epoch 2/500") == 2)
    leader.kill()
    leader.wait()
    until(lambda: (tmp_path / "said").read_text().count("SIGTERM: saved; ") == 2)
    time.sleep(5)
    os.killpg(leader.pid, signal.SIGKILL)  # joblib's own wait for five minutes for more to do
    assert sum(1 for path in (tmp_path / "sweep").iterdir() if list(path.glob("checkpoints/*"))) == 2


@pytest.mark.slow
def test_a_sweep_goes_on_where_the_shell_that_began_it_is_gone(tmp_path):
    """With one run at a time joblib's leader does the work itself."""
    sweep = [sys.executable, train.__file__, "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=1", *TINY]
    sweep = shlex.join([*sweep, "trainer.max_epochs=20", "seed=0,1", f"hydra.sweep.dir={tmp_path}/sweep"])
    shell = f"{sweep} > said 2>&1 & until grep -q '^epoch 2/' said; do sleep 0.1; done"
    subprocess.run(["sh", "-c", shell], cwd=tmp_path, check=True, timeout=60)
    until(lambda: "│ finished" in (tmp_path / "said").read_text() or "SIGTERM" in (tmp_path / "said").read_text())
    assert (tmp_path / "said").read_text().count("│ finished") == 2


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_a_sweep_says_where_it_is_and_its_status_lists_what_has_not_begun(command, tmp_path, capsys):
    sweep = [*TINY, "trainer.max_epochs=1", "data.limit=100", "num_stu=1,2", "method=od,alone"]
    write(tmp_path / "sweep" / "other" / "summary.json", {"finished": True})
    result = command("-m", *sweep, f"hydra.sweep.dir={tmp_path}/sweep")
    assert result.status == 0, result.err
    assert f"sweep of 4 runs in {tmp_path}/sweep; its progress: " in result.out
    assert "run 2 of 4: method=alone,num_stu=1\n" in result.out
    assert "also in this folder: 1 run of other sweeps (" in result.out
    shutil.rmtree(tmp_path / "sweep" / "other")
    plan = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert sorted(plan["runs"]) == sorted(path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir())

    # Two runs as a sweep leaves them that is stopped early.
    shutil.rmtree(tmp_path / "sweep" / plan["runs"][2])
    (tmp_path / "sweep" / plan["runs"][3] / "status.json").unlink()
    for name in ("summary.json", "config.yaml"):
        (tmp_path / "sweep" / plan["runs"][3] / name).unlink()
    assert report(["--status", str(tmp_path / "sweep")]) == 0
    said = capsys.readouterr().out
    assert "2 finished, 2 not begun" in said
    assert "│ alone,num_stu=2 │ not begun" in said
    shutil.rmtree(tmp_path / "sweep" / plan["runs"][0])
    shutil.rmtree(tmp_path / "sweep" / plan["runs"][1])
    assert report(["--status", str(tmp_path / "sweep")]) == 0
    assert capsys.readouterr().out.endswith("4 not begun\n")

    (tmp_path / "sweep" / "sweep.json").write_text("mine")
    refused = command("-m", *sweep, f"hydra.sweep.dir={tmp_path}/sweep")
    assert "holds a sweep.json that no sweep has written" in refused.err
    assert (tmp_path / "sweep" / "sweep.json").read_text() == "mine"


def test_a_stopped_sweep_says_how_it_goes_on(command, tmp_path, monkeypatch):
    def stop(*_):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Experiment, "run", stop)
    result = command("-m", *TINY, "seed=0,1", f"hydra.sweep.dir={tmp_path}/sweep")
    assert result.status == 130
    assert "the sweep was stopped; the same command continues it; " in result.out
    assert f"report --status {tmp_path}/sweep lists its runs" in result.out


@pytest.mark.slow
def test_ctrl_c_lets_all_runs_of_joblib_save(tmp_path):
    sweep = [sys.executable, train.__file__, "-m", "hydra/launcher=joblib", *TINY, "seed=0,1,2,3"]
    sweep += ["trainer.max_epochs=500", f"hydra.sweep.dir={tmp_path}/sweep"]
    with open(tmp_path / "said", "w") as file:
        leader = subprocess.Popen(sweep, cwd=tmp_path, stdout=file, stderr=file, start_new_session=True)
    until(lambda: all(f"[seed={k}] epoch 2/500" in (tmp_path / "said").read_text() for k in (0, 1)), 200)
    os.killpg(leader.pid, signal.SIGINT)
    assert leader.wait(60) == 130
    said = (tmp_path / "said").read_text()
    assert said.count("SIGINT: saved; ") == 2
    assert "the sweep was stopped; the same command continues it; " in said
    assert "Traceback" not in said
    assert "[seed=2]" not in said


# The sweeper asks for Optuna 2, which calls SQLAlchemy and NumPy by names of its time.
old_optuna = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@old_optuna
def test_optuna_looks_for_the_highest_accuracy(command, tmp_path):
    given = ["optimizer.lr=choice(1e-9,0.1)", "hydra.sweeper.n_trials=3", "hydra.sweeper.sampler.seed=0"]
    result = command("-m", "hydra/sweeper=optuna", *TINY, "num_stu=1", *given, f"hydra.sweep.dir={tmp_path}/sweep")
    assert result.status == 0, result.err
    best = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    found = {p.parent.name: json.loads(p.read_text()) for p in (tmp_path / "sweep").glob("*/summary.json")}
    assert len(found) == 2
    assert best.best_value == max(summary["selected"]["val_top1"] for summary in found.values())
    assert best.best_params == {"optimizer.lr": 0.1}
    trials = json.loads((tmp_path / "sweep" / "study.json").read_text())["searches"][0]["trials"]
    assert [trial["state"] for trial in trials] == ["COMPLETE"] * 3
    folder = next(name for name in found if "lr=0.1" in name)
    assert f"best of 3 trials: optimizer.lr=0.1, {best.best_value:.2%}"[:-1] in result.out
    assert f"({tmp_path}/sweep/{folder})" in result.out
    assert "test top-1" not in result.out.partition("sweep  ")[2]
    assert "run 3 of 3: optimizer.lr=" in result.out

    # The same command with more trials continues: three are known, and an interrupted one is tried again.
    trials[1] |= {"state": "RUNNING", "value": None}
    study = {
        "searches": [{"overrides": ["another"], "trials": []}, {"overrides": overrides_of(tmp_path), "trials": trials}]
    }
    (tmp_path / "sweep" / "study.json").write_text(json.dumps(study, indent=2))
    again = command("-m", "hydra/sweeper=optuna", *TINY, "num_stu=1", *given, f"hydra.sweep.dir={tmp_path}/sweep")
    assert again.status == 0, again.err
    assert f"sweep of 3 runs in {tmp_path}/sweep (2 are finished); " in again.out
    assert f"run 3 of 3: optimizer.lr={trials[1]['params']['optimizer.lr']}" in again.out
    searches = json.loads((tmp_path / "sweep" / "study.json").read_text())["searches"]
    assert [search["overrides"][0] for search in searches] == ["another", *overrides_of(tmp_path)[:1]]
    assert sum(trial["state"] == "COMPLETE" for trial in searches[1]["trials"]) == 3


def overrides_of(tmp_path):
    return json.loads((tmp_path / "sweep" / "study.json").read_text())["searches"][-1]["overrides"]


@old_optuna
def test_a_search_whose_every_run_fails_ends_with_its_reasons(command, tmp_path):
    given = ["data.batch_size=choice(0,1)", "hydra.sweeper.n_trials=2", "hydra.sweeper.sampler.seed=0"]
    result = command("-m", "hydra/sweeper=optuna", *TINY, *given, f"hydra.sweep.dir={tmp_path}/sweep")
    assert result.status == 1
    assert "the sweep ended early" in result.err
    assert "Traceback" not in result.err + result.out
    assert result.out.count("failed: data.batch_size=") == 2


@pytest.mark.parametrize(("methods", "compared"), [(("alone", "od"), True), (("od",), False)])
def test_several_methods_are_compared(tmp_path, capsys, methods, compared):
    outcomes = [run(tmp_path / f"{method}", method, 0, 0.5 + 0.1 * k) for k, method in enumerate(methods)]
    show_sweep(Console(width=160), [*outcomes, Outcome(str(tmp_path / "bad"), "failed: num_stu=0", None)])
    said = capsys.readouterr().out
    assert "failed: num_stu=0" in said
    assert ("gain over alone" in said) == compared
    assert ("+10.00" in said) == compared
