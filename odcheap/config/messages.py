"""One-line messages for errors of Hydra, OmegaConf and Lightning."""

import difflib
import re
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from odcheap.runs.settings import flatten
from odcheap.utils.errors import Failure, first_line
from odcheap.utils.parts import OWN_PART, find_conf_dir, list_parts


def explained_errors() -> tuple[type[Exception], ...]:
    """Returns the exception classes that `describe_error` can explain; any other exception is a bug of odcheap."""
    from pytorch_lightning.utilities.exceptions import MisconfigurationException  # slow: only where a run has failed

    return (Failure, HydraException, MisconfigurationException, OmegaConfBaseException)


def hide_library_warnings() -> None:
    """Hides those warnings of Lightning about which a user can do nothing."""
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
    warnings.filterwarnings("ignore", message=r"The `srun` command is available on your system but is not used")


def describe_error(error: BaseException) -> str:
    """Returns one line that explains an error, for the user."""
    # Hydra wraps errors that are raised while it builds an object: odcheap's own errors explain themselves.
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, Failure):
            return str(cause)
        cause = cause.__cause__
    if isinstance(error, InstantiationException):
        # Hydra always names the class, and the group only if it built the part from the whole config.
        match = re.search(r"full_key: (\S+)", str(error)) or re.search(r"target '(?:\w+\.)*(\w+)'", str(error))
        group = match[1].lower() if match else "config"
        return f"{group}: {first_line(error.__cause__ or error)}"
    if isinstance(error, HydraException | OmegaConfBaseException):
        return describe_hydra_error(error)
    return f"trainer: {first_line(error)}"


def describe_hydra_error(error: Exception) -> str:
    """Returns one line that explains an error of Hydra or OmegaConf: what is wrong, and which names exist."""
    if isinstance(error, MissingConfigException):
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        if (find_conf_dir() / group / f"{name}_sweep.yaml").is_file():
            return f"{group}={name}: needs further packages: uv sync --extra sweep, or pip install 'odcheap[sweep]'"
        return f"{group}={name}: unknown; must be one of {', '.join(error.options or [])}{OWN_PART}"
    if "Could not override" in str(error) and any(argument.startswith("resume=") for argument in sys.argv):
        example = "such as data=imagefolder or logger=tensorboard"
        return f"{first_line(error)}; with resume, the part that has this option must be given too, {example}"
    return describe_unknown_option(error) or f"{first_line(error)} (odcheap train --help shows every option)"


def describe_unknown_option(error: Exception) -> str | None:
    """Returns one line about an option that does not exist, with similar names; None if the error is another one."""
    unknown = re.search(r"Could not override '([\w./]+)'", str(error))
    if unknown is None:
        return None
    name = unknown[1]
    similar = find_similar_options(name)
    suggestion = f"; did you mean {' or '.join(similar)}?" if similar else ""
    added = re.search(r"use (\+\S+)", str(error))
    hint = f"{added[1]} adds it to the config; " if added else ""
    return f"{name}: there is no such option{suggestion} ({hint}odcheap train --help shows every option)"


def find_similar_options(name: str) -> list[str]:
    """Returns up to three existing options with the same name as `name` in another group, or with a similar name."""
    # The options of the default config, of groups and of their parts.
    is_running = GlobalHydra.instance().is_initialized()  # within a run or a sweep
    start = hydra.initialize_config_dir(str(find_conf_dir()), version_base="1.3") if not is_running else nullcontext()
    with start:
        known = flatten(OmegaConf.to_container(hydra.compose("config"), resolve=False))
    known = [option for option in known if "._" not in option]  # without `_target_` and the like
    names = sorted({".".join(option.split(".")[:depth]) for option in known for depth in (1, 2)})
    last = name.rpartition(".")[2]
    same = [option for option in names if option.rpartition(".")[2] == last]
    by_last = {option.rpartition(".")[2]: option for option in names}
    close = difflib.get_close_matches(name, names, n=3)
    close += [by_last[match] for match in difflib.get_close_matches(last, by_last, n=3)]
    return list(dict.fromkeys(same or close))[:3]


def list_groups(config_dirs: Sequence[Path] = ()) -> dict[str, list[str]]:
    """Returns the names that can be chosen in each config group, from odcheap's `conf` and from `config_dirs`."""
    folders = [folder.relative_to(conf) for conf in (find_conf_dir(), *config_dirs) for folder in conf.rglob("*/")]
    groups = sorted({str(folder) for folder in folders if folder.parts and folder.parts[0] != "hydra"})
    return {group: list_parts(group, config_dirs) for group in groups}
