"""Checks all options of a run before anything is built.

The type and the range of an option are annotations in the signature of the class or function that gets it. If no
signature has the option, as for `resume`, its annotation is in this module. `utils.arguments.check_value` compares one
value with its annotation.

A part is a component of a run that is chosen by the name of its file `conf/<group>/<name>.yaml`, such as a backbone.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import GenericAlias, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from odcheap.config.messages import suggest_options
from odcheap.config.signatures import NO_PARAMETERS, Signature, import_signature
from odcheap.models.student_shapes import GROUPS, read_shapes
from odcheap.runs.settings import RunConfig, override_key, to_dict
from odcheap.utils.arguments import StudentCount, check_value
from odcheap.utils.errors import OptionError
from odcheap.utils.parts import CALL_KEYS, list_parts, read_part

LIST_GROUPS = ("logger", "experiment")  # groups in which several names may be chosen
# Groups whose parts are classes of libraries: these have more options than their files in conf/ list.
LIBRARY_GROUPS = ("trainer", "logger", "optimizer", "scheduler")
# The functions that build the parts of some groups. Each part of such a group has the keyword-only parameters of this
# function as options, in addition to those of its class.
BUILDERS = {
    "optimizer": "odcheap.training.optim.build_optimizer",
    "scheduler": "odcheap.training.optim.build_scheduler",
}
PATH_NAMES = ("job_dir", "data_dir", "resume", "weights", "pretrained", "teacher_weights")
MAX_INT = 2**53  # larger whole numbers cannot all be represented as floats
MIN_FLOAT, MAX_FLOAT = 2.0**-126, 2.0**127  # the range of normal numbers in float32, in which networks compute
OWN_CLASS = "is not an option: a class of your own needs a YAML file in a config directory of your own"

FindSignature = Callable[[str, str], Signature]

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class RootOptions:
    """The types and ranges of the options without a group, such as `num_stu` and `seed`. It is never instantiated."""

    num_stu: StudentCount
    students: Any  # `check_students` checks it
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
    """The types and ranges of options of Lightning's `Trainer` for which odcheap allows fewer values than Lightning."""

    max_epochs: Count
    limit_train_batches: Count | Annotated[float, Field(gt=0, le=1)] | None
    accumulate_grad_batches: Count
    min_epochs: Natural | None
    max_steps: Annotated[int, Field(ge=-1)]
    min_steps: Natural | None
    check_val_every_n_epoch: Count | None
    val_check_interval: Count | Annotated[float, Field(gt=0, le=1)] | str | None
    gradient_clip_val: Annotated[float, Field(ge=0)] | None
    gradient_clip_algorithm: Literal["norm", "value"] | None
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


def check_options(
    config: RunConfig,
    config_dirs: Sequence[Path] = (),
    find_signature: FindSignature = import_signature,
) -> None:
    """Checks that each option of a run exists, and that its value has the right type and range.

    An option that still lacks a value is accepted here. `check_complete` refuses it later, since a resumed run takes
    such values from its checkpoint.

    Args:
        config: The config of the run.
        config_dirs: The user's own `conf` directories.
        find_signature: The function that finds the parameters of a class or function. `import_signature` imports it;
            `read_signature` reads its source file, which is faster but does not find every annotation.

    Raises:
        OptionError: An option is wrong. The message names the first wrong option, its value, and what is allowed.
    """
    for name, annotation in get_type_hints(RootOptions, include_extras=True).items():
        if name in config.cfg and not OmegaConf.is_missing(config.cfg, name):
            check_option(name, to_plain(config.cfg[name]), annotation)
    values = to_dict(config.cfg)
    common = {"trainer": get_type_hints(TrainerOptions, include_extras=True)}
    for group, builder in BUILDERS.items():
        signature = find_signature(group, builder)
        common[group] = {name: signature.annotations.get(name, Any) for name in signature.keyword_only}
    for group, name in config.parts.items():
        check_part(group, group, values, read_part(group, name, config_dirs), common.get(group, {}), find_signature)
    check_students(config, config_dirs, find_signature)
    check_loggers(values, config_dirs, find_signature)


