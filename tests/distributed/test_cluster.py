"""Against a real Slurm where one runs (../shared/slurm/start); what a cluster alone could say is made up elsewhere."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from conftest import TINY

import train
from odcheap.distributed import cluster
from odcheap.utils.errors import OptionError

NAMES = (
    "STEP_ID",
    "STEP_NUM_TASKS",
    "STEP_NUM_NODES",
    "CPUS_ON_NODE",
    "CPUS_PER_TASK",
    "JOB_ID",
    "RESTART_COUNT",
    "ARRAY_TASK_ID",
)


@pytest.fixture
def said(monkeypatch):
    """Sets Slurm's variables, and no others of them."""
    for name in NAMES:
        monkeypatch.delenv(f"SLURM_{name}", raising=False)

    def given(**values):
        for name, value in values.items():
            monkeypatch.setenv(f"SLURM_{name}", str(value))

    return given


def test_outside_of_slurm_and_in_a_batch_script_there_is_one_process(said):
    assert (cluster.count_tasks(), cluster.count_nodes(), cluster.processes_per_node(), cluster.cores_per_task()) == (
        1,
        1,
        1,
        None,
    )
    said(NTASKS=4, NNODES=2, CPUS_ON_NODE=8, JOB_ID=1)
    assert (cluster.count_tasks(), cluster.count_nodes(), cluster.processes_per_node(), cluster.cores_per_task()) == (
        1,
        1,
        1,
        8,
    )
    assert not cluster.is_restarted()


def test_tasks_and_cores_of_a_step(said):
    said(STEP_ID=0, STEP_NUM_TASKS=6, STEP_NUM_NODES=2, CPUS_ON_NODE=12, RESTART_COUNT=1)
    assert (cluster.count_tasks(), cluster.count_nodes(), cluster.processes_per_node(), cluster.cores_per_task()) == (
        6,
        2,
        3,
        4,
    )
    assert cluster.is_restarted()
    said(CPUS_PER_TASK=2)
    assert cluster.cores_per_task() == 2
    said(STEP_NUM_TASKS=5)
    with pytest.raises(OptionError, match="srun --ntasks=5: must be divisible by the number of nodes, 2"):
        cluster.processes_per_node()


def test_agents_of_torchrun_on_one_node_share_its_cores(said, monkeypatch):
    said(STEP_ID=0, STEP_NUM_TASKS=2, STEP_NUM_NODES=1, CPUS_ON_NODE=8)
    for name, value in {"TORCHELASTIC_RUN_ID": "a", "GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert (cluster.count_nodes(), cluster.processes_per_node(), cluster.cores_per_task()) == (2, 1, 4)


@pytest.mark.parametrize(
    ("state", "asked"), [("RUNNING", True), ("PREEMPTED", True), ("CANCELLED", False), ("PENDING", False)]
)
def test_a_job_goes_back_into_the_queue_unless_it_was_cancelled(said, monkeypatch, tmp_path, state, asked):
    script = f"""#!/bin/sh
echo "$@" >> {tmp_path}/asked
grep -q requeue {tmp_path}/asked && echo "JobState=PENDING" || echo "JobState={state} Reason=None"
"""
    (tmp_path / "scontrol").write_text(script)
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert cluster.requeue_job() == ""
    said(JOB_ID=7, ARRAY_TASK_ID=3)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    assert cluster.requeue_job() == ("; job 7_3 is back in the queue" if asked else "")
    assert ("requeue 7_3" in (tmp_path / "asked").read_text()) == asked


def no_slurm():
    if shutil.which("sbatch") is None:
        return True
    idle = subprocess.run(["timeout", "20", "sinfo", "-h", "-o", "%D"], capture_output=True, text=True)
    return idle.returncode != 0 or sum(map(int, idle.stdout.split())) < 2


real = pytest.mark.skipif(no_slurm(), reason="needs a Slurm of two nodes: ../shared/slurm/start")
EPOCHS = "trainer.max_epochs=10"


def submit(tmp_path, job_dir):
    """The README's batch script, with the accelerator that is here; the job's number."""
    options = [*TINY, "trainer=multinode", "trainer.accelerator=cpu", EPOCHS, f"job_dir={job_dir}", "resume=auto"]
    script = f"""#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --requeue --open-mode=append --output={job_dir}.log
srun --kill-on-bad-exit=1 {sys.executable} {train.__file__} {" ".join(options)}
"""
    (tmp_path / "job.sh").write_text(script)
    asked = ["sbatch", "--parsable", str(tmp_path / "job.sh")]
    return subprocess.run(asked, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.strip()


def until(told, seconds=150):
    end = time.monotonic() + seconds
    while not told():
        assert time.monotonic() < end
        time.sleep(0.2)


def state_of(job):
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
    return shown.partition("JobState=")[2].split()[0]


def start_at_once(job):
    """Slurm lets a requeued job wait for two minutes, counted from when its last process has gone."""
    until(lambda: state_of(job) == "PENDING")
    while state_of(job) == "PENDING":  # told too early, it does not listen
        time.sleep(4)  # or it takes the end of the old processes for that of the new ones
        subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], capture_output=True)


@pytest.mark.slow  # Slurm lets the requeued job wait for two minutes
@pytest.mark.slurm
@real
def test_a_preempted_run_of_two_nodes_continues_and_ends_the_same(tmp_path):
    straight = submit(tmp_path, tmp_path / "straight")
    until(lambda: state_of(straight) == "COMPLETED")
    job, log = submit(tmp_path, tmp_path / "run"), tmp_path / "run.log"
    until(lambda: log.is_file() and "epoch 2/" in log.read_text())
    subprocess.run(["scancel", "--signal=TERM", job], check=True)
    start_at_once(job)
    until(lambda: state_of(job) == "COMPLETED")
    assert "continuing from" in log.read_text()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["finished"], summary["epochs"], len(summary["students"])) == (True, 10, 2)
    found, expected = (tmp_path / name / "student.safetensors" for name in ("run", "straight"))
    assert found.read_bytes() == expected.read_bytes()


@pytest.mark.slurm
@real
def test_a_sweep_of_four_runs_by_submitit(tmp_path):
    command = [sys.executable, train.__file__, "-m", "hydra/launcher=submitit_slurm", *TINY, "num_stu=0,1", "seed=0,1"]
    done = subprocess.run(
        [*command, f"hydra.sweep.dir={tmp_path}/sweep"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert done.stdout.count("│ finished") == 2
    assert done.stdout.count("failed: num_stu=0: must be") == 2
    summaries = list((tmp_path / "sweep").glob("*/summary.json"))
    assert [json.loads(path.read_text())["finished"] for path in summaries] == [True, True]
