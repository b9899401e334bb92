"""Builds parts of a run, such as block types (kinds of cheap convolutions), backbones and data sets, from YAML files.

The file `conf/<group>/<name>.yaml` of a part says which class or function it is (`_target_`), and gives its arguments,
which are the part's options. Checkpoints and exports contain the name and the options of a part, never a Python path.
Loading a file from an untrusted source can therefore only build parts that a `conf` directory has.
"""

import contextlib
import functools
import importlib
import math
import re
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from odcheap.utils.errors import OptionError
from odcheap.utils.files import PlainLoader

PART_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
GROUP_NAME = re.compile(r"[A-Za-z0-9_]+(/[A-Za-z0-9_]+)*")
CALL_KEYS = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")  # the keys that Hydra's `instantiate` reads
OWN_PART = "; --config-dir DIR (config_dirs=[DIR] in Python) adds parts of your own"
OWN_PACKAGE = "; install the package, or name the folder that contains it in PYTHONPATH"
MAX_DEPTH = 20  # of nested settings, and of `defaults:` lists that name further files


def find_conf_dir() -> Path:
    """Returns odcheap's own `conf` directory. It is inside the package; in a clone of the repository it is beside it.

    Raises:
        FileNotFoundError: There is no such directory.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no conf directory in or beside {package}: odcheap is not installed completely")


_own_dirs: list[Path] = []


@contextlib.contextmanager
def use_config_dirs(config_dirs: Sequence[Path]) -> Generator[None]:
    """A context manager in which the functions of this module also find parts in the user's own `conf` directories.

    A part is what a YAML file `conf/<group>/<name>.yaml` describes, such as a block type or a backbone. Within the
    context, the argument `config_dirs` of these functions is not needed.

    Args:
        config_dirs: The directories. They contain files `<group>/<name>.yaml`, as odcheap's own `conf` does.
    """
    before = list(_own_dirs)
    _own_dirs[:] = config_dirs
    try:
        yield
    finally:
        _own_dirs[:] = before


def find_folders(config_dirs: Sequence[Path] = ()) -> list[Path]:
    """Returns all `conf` directories in the order in which they are searched for a part.

    Args:
        config_dirs: Directories of the user, which are searched after odcheap's own.

    Returns:
        odcheap's own directory, then `config_dirs`, then the directories of the surrounding `use_config_dirs`.
    """
    return list(dict.fromkeys([find_conf_dir(), *map(Path, config_dirs), *_own_dirs]))


def is_own_part(group: str, name: str) -> bool:
    """Returns whether a part is in a directory of `use_config_dirs`, and not in odcheap's own `conf`.

    Args:
        group: The config group, such as `block_type`.
        name: The name of a part of this group, such as `DW`.
    """
    own, *others = [(folder / group / f"{name}.yaml").is_file() for folder in find_folders()]
    return any(others) and not own


def list_parts(group: str, config_dirs: Sequence[Path] = ()) -> list[str]:
    """Returns the names that can be chosen in a config group, which are the names of its YAML files without `.yaml`.

    Args:
        group: The config group, such as `block_type`, whose files are in the folder `conf/<group>`.
        config_dirs: Further `conf` directories, which are searched too.

    Returns:
        The names, sorted.

    Example:
        >>> list_parts("block_type")
        ['DW', 'Group', 'RepDW', 'Shift', 'Standard']
    """
    folders = [folder / group for folder in find_folders(config_dirs)]
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})


def part_settings(node: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns the name and the options of a part as one dict, in the form in which checkpoints and exports store them.

    A part is what a YAML file `conf/<group>/<name>.yaml` describes, such as a block type or a backbone.

    Args:
        node: The part in a resolved config (a dict or an OmegaConf `DictConfig`), with its `_target_` and its options.
        name: The name of the part, such as `DW` for `conf/block_type/DW.yaml`.

    Returns:
        `{"part": name, **options}`. `_target_` and the other keys of Hydra's `instantiate` are left out, also in nested
        parts.

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
    """Builds the object that a YAML file `conf/<group>/<name>.yaml` describes, such as a block type, without Hydra.

    Only the class or function that the YAML file names is called; the settings can only change values of its options.

    Args:
        group: The config group, such as `block_type`.
        settings: A dict with the name of the YAML file under the key "part", and with options, which replace the values
            in the YAML file; `part_settings` returns such a dict.
        config_dirs: Further `conf` directories, which are searched after odcheap's own.
        **overrides: Further arguments of the class or function, such as modules; they replace options.

    Returns:
        The object, or a `functools.partial` if the YAML file says `_partial_: true`.

    Raises:
        OptionError: The part or an option is unknown, a value is a reference (`${...}`), or a value is missing.

    Example:
        >>> build_part("block_type", {"part": "Group", "groups": 2})
        Group(groups=2)
    """
    if not isinstance(settings, Mapping):
        raise OptionError(group, settings, "must be settings: {'part': NAME, ...}")
    name = settings.get("part")
    options = {key: value for key, value in settings.items() if key != "part"}
    node = _overlay(read_part(group, name, config_dirs), options, group)
    _require_values({key: value for key, value in node.items() if key not in overrides}, group)
    return _instantiate(node, overrides)


def read_part(group: str, name: Any, config_dirs: Sequence[Path] = ()) -> dict[str, Any]:
    """Returns the content of a YAML file `conf/<group>/<name>.yaml`, merged with the files in its `defaults:` list.

    Args:
        group: The config group, such as `block_type`.
        name: The name of the file without `.yaml`, such as `DW`.
        config_dirs: Further `conf` directories, which are searched after odcheap's own.

    Raises:
        OptionError: There is no such file, or it is not valid.
    """
    return _read(group, name, find_folders(config_dirs), MAX_DEPTH)


def _read(group: str, name: Any, folders: list[Path], depth: int) -> dict[str, Any]:
    if not depth:
        raise OptionError(group, name, "its defaults lists form a circle")
    if not GROUP_NAME.fullmatch(group) or not isinstance(name, str) or not PART_NAME.fullmatch(name):
        raise OptionError(group, name, "is not the name of a part")
    path = next((path for folder in folders if (path := folder / group / f"{name}.yaml").is_file()), None)
    if path is None:
        raise OptionError(group, name, f"unknown; must be one of {', '.join(list_parts(group, folders[1:]))}{OWN_PART}")
    try:
        node = yaml.load(path.read_text(encoding="utf-8"), PlainLoader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(group, name, f"{path} is not a valid YAML file ({' '.join(str(error).split())})") from error
    if not isinstance(node, dict):
        raise OptionError(group, name, f"{path} does not hold options by name")
    defaults = node.pop("defaults", None) or []
    merged: dict[str, Any] = {}
    for entry in defaults if "_self_" in defaults else [*defaults, "_self_"]:  # Hydra's order
        merged = _merge(merged, node if entry == "_self_" else _read_default(entry, group, folders, depth))
    return merged


def _read_default(entry: Any, group: str, folders: list[Path], depth: int) -> dict[str, Any]:
    """Reads an entry of a `defaults:` list: `name` in the same group, or `{subgroup: name}` for the node `subgroup`."""
    if isinstance(entry, str):
        return _read(group, entry, folders, depth - 1)
    if not isinstance(entry, dict) or len(entry) != 1:
        raise OptionError(group, entry, "is not an entry of a defaults list that odcheap can read")
    subgroup, name = str(next(iter(entry))), next(iter(entry.values()))
    path = subgroup.strip("/") if subgroup.startswith("/") else f"{group}/{subgroup}"
    node = {} if name is None else _read(path, name, folders, depth - 1)
    for key in reversed(subgroup.strip("/").split("/")):
        node = {key: node}
    return node


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _overlay(node: dict[str, Any], options: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Returns a dict from a YAML file in which `options`, from a file that is not trusted, replace values."""
    # An option must be in the YAML file; dicts of options without a `_target_` may have further entries.
    merged = dict(node)
    for key, value in options.items():
        option = f"{path}.{key}"
        if not isinstance(key, str) or key.startswith("_") or ("_target_" in node and key not in node):
            raise OptionError(option, value, f"is not an option of {path}")
        own = node.get(key)
        if isinstance(own, dict) and isinstance(value, Mapping):
            merged[key] = _overlay(own, value, option)
        elif isinstance(own, dict) and "_target_" in own and value is not None:
            raise OptionError(option, value, "must be a part's options by name")
        else:
            _check_plain(value, option, MAX_DEPTH)
            merged[key] = value
    return merged


