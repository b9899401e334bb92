"""Composes the config of a run for commands that do not train."""

from collections.abc import Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig

import odcheap.config.resolvers  # noqa: F401 - registers what the config computes
from odcheap.utils.parts import find_conf_dir


def compose_config(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> DictConfig:
    """Composes the config of a run.

    Args:
        overrides: Options such as `backbone=resnet56`.
        config_dirs: Further `conf` directories, with files that odcheap does not have.

    Raises:
        HydraException: An option is unknown; `describe_error` makes one line of it.
    """
    # The default of `job_dir` needs a running Hydra application, so a value is given.
    search = [f"file://{folder.resolve()}" for folder in config_dirs]
    if search:
        overrides = [*overrides, f"hydra.searchpath=[{','.join(search)}]"]
    with hydra.initialize_config_dir(str(find_conf_dir()), version_base="1.3"):
        return hydra.compose("config", [*overrides, "job_dir=unused"])
