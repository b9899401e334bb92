import json
import os
import shlex
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
from odcheap.report.console_tables import short_names, show_sweep
from odcheap.runs.sweep import KILLED, Outcome, SweepFolder


def test_rows_show_what_differs():
    names = ["a=1,seed=0,x=y", "a=1,seed=1,x=y", "a=2,seed=1,x=y"]
    assert short_names(names) == ["a=1,seed=0", "a=1,seed=1", "a=2,seed=1"]
    assert short_names(["a=1"]) == ["a=1"]


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
