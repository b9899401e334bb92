"""The number of machines and processes that torchrun or srun has started.

Importing this module also defines them for configs, as `${nodes:}` and `${devices:}`.
"""

import os

from omegaconf import OmegaConf

from odcheap.distributed import slurm


def is_torchrun() -> bool:
    """Returns whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def count_nodes() -> int:
    """Returns the number of machines on which torchrun or srun has started this run; 1 if neither has started it."""
    return int(os.environ["GROUP_WORLD_SIZE"]) if is_torchrun() else slurm.count_nodes()


def processes_per_node() -> int:
    """Returns the number of processes that torchrun or srun has started on each machine; 1 if neither has."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if is_torchrun() else slurm.tasks_per_node()


OmegaConf.register_new_resolver("nodes", count_nodes, replace=True)
OmegaConf.register_new_resolver("devices", processes_per_node, replace=True)
