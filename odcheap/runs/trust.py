"""What a file from somebody else may bring into a run: options of the parts that `conf/` names, and nothing else."""

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from odcheap.utils.errors import OptionError

CONF = Path(__file__).parents[2] / "conf"
# Where a run writes to beside its folder, and what Hydra itself does, is for the command line to say.
NOT_FROM_FILES = ("hydra", "logger.", "trainer.default_root_dir", "trainer.logger", "trainer.callbacks")


@functools.lru_cache
def parts() -> frozenset[str]:
    """Every class and function that `conf/` calls."""
    texts = (path.read_text() for path in CONF.rglob("*.yaml"))
    return frozenset(name for text in texts for name in re.findall(r"_target_: *([\w.]+)", text))


def kept(overrides: list[str]) -> list[str]:
    """Those of a file's overrides that are applied again."""
    return [o for o in overrides if not o.lstrip("+~").startswith(NOT_FROM_FILES)]


def refuse_foreign(cfg: DictConfig, own: DictConfig, option: str, path: Any) -> None:
    """`OptionError` where `cfg`, which a file has had a part in, calls what neither `conf/` nor `own` calls."""
    known = parts() | set(targets(own))
    for target in targets(cfg):
        if target not in known:
            allowed = f"its options call {target!r}, which is no part of odcheap: give that option again to allow it"
            raise OptionError(option, path, allowed)


def targets(cfg: DictConfig) -> Iterator[str]:
    """Every `_target_`, however deep; interpolations as they would come out."""
    yield from within(OmegaConf.to_container(cfg, resolve=True))


def within(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        if "_target_" in tree:
            yield str(tree["_target_"])
        for branch in tree.values():
            yield from within(branch)
    elif isinstance(tree, list):
        for branch in tree:
            yield from within(branch)
