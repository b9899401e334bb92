"""Parts (block types, backbones, data sets, methods) by their option names, as `conf/<group>/<name>.yaml` defines them.

Files on disk name a part by its option name and plain options, never by a Python path. The YAML file of that name says
which class or function it is, so a file from a stranger can only build what a `conf` directory offers.
"""

import functools
import importlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from odcheap.utils.errors import OptionError

PART_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
GROUP_NAME = re.compile(r"[A-Za-z0-9_]+(/[A-Za-z0-9_]+)*")
CALL_KEYS = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")  # how Hydra's `instantiate` makes a call
MAX_DEPTH = 20  # of nested settings and of `defaults:` that lead to further files


def find_conf_dir() -> Path:
    """Returns the directory of the YAML files that odcheap ships: inside the package, or beside it in a clone.

    Raises:
        FileNotFoundError: The installation holds no configuration.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no conf directory in or beside {package}: odcheap is not installed completely")


def list_parts(group: str, config_dirs: Sequence[Path] = ()) -> list[str]:
    """Returns the names of all parts of a group, sorted, from the shipped `conf` and from `config_dirs`.

    Example:
        >>> list_parts("block_type")
        ['DW', 'Group', 'Shift', 'Standard']
    """
    folders = [Path(folder) / group for folder in (find_conf_dir(), *config_dirs)]
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})


def part_settings(node: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns a config node as plain settings for the disk: the part's option name and its options.

    Args:
        node: The part's resolved config node (a dict or an OmegaConf `DictConfig`), with its `_target_`.
        name: The option name, such as `DW` for `conf/block_type/DW.yaml`.

    Returns:
        `{"part": name, **options}` without `_target_` and its like, in nested nodes too.

    Raises:
        ValueError: The part has an option called `part`.

    Example:
        >>> part_settings({"_target_": "odcheap.layers.cheap_conv.Group", "groups": 4}, "Group")
        {'part': 'Group', 'groups': 4}
    """
    if "part" in node:
        raise ValueError(f"{name}: an option cannot be called 'part', which is the part's own name on disk")
    return {"part": name, **_plain_options(node)}


def _plain_options(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain_options(value[key]) for key in value if key not in CALL_KEYS}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain_options(entry) for entry in value]
    return value


def build_part(group: str, settings: Mapping[str, Any], *, config_dirs: Sequence[Path] = (), **overrides: Any) -> Any:
    """Builds a part from its settings, without Hydra.

    Only what stands as `_target_` in a YAML file of the group is called; the settings choose the file and give values
    to options that the file has.

    Args:
        group: The config group, such as `block_type`.
        settings: What `part_settings` returned; its options replace the values in the YAML file.
        config_dirs: Further `conf` directories, searched after the shipped one.
        **overrides: Arguments for the part that are no settings, such as modules; they replace options.

    Returns:
        The instance, or a `functools.partial` of it where the YAML file says `_partial_: true`.

    Raises:
        OptionError: An unknown part or option, an interpolation, or an option without a value.

    Example:
        >>> build_part("block_type", {"part": "Group", "groups": 2})
        Group(groups=2)
    """
    if not isinstance(settings, Mapping):
        raise OptionError(group, settings, "must be settings: {'part': NAME, ...}")
    name = settings.get("part")
    options = {key: value for key, value in settings.items() if key != "part"}
    node = _overlay(read_part(group, name, config_dirs), options, group)
    given = dict.fromkeys(overrides)  # the values themselves are not looked into: they may be modules
    _require_values({key: value for key, value in node.items() if key not in given}, group)
    return _instantiate(node, overrides)


def read_part(group: str, name: Any, config_dirs: Sequence[Path] = ()) -> dict[str, Any]:
    """Reads a part's YAML file, with the files that its `defaults:` list names.

    Raises:
        OptionError: There is no such part.
    """
    return _read(group, name, [find_conf_dir(), *map(Path, config_dirs)], MAX_DEPTH)


def _read(group: str, name: Any, folders: list[Path], depth: int) -> dict[str, Any]:
    if not depth:
        raise OptionError(group, name, "its defaults lists lead in a circle")
    if not GROUP_NAME.fullmatch(group) or not isinstance(name, str) or not PART_NAME.fullmatch(name):
        raise OptionError(group, name, "is no name of a part")
    path = next((path for folder in folders if (path := folder / group / f"{name}.yaml").is_file()), None)
    if path is None:
        known = sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})
        raise OptionError(group, name, f"unknown; must be one of {', '.join(known)}")
    try:
        node = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(group, name, f"{path} is no valid YAML file ({' '.join(str(error).split())})") from error
    if not isinstance(node, dict):
        raise OptionError(group, name, f"{path} does not hold options by name")
    defaults = node.pop("defaults", None) or []
    merged: dict[str, Any] = {}
    for entry in defaults if "_self_" in defaults else [*defaults, "_self_"]:  # Hydra's order
        merged = _merge(merged, node if entry == "_self_" else _read_default(entry, group, folders, depth))
    return merged


