"""The options of a run: the overrides of the user, such as `num_stu=4`, and the config that is composed from them."""

import hashlib
import os
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers.oc import env

from odcheap.models.student_shapes import GROUPS, Shape, read_shapes
from odcheap.utils.errors import OptionError
from odcheap.utils.parts import part_settings, read_part

# Options that determine where and how a run is stored, but not its results. They are not part of a run's name.
STORAGE_OPTIONS = (
    "job_dir",
    "data_dir",
    "resume",
    "overwrite",
    "test_only",
    "checkpoint_every",
    "checkpoint_keep",
    "logger",
)
PLAIN_PATH = re.compile(r"[A-Za-z0-9_/.+@:%*?|-]*")  # what Hydra takes without quotes
MAX_NAME_BYTES = 200  # file systems allow 255


def override_key(override: str) -> str:
    """Returns the name of the option that an override sets.

    Example:
        >>> override_key("+trainer.profiler=simple")
        'trainer.profiler'
    """
    return override.split("=")[0].lstrip("+~")


def find_override(overrides: Sequence[str], name: str) -> tuple[str, str] | None:
    """Returns the key and the value of the first override that sets an entry of the config; None if there is none.

    Args:
        overrides: The overrides to look through.
        name: The dotted name of the entry. It is also set by an override of its group.

    Example:
        >>> find_override(["seed=1", "block_type=Shift"], "block_type.part")
        ('block_type', 'Shift')
    """
    for override in overrides:
        key = override_key(override)
        if name == key or name.startswith(f"{key}."):
            return key, override.partition("=")[2]
    return None


def quote_override(override: str) -> str:
    """Puts quotes around the path in an override such as `data_dir=my images` if Hydra could not read it otherwise.

    A value that already has quotes, a list, and an interpolation (`${...}`) are not changed. `~` at the beginning of a
    path is replaced by the home directory.

    Example:
        >>> quote_override("resume=runs/a=b,c=d")
        'resume="runs/a=b,c=d"'
        >>> print(quote_override("data_dir=/data/Tom's #1"))
        data_dir="/data/Tom's #1"
    """
    key, equals, value = override.partition("=")
    quote = value[:1] if value[:1] in ("'", '"') else ""
    if value[len(quote) :].startswith("~"):
        value = quote + os.path.expanduser(value[len(quote) :])
    is_grammar = quote or "${" in value or (value[:1] in ("[", "{") and not os.path.exists(value))
    if not equals or is_grammar or PLAIN_PATH.fullmatch(value):
        return f"{key}{equals}{value}"
    # In Hydra's quoted text a backslash is one, except before a quotation mark.
    escaped = re.sub(r'(\\*)("|$)', lambda match: 2 * match[1] + (f"\\{match[2]}" if match[2] else ""), value)
    return f'{key}="{escaped}"'


def name_run(overrides: Sequence[str], also: Sequence[str] = ()) -> str:
    """Returns the default name of a run's folder, made of the overrides that determine its results.

    The name is "default" if there are no such overrides. A name that is too long is cut, and a hash is added at its
    end.

    Args:
        overrides: The overrides of the run.
        also: Names of storage options, such as `data_dir`, that shall be part of the name too, since a sweep varies
            them.

    Example:
        >>> name_run(["num_stu=4", "block_type=DW", "resume=auto"])
        'block_type=DW,num_stu=4'
    """
    # Sorted, so that the order on the command line does not matter; other characters than these could be special.
    named = [o for o in overrides if override_key(o) not in STORAGE_OPTIONS]
    named += [o.replace("'", "").replace('"', "") for o in overrides if override_key(o) in also]
    named = sorted(o for o in named if not override_key(o).startswith("hydra"))
    name = re.sub(r"[^\w=,.+\[\]@-]", "-", ",".join(named)) or "default"
    in_bytes = name.encode()
    if len(in_bytes) <= MAX_NAME_BYTES:
        return name
    digest = hashlib.blake2b(in_bytes, digest_size=6).hexdigest()
    return f"{in_bytes[: MAX_NAME_BYTES - 20].decode(errors='ignore')}-{digest}"


