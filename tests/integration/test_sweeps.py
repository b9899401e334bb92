import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import TINY
from omegaconf import OmegaConf
from rich.console import Console

import train
from odcheap.training import sweep
from odcheap.training.sweep import Gather, Outcome, short_names, show


def test_rows_show_what_differs():
    names = ["a=1,seed=0,x=y", "a=1,seed=1,x=y", "a=2,seed=1,x=y"]
    assert short_names(names) == ["a=1,seed=0", "a=1,seed=1", "a=2,seed=1"]
    assert short_names(["a=1"]) == ["a=1"]


def test_words_of_other_processes_are_gathered_in_order_and_cleared_away(tmp_path, monkeypatch):
    config, gather = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path / "sweep")}}}), Gather()
    (tmp_path / "sweep" / f".words-{socket.gethostname()}-{2**22 + 1}-5").mkdir(parents=True)  # of one that was killed
    monkeypatch.setenv(sweep.WORDS, "")
    gather.on_multirun_start(config)
    for number in (1, 0):
        job = OmegaConf.create({"job": {"num": number}})
        monkeypatch.setattr("odcheap.training.sweep.HydraConfig.get", lambda job=job: job)
        sweep.leave_word(Outcome(f"run-{number}", "failed: ended without a word", None))
        sweep.leave_word(Outcome(f"run-{number}", "failed: why", None))
    where = os.environ[sweep.WORDS]
    gather.on_multirun_end(config)
    assert sweep.ended == [Outcome("run-0", "failed: why", None), Outcome("run-1", "failed: why", None)]
    assert not list((tmp_path / "sweep").iterdir())
    assert not sweep.gather()
    monkeypatch.setenv(sweep.WORDS, where)
    sweep.leave_word(Outcome("run-2", "finished", None))  # whoever led the sweep has gone
    assert not list((tmp_path / "sweep").iterdir())
    sweep.ended.clear()


def run(folder, method, seed, value):
    folder.mkdir()
    config = {"job_dir": str(folder), "seed": seed, "method": {"_target_": f"odcheap.methods.{method}.Class"}}
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
    until(lambda: (tmp_path / "said").read_text().count("epoch 1 (2/500)") == 2)
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
    shell = f"{sweep} > said 2>&1 & until grep -q 'epoch 1 ' said; do sleep 0.1; done"
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
    assert "the sweep ended before its time" in result.err
    assert "Traceback" not in result.err + result.out
    assert result.out.count("failed: data.batch_size=") == 2


@pytest.mark.parametrize(("methods", "compared"), [(("alone", "od"), True), (("od",), False)])
def test_several_methods_are_compared(tmp_path, capsys, methods, compared):
    outcomes = [run(tmp_path / f"{method}", method, 0, 0.5 + 0.1 * k) for k, method in enumerate(methods)]
    show(Console(width=160), [*outcomes, Outcome(str(tmp_path / "bad"), "failed: num_stu=0", None)])
    said = capsys.readouterr().out
    assert "failed: num_stu=0" in said
    assert ("gain over alone" in said) == compared
    assert ("+0.1000" in said) == compared
