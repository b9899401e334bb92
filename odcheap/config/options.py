"""Values that no option may have, refused by name before any part is built with them."""

from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, QuotedString, Sweep
from omegaconf import DictConfig, ListConfig, OmegaConf

from odcheap.runs.overrides import override_key, quote_override
from odcheap.utils.errors import OptionError

PATHS = ("job_dir", "resume", "weights", "data_dir", "backbone.pretrained", "data.load.data_dir")
PATHS += ("method.teacher_weights", "hydra.sweep.dir")
HYDRA_S_OWN = ("_partial_", "_recursive_", "_convert_", "_args_")
NEEDED = ("job_dir", "data_dir", "data.load.data_dir", "method.teacher_weights")
LISTS = ("logger", "experiment")  # groups of which several may be chosen
LIBRARIES_OWN = ("trainer.", "logger.")  # whose options conf/ need not have
WORD_OR_COUNT = ("logger.tensorboard.version",)
NULLABLE = ("checkpoint_every",)  # numbers that may be left away
FRACTIONS = ("checkpoint_every", "data.val_size", "data.load.test_size")  # not whole, whatever their defaults are
COUNTS = ("trainer.max_epochs", "trainer.devices", "trainer.num_nodes", "checkpoint_keep")  # from 1
CHOICES = {
    "capture": ("auto", True, False),
    "trainer.strategy": ("auto", "ddp"),
    "together": ("auto", "sequential", "streams"),
    "select": ("val", "last", "test"),
    "on_nonfinite": ("stop", "skip"),
    "weights_head": ("keep", "new"),
}
ELSEWHERE = {"data.seed": "seed", "data.select": "select", "method.mean": "data.mean", "method.std": "data.std"}
INSTEAD_OF_NULL = {
    "method.teacher_network": "torchvision/resnet50",
    "method.teacher_mean": ListConfig([0.5]),
    "method.teacher_std": ListConfig([0.5]),
    "method.teacher_size": 224,
    "data.workers": 2,
}
MOST = 2**53  # of whole numbers: beyond it not every one is a float of its own
SMALLEST, LARGEST = 2.0**-126, 2.0**127  # of what networks compute with, in 32 bits


def compose(overrides: list[str]) -> DictConfig:
    """The config of these overrides; inside a run of Hydra's only."""
    return hydra.compose("config", overrides=[quote_override(o) for o in overrides])


def check_choices(arguments: list[str], groups: dict[str, list[str]]) -> None:
    """Refuses what is no name where a part is chosen by its name; Hydra's own errors of it are no lines.

    Args:
        arguments: As given on the command line.
        groups: The config groups with the names of their parts.
    """
    given = [argument for argument in arguments if override_key(argument) in groups and "=" in argument]
    for override in OverridesParser.create().parse_overrides(given):
        group, value = override.key_or_group, override.value()
        for chosen in value.list if isinstance(value, ChoiceSweep) else [value]:
            if group == "experiment" and chosen == []:  # no recipe
                continue
            names = chosen if isinstance(chosen, list) and group in LISTS and chosen else [chosen]
            if not all(isinstance(name, str | QuotedString | Sweep | Glob) for name in names):
                allowed = ", ".join(groups[group])
                none = "; csv adds none to metrics.csv" if group == "logger" else ""
                raise OptionError(group, override.input_line.partition("=")[2], f"must be one of {allowed}{none}")


def check_paths(cfg: DictConfig) -> None:
    for key in PATHS:
        value = OmegaConf.select(cfg, key, default="")
        if not isinstance(value, str) and (value is not None or key in NEEDED):
            allowed = "must be a path (./5 where a folder is called 5)"
            raise OptionError(key, value, allowed)


def checked(overrides: list[str]) -> DictConfig:
    """`compose`, and `check_types` of it."""
    cfg = compose(overrides)
    check_types(cfg, overrides)
    return cfg


def check_types(cfg: DictConfig, overrides: list[str]) -> None:
    """Refuses a word for a number, half a piece and the like: an option is of its default's kind."""
    groups = set(HydraConfig.get().runtime.choices)
    default = compose([o for o in overrides if override_key(o) in groups])
    missing = OmegaConf.missing_keys(cfg)
    for key in [override_key(o) for o in overrides if override_key(o) not in groups]:
        value = OmegaConf.select(cfg, key)
        if key.replace(".", "/") in groups and not isinstance(value, DictConfig):
            raise OptionError(key, value, f"is a part, chosen as {key.replace('.', '/')}=NAME")
        part, _, name = key.rpartition(".")
        check_known(part, name, value, OmegaConf.select(default, part) if part else default)
        if key not in missing:
            check_tree(key, value, OmegaConf.select(default, key))


