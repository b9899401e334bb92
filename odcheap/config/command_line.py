"""Prepares the command-line arguments of `odcheap train` for Hydra: checks their form, and puts paths in quotes."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, QuotedString, Sweep
from hydra.errors import HydraException

from odcheap.config.options import LIST_GROUPS, PATH_NAMES
from odcheap.runs.folder import CHECKPOINT_NAME, CONFIG, read_config
from odcheap.runs.resume import EXPERIMENT_GROUPS
from odcheap.runs.settings import flatten, override_key, quote_override
from odcheap.utils.errors import Failure, OptionError
from odcheap.utils.parts import PART_NAME


def check_arguments(arguments: Sequence[str]) -> None:
    """Checks the form of the command-line arguments of `odcheap train`, before Hydra reads them.

    Each argument must be a flag of Hydra, the value of such a flag, or an option such as `num_stu=4`.

    Raises:
        Failure: An argument has another form, such as `--num_stu 4`; the message says how to write it.
    """
    flags = {flag: action for action in get_args_parser()._actions for flag in action.option_strings}
    before, takes_value = "", False
    for argument, after in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name.startswith("-"):
            if name.startswith("--") and name not in flags:
                # `--num_stu 2` is the usual form in other programs.
                value = value if equals or after.startswith("-") or "=" in after else after
                written = f"write {name.lstrip('-')}={value}, without --" if value else "there is no such flag"
                raise Failure(f"{argument}: {written} (odcheap train --help shows every option)")
            takes_value = name in flags and flags[name].nargs != 0 and not equals
        elif takes_value:
            takes_value = False
        elif not name or (not equals and not name.startswith("~")):
            near = (argument[:1], argument[-1:], before[-1:], after[:1])
            if {"=", ","} & set(near):
                raise Failure(f"{argument}: write no spaces around = and commas, as in num_stu=2 and seed=0,1")
            quotes = "; a value with spaces needs quotes, as in 'data_dir=my images'"
            raise Failure(f"{argument}: write options as NAME=VALUE, such as num_stu=2{quotes}")
        before = argument


def check_single_values(arguments: Sequence[str]) -> None:
    """Checks that no option has several values, such as `seed=0,1`, unless the arguments start a sweep (`-m`).

    Args:
        arguments: The arguments as `prepare_arguments` returns them.

    Raises:
        Failure: An option has several values and there is no `-m`; the message says how to write it.
    """
    if any(argument in ("-m", "--multirun") or argument.startswith("hydra.mode=") for argument in arguments):
        return
    for argument in arguments:
        if "=" in argument and not argument.startswith("-") and is_choice(argument):
            name, _, value = argument.partition("=")
            both = f", or write {name}=[{value}] to have all of them in one run" if name in LIST_GROUPS else ""
            raise Failure(f"{argument}: several values need a sweep: add -m{both}")


def check_choices(arguments: Sequence[str], groups: Mapping[str, Sequence[str]]) -> None:
    """Checks that each config group gets the name of a file, as in `method=od`, and not a value such as `method=3`.

    Args:
        arguments: The command-line arguments.
        groups: The names that can be chosen in each config group; the error message lists them.

    Raises:
        OptionError: The value of a group is not a name. Whether a file of this name exists is not checked.
    """
    # Hydra's own error about this has many lines.
    choices = [argument for argument in arguments if override_key(argument) in groups and "=" in argument]
    for override in OverridesParser.create().parse_overrides(choices):
        group, value = override.key_or_group, override.value()
        for choice in value.list if isinstance(value, ChoiceSweep) else [value]:
            if group == "experiment" and choice == []:
                continue
            names = choice if isinstance(choice, list) and group in LIST_GROUPS and choice else [choice]
            if not all(isinstance(name, str | QuotedString | Sweep | Glob) for name in names):
                none = "; logger=csv writes metrics.csv only" if group == "logger" else ""
                allowed = f"must be one of {', '.join(groups[group])}{none}"
                raise OptionError(group, str(override.input_line).partition("=")[2], allowed)


def prepare_arguments(arguments: Sequence[str], conf: Path) -> list[str]:
    """Returns the command-line arguments of `odcheap train` in the form that Hydra needs.

    Paths are put in quotes, and in a sweep each of several paths. If a run is resumed, the names of its parts are
    added.

    Args:
        arguments: The arguments as the user has given them.
        conf: The `conf` directory of odcheap.
    """
    # In a sweep, several paths separated by commas are several values. If they are values of `data_dir`, which is not
    # part of the names of runs, the names must contain it.
    is_sweep = any(argument in ("-m", "--multirun") for argument in arguments)
    prepared = [split_paths(argument) if is_sweep else None for argument in arguments]
    result = [sweep or prepare_argument(argument, conf) for argument, sweep in zip(arguments, prepared, strict=True)]
    if not is_sweep:
        return add_resumed_parts(result)
    sweeps_data = any(a.startswith("data_dir=") and is_choice(b) for a, b in zip(arguments, result, strict=True))
    has_name = any(argument.startswith("hydra.sweep.subdir=") for argument in arguments)
    return [*result, "hydra.sweep.subdir='${run_name:data_dir}'"] if sweeps_data and not has_name else result


def add_resumed_parts(arguments: list[str]) -> list[str]:
    """Adds arguments such as `method=kd`, which the user may leave out when a run is resumed.

    `resume=RUN method.teacher_weights=FILE` does not name the method, and Hydra would look for the option in the
    default method. So `method=kd` is added if the `config.yaml` of the resumed run says `kd`.

    Args:
        arguments: The arguments, with paths in quotes.

    Returns:
        All arguments. Nothing is added if no run is resumed, if the run's `config.yaml` cannot be read, or if a recipe
        (`experiment=NAME`), which may choose the parts, is given.
    """
    keys = [override_key(argument) for argument in arguments]
    given = dict(zip(keys, arguments, strict=True))
    roots = [key.split(".")[0] if "." in key else "" for key in keys]
    groups = [group for group in EXPERIMENT_GROUPS if group in roots and group not in given]
    if not groups or "resume" not in given or "experiment" in given:
        return arguments
    try:
        option = "job_dir" if given["resume"] == "resume=auto" else "resume"
        place = Path(str(OverridesParser.create().parse_override(given[option]).value()))
        folder = place.resolve().parent.parent if CHECKPOINT_NAME.fullmatch(place.name) else place
        settings = flatten(read_config(folder / CONFIG, "resume"))
    except (HydraException, OptionError, KeyError):  # what reads the run says later what is wrong
        return arguments
    result = list(arguments)
    for group in groups:
        part = settings.get(f"{group}.part")
        if isinstance(part, str) and PART_NAME.fullmatch(part):
            # After the options of the part, since a message about one of them names the first override that sets it.
            last = max(k for k, argument in enumerate(result) if override_key(argument).startswith(f"{group}."))
            result.insert(last + 1, f"{group}={part}")
    return result


def is_choice(override: str) -> bool:
    """Returns whether an override has several values for a sweep, as `seed=0,1` has."""
    try:
        return isinstance(OverridesParser.create().parse_override(override).value(), ChoiceSweep)
    except HydraException:  # Hydra says later what is wrong
        return False


def split_paths(argument: str) -> str | None:
    """Puts quotes around each path of an argument with several paths, as `data_dir=a,b`; returns None for any other
    argument.

    If the whole text with its commas is a path that exists, it is taken for one path.
    """
    # Names of runs contain commas, so that only for `data_dir` the paths need not exist.
    key, _, text = argument.partition("=")
    values = text.split(",")
    if key in ("job_dir", "resume") or not is_path_option(argument) or len(values) < 2 or not all(values):
        return None
    if text[0] in "'\"[{" or Path(text).exists() or not (key == "data_dir" or all(map(os.path.exists, values))):
        return None
    return f"{key}={','.join(quote_override(f'{key}={value}').partition('=')[2] for value in values)}"


def prepare_argument(argument: str, conf: Path) -> str:
    """Returns one command-line argument in the form that Hydra needs.

    A path is put in quotes. A launcher or a sweeper gets the ending `_sweep` if odcheap has a file of this name, which
    changes defaults of the plugin: `hydra/launcher=joblib` becomes `hydra/launcher=joblib_sweep`.

    Args:
        argument: The argument as the user has given it.
        conf: The `conf` directory of odcheap.
    """
    if is_path_option(argument):
        return quote_override(argument)
    has_own_file = argument.startswith("hydra/") and (conf / f"{argument.replace('=', '/')}_sweep.yaml").is_file()
    return f"{argument}_sweep" if has_own_file else argument


def is_path_option(argument: str) -> bool:
    """Returns whether an argument such as `data_dir=images` sets an option whose value is a path."""
    key = override_key(argument)
    return key.rpartition(".")[2] in PATH_NAMES or key == "hydra.sweep.dir"