def _read_default(entry: Any, group: str, folders: list[Path], depth: int) -> dict[str, Any]:
    """One entry of a `defaults:` list: `name` of the same group, or `{subgroup: name}` for the node `subgroup`."""
    if isinstance(entry, str):
        return _read(group, entry, folders, depth - 1)
    if not isinstance(entry, dict) or len(entry) != 1:
        raise OptionError(group, entry, "is no entry of a defaults list that odcheap can read")
    ((where, name),) = entry.items()
    where = str(where)
    found = (
        {}
        if name is None
        else _read(where.strip("/") if where[:1] == "/" else f"{group}/{where}", name, folders, depth - 1)
    )
    for key in reversed(where.strip("/").split("/")):
        found = {key: found}
    return found


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _overlay(node: dict[str, Any], options: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The node with values from a file that is not trusted: plain ones, of options that the node has."""
    merged = dict(node)
    for key, value in options.items():
        where = f"{path}.{key}"
        if not isinstance(key, str) or key.startswith("_") or ("_target_" in node and key not in node):
            raise OptionError(where, value, f"is no option of {path}")
        own = node.get(key)
        if isinstance(own, dict) and isinstance(value, Mapping):
            merged[key] = _overlay(own, value, where)
        elif isinstance(own, dict) and "_target_" in own and value is not None:
            raise OptionError(where, value, "must be a part's options by name")
        else:
            _check_plain(value, where, MAX_DEPTH)
            merged[key] = value
    return merged


def _check_plain(value: Any, path: str, depth: int) -> None:
    """Raises `OptionError` unless the value is made of numbers, texts, lists and dicts, with nothing to resolve."""
    if not depth:
        raise OptionError(path, "...", "is nested too deeply")
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if not isinstance(key, str) or key.startswith("_"):
                raise OptionError(f"{path}.{key}", entry, f"is no option of {path}")
            _check_plain(entry, f"{path}.{key}", depth - 1)
    elif isinstance(value, list | tuple):
        for entry in value:
            _check_plain(entry, path, depth - 1)
    elif isinstance(value, str):
        if "${" in value or value == "???":
            raise OptionError(path, value, "must be a value, not a reference to another option")
    elif value is not None and not isinstance(value, bool | int | float):
        raise OptionError(path, value, "must be a number, a text, a list or options by name")
    elif isinstance(value, float) and not math.isfinite(value):
        raise OptionError(path, value, "must be a finite number")


def _require_values(value: Any, path: str) -> None:
    if isinstance(value, dict):
        for key, entry in value.items():
            _require_values(entry, f"{path}.{key}")
    elif isinstance(value, list):
        for entry in value:
            _require_values(entry, path)
    elif isinstance(value, str) and (value == "???" or "${" in value):
        raise OptionError(path, value, "must be given")


def _instantiate(node: Any, overrides: Mapping[str, Any]) -> Any:
    """What Hydra's `instantiate` makes of a node of one of our YAML files."""
    if isinstance(node, list):
        return [_instantiate(entry, {}) for entry in node]
    if not isinstance(node, dict):
        return node
    nested = node.get("_recursive_", True)
    options = {key: value for key, value in node.items() if key not in CALL_KEYS and key not in overrides}
    if nested:
        options = {key: _instantiate(value, {}) for key, value in options.items()}
    options |= overrides
    if "_target_" not in node:
        return options
    target = _import_object(node["_target_"])
    args = node.get("_args_", [])
    return functools.partial(target, *args, **options) if node.get("_partial_") else target(*args, **options)


def _import_object(path: str) -> Any:
    """The class or function of this dotted path: the longest importable prefix, then attributes."""
    names = path.split(".")
    for count in range(len(names) - 1, 0, -1):
        module = ".".join(names[:count])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
                continue  # a class, not a module: its methods may be targets too
            raise
        return functools.reduce(getattr, names[count:], found)
    raise ModuleNotFoundError(f"no module for {path!r}", name=names[0])


class _Loader(yaml.SafeLoader):
    """Reads numbers as OmegaConf does: `1e-4` is a float, and a date is a text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own class attribute
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*[eE][-+]?[0-9]+|[0-9][0-9_]*\.[0-9_]*|\.[0-9_]+(?:[eE][-+]?[0-9]+)?)$"),
    list("-+0123456789."),
)