class RunConfig:
    """The config of a run that Hydra has composed, together with the options that the user has given.

    Args:
        cfg: The config, without Hydra's own entry `hydra`.
        parts: Hydra's `hydra.runtime.choices`: the name of the file that was chosen in each config group.
        overrides: The options that the user has given, such as `num_stu=4`.

    Attributes:
        cfg: The config.
        parts: The name of the file that was chosen in each config group, such as `{"block_type": "DW"}`. Loggers are
            not included: a run may have several, and `cfg.logger` has their names.
        overrides: The options that the user has given.
    """

    def __init__(self, cfg: DictConfig, parts: Mapping[str, Any], overrides: Sequence[str]):
        self.cfg, self.overrides = cfg, list(overrides)
        # A recipe may set another number than that of the students whose shapes are given.
        students = cfg.get("students")
        if (
            students
            and OmegaConf.is_list(students)
            and not any(override_key(override) == "num_stu" for override in overrides)
        ):
            cfg.num_stu = len(students)
        self.parts = {group: name for group, name in parts.items() if isinstance(name, str) and is_part(cfg.get(group))}

    def to_settings(self) -> dict[str, Any]:
        """Returns the config as plain dicts and lists, as it is saved in `config.yaml` and in checkpoints.

        The class of a part, such as a backbone, is replaced by the name of its file: `{"part": "resnet56", ...}`.
        Interpolations are replaced by their values, except those of environment variables (`${oc.env:NAME}`), whose
        values may be secret.
        """
        with replace_resolver("oc.env", lambda *names: f"${{oc.env:{','.join(map(str, names))}}}", env):
            settings = to_dict(self.cfg)
        for group, name in self.parts.items():
            settings[group] = part_settings(settings[group], name)
        if settings.get("students") is not None:
            settings["students"] = read_shapes(settings["students"], settings)
        loggers = settings.get("logger") or {}
        return settings | {"logger": {name: node and part_settings(node, name) for name, node in loggers.items()}}

    def student_shapes(self) -> list[Shape] | None:
        """Returns the backbone and the block type of each student, as the option `students` gives them.

        Returns:
            For each student a dict with the keys `backbone` and `block_type`, like the result of `own_shape`. None if
            the option is not given; all students then have the backbone and the block type of the run.
        """
        students = self.cfg.get("students")
        if students is None:
            return None
        return read_shapes(OmegaConf.to_container(students, resolve=True), self.own_shape())

    def own_shape(self) -> Shape:
        """Returns the options of the run's backbone and of its block type (the kind of cheap convolution, such as DW).

        Returns:
            A dict with the keys `backbone` and `block_type`. Each value is a dict of options, in which `part` is the
            name of the file in `conf/`, such as "resnet56".
        """
        nodes = {group: OmegaConf.to_container(self.cfg[group], resolve=True) for group in GROUPS}
        return {group: part_settings(cast(dict[str, Any], node), self.parts[group]) for group, node in nodes.items()}


# Config groups that earlier versions did not have, and the part that does what these versions did.
NEW_GROUPS = {"augment": "standard"}


def complete_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of saved settings with the defaults of options and config groups that did not exist at that time.

    So runs of different versions can be compared.

    Args:
        settings: The config of a run, as `RunConfig.to_settings` of this or an earlier version has returned it.
    """
    completed = {**{group: {"part": name} for group, name in NEW_GROUPS.items()}, **settings}
    for group, node in completed.items():
        if isinstance(node, Mapping) and isinstance(node.get("part"), str):
            with suppress(OptionError):  # a part of the user, whose directory is not known here
                default = part_settings(read_part(group, node["part"]), node["part"])
                new = {name: value for name, value in default.items() if name not in node and is_plain_default(value)}
                completed[group] = {**node, **new}
    return completed


def is_plain_default(value: Any) -> bool:
    """Returns whether a default value can be added to settings: no dict, no reference (`${seed}`), and not missing
    ("???").
    """
    return not isinstance(value, Mapping) and "${" not in str(value) and value != "???"


def select_student_settings(about: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Returns the settings from which one student of a run can be built (see `models.build`).

    Args:
        about: The entry `odcheap` of a checkpoint; see `schemas.SavedRun`.
        number: The number of the student, from 0.
    """
    students = about.get("students")
    return about["student"] if students is None else students[number]


@contextmanager
def replace_resolver(name: str, resolver: Callable[..., Any], default: Callable[..., Any]) -> Generator[None]:
    """A context manager that replaces the function with which OmegaConf computes the values of `${name:...}`.

    Args:
        name: The name of the resolver, such as "oc.env".
        resolver: The function that computes the values within the context.
        default: The function that computes them after the context.
    """
    OmegaConf.register_new_resolver(name, resolver, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver(name, default, replace=True)


def to_dict(cfg: DictConfig) -> dict[str, Any]:
    """Returns a config as plain dicts and lists, in which all interpolations are replaced by their values."""
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))


def is_part(node: Any) -> bool:
    """Returns whether a node of a config describes a class or function and its arguments (it has a `_target_`)."""
    return isinstance(node, Mapping | DictConfig) and "_target_" in node


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns nested options as one dict with dotted names.

    Example:
        >>> flatten({"a": {"b": 1}, "c": 2})
        {'a.b': 1, 'c': 2}
    """
    if not isinstance(tree, dict):
        return {prefix: tree}
    branches = ((f"{prefix}.{key}".strip("."), branch) for key, branch in tree.items())
    return {name: value for path, branch in branches for name, value in flatten(branch, path).items()}