def check_students(config: RunConfig, config_dirs: Sequence[Path], find_signature: FindSignature) -> None:
    """Checks the option `students`, which gives each student a network of its own, as in `students=[DW,Shift]`.

    Nothing is checked if the option is not given.

    Args:
        config: The config of the run.
        config_dirs: The user's own `conf` directories.
        find_signature: A function that returns the parameters of a class or function, such as `import_signature`.

    Raises:
        OptionError: An entry is wrong, `num_stu` is not the number of entries, or the user has chosen a block type or a
            backbone that no student has.
    """
    students = to_plain(config.cfg.get("students"))
    if students is None:
        return
    shapes = read_shapes(students, config.own_shape(), config_dirs)
    if config.cfg.num_stu != len(shapes):
        raise OptionError("num_stu", config.cfg.num_stu, f"must be {len(shapes)}, the number of entries of students")
    for k, shape in enumerate(shapes):
        for group, settings in shape.items():
            default = read_part(group, settings["part"], config_dirs)
            node = {key: value for key, value in settings.items() if key != "part"}
            values = {"students": {str(k): {group: node}}}
            check_part(group, f"students.{k}.{group}", values, default, {}, find_signature)
    # A part that the user has named and no student has is a mistake.
    for group in GROUPS:
        part = config.parts.get(group)
        given = next((o for o in config.overrides if override_key(o) == group), None)
        if given is not None and all(shape[group]["part"] != part for shape in shapes):
            raise OptionError(group, part, "is not used: each entry of students names another one")


def check_added_options(config: RunConfig) -> None:
    """Checks that each option which the user adds with a plus sign, as in `+width=2`, is used somewhere in the config.

    Raises:
        OptionError: Nothing uses one of these options; the message names it and options with similar names.
    """
    known = {*get_type_hints(RootOptions), *config.parts, *LIST_GROUPS}
    for override in config.overrides:
        key, _, value = override.partition("=")
        root = re.split(r"[./@]", override_key(override))[0]
        if not key.startswith("+") or root in known or root not in config.cfg:
            continue
        # A file of the user may refer to an entry of his own, as in `width: ${width}`.
        others = OmegaConf.masked_copy(config.cfg, [str(name) for name in config.cfg if name != root])
        if not re.search(rf"\$\{{{re.escape(root)}\b", OmegaConf.to_yaml(others)):
            suggestion = suggest_options(override_key(override))
            raise OptionError(key, value, f"no part of the run reads this option{suggestion}")


def to_plain(value: Any) -> Any:
    """Converts a list or dict of OmegaConf to a plain one, with interpolations resolved, and returns all other values
    unchanged.
    """
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def check_loggers(values: Mapping[str, Any], config_dirs: Sequence[Path], find_signature: FindSignature) -> None:
    """Checks the options of the loggers that the user has chosen.

    Args:
        values: The whole config as plain dicts, with interpolations resolved.
        config_dirs: The user's own `conf` directories.
        find_signature: A function that returns the parameters of a class or function, such as `import_signature`.

    Raises:
        OptionError: An option of a logger is wrong.
    """
    loggers = values["logger"]
    known = list_parts("logger", config_dirs)
    for name, node in loggers.items() if isinstance(loggers, Mapping) else [("", loggers)]:
        default = read_part("logger", name, config_dirs).get(name) if name in known else None
        if node is None:  # logger=csv
            continue
        if not isinstance(default, Mapping):
            raise OptionError(f"logger.{name}".rstrip("."), node, "is a part; choose it with logger=NAME")
        check_part("logger", f"logger.{name}", values, default, {}, find_signature)


