"""Starts the processes of a distributed run: torchrun with this run's own overrides, never those of a whole sweep."""

import os
import subprocess
import sys
from pathlib import Path

from omegaconf import DictConfig

from odcheap.errors import Failure
from odcheap.folder import Start, key_of


def quoted(override: str) -> str:
    """A value with signs of Hydra's grammar in it (a path such as runs/a=b,c=d), in quotes."""
    key, equals, value = override.partition("=")
    if not equals or value[:1] in "'\"[{" or not set("=, ()") & set(value):
        return override
    return f'{key}="{value}"'


def processes(cfg: DictConfig) -> int:
    """How many processes the run has in all; 1 where only Lightning will know."""
    devices, nodes = cfg.trainer.devices, cfg.trainer.num_nodes
    return max(1, devices * nodes) if isinstance(devices, int) and isinstance(nodes, int) else 1


def needs_processes(cfg: DictConfig) -> bool:
    """Several processes on one machine, and nobody has started them yet."""
    several = isinstance(cfg.trainer.devices, int) and cfg.trainer.devices > 1
    started = "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("SLURM_NTASKS", 1)) > 1
    return several and cfg.trainer.num_nodes == 1 and not started


def start_processes(script: Path, start: Start) -> None:
    """Runs `script` with the run's overrides in as many processes as it has devices; `Failure` where one fails."""
    devices = start.cfg.trainer.devices
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"]
    overrides = [o for o in start.overrides if key_of(o) != "job_dir"]
    if start.checkpoint is not None and not any(key_of(o) == "resume" for o in overrides):
        overrides.append("resume=auto")  # a sweep's default, which the process of its own does not have
    overrides += [f"job_dir={start.job_dir}", "hydra.mode=RUN"]  # an experiment may make every command a sweep
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // devices))} | os.environ
    arguments = [quoted(o) for o in overrides]
    status = subprocess.run([*command, str(script), *arguments], env=environment, check=False).returncode
    if status:
        raise Failure(f"trainer.devices={devices}: a process of the run failed (status {status}); its reason is above")
