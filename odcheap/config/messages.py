"""Errors of Hydra, OmegaConf and Lightning as one line for the user."""

import difflib
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from odcheap.runs.settings import flatten
from odcheap.utils.errors import Failure, first_line
from odcheap.utils.parts import find_conf_dir

# Errors that `describe_error` explains; anything else is a bug and keeps its traceback.
EXPLAINED_ERRORS = (Failure, HydraException, MisconfigurationException, OmegaConfBaseException)


def hide_library_warnings() -> None:
    """Hides warnings of Lightning that a user cannot act on."""
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
    warnings.filterwarnings("ignore", message=r"The `srun` command is available on your system but is not used")


def describe_error(error: BaseException) -> str:
    """Returns one line that explains the error, looking below what Hydra has wrapped around it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, Failure):
            return str(cause)
        cause = cause.__cause__
    if isinstance(error, InstantiationException):
        # Hydra names the group where the config is whole, and always the class.
        found = re.search(r"full_key: (\S+)", str(error)) or re.search(r"target '(?:\w+\.)*(\w+)'", str(error))
        group = found[1].lower() if found else "config"
        return f"{group}: {first_line(error.__cause__ or error)}"
    if isinstance(error, HydraException | OmegaConfBaseException):
        return describe_hydra_error(error)
    return f"trainer: {first_line(error)}"


def describe_hydra_error(error: Exception) -> str:
    """Returns one line that says what is wrong with the options, with the names that are known."""
    if isinstance(error, MissingConfigException):
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        if (find_conf_dir() / group / f"{name}_sweep.yaml").is_file():
            return f"{group}={name}: needs the extra sweep: uv sync --extra sweep, or pip install 'odcheap[sweep]'"
        return f"{group}={name}: unknown; must be one of {', '.join(error.options or [])}"
    if "Could not override" in str(error) and any(argument.startswith("resume=") for argument in sys.argv):
        example = "such as data=imagefolder or logger=tensorboard"
        return f"{first_line(error)}; together with resume also choose the part that has this option, {example}"
    return f"{first_line(error)}{suggest_options(error)} (odcheap train --help shows every option)"


def suggest_options(error: Exception) -> str:
    """Returns the names most like the unknown option that the error names, as the end of a sentence."""
    unknown = re.search(r"Could not override '([\w./]+)'", str(error))
    if unknown is None:
        return ""
    with hydra.initialize_config_dir(str(find_conf_dir()), version_base="1.3"):
        known = flatten(OmegaConf.to_container(hydra.compose("config"), resolve=False))
    names = {".".join(name.split(".")[:depth]) for name in known for depth in (1, 2)}
    similar = difflib.get_close_matches(unknown[1], sorted(names), n=3)
    return f"; did you mean {' or '.join(similar)}?" if similar else ""


def list_groups(config_dirs: Sequence[Path]) -> dict[str, list[str]]:
    """Returns the config groups, such as `block_type`, with the names of their parts."""
    groups: dict[str, set[str]] = {}
    for conf in config_dirs:
        for folder in conf.rglob("*"):
            group = str(folder.relative_to(conf))
            if folder.is_dir() and not group.startswith("hydra"):
                groups.setdefault(group, set()).update(path.stem for path in folder.glob("*.yaml"))
    return {group: sorted(names) for group, names in groups.items()}