def _check_plain(value: Any, path: str, depth: int) -> None:
    """Raises `OptionError` unless a value consists of numbers, strings, lists and dicts, without `${...}`."""
    # In a config, a text with "${" is a reference, and keys that begin with "_" say what is called.
    if not depth:
        raise OptionError(path, "...", "is nested too deeply")
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if not isinstance(key, str) or key.startswith("_"):
                raise OptionError(f"{path}.{key}", entry, f"is not an option of {path}")
            _check_plain(entry, f"{path}.{key}", depth - 1)
    elif isinstance(value, list | tuple):
        for entry in value:
            _check_plain(entry, path, depth - 1)
    elif isinstance(value, str):
        if "${" in value or value == "???":
            raise OptionError(path, value, "must be a value, not a reference to another option")
    elif value is not None and not isinstance(value, bool | int | float):
        raise OptionError(path, value, "must be a number, a string, a list or options by name")
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
    """Builds the object that a node of a YAML file describes, as Hydra's `instantiate` does."""
    # Hydra is not used, so that a student can be loaded without it.
    if isinstance(node, list):
        return [_instantiate(entry, {}) for entry in node]
    if not isinstance(node, dict):
        return node
    options = {key: value for key, value in node.items() if key not in CALL_KEYS and key not in overrides}
    if node.get("_recursive_", True):
        options = {key: _instantiate(value, {}) for key, value in options.items()}
    options |= overrides
    if "_target_" not in node:
        return options
    target = import_target(node["_target_"])
    args = node.get("_args_", [])
    return functools.partial(target, *args, **options) if node.get("_partial_") else target(*args, **options)


def import_target(path: str) -> Any:
    """Imports a class or function by its dotted Python path."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
