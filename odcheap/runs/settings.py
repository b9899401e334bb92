"""A run's config with the names of its parts, and how it is written to the disk."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from odcheap.utils.parts import part_settings


class RunConfig:
    """A composed config.

    Attributes:
        cfg: The config.
        parts: The option name of the chosen part by group (`{"block_type": "DW"}`). Loggers, of which there may be
            several, have their names in `cfg.logger`.
        overrides: The options as they were given.
    """

    def __init__(self, cfg: DictConfig, parts: Mapping[str, Any], overrides: Sequence[str]):
        self.cfg, self.overrides = cfg, list(overrides)
        self.parts = {group: name for group, name in parts.items() if isinstance(name, str) and is_part(cfg.get(group))}

    def to_settings(self) -> dict[str, Any]:
        """Returns the resolved config for the disk. Parts have their option names there, not Python paths."""
        settings = to_dict(self.cfg)
        for group, name in self.parts.items():
            settings[group] = part_settings(settings[group], name)
        loggers = settings.get("logger") or {}
        return settings | {"logger": {name: node and part_settings(node, name) for name, node in loggers.items()}}


def to_dict(cfg: DictConfig) -> dict[str, Any]:
    """Returns the resolved config as plain containers."""
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))


def is_part(node: Any) -> bool:
    """Whether a config node describes a class or function with its options."""
    return isinstance(node, Mapping | DictConfig) and "_target_" in node


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns nested options by dotted names.

    Example:
        >>> flatten({"a": {"b": 1}, "c": 2})
        {'a.b': 1, 'c': 2}
    """
    if not isinstance(tree, dict):
        return {prefix: tree}
    branches = ((f"{prefix}.{key}".strip("."), branch) for key, branch in tree.items())
    return {name: value for path, branch in branches for name, value in flatten(branch, path).items()}
