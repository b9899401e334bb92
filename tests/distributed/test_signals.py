"""Signals to real runs, in this process and in others."""

import json
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ONE_THREAD, TINY, Begun

import train
from odcheap.data.in_memory import EvalBatches, TrainBatches
from odcheap.distributed import signals
from odcheap.distributed.signals import SignalListener, Stopped
from odcheap.training.callbacks import Record
from odcheap.training.train_step import EagerStep
from odcheap.utils.errors import Failure
from odcheap.utils.signals import STOP_SIGNALS, stop_with_parent


@pytest.fixture
def own_signals():
    """Puts back what this process did on signals before."""
    before = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_saves_the_step_and_the_run_ends_as_if_nothing_had_been(
    tmp_path, command, trained, own_signals, monkeypatch, name
):
    """It comes in the third step of the third epoch."""
    signum, begin = getattr(signal, name), Record.on_train_batch_start

    def send(record, trainer, *given):
        begin(record, trainer, *given)
        if (trainer.current_epoch, given[-1]) == (2, 2):
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(Record, "on_train_batch_start", send)
    given = [*TINY, "trainer.max_epochs=4"]
    run = command(*given, f"job_dir={tmp_path}/run")
    assert run.status == 128 + signum
    assert run.out.endswith(f"{name}: saved; resume={tmp_path}/run logger=csv continues\n")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "stopped"
    monkeypatch.undo()
    again = command(*given, f"job_dir={tmp_path}/run", "resume=auto")
    assert again.status == 0
    assert "run/checkpoints/epoch-0002-step-0000003.ckpt\n" in again.out.partition("continuing from")[2]
    straight = trained("trainer.max_epochs=4", name="straight")
    found, expected = (folder / "student.safetensors" for folder in (tmp_path / "run", straight))
    assert found.read_bytes() == expected.read_bytes()


def test_a_signal_while_testing_ends_the_run_which_is_then_completed(tmp_path, command, own_signals, monkeypatch):
    monkeypatch.setattr(
        "odcheap.training.experiment.summary.summarize_members", lambda *_: os.kill(os.getpid(), signal.SIGTERM)
    )
    run = command(*TINY, f"job_dir={tmp_path}/run")
    assert run.status == 143
    assert run.out.endswith(f"SIGTERM: saved; resume={tmp_path}/run logger=csv continues\n")
    monkeypatch.undo()
    assert command(*TINY, f"job_dir={tmp_path}/run", "resume=auto").status == 0
    assert (tmp_path / "run" / "summary.json").is_file()


def test_a_signal_before_there_is_a_folder_has_its_line_too(tmp_path, command, own_signals, monkeypatch):
    monkeypatch.setattr(
        "odcheap.training.experiment.Experiment.build_trainer", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)
    )
    run = command(*TINY, f"job_dir={tmp_path}/run")
    assert (run.status, run.out) == (143, "SIGTERM: nothing was saved yet\n")
    assert not (tmp_path / "run").exists()


def test_a_second_signal_ends_the_run_at_once(tmp_path):
    """Both come while the process sleeps, so no step can have ended between them."""
    run = Begun("trainer.max_epochs=300", "job_dir=run", cwd=tmp_path)
    run.until("epoch 2/300")
    for signum in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
        run.process.send_signal(signum)
        time.sleep(0.2)
    assert run.end() in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    assert "Traceback" not in "".join(run.said)
    assert not any("saved" in line for line in run.said)


def test_what_a_launcher_s_process_was_stopped_by_reaches_its_leader():
    found = pickle.loads(pickle.dumps(Stopped(signal.SIGTERM)))
    assert (found.code, found.name) == (143, "SIGTERM")


def test_a_signal_heard_too_late_is_not_forgotten(own_signals):
    def hears_twice():
        with SignalListener() as listener:
            listener.is_deferred = True
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # the same at once: from a starter, and with all of a group
            assert listener.received == signal.SIGTERM

    with pytest.raises(Stopped):
        hears_twice()


def test_a_process_whose_starter_is_gone_ends_as_by_a_signal(own_signals):
    with SignalListener(), stop_with_parent(os.getppid()):
        time.sleep(1.5)
    with pytest.raises(Stopped) as stopped, SignalListener(), stop_with_parent(os.getppid() + 1):
        time.sleep(3)
    assert stopped.value.name == "SIGTERM"


def test_nohup_is_respected(own_signals):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with SignalListener():
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.1)


@pytest.mark.parametrize("is_waiting", [True, False])
def test_a_signal_ends_a_wait_for_a_batch_that_never_comes(own_signals, monkeypatch, is_waiting):
    """But it never ends a step that takes long."""
    monkeypatch.setattr(signals, "WAIT_SECONDS", 0.5)

    def waits():
        with SignalListener() as listener:
            listener.defer()
            listener.waiting_since = time.monotonic() if is_waiting else None
            os.kill(os.getpid(), signal.SIGTERM)
            begun = time.monotonic()
            try:
                time.sleep(3)
            finally:
                listener.is_deferred = False
                assert (time.monotonic() - begun < 2.5) == is_waiting
                assert listener.has_given_up == is_waiting

    with pytest.raises(Stopped) as stopped:
        waits()
    assert stopped.value.name == "SIGTERM"


