"""Slurm: what it says about this process, and how a job is put back into its queue."""

import os
import re
import socket
import subprocess

from odcheap.utils.errors import OptionError


def is_step() -> bool:
    """Returns whether srun has started this process.

    The script of an sbatch job has most of the same variables, so only `SLURM_STEP_ID` is looked at.
    """
    return "SLURM_STEP_ID" in os.environ


def count_tasks() -> int:
    """Returns how many processes srun has started, 1 outside srun."""
    return int(os.environ["SLURM_STEP_NUM_TASKS"]) if is_step() else 1


def count_nodes() -> int:
    """Returns on how many machines srun has started them, 1 outside srun."""
    return int(os.environ["SLURM_STEP_NUM_NODES"]) if is_step() else 1


def tasks_per_node() -> int:
    """Returns how many processes each machine has. Raises `OptionError` where their numbers differ."""
    each, rest = divmod(count_tasks(), count_nodes())
    if rest:
        raise OptionError("srun --ntasks", count_tasks(), f"must be divisible by the number of nodes, {count_nodes()}")
    return each


def cores_per_task() -> int | None:
    """Returns how many cores Slurm has given this process, None outside its jobs."""
    if "SLURM_CPUS_PER_TASK" in os.environ:
        return int(os.environ["SLURM_CPUS_PER_TASK"])
    if "SLURM_CPUS_ON_NODE" in os.environ:
        return max(1, int(os.environ["SLURM_CPUS_ON_NODE"]) // tasks_per_node())
    return None


def prepare_environment() -> None:
    """Sets the variables that Lightning reads.

    These are the tasks of a node, also where --ntasks was given, and the address of the first process. It is the
    address that Slurm itself uses: names of nodes need not be names of hosts.
    """
    os.environ["SLURM_NTASKS_PER_NODE"] = str(tasks_per_node())
    if "MASTER_ADDR" not in os.environ:
        first = ask_slurm("scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]).split("\n")[0]
        os.environ["MASTER_ADDR"] = find_address(first)


def find_address(node: str) -> str:
    """Returns the network address of a node."""
    try:
        return socket.gethostbyname(node)
    except OSError:
        found = re.search(r"NodeAddr=(\S+)", ask_slurm("scontrol", "show", "node", node))
        if found is None:
            raise OptionError("MASTER_ADDR", "", f"must be given: neither the network nor Slurm knows {node}") from None
        return found[1]


def is_restarted() -> bool:
    """Whether Slurm has started this job before."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0


def requeue_job() -> str:
    """Puts this job back into the queue, unless it was cancelled or Slurm requeues it anyway.

    Returns:
        What was done, as the end of a sentence; empty outside Slurm and where nothing was to be done.
    """
    if "SLURM_JOB_ID" not in os.environ:
        return ""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_TASK_ID" in os.environ:  # the last task has the array's own number, which means all of them
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    state = read_job_state(job)
    if state is None:
        return f"; job {job} is not requeued: scontrol does not answer"
    if state not in ("RUNNING", "PREEMPTED"):
        return ""
    ask_slurm("scontrol", "requeue", job)
    if read_job_state(job) == "RUNNING":
        return f"; job {job} is not requeued: Slurm refuses (see scontrol requeue {job})"
    return f"; job {job} is back in the queue"


def read_job_state(job: str) -> str | None:
    """Returns the state of a job such as RUNNING, None where Slurm does not answer."""
    found = re.search(r"JobState=(\S+)", ask_slurm("scontrol", "show", "job", job))
    return found[1] if found else None


def ask_slurm(*command: str) -> str:
    """Returns the output of one of Slurm's commands, empty where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
