"""Selects the options that a resumed run takes from its checkpoint.

A checkpoint may come from a stranger. Only options in a fixed list are therefore taken from it, and only plain values.
Options that say where to write, where to connect, or what else to run are taken from the command line and `conf/` only.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Quote, QuotedString
from hydra.errors import HydraException

from odcheap.runs.settings import override_key
from odcheap.utils.errors import OptionError
from odcheap.utils.parts import PART_NAME

# Options and groups that define the experiment. Everything else in a checkpoint's overrides is left out.
EXPERIMENT_OPTIONS = ("num_stu", "students", "seed", "select", "on_nonfinite", "max_skipped", "experiment")
EXPERIMENT_OPTIONS += ("trainer.max_epochs", "trainer.precision", "trainer.accumulate_grad_batches")
EXPERIMENT_OPTIONS += ("trainer.gradient_clip_val", "trainer.gradient_clip_algorithm", "trainer.limit_train_batches")
EXPERIMENT_GROUPS = ("block_type", "backbone", "method", "data", "augment", "optimizer", "scheduler")
# Options of these groups that say on which machine a run computes, or that let a loader write files.
MACHINE_OPTIONS = ("data.workers", "data.load.download", "data.load.read_only")
DATA_FOLDERS = ("data_dir", "data.load.data_dir")
READ_ONLY = "data.load.read_only=true"
# These are paths. They are taken only if something exists there already.
PATH_OPTIONS = (*DATA_FOLDERS, "backbone.pretrained", "method.teacher_weights")
# Options that belong to one command and are left out without a message.
SILENT_OPTIONS = ("job_dir", "resume", "overwrite", "test_only", "weights", "weights_head", "data.load.read_only")
OPTION_NAME = re.compile(r"[A-Za-z]\w*")
PLAIN_TEXT = re.compile(r"[\w.+*?\[\]@ -]*")
LIBRARY_NETWORK = re.compile(r"(torchvision|timm)/[\w.+-]+")
MAX_DEPTH = 4  # of nested lists


def select_saved_overrides(saved: Sequence[str], given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Selects those overrides in a checkpoint that define its experiment.

    Args:
        saved: The overrides in the checkpoint.
        given: The overrides of the current command. A saved override of the same option is neither selected nor
            reported, since the given one replaces it.

    Returns:
        The selected overrides, written anew from their parsed values, and the overrides that were left out and should
        be reported.

    Raises:
        OptionError: The value of a selected option is not plain: it is, for example, an interpolation.

    Example:
        >>> select_saved_overrides(["num_stu=2", "logger=mlflow", "job_dir=runs/a"], ["num_stu=2"])
        ([], ['logger=mlflow'])
    """
    given_keys = {override_key(override) for override in given}
    selected, left_out = [], []
    for text in saved:
        if override_key(text) in SILENT_OPTIONS:  # not parsed, since the path in it need not follow Hydra's grammar
            continue
        override = parse_override(text)
        key = override.key_or_group
        if key in given_keys:
            continue
        if override.type is not OverrideType.CHANGE or not is_experiment_option(key):
            left_out.append(text)
            continue
        value = check_plain(key, override.value())
        paths = value if isinstance(value, list) else [value]
        if key in PATH_OPTIONS and value is not None and not all(map(is_file_or_folder, paths)):
            left_out.append(text)
        else:
            selected.append(f"{key}={to_grammar(value)}")
    return selected, left_out


def parse_override(text: str) -> Override:
    """Returns a parsed override of a checkpoint.

    Raises:
        OptionError: It is something else than `key=value` with a single value.
    """
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise OptionError("resume", text, "this override in the checkpoint cannot be read") from error
    if override.is_sweep_override() or override.package is not None:
        raise OptionError("resume", text, "this override in the checkpoint must be a single value")
    return override


def find_values(overrides: Sequence[str], keys: Sequence[str]) -> list[Any]:
    """Returns the values that overrides of a checkpoint give to the options with the names `keys`.

    Example:
        >>> find_values(["seed=1", "data_dir='my photos'"], ["data_dir"])
        ['my photos']
    """
    return [parse_override(text).value() for text in overrides if override_key(text) in keys]


def is_experiment_option(key: str) -> bool:
    """Returns whether an option, by its dotted name such as `optimizer.lr`, may be taken from a checkpoint."""
    if key in MACHINE_OPTIONS:
        return False
    return key in (*EXPERIMENT_OPTIONS, *PATH_OPTIONS) or key.split(".")[0] in EXPERIMENT_GROUPS


def check_plain(key: str, value: Any, depth: int = MAX_DEPTH) -> Any:
    """Returns a value if it is plain: a number, a text that `is_plain_text` allows, or lists and dicts of these.

    Args:
        key: The name of the option.
        value: Its value, or an entry of it.
        depth: How many levels of lists and dicts are still allowed.

    Raises:
        OptionError: The value is not plain.
    """
    if isinstance(value, list) and depth:
        return [check_plain(key, entry, depth - 1) for entry in value]
    if isinstance(value, dict) and depth and all(OPTION_NAME.fullmatch(str(name)) for name in value):
        return {str(name): check_plain(key, entry, depth - 1) for name, entry in value.items()}
    if value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and is_plain_text(key, value)):
        return value
    allowed = "a checkpoint may give plain names and numbers only; give this option on the command line if it is yours"
    raise OptionError(key, value, allowed)


def is_plain_text(key: str, value: str) -> bool:
    """Returns whether an option may have this text: a name in `conf/`, a path, or a text without special characters.

    Args:
        key: The dotted name of the option, which decides what is allowed.
        value: The text.
    """
    if key in PATH_OPTIONS:
        return "$" not in value and "\0" not in value
    if key == "method.teacher_network":
        return LIBRARY_NETWORK.fullmatch(value) is not None
    if key in (*EXPERIMENT_GROUPS, "experiment"):
        return PART_NAME.fullmatch(value) is not None
    return PLAIN_TEXT.fullmatch(value) is not None


def is_file_or_folder(path: Any) -> bool:
    """Returns whether a path is that of a regular file or a folder; a pipe or a device would block a reader."""
    return isinstance(path, str) and (Path(path).is_file() or Path(path).is_dir())


def to_grammar(value: Any) -> str:
    """Returns a plain value as text that Hydra reads as the same value."""
    if isinstance(value, list):
        return f"[{','.join(map(to_grammar, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{to_grammar(entry)}" for name, entry in value.items()) + "}"
    if isinstance(value, str):
        return QuotedString(value, Quote.double).with_quotes()
    return "null" if value is None else str(value).lower()
