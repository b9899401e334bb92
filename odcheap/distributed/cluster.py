"""Reads what torchrun, srun and Slurm say about this process in environment variables, and requeues Slurm jobs.

Importing this module also defines two resolvers for configs: `${nodes:}` is the number of machines, and `${devices:}`
the number of processes on each machine.
"""

import os
import re
import socket
import subprocess

from omegaconf import OmegaConf

from odcheap.utils.errors import OptionError


def is_torchrun() -> bool:
    """Returns whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_step() -> bool:
    """Returns whether srun has started this process."""
    # The script of an sbatch job has most of the same variables, but not this one.
    return "SLURM_STEP_ID" in os.environ


def count_tasks() -> int:
    """Returns the number of processes that srun has started on all machines; 1 without srun."""
    return int(os.environ["SLURM_STEP_NUM_TASKS"]) if is_step() else 1


def count_nodes() -> int:
    """Returns the number of machines on which torchrun or srun has started this run; 1 if neither has started it."""
    return int(os.environ["GROUP_WORLD_SIZE"]) if is_torchrun() else count_step_nodes()


def count_step_nodes() -> int:
    """Returns the number of machines on which srun has started processes; 1 without srun."""
    return int(os.environ["SLURM_STEP_NUM_NODES"]) if is_step() else 1


def processes_per_node() -> int:
    """Returns the number of processes that torchrun or srun has started on each machine; 1 if neither has.

    Raises:
        OptionError: srun has not started the same number of processes on all machines.
    """
    return int(os.environ["LOCAL_WORLD_SIZE"]) if is_torchrun() else tasks_per_node()


def tasks_per_node() -> int:
    """Returns the number of processes that srun has started on each machine (torchrun may be one); 1 without srun.

    Raises:
        OptionError: It is not the same on all machines.
    """
    each, rest = divmod(count_tasks(), count_step_nodes())
    if rest:
        allowed = f"must be divisible by the number of nodes, {count_step_nodes()}"
        raise OptionError("srun --ntasks", count_tasks(), allowed)
    return each


def cores_per_task() -> int | None:
    """Returns the number of CPU cores that Slurm has given to this process; None outside of Slurm."""
    if "SLURM_CPUS_PER_TASK" in os.environ:
        return int(os.environ["SLURM_CPUS_PER_TASK"])
    if "SLURM_CPUS_ON_NODE" in os.environ:
        return max(1, int(os.environ["SLURM_CPUS_ON_NODE"]) // tasks_per_node())
    return None


def prepare_environment() -> None:
    """Sets the environment variables `SLURM_NTASKS_PER_NODE` and `MASTER_ADDR`, which Lightning reads."""
    # The first one is missing after `srun --ntasks`. The second one must be an address that Slurm knows: the name that
    # Slurm has for a node need not be the name of a host.
    os.environ["SLURM_NTASKS_PER_NODE"] = str(processes_per_node())
    if "MASTER_ADDR" not in os.environ:
        first = ask_slurm("scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]).split("\n")[0]
        os.environ["MASTER_ADDR"] = find_address(first)


def find_address(node: str) -> str:
    """Returns the network address of a node, by its name in Slurm.

    Raises:
        OptionError: Neither the network nor Slurm knows the address.
    """
    try:
        return socket.gethostbyname(node)
    except OSError:
        match = re.search(r"NodeAddr=(\S+)", ask_slurm("scontrol", "show", "node", node))
        if match is None:
            raise OptionError("MASTER_ADDR", "", f"must be given: neither the network nor Slurm knows {node}") from None
        return match[1]


def is_restarted() -> bool:
    """Returns whether Slurm has requeued and restarted this job."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0


def requeue_job() -> str:
    """Requeues this Slurm job, unless a user has cancelled it or Slurm requeues it by itself.

    Returns:
        A text to append to a message, such as "; job 7 is back in the queue", or why the job could not be requeued. It
        is empty outside of Slurm, and if the job must not be requeued.
    """
    if "SLURM_JOB_ID" not in os.environ:
        return ""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_TASK_ID" in os.environ:  # the last task's job number is that of the whole array
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
    """Returns the state of a Slurm job, such as "RUNNING"; None if Slurm does not answer."""
    match = re.search(r"JobState=(\S+)", ask_slurm("scontrol", "show", "job", job))
    return match[1] if match else None


def ask_slurm(*command: str) -> str:
    """Runs a command of Slurm and returns its output; an empty string if the command is missing or takes too long."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


OmegaConf.register_new_resolver("nodes", count_nodes, replace=True)
OmegaConf.register_new_resolver("devices", processes_per_node, replace=True)
