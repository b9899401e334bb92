"""The processes of a distributed run: those that torchrun or srun started, or torchrun with this run's overrides."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from omegaconf import DictConfig, OmegaConf

from odcheap.distributed import slurm
from odcheap.distributed.signals import Listener, Stopped
from odcheap.distributed.torchrun import ENDING
from odcheap.runs import status
from odcheap.runs.overrides import override_key, quote_override
from odcheap.runs.resume import Start
from odcheap.utils.errors import Failure, OptionError


def by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def nodes() -> int:
    """How many machines torchrun or srun has started this run on; 1 without either."""
    if by_torchrun():
        return int(os.environ["GROUP_WORLD_SIZE"])
    return slurm.nodes()


def devices() -> int:
    """How many processes torchrun or srun has started on each machine; 1 without either."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if by_torchrun() else slurm.tasks_a_node()


def environment() -> ClusterEnvironment:
    """Who has started this process, for Lightning, which would guess wrong within a batch script of Slurm's."""
    if by_torchrun():
        return TorchElasticEnvironment()
    if slurm.tasks() > 1:
        slurm.prepare()
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()


def share_cores() -> None:
    """As many threads as Slurm has given cores, which need not be bound to them; more would wait for each other."""
    cores = slurm.cores()
    if cores and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores)


def check(cfg: DictConfig, trainer: str, in_sweep: bool) -> None:
    """Refuses a `trainer` that does not fit how the process was started; `trainer` is the option's choice."""
    if in_sweep and by_torchrun():
        raise OptionError("trainer", trainer, "a sweep starts its processes itself: python train.py -m trainer=ddp ...")
    if trainer == "multinode" and not by_torchrun() and not slurm.in_step():
        allowed = "start it with torchrun --nnodes=N --nproc-per-node=M, or with srun; trainer=ddp is for one machine"
        raise OptionError("trainer", trainer, allowed)
    if cfg.trainer.num_nodes != 1 and nodes() == 1:
        allowed = "1 machine has been told of; torchrun or srun starts several, with trainer=multinode"
        raise OptionError("trainer.num_nodes", cfg.trainer.num_nodes, allowed)
    started = nodes() * devices()
    if started > 1 and processes(cfg) != started:
        raise OptionError("trainer", trainer, f"{started} processes were started; trainer=multinode makes them one run")


def processes(cfg: DictConfig) -> int:
    """How many processes the run has in all; 1 where only Lightning will know."""
    devices, nodes = cfg.trainer.devices, cfg.trainer.num_nodes
    return max(1, devices * nodes) if isinstance(devices, int) and isinstance(nodes, int) else 1


def needs_processes(cfg: DictConfig) -> bool:
    """Several processes on one machine, and nobody has started them yet."""
    several = isinstance(cfg.trainer.devices, int) and cfg.trainer.devices > 1
    return several and cfg.trainer.num_nodes == 1 and not by_torchrun() and slurm.tasks() == 1


def start_processes(start: Start, config_dirs: Sequence[Path], listener: Listener) -> None:
    """Starts `odcheap train` with the run's overrides in as many processes as it has devices.

    Raises `Failure` where one fails, `Stopped` where a signal has ended them in order.
    """
    devices = start.cfg.trainer.devices
    overrides = [o for o in start.config.overrides if override_key(o) != "job_dir"]
    if start.checkpoint is not None and not any(override_key(o) == "resume" for o in overrides):
        overrides.append("resume=auto")  # a sweep's default, which the process of its own does not have
    overrides.append(f"job_dir={os.path.join('.', start.job_dir)}")
    overrides.append("hydra.mode=RUN")  # an experiment may make every command a sweep
    command = [sys.executable, "-m", "odcheap.distributed.torchrun", "--standalone", f"--nproc-per-node={devices}"]
    command += ["--module", "odcheap", "train", *(f"--config-dir={folder}" for folder in config_dirs)]
    command += [quote_override(o) for o in overrides]
    own = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // devices))}
    env = own | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"} | os.environ  # seconds for a long step, and to save it
    status.write_status(start.job_dir, "running")
    # In a session of its own: a Ctrl-C at the terminal comes to it once, by way of this process.
    agent = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, start_new_session=True)
    with agent, listener.passing_on(agent):
        exit_status = agent.wait()
    if exit_status - 128 in ENDING:
        raise Stopped(exit_status - 128)
    if exit_status:
        raise Failure(f"trainer.devices={devices}: a process of the run failed; its reason is above")


OmegaConf.register_new_resolver("nodes", nodes, replace=True)
OmegaConf.register_new_resolver("devices", devices, replace=True)
