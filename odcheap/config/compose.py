"""The config of a run, for commands that do not train."""

from collections.abc import Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig

import odcheap.config.resolvers  # noqa: F401 - registers what the config computes
from odcheap.utils.parts import find_conf_dir


def compose_config(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> DictConfig:
    """Composes a run's config; Hydra's errors about unknown options are raised.

    Args:
        overrides: Options such as `backbone=resnet56`.
        config_dirs: Further `conf` directories, with parts that odcheap does not have.
    """
    search = [f"file://{folder.resolve()}" for folder in config_dirs]
    if search:
        overrides = [*overrides, f"hydra.searchpath=[{','.join(search)}]"]
    with hydra.initialize_config_dir(str(find_conf_dir()), version_base="1.3"):
        return hydra.compose("config", [*overrides, "job_dir=unused"])