def check_part(
    group: str,
    path: str,
    values: Mapping[str, Any],
    default: Mapping[str, Any],
    common: Mapping[str, Any],
    find_signature: FindSignature,
) -> None:
    """Checks the options of a part (a class or function with its arguments) and of the parts nested in it.

    Args:
        group: The config group, such as `backbone`.
        path: The dotted name of the part in the config, such as `backbone.network`.
        values: The whole config as plain dicts, with interpolations resolved.
        default: The content of the part's YAML file.
        common: The annotations of options that every part of the group has, by the names of the options.
        find_signature: A function that returns the parameters of a class or function, such as `import_signature`.

    Raises:
        OptionError: An option is wrong.
    """
    # What the options are compared with: the file, and the signature of the class or function.
    node = select(values, path)
    if not isinstance(node, Mapping):
        raise OptionError(path, node, f"must be a part with options of its own, such as {path}.NAME=VALUE")
    signature = find_signature(path, default["_target_"]) if "_target_" in default else NO_PARAMETERS
    annotations = {**signature.annotations, **common}
    # A class of a library has parameters that its file does not list.
    takes_any = group in LIBRARY_GROUPS and signature.takes_any
    addable = signature.names if group in LIBRARY_GROUPS else ()
    # `scheduler.fractions` names the options that are fractions of the run's steps, so it is checked before them.
    fractions = node.get("fractions") if group == "scheduler" else None
    for name, value in sorted(node.items(), key=lambda item: item[0] != "fractions"):
        # In this order: what is called, a nested part, an option that does not exist, one without a value of its own,
        # and at last a value to check.
        option, own = f"{path}.{name}", default.get(name)
        if name in CALL_KEYS:
            if name not in default or own != value:
                raise OptionError(option, value, OWN_CLASS)
        elif isinstance(own, Mapping):
            check_part(group, option, values, own, {}, find_signature)
        elif name not in default and name not in addable and not takes_any:
            raise OptionError(option, value, f"is not an option of this {path.partition('.')[0]}")
        elif value == "???" or (isinstance(own, list) and own == value):
            continue  # missing, or unchanged: a list in the file may hold parts
        else:
            check_reference(option, value, own, group, values)
            annotation = annotations.get(name, Any)
            if isinstance(fractions, list) and name in fractions:
                annotation = list[Fraction] if isinstance(own, list) else Fraction
            check_option(option, value, annotation)


def check_reference(option: str, value: Any, default: Any, group: str, values: Mapping[str, Any]) -> None:
    """Checks that the user has not changed an option which always equals another one, as in `data.seed: ${seed}`.

    Options that are paths, and options of libraries, may be changed.

    Args:
        option: The dotted name of the option.
        value: Its value.
        default: Its value in the YAML file, such as `${seed}`. Other values than references are not checked.
        group: The config group of the option.
        values: The whole config as plain dicts, with interpolations resolved.

    Raises:
        OptionError: The option has another value than the option to which the YAML file refers.
    """
    reference = re.fullmatch(r"\$\{([\w.]+)\}", default) if isinstance(default, str) else None
    if reference is None or group in LIBRARY_GROUPS or option.rpartition(".")[2] in PATH_NAMES:
        return
    if select(values, reference[1]) != value:
        raise OptionError(option, value, f"always equals {reference[1]}: set that option")


def select(values: Any, path: str) -> Any:
    """Returns the entry of nested dicts with a dotted name such as "data.seed"; None if there is no such entry."""
    for name in path.split("."):
        values = values.get(name) if isinstance(values, Mapping) else None
    return values


