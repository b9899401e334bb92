"""Checks of options before anything is built: their types and ranges stand in the signatures that they go to.

One value is compared with its range in `utils.arguments.check_value`.
"""

import contextlib
import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, QuotedString, Sweep
from omegaconf import DictConfig, OmegaConf, open_dict
from pydantic import Field

from odcheap.runs.overrides import override_key, quote_override
from odcheap.runs.settings import RunConfig, to_dict
from odcheap.utils.arguments import check_value
from odcheap.utils.errors import OptionError, first_line
from odcheap.utils.parts import CALL_KEYS, list_parts, read_part

LIST_GROUPS = ("logger", "experiment")  # of which several parts may be chosen
# Options of these groups go to classes of libraries, which have more options than conf/ lists.
LIBRARY_GROUPS = ("trainer", "logger", "optimizer", "scheduler")
PATH_NAMES = ("job_dir", "data_dir", "resume", "weights", "pretrained", "teacher_weights")
MAX_INT = 2**53  # beyond it not every whole number is a float of its own
MIN_FLOAT, MAX_FLOAT = 2.0**-126, 2.0**127  # of normal numbers in 32 bits, with which networks compute

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class RootOptions:
    """Types and ranges of the options that belong to no group."""

    num_stu: Annotated[int, Field(ge=1, le=100)]
    seed: int
    together: Literal["auto", "sequential", "streams"]
    select: Literal["val", "last", "test"]
    data_dir: str
    job_dir: str
    resume: str | None
    overwrite: bool
    weights: str | None
    weights_head: Literal["keep", "new"]
    test_only: bool
    checkpoint_every: Annotated[float, Field(ge=0)] | None  # minutes
    checkpoint_keep: Count
    capture: Literal["auto"] | bool
    kernels: Literal["auto", "off"]
    on_nonfinite: Literal["stop", "skip"]
    max_skipped: Annotated[int, Field(ge=0)]


class TrainerOptions:
    """Types and ranges of the options of Lightning's trainer where odcheap allows less than Lightning."""

    max_epochs: Count
    devices: Count
    num_nodes: Count
    strategy: Literal["auto", "ddp"]
    accelerator: str
    precision: str | int
    benchmark: bool | None
    sync_batchnorm: bool
    default_root_dir: str
    use_distributed_sampler: bool
    num_sanity_val_steps: int
    log_every_n_steps: int | None
    enable_checkpointing: bool
    enable_progress_bar: bool
    enable_model_summary: bool


class OptimizerOptions:
    """Options of every optimizer, besides those of its class."""

    lr: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    decay_norm: bool
    decay_spatial: bool


class SchedulerOptions:
    """Options of every learning rate schedule, besides those of its class."""

    fractions: list[str]


GROUP_OPTIONS = {"trainer": TrainerOptions, "optimizer": OptimizerOptions, "scheduler": SchedulerOptions}


def compose(overrides: Sequence[str]) -> RunConfig:
    """Composes the config of these overrides. Works inside a run of Hydra's only."""
    cfg = hydra.compose("config", overrides=[quote_override(o) for o in overrides], return_hydra_config=True)
    parts = to_dict(cfg.hydra.runtime.choices)
    with open_dict(cfg):
        del cfg["hydra"]
    return RunConfig(cfg, parts, overrides)


def check_choices(arguments: Sequence[str], groups: Mapping[str, Sequence[str]]) -> None:
    """Checks that parts are chosen by names. Hydra's own errors about this take many lines.

    Args:
        arguments: As given on the command line.
        groups: The config groups with the names of their parts.

    Raises:
        OptionError: A group has a value that is no name.
    """
    given = [argument for argument in arguments if override_key(argument) in groups and "=" in argument]
    for override in OverridesParser.create().parse_overrides(given):
        group, value = override.key_or_group, override.value()
        for choice in value.list if isinstance(value, ChoiceSweep) else [value]:
            if group == "experiment" and choice == []:
                continue
            names = choice if isinstance(choice, list) and group in LIST_GROUPS and choice else [choice]
            if not all(isinstance(name, str | QuotedString | Sweep | Glob) for name in names):
                none = "; csv stands for no further logger than metrics.csv" if group == "logger" else ""
                allowed = f"must be one of {', '.join(groups[group])}{none}"
                raise OptionError(group, str(override.input_line).partition("=")[2], allowed)