def stall(seconds):
    """A signal arrives while the run waits so long."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(seconds)


@pytest.mark.parametrize("place", ["training", "first batch", "evaluation"])
def test_a_run_ends_if_no_batch_comes_after_a_signal(tmp_path, command, own_signals, monkeypatch, place):
    train, evaluate, evaluations = TrainBatches.batches_from, EvalBatches.__iter__, []

    def train_batches(self, start):
        for k, batch in enumerate(train(self, start)):
            if self.sampler.epoch == 1 and (place, k) in (("first batch", 0), ("training", 2)):
                stall(30)
                pytest.fail("nothing has ended the wait")
            yield batch

    def evaluation_batches(self):
        evaluations.append(1)
        for k, batch in enumerate(evaluate(self)):
            if (place, len(evaluations), k) == ("evaluation", 2, 1):
                stall(30)
                pytest.fail("nothing has ended the wait")
            yield batch

    assert 10 <= signals.WAIT_SECONDS <= 25  # Slurm kills a job 30 seconds after the signal
    monkeypatch.setattr(signals, "WAIT_SECONDS", 0.5)
    monkeypatch.setattr(TrainBatches, "batches_from", train_batches)
    monkeypatch.setattr(EvalBatches, "__iter__", evaluation_batches)
    run = command(*TINY, "data.eval_batch_size=400", f"job_dir={tmp_path}/run")
    assert run.status == 143
    hint = "(no batch of images came; see data.workers and /dev/shm)"
    assert run.out.endswith(f"SIGTERM {hint}: saved; resume={tmp_path}/run logger=csv continues\n")


def test_a_long_step_is_not_taken_for_a_wait(tmp_path, command, own_signals, monkeypatch):
    update, calls = EagerStep.update, []

    def slow(step):
        calls.append(step)
        if len(calls) == 10:
            stall(2)
        return update(step)

    monkeypatch.setattr(signals, "WAIT_SECONDS", 0.5)
    monkeypatch.setattr(EagerStep, "update", slow)
    run = command(*TINY, f"job_dir={tmp_path}/run")
    assert run.status == 143
    assert run.out.endswith(f"SIGTERM: saved; resume={tmp_path}/run logger=csv continues\n")
    assert (tmp_path / "run" / "checkpoints" / "epoch-0001-step-0000003.ckpt").is_file()


def begin(*command, cwd, **more):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *command], cwd=cwd, env=ONE_THREAD, **pipes | more)


def wait_until_it_imports(process):
    while "libtorch_cpu" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
@pytest.mark.parametrize("command", [[train.__file__, *TINY], ["-m", "odcheap.export", "x"]], ids=["train", "export"])
def test_a_signal_during_the_imports_is_one_line(tmp_path, name, command):
    process = begin(*command, cwd=tmp_path)
    wait_until_it_imports(process)
    process.send_signal(getattr(signal, name))
    out, _ = process.communicate(timeout=60)
    assert out == f"{name}: ended before anything was started\n"
    assert process.returncode == 128 + getattr(signal, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["pipe", "closed"])
def test_an_output_that_nobody_reads_ends_no_training(tmp_path, how):
    """`train.py | head -1`, and `train.py >&-`."""
    options = ["data.val_size=1300", "trainer.max_epochs=1", f"job_dir={tmp_path}/run"]
    if how == "pipe":
        run = Begun(*options, cwd=tmp_path)
        run.until("")
        run.process.stdout.close()
        assert run.process.wait(120) == 0
    else:
        words = shlex.join([sys.executable, train.__file__, *TINY, *options])
        assert subprocess.run(["sh", "-c", f"exec {words} >&- 2>&-"], env=ONE_THREAD, check=False).returncode == 0
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
    assert (tmp_path / "run" / "student.safetensors").is_file()


def test_a_failed_run_is_not_called_running(tmp_path, command, monkeypatch):
    def fail(*_):
        raise Failure("it failed")

    monkeypatch.setattr(Record, "on_train_epoch_end", fail)
    assert command(*TINY, f"job_dir={tmp_path}/run").status == 1
    found = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (found["state"], found["reason"]) == ("failed", "it failed")


def ranks(train_py):
    """Process ids by rank of the workers that this process tree holds."""
    found = {}
    listed = subprocess.run(["pgrep", "-f", str(train_py)], capture_output=True, text=True).stdout.split()
    for pid in listed:
        try:
            words = Path(f"/proc/{pid}/environ").read_text() + Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            continue
        found |= {int(word[5:]): int(pid) for word in words.split("\0") if re.fullmatch(r"RANK=\d+", word)}
    return found


SEVERAL = ["trainer=ddp", "trainer.accelerator=cpu"]


@pytest.mark.parametrize("whom", [pytest.param("leader", marks=pytest.mark.slow), "rank 1"])
def test_several_processes_stop_together_wherever_the_signal_arrives(tmp_path, whom):
    job_dir = tmp_path / "run"
    run = Begun(*SEVERAL, "trainer.max_epochs=60", f"job_dir={job_dir}", cwd=tmp_path)
    run.until("epoch 2/60")
    os.kill(run.process.pid if whom == "leader" else ranks(f"job_dir={job_dir}")[1], signal.SIGTERM)
    assert run.end() == 128 + signal.SIGTERM
    assert run.said[-1] == f"SIGTERM: saved; resume={job_dir} logger=csv continues\n"
    assert ranks(f"job_dir={job_dir}") == {}
    assert json.loads((job_dir / "status.json").read_text())["reason"] == "SIGTERM"


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.mark.parametrize(
    ("starter", "name"),
    [
        ([], "SIGINT"),
        pytest.param([], "SIGTERM", marks=pytest.mark.slow),
        pytest.param(TORCHRUN, "SIGINT", marks=pytest.mark.slow),
        pytest.param(TORCHRUN, "SIGTERM", marks=pytest.mark.slow),
    ],
    ids=["Ctrl-C", "SIGTERM", "Ctrl-C of torchrun", "SIGTERM to torchrun"],
)
def test_several_processes_save_and_end_if_a_signal_goes_to_the_whole_group(tmp_path, command, starter, name):
    """A terminal, a shell's `kill -- -PID` and many schedulers signal all processes of a group at once."""
    job_dir, signum = tmp_path / "run", signal.Signals[name]
    run = Begun(*SEVERAL, "trainer.max_epochs=60", f"job_dir={job_dir}", cwd=tmp_path, starter=starter)
    run.until("epoch 2/60")
    os.killpg(run.process.pid, signum)
    status = run.end()
    assert (job_dir / "checkpoints").is_dir(), run.said
    assert json.loads((job_dir / "status.json").read_text())["state"] == "stopped"
    assert json.loads((job_dir / "status.json").read_text())["reason"] == name
    assert f"{name}: saved; resume={job_dir} logger=csv continues\n" in run.said
    assert starter or (status, run.said[-1][: len(name)]) == (128 + signum, name), run.said
    assert status != 0
    assert ranks(f"job_dir={job_dir}") == {}
    result = command(*TINY, "resume=auto", "trainer.max_epochs=3", f"job_dir={job_dir}")
    assert result.status == 0, result.err
    assert "continuing from" in result.out


