"""Starts the processes of a distributed run, or uses those that torchrun or srun has started."""

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
from omegaconf import DictConfig

from odcheap.distributed import cluster
from odcheap.distributed.cluster import count_nodes, is_torchrun, processes_per_node
from odcheap.distributed.signals import SignalListener, Stopped
from odcheap.runs.resume import Start
from odcheap.runs.settings import override_key, quote_override
from odcheap.utils.errors import Failure, OptionError
from odcheap.utils.signals import PARENT_VARIABLE, STOP_SIGNALS

SHUTDOWN_SECONDS = "600"  # the time that torchrun gives a process after a signal, to finish its step and to save


def make_cluster_environment() -> ClusterEnvironment:
    """Returns the object from which Lightning reads ranks: for torchrun, for srun, or for a process without either."""
    # Lightning's own choice would mistake the script of a Slurm job for a process that srun has started.
    if is_torchrun():
        return TorchElasticEnvironment()
    if cluster.count_tasks() > 1:
        cluster.prepare_environment()
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()


def limit_threads() -> None:
    """Sets the number of PyTorch's threads to the number of cores that Slurm has given to this process.

    Nothing changes outside of Slurm, or if `OMP_NUM_THREADS` is set.
    """
    # Slurm may not bind the process to its cores: PyTorch would use all cores of the machine.
    cores = cluster.cores_per_task()
    if cores and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores)


def check_trainer(cfg: DictConfig, trainer: str, in_sweep: bool) -> None:
    """Checks that the options `trainer` match the machine and the way in which this process was started.

    Args:
        cfg: The config of the run.
        trainer: The name of the config file in `conf/trainer`, such as "ddp".
        in_sweep: Whether the run is one of a sweep.

    Raises:
        OptionError: The options do not match. For example, torchrun has started several processes, but the options ask
            for one; or the options ask for a GPU, and there is none.
    """
    # A sweep in processes that somebody else has started, then several machines without such processes, then other
    # numbers of machines or processes than have been started.
    if in_sweep and is_torchrun():
        raise OptionError("trainer", trainer, "a sweep starts its processes itself: python train.py -m trainer=ddp ...")
    if cfg.trainer.get("accelerator") in ("gpu", "cuda") and not has_gpu():
        option, value = ("trainer", "gpu") if trainer == "gpu" else ("trainer.accelerator", cfg.trainer.accelerator)
        allowed = "PyTorch finds no GPU that it can use; trainer=cpu trains on the CPU, trainer=auto on what there is"
        raise OptionError(option, value, allowed)
    if trainer == "multinode" and not is_torchrun() and not cluster.is_step():
        allowed = "start it with torchrun --nnodes=N --nproc-per-node=M, or with srun; trainer=ddp is for one machine"
        raise OptionError("trainer", trainer, allowed)
    if cfg.trainer.num_nodes != 1 and count_nodes() == 1:
        allowed = "this run was started on 1 machine; torchrun or srun starts several, with trainer=multinode"
        raise OptionError("trainer.num_nodes", cfg.trainer.num_nodes, allowed)
    started = count_nodes() * processes_per_node()
    if started > 1 and count_processes(cfg) != started:
        raise OptionError("trainer", trainer, f"{started} processes were started; trainer=multinode makes them one run")


def has_gpu() -> bool:
    """Returns whether PyTorch can use a GPU on this machine."""
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def count_processes(cfg: DictConfig) -> int:
    """Returns the number of processes on all machines together for which a config asks."""
    return cfg.trainer.devices * cfg.trainer.num_nodes


def needs_launch(cfg: DictConfig) -> bool:
    """Returns whether a config asks for several processes on this machine and nobody has started them yet."""
    is_local = cfg.trainer.devices > 1 and cfg.trainer.num_nodes == 1
    return is_local and not is_torchrun() and cluster.count_tasks() == 1


def launch_processes(start: Start, config_dirs: Sequence[Path], listener: SignalListener) -> None:
    """Starts one process of `odcheap train` for each device, with the overrides of the run, and waits for their end.

    Args:
        start: The run's config and folder, and the checkpoint from which it continues, if there is one.
        config_dirs: The user's own `conf` directories.
        listener: The listener that forwards signals to these processes.

    Raises:
        Failure: A process failed.
        Stopped: A signal has stopped the processes.
    """
    # The processes run the same command, with the options that this process has chosen by itself.
    devices = start.cfg.trainer.devices
    overrides = [o for o in start.config.overrides if override_key(o) != "job_dir"]
    if start.checkpoint is not None and not any(override_key(o) == "resume" for o in overrides):
        overrides.append("resume=auto")  # this is the default in a sweep, but the new processes are not in a sweep
    overrides.append(f"job_dir={os.path.join('.', start.job_dir)}")
    overrides.append("hydra.mode=RUN")  # a recipe may set another mode
    command = [sys.executable, "-m", "odcheap.distributed.torchrun", "--standalone", f"--nproc-per-node={devices}"]
    # Hydra takes one --config-dir; further directories are on its search path.
    command += ["--module", "odcheap", "train", *(f"--config-dir={folder}" for folder in config_dirs[:1])]
    if config_dirs[1:]:
        further = ",".join(quote_override(f"x=file://{folder.resolve()}")[2:] for folder in config_dirs[1:])
        command.append(f"hydra.searchpath=[{further}]")
    command += [quote_override(o) for o in overrides]

    # The processes share the cores. A Ctrl-C at the terminal goes to all processes of the session, so torchrun gets
    # one of its own, and the listener forwards the signal once.
    threads = max(1, (os.cpu_count() or 1) // devices)
    defaults = {"OMP_NUM_THREADS": str(threads), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": SHUTDOWN_SECONDS}
    environment = defaults | os.environ | {PARENT_VARIABLE: str(os.getpid())}
    agent = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    with agent, listener.forward_to(agent):
        exit_status = agent.wait()
    if exit_status - 128 in STOP_SIGNALS:
        raise Stopped(exit_status - 128)
    if exit_status:
        raise Failure(f"trainer.devices={devices}: a process of the run failed; its error is printed above")
