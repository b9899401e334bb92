"""What Slurm says of this process, and what is asked of Slurm."""

import os
import re
import socket
import subprocess

from odcheap.utils.errors import OptionError


def in_step() -> bool:
    """Whether srun has started this process. A batch script has most of the same variables, and is one process."""
    return "SLURM_STEP_ID" in os.environ


def tasks() -> int:
    """How many processes srun has started; 1 outside srun."""
    return int(os.environ["SLURM_STEP_NUM_TASKS"]) if in_step() else 1


def nodes() -> int:
    return int(os.environ["SLURM_STEP_NUM_NODES"]) if in_step() else 1


def tasks_a_node() -> int:
    """`OptionError` where the machines have different numbers of tasks."""
    each, rest = divmod(tasks(), nodes())
    if rest:
        raise OptionError("srun --ntasks", tasks(), f"must be divisible by the number of nodes, {nodes()}")
    return each


def cores() -> int | None:
    """How many cores Slurm has given this process; None outside its jobs."""
    if "SLURM_CPUS_PER_TASK" in os.environ:
        return int(os.environ["SLURM_CPUS_PER_TASK"])
    on_node = os.environ.get("SLURM_CPUS_ON_NODE")
    return on_node and max(1, int(on_node) // tasks_a_node())


def prepare() -> None:
    """Says what Lightning asks for: tasks a node, also where --ntasks was given; where the first process listens, by
    the address that Slurm itself uses, for its nodes' names need not be host names.
    """
    os.environ["SLURM_NTASKS_PER_NODE"] = str(tasks_a_node())
    if "MASTER_ADDR" not in os.environ:
        first = said("scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]).split("\n")[0]
        os.environ["MASTER_ADDR"] = address(first)


def address(node: str) -> str:
    try:
        return socket.gethostbyname(node)
    except OSError:
        found = re.search(r"NodeAddr=(\S+)", said("scontrol", "show", "node", node))
        if found is None:
            raise OptionError("MASTER_ADDR", "", f"must be given: neither the network nor Slurm knows {node}") from None
        return found[1]


def restarted() -> bool:
    """Whether Slurm has started this job before."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0


def requeue() -> str:
    """Puts this job back into the queue, unless it was cancelled or Slurm does it anyway; says so, or nothing."""
    if "SLURM_JOB_ID" not in os.environ:
        return ""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_TASK_ID" in os.environ:  # the last task has the array's own number, which means all of them
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    state = re.search(r"JobState=(\S+)", said("scontrol", "show", "job", job))
    if state is None:
        return f"; job {job} is not requeued: scontrol does not answer"
    if state[1] not in ("RUNNING", "PREEMPTED"):
        return ""
    said("scontrol", "requeue", job)
    after = re.search(r"JobState=(\S+)", said("scontrol", "show", "job", job))
    if after is not None and after[1] == "RUNNING":
        return f"; job {job} is not requeued: Slurm does not want to (see scontrol requeue {job})"
    return f"; job {job} is back in the queue"


def said(*command: str) -> str:
    """What Slurm answers; nothing where it does not."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