def check_option(option: str, value: Any, annotation: Any) -> None:
    """Checks the value of one option: its type, its range, and that it is plain data with numbers of a usable size.

    Args:
        option: The dotted name of the option.
        value: Its value.
        annotation: The type and range that it must have, such as `Annotated[int, Field(ge=1)]`.

    Raises:
        OptionError: The value is not allowed.
    """
    check_plain(option, value, value)
    annotation = keep_plain(annotation)
    name = option.rpartition(".")[2]
    has_paths = isinstance(value, list) and any(get_origin(choice) is not None for choice in get_args(annotation))
    is_missing = value is None and type(None) in get_args(annotation)
    if name in PATH_NAMES and not (isinstance(value, str) or is_missing or has_paths):
        raise OptionError(option, value, "must be a path (for a folder called 5, write ./5)")
    # Two frequent mistakes get a hint: text that YAML reads as a number, and `trainer.devices=[0,1]`.
    try:
        check_value(option, to_annotated(value, annotation), annotation)
    except OptionError as error:
        allowed = error.allowed
        if annotation in (str, str | None) and isinstance(value, int | float):
            allowed = f"must be a string; write it in quotes: {option}='\"{str(value).lower()}\"'"
        elif option == "trainer.devices":
            allowed += "; CUDA_VISIBLE_DEVICES chooses the GPUs"
        raise OptionError(option, value, allowed) from error


def check_plain(option: str, value: Any, whole: Any) -> None:
    """Raises `OptionError` if a value contains a dict with `_target_`, or a number that is too large or too small.

    Hydra would call the class that `_target_` names. Numbers must be representable as float32.

    Args:
        option: The dotted name of the option.
        value: The value of the option, or an entry of it.
        whole: The whole value of the option, for the message.
    """
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if key in CALL_KEYS:
                raise OptionError(option, whole, OWN_CLASS)
            check_plain(option, entry, whole)
    elif isinstance(value, list):
        for entry in value:
            check_plain(option, entry, whole)
    elif type(value) is int and abs(value) > MAX_INT:
        raise OptionError(option, whole, "must be at most 2^53 in size, as every whole number")
    elif type(value) is float and value != 0 and not MIN_FLOAT <= abs(value) <= MAX_FLOAT:
        raise OptionError(option, whole, "must be finite, also as float32: from 1.2e-38 to 1.7e38, or zero")


PLAIN_TYPES = (int, float, bool, str, type(None), Any)


def keep_plain(annotation: Any) -> Any:
    """Returns a type annotation without the types that a config cannot contain, such as `Tensor`.

    They are removed from unions: `float | Tensor` becomes `float`.
    """
    origin = get_origin(annotation)
    if origin is tuple:
        entries = get_args(annotation)
        return GenericAlias(tuple, tuple(entry if entry is Ellipsis else keep_plain(entry) for entry in entries))
    if origin not in (Union, UnionType):
        return annotation
    kept = [choice for choice in get_args(annotation) if choice in PLAIN_TYPES or get_origin(choice) is not None]
    return Union[tuple(map(keep_plain, kept))] if kept else annotation  # noqa: UP007 - built from a list


def to_annotated(value: Any, annotation: Any) -> Any:
    """Converts a list to a tuple if the annotation of its option allows a tuple and no list, since YAML has no tuples.

    Args:
        value: The value of an option. Any other value than such a list is returned unchanged.
        annotation: The type that the option must have.
    """
    choices = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else [annotation]
    wants_tuple = any(get_origin(choice) is tuple for choice in choices)
    wants_list = any(get_origin(choice) is list for choice in choices)
    return tuple(value) if isinstance(value, list) and wants_tuple and not wants_list else value


def check_complete(cfg: DictConfig) -> None:
    """Raises `OptionError` if an option has no value, because it has no default and the user has not given one."""
    for name in sorted(OmegaConf.missing_keys(cfg)):
        raise OptionError(name, "???", "must be given")


def check_files(cfg: DictConfig) -> None:
    """Raises `OptionError` if the option `resume` or `weights` names a file or a folder that does not exist."""
    for name in ("resume", "weights"):
        if cfg[name] not in (None, "auto"):
            try:
                os.stat(cfg[name])
            except (FileNotFoundError, NotADirectoryError) as error:
                raise OptionError(name, cfg[name], "no such file") from error
            except (OSError, ValueError):
                continue  # what reads it explains it