def check_tree(key: str, value: Any, default: Any) -> None:
    """`check_type` of a value and, where it is a part, of all that is in it."""
    check_type(key, value, default)
    if not isinstance(value, DictConfig) or not isinstance(default, DictConfig):
        return
    for name in value:
        if OmegaConf.is_missing(value, name) or (name in HYDRA_S_OWN and value[name] == default.get(name)):
            continue
        check_known(key, name, value[name], default)
        check_tree(f"{key}.{name}", value[name], None if OmegaConf.is_missing(default, name) else default.get(name))


def check_known(part: str, name: str, value: Any, default: DictConfig | None) -> None:
    """`OptionError` for an option that is added to a part which does not have it; libraries have more than conf/."""
    known = list(default or {})  # a DictConfig's own `in` passes over what must be given, ???
    if part and not f"{part}.".startswith(LIBRARIES_OWN) and name not in known:
        raise OptionError(f"{part}.{name}", value, f"is no option of this {part.partition('.')[0]}")


def check_type(key: str, value: Any, default: Any) -> None:
    """Raises `OptionError` where `value` is not of the kind of `default`. Lightning sees to what is its own."""
    if value is None and (key in NULLABLE or key.startswith(LIBRARIES_OWN)) and key not in COUNTS:
        return
    check_part(key, value, default)
    default = INSTEAD_OF_NULL.get(key) if default is None and value is not None else default
    lightning_s = key.startswith("trainer.") and key not in COUNTS
    if isinstance(default, bool) and not isinstance(value, bool):
        raise OptionError(key, value, "must be true or false")
    if isinstance(default, str) and key not in CHOICES and not (isinstance(value, str) or lightning_s):
        check_word(key, value)
    if isinstance(default, ListConfig):
        if not isinstance(value, ListConfig):
            example = f"{key}={list(default)}".replace(" ", "")
            raise OptionError(key, value, f"must be a list, such as {example}")
        for entry in value:
            check_number(key, entry, whole=False, given=value)
    if type(default) in (int, float):
        check_number(key, value, type(default) is int and key not in FRACTIONS and not lightning_s, value)


def check_part(key: str, value: Any, default: Any) -> None:
    """`OptionError` where a part is given as a value, or a value that is set elsewhere."""
    if key.rpartition(".")[2] in HYDRA_S_OWN:
        raise OptionError(key, value, "is no option: it says how conf/ is put together")
    if isinstance(default, DictConfig) and not isinstance(value, DictConfig):
        raise OptionError(key, value, f"must be a part with options of its own, such as {key}.NAME=VALUE")
    if key in ELSEWHERE:
        raise OptionError(key, value, f"is no option of its own: give {ELSEWHERE[key]}")


def check_word(key: str, value: Any) -> None:
    if key in WORD_OR_COUNT and type(value) is int:
        return
    hint = (
        f"; in quotes what looks like none: {key}='\"{str(value).lower()}\"'" if isinstance(value, int | float) else ""
    )
    raise OptionError(key, value, f"must be a word{hint}")


def check_values(cfg: DictConfig) -> None:
    """Refuses what no part would refuse before the training has begun."""
    for name in sorted(OmegaConf.missing_keys(cfg)):
        raise OptionError(name, "???", "must be given")
    for name, part in (cfg.logger or {}).items():
        if part is not None and not (isinstance(part, DictConfig) and "_target_" in part):
            raise OptionError(f"logger.{name}", part, "is a part, chosen as logger=NAME")
    for name, allowed in CHOICES.items():
        value = OmegaConf.select(cfg, name)
        if not any(type(value) is type(one) and value == one for one in allowed):  # 0 is not false
            raise OptionError(name, value, f"must be one of {', '.join(map(str, allowed)).lower()}")
    for name in COUNTS:
        value = OmegaConf.select(cfg, name)
        if type(value) is not int or value < 1:
            raise OptionError(name, value, "must be a whole number, 1 or more")
    if cfg.max_skipped < 0:
        raise OptionError("max_skipped", cfg.max_skipped, "must be 0 or more")
    if cfg.checkpoint_every is not None and cfg.checkpoint_every < 0:
        raise OptionError("checkpoint_every", cfg.checkpoint_every, "must be 0 or more minutes, or null")


def check_number(key: str, value: Any, whole: bool, given: Any) -> None:
    """`given`: the option's value, of which this one may be an entry."""
    if type(value) not in (int, float):
        gpus = "; CUDA_VISIBLE_DEVICES says which GPUs" if key == "trainer.devices" else ""
        raise OptionError(key, given, f"must be a number{gpus}")
    if type(value) is int and abs(value) > MOST:
        raise OptionError(key, given, "must be within 2^53, as every whole number")
    if type(value) is float and value != 0 and not SMALLEST <= abs(value) <= LARGEST:
        raise OptionError(key, given, "must be finite, also in 32 bits: from 1.2e-38 to 1.7e38, or zero")
    if whole and type(value) is not int:
        raise OptionError(key, given, "must be a whole number, without a point or an exponent")