def check_options(config: RunConfig, config_dirs: Sequence[Path] = ()) -> None:
    """Checks every option: that its part has it, and that its value has the type and range that it must have.

    Options that must be given and are missing are left to `check_complete`: a resumed run brings them along.

    Args:
        config: The config.
        config_dirs: The user's own `conf` directories.

    Raises:
        OptionError: Names the first option that is wrong, with its value and what is allowed.
    """
    values = to_dict(config.cfg)
    for name, annotation in get_type_hints(RootOptions, include_extras=True).items():
        if name in values and values[name] != "???":
            check_option(name, values[name], annotation)
    for group, name in config.parts.items():
        check_part(group, group, values, read_part(group, name, config_dirs))
    check_loggers(values, config_dirs)


def check_loggers(values: Mapping[str, Any], config_dirs: Sequence[Path]) -> None:
    """Checks the options of each chosen logger."""
    loggers = values["logger"]
    known = list_parts("logger", config_dirs)
    for name, node in loggers.items() if isinstance(loggers, Mapping) else [("", loggers)]:
        default = read_part("logger", name, config_dirs).get(name) if name in known else None
        if node is None:  # logger=csv
            continue
        if not isinstance(default, Mapping):
            raise OptionError(f"logger.{name}".rstrip("."), node, "is a part, chosen as logger=NAME")
        check_part("logger", f"logger.{name}", values, default)


def check_part(group: str, path: str, values: Mapping[str, Any], default: Mapping[str, Any]) -> None:
    """Checks the options of a part, nested parts included.

    Args:
        group: The config group.
        path: Where the part stands in the config, such as `backbone.network`.
        values: The whole config, resolved.
        default: The part's node in its YAML file.
    """
    node = select(values, path)
    if not isinstance(node, Mapping):
        raise OptionError(path, node, f"must be a part with options of its own, such as {path}.NAME=VALUE")
    target = import_target(path, default["_target_"]) if "_target_" in default else None
    annotations = read_annotations(target) if target else {}
    if path in GROUP_OPTIONS:
        annotations |= get_type_hints(GROUP_OPTIONS[path], include_extras=True)
    for name, value in node.items():
        option, own = f"{path}.{name}", default.get(name)
        if name in CALL_KEYS:
            if name not in default or own != value:
                raise OptionError(option, value, "is no option: a class of your own is a part, in a file of its own")
        elif isinstance(own, Mapping):
            check_part(group, option, values, own)
        elif name not in default and not is_library_option(group, name, target):
            raise OptionError(option, value, f"is no option of this {path.partition('.')[0]}")
        elif value == "???" or (isinstance(own, list) and own == value):
            continue  # missing, or as it is in the file: a list there may hold parts
        else:
            check_reference(option, value, own, group, values)
            fractions = node.get("fractions") if group == "scheduler" else None
            annotation = annotations.get(name, Any)
            if isinstance(fractions, list) and name in fractions:
                annotation = list[Fraction] if isinstance(own, list) else Fraction
            check_option(option, value, annotation)


def check_reference(option: str, value: Any, default: Any, group: str, values: Mapping[str, Any]) -> None:
    """Refuses a value of its own for an option that takes another option's, such as `data.seed: ${seed}`.

    Paths may differ from what they refer to, and so may the options of libraries.
    """
    reference = re.fullmatch(r"\$\{([\w.]+)\}", default) if isinstance(default, str) else None
    if reference is None or group in LIBRARY_GROUPS or option.rpartition(".")[2] in PATH_NAMES:
        return
    if select(values, reference[1]) != value:
        raise OptionError(option, value, f"is no option of its own: give {reference[1]}")


def select(values: Any, path: str) -> Any:
    """Returns the entry with this dotted name, None where there is none."""
    for name in path.split("."):
        values = values.get(name) if isinstance(values, Mapping) else None
    return values


