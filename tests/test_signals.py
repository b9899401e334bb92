"""Signals to real runs, in this process and in others."""

import json
import os
import signal
import subprocess
import threading
import time

import pytest
from conftest import TINY, Begun

from odcheap.checkpoint import all_paths
from odcheap.signals import ENDING


@pytest.fixture
def own_signals():
    """Puts back what this process did on signals before."""
    before = {signum: signal.getsignal(signum) for signum in ENDING}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_saves_the_next_step_and_the_run_ends_as_if_nothing_had_been(tmp_path, command, own_signals, name):
    job_dir, signum = tmp_path / "run", getattr(signal, name)

    def send():
        while not (job_dir / "checkpoints" / "epoch-0001.ckpt").is_file():
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(os.getpid(), signum)

    sender = threading.Thread(target=send)
    sender.start()
    run = command(*TINY, "trainer.max_epochs=9", f"job_dir={job_dir}")
    sender.join()
    assert run.status == 128 + signum
    assert run.out.endswith(f"{name}: saved; resume={job_dir} continues\n")
    assert json.loads((job_dir / "status.json").read_text())["state"] == "stopped"
    newest = all_paths(job_dir)[-1]
    again = command(*TINY, "trainer.max_epochs=9", f"job_dir={job_dir}", "resume=auto")
    assert again.status == 0
    assert f"continuing from {newest}" in again.out
    assert command(*TINY, "trainer.max_epochs=9", f"job_dir={tmp_path}/straight").status == 0
    found, straight = (tmp_path / folder / "student.safetensors" for folder in ("run", "straight"))
    assert found.read_bytes() == straight.read_bytes()


def test_a_second_signal_ends_the_run_at_once(tmp_path):
    """Its epochs of one step take seconds, so the first signal still waits when the second comes."""
    run = Begun(
        "trainer.max_epochs=6", "job_dir=run", "data.batch_size=437", "num_stu=8", "backbone.depth=56", cwd=tmp_path
    )
    run.until("epoch 0 (1/6)")
    time.sleep(0.5)
    run.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 128 + signal.SIGINT
    assert "Traceback" not in "".join(run.said)
    assert not any("saved" in line for line in run.said)


def ranks(train_py):
    """Process ids by rank of the workers that this process tree holds."""
    found = {}
    listed = subprocess.run(["pgrep", "-f", str(train_py)], capture_output=True, text=True).stdout.split()
    for pid in listed:
        try:
            with open(f"/proc/{pid}/environ") as file:
                environment = dict(entry.split("=", 1) for entry in file.read().split("\0") if "=" in entry)
        except OSError:
            continue
        if "RANK" in environment:
            found[int(environment["RANK"])] = int(pid)
    return found


@pytest.mark.parametrize("whom", [pytest.param("leader", marks=pytest.mark.slow), "rank 1"])
def test_several_processes_stop_together_wherever_the_signal_arrives(tmp_path, whom):
    job_dir = tmp_path / "run"
    run = Begun("trainer=ddp", "trainer.accelerator=cpu", "trainer.max_epochs=6", f"job_dir={job_dir}", cwd=tmp_path)
    run.until("epoch 1 (2/6)")
    os.kill(run.process.pid if whom == "leader" else ranks(f"job_dir={job_dir}")[1], signal.SIGTERM)
    assert run.end() == 128 + signal.SIGTERM
    assert run.said[-1] == f"SIGTERM: saved; resume={job_dir} continues\n"
    assert ranks(f"job_dir={job_dir}") == {}
    assert json.loads((job_dir / "status.json").read_text())["reason"] == "SIGTERM"


@pytest.mark.parametrize("whom", ["leader", pytest.param("rank 1", marks=pytest.mark.slow)])
def test_no_process_outlives_another_that_was_killed(tmp_path, whom):
    job_dir = tmp_path / "run"
    run = Begun("trainer=ddp", "trainer.accelerator=cpu", "trainer.max_epochs=300", f"job_dir={job_dir}", cwd=tmp_path)
    run.until("epoch 1 (2/300)")
    os.kill(run.process.pid if whom == "leader" else ranks(f"job_dir={job_dir}")[1], signal.SIGKILL)
    if whom == "leader":
        assert run.end() == -signal.SIGKILL  # its workers hold the pipe: they have ended too
    else:
        assert run.end() == 1
        assert "error: process 1 was killed by SIGKILL (out of memory?); the others were ended\n" in run.said
    assert ranks(f"job_dir={job_dir}") == {}
