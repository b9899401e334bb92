"""One-line messages for errors of Hydra, OmegaConf and Lightning."""

import difflib
import re
import sys
import warnings
from collections.abc import Mapping
from typing import Any, cast

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from odcheap.config.compose import compose_config, find_config_dirs, list_groups
from odcheap.config.signatures import read_signature
from odcheap.runs.settings import flatten
from odcheap.utils.errors import Failure, first_line
from odcheap.utils.parts import OWN_PART, find_conf_dir

ADDABLE_GROUPS = ("trainer", "optimizer", "scheduler")  # classes of libraries, with more options than conf/ lists


def explained_errors() -> tuple[type[Exception], ...]:
    """Returns the exception classes for which `describe_error` is meant; any other exception is a bug of odcheap."""
    from pytorch_lightning.utilities.exceptions import MisconfigurationException  # slow: only where a run has failed

    return (Failure, HydraException, MisconfigurationException, OmegaConfBaseException)


def hide_library_warnings() -> None:
    """Hides those warnings of Lightning and PyTorch that a user cannot or need not act on."""
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
    warnings.filterwarnings("ignore", message=r"The `srun` command is available on your system but is not used")
    # `data.workers` is the user's choice: more processes than cores are slower at worst.
    warnings.filterwarnings("ignore", message=r"This DataLoader will create \d+ worker processes")


def describe_error(error: BaseException) -> str:
    """Returns one line for the user about an error of one of the classes in `explained_errors`."""
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
    """Returns one line that explains an error of Hydra or OmegaConf, with the names that exist if a name is wrong."""
    if isinstance(error, MissingConfigException):
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        if (find_conf_dir() / group / f"{name}_sweep.yaml").is_file():
            return f"{group}={name}: needs further packages: uv sync --extra sweep, or pip install 'odcheap[sweep]'"
        names = error.options or sorted(
            file.stem for file in (find_conf_dir() / group).glob("*.yaml")
        )  # none in a list
        return f"{group}={name}: unknown; must be one of {', '.join(names)}{OWN_PART}"
    return describe_unknown_option(error) or f"{first_line(error)} (odcheap train --help shows every option)"


def describe_unknown_option(error: Exception) -> str | None:
    """Returns one line about an option that does not exist, with similar names; None if the error has another cause."""
    unknown = re.search(r"Could not override '([\w./]+)'", str(error))
    if unknown is None:
        return None
    name = unknown[1]
    if is_addable(name):
        return f"{name}: must be given with a plus sign, since conf/ does not list it: +{name}=VALUE"
    line = f"{name}: there is no such option{suggest_options(name)}"
    # `add_resumed_parts` knows the parts of a resumed run only if its `config.yaml` is there.
    is_chosen = any(argument.startswith(f"{name.partition('.')[0]}=") for argument in sys.argv)
    if "." in name and not is_chosen and any(argument.startswith("resume=") for argument in sys.argv):
        line += f"{'' if line.endswith('?') else ';'} with resume, give its part too, such as data=imagefolder"
    return f"{line} (odcheap train --help shows every option)"


def is_addable(name: str) -> bool:
    """Returns whether an option such as `trainer.profiler` may be added with a plus sign, as in
    `+trainer.profiler=simple`.

    It may if a class of a library takes this argument, and its YAML file in `conf/` does not list it.
    """
    group, _, option = name.partition(".")
    part = compose_known().get(group) if group in ADDABLE_GROUPS else None
    if not option or not isinstance(part, Mapping) or fold_name(option) in map(fold_name, part):
        return False
    return option in read_signature(name, str(part["_target_"])).names


def suggest_options(name: str) -> str:
    """Returns text such as "; did you mean num_stu?" for an option that does not exist; "" if no option has a similar
    name.
    """
    similar = find_similar_options(name)
    return f"; did you mean {' or '.join(similar)}?" if similar else ""


def fold_name(name: str) -> str:
    """Returns a name in lower case and without underscores, so that similar names become equal."""
    return name.replace("_", "").lower()


def compose_known() -> dict[str, Any]:
    """Returns the default config as nested dicts, unresolved, with the parts that `sys.argv` chooses."""
    arguments = sys.argv[1:]
    config_dirs = find_config_dirs(arguments)
    groups = list_groups(config_dirs)
    chosen = [argument for argument in arguments if "=" in argument and argument.partition("=")[0] in groups]
    in_run = GlobalHydra.instance().is_initialized()  # it knows the config directories then
    try:
        cfg = hydra.compose("config", chosen) if in_run else compose_config(chosen, config_dirs)
    except (HydraException, OmegaConfBaseException):  # such as a sweep over a group
        cfg = hydra.compose("config") if in_run else compose_config([])
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=False))


def find_similar_options(name: str) -> list[str]:
    """Returns up to three options with the same name as `name` in another group, or with a similar spelling."""
    # The options of groups and of their parts, of those parts that are chosen.
    known = [option for option in flatten(compose_known()) if "._" not in option]  # without `_target_` and the like
    names = sorted({".".join(option.split(".")[:depth]) for option in known for depth in (1, 2)})
    folded = {fold_name(option): option for option in names}
    last = fold_name(name).rpartition(".")[2]
    if fold_name(name) in folded:  # only underscores or capital letters differ
        return [folded[fold_name(name)]]
    same = [option for option in names if fold_name(option).rpartition(".")[2] == last]
    by_last = {option.rpartition(".")[2]: option for option in folded}
    close = [folded[match] for match in difflib.get_close_matches(fold_name(name), folded, n=3)]
    close += [folded[by_last[match]] for match in difflib.get_close_matches(last, by_last, n=3)]
    return list(dict.fromkeys(same or close))[:3]