def is_library_option(group: str, name: str, target: Callable[..., Any] | None) -> bool:
    """Whether a library's class has the option, though conf/ does not list it."""
    if group not in LIBRARY_GROUPS or target is None:
        return False
    parameters = inspect.signature(target).parameters
    has_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return has_any or name in parameters


def import_target(path: str, target: str) -> Callable[..., Any]:
    """Imports what a part's `_target_` names."""
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise OptionError(f"{path}._target_", target, f"cannot be imported ({first_line(error)})") from error


def read_annotations(target: Callable[..., Any]) -> dict[str, Any]:
    """Returns the annotations of a callable's parameters; those that name what is not there are left out."""
    function = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)
    hints = {}
    for name, hint in inspect.get_annotations(function).items():
        with contextlib.suppress(NameError):
            hints[name] = eval(hint, function.__globals__) if isinstance(hint, str) else hint
    return {name: hint for name, hint in hints.items() if name != "return"}


def check_option(option: str, value: Any, annotation: Any) -> None:
    """Checks one value: plain, numbers within what can be computed with, and of the annotated type and range."""
    check_plain(option, value, value)
    annotation = keep_plain(annotation)
    name = option.rpartition(".")[2]
    if name in PATH_NAMES and not isinstance(value, str) and not (value is None and type(None) in get_args(annotation)):
        raise OptionError(option, value, "must be a path (./5 where a folder is called 5)")
    try:
        check_value(option, to_annotated(value, annotation), annotation)
    except OptionError as error:
        if annotation in (str, str | None) and isinstance(value, int | float):
            quoted = f"{option}='\"{str(value).lower()}\"'"
            raise OptionError(option, value, f"must be a text; in quotes what looks like none: {quoted}") from error
        if option == "trainer.devices":
            raise OptionError(
                option, value, f"{str(error).partition(': ')[2]}; CUDA_VISIBLE_DEVICES says which GPUs"
            ) from error
        raise OptionError(option, value, str(error).partition(": ")[2]) from error


def check_plain(option: str, value: Any, given: Any) -> None:
    """Checks a value, and what is in it, for parts in disguise and for numbers that are too large or too small."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if key in CALL_KEYS:
                raise OptionError(option, given, "is no option: a class of your own is a part, in a file of its own")
            check_plain(option, entry, given)
    elif isinstance(value, list):
        for entry in value:
            check_plain(option, entry, given)
    elif type(value) is int and abs(value) > MAX_INT:
        raise OptionError(option, given, "must be within 2^53, as every whole number")
    elif type(value) is float and value != 0 and not MIN_FLOAT <= abs(value) <= MAX_FLOAT:
        raise OptionError(option, given, "must be finite, also in 32 bits: from 1.2e-38 to 1.7e38, or zero")


PLAIN_TYPES = (int, float, bool, str, type(None), Any)


def keep_plain(annotation: Any) -> Any:
    """Returns the annotation; of a union only the types that can be written in a config (no tensors, for example)."""
    origin = get_origin(annotation)
    if origin not in (Union, UnionType):
        return annotation
    kept = [choice for choice in get_args(annotation) if choice in PLAIN_TYPES or get_origin(choice) is not None]
    return Union[tuple(kept)] if kept else annotation  # noqa: UP007 - made of a list


def to_annotated(value: Any, annotation: Any) -> Any:
    """Returns a list as a tuple where the annotation asks for one: YAML has lists only."""
    choices = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else [annotation]
    wants_tuple = any(get_origin(choice) is tuple for choice in choices)
    wants_list = any(get_origin(choice) is list for choice in choices)
    return tuple(value) if isinstance(value, list) and wants_tuple and not wants_list else value


def check_complete(cfg: DictConfig) -> None:
    """Raises `OptionError` where an option that has no default was not given."""
    for name in sorted(OmegaConf.missing_keys(cfg)):
        raise OptionError(name, "???", "must be given")


def is_path_option(argument: str) -> bool:
    """Whether an argument of the command line gives a path, in which Hydra's grammar means nothing."""
    key = override_key(argument)
    return key.rpartition(".")[2] in PATH_NAMES or key == "hydra.sweep.dir"