@pytest.mark.parametrize("whom", ["leader", "agent", pytest.param("rank 0", marks=pytest.mark.slow), "rank 1"])
def test_no_process_outlives_another_that_was_killed(tmp_path, command, whom):
    """After rank 1 was killed, the run goes on in one process."""
    job_dir = tmp_path / "run"
    run = Begun("trainer=ddp", "trainer.accelerator=cpu", "trainer.max_epochs=300", f"job_dir={job_dir}", cwd=tmp_path)
    run.until("epoch 2/300")
    found = ranks(f"job_dir={job_dir}")
    agent, began = parent(found[0]), time.monotonic()
    os.kill({"leader": run.process.pid, "agent": agent, "rank 0": found[0], "rank 1": found[1]}[whom], signal.SIGKILL)
    if whom == "leader":
        assert run.end() == -signal.SIGKILL  # its workers hold the pipe: they have ended too
    else:
        assert run.end() == 1
    if whom.startswith("rank"):
        line = f"error: process {whom[-1]} was killed by SIGKILL (out of memory?); the others were stopped\n"
        assert line in run.said
        assert "Traceback" not in "".join(run.said)
    assert time.monotonic() - began < 60
    assert ranks(f"job_dir={job_dir}") == {}
    assert json.loads((job_dir / "status.json").read_text())["state"] != "running"
    if whom == "rank 1":
        result = command(f"resume={job_dir}", "trainer=cpu", "trainer.max_epochs=5")
        assert result.status == 0, result.err
        assert "continuing from" in result.out


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_three_interrupts_leave_no_process_behind(tmp_path):
    """The ranks are stopped meanwhile, so that they cannot end at the first one."""
    job_dir = tmp_path / "run"
    run = Begun("trainer=ddp", "trainer.accelerator=cpu", "trainer.max_epochs=300", f"job_dir={job_dir}", cwd=tmp_path)
    run.until("epoch 2/300")
    found = ranks(f"job_dir={job_dir}")
    for pid in found.values():
        os.kill(pid, signal.SIGSTOP)
    for _ in range(3):
        run.process.send_signal(signal.SIGINT)
        time.sleep(1.2)
    for pid in found.values():
        os.kill(pid, signal.SIGCONT)
    assert run.end() == 128 + signal.SIGINT
    assert ranks(f"job_dir={job_dir}") == {}
