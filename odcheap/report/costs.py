"""`python -m odcheap.report --costs`: what every network costs with every block type."""

from collections.abc import Iterator
from typing import NamedTuple

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Group
from rich.table import Table
from torch import nn

from odcheap.models import flops
from odcheap.utils.console import console, print_error
from odcheap.utils.errors import Failure, OptionError
from odcheap.utils.parts import find_conf_dir

CONF = find_conf_dir()
BLOCK_TYPES = ("Standard", "Shift", "DW", "Group")
CLASSES = {32: 10, 224: 1000}  # of the usual data set at each size of picture


class Cost(NamedTuple):
    """One network: `params` and `macs` of one square picture with `pixels` a side; `refused` says why there is none."""

    backbone: str
    block_type: str
    pixels: int = 0
    params: int = 0
    macs: int = 0
    refused: str = ""


def costs(overrides: list[str]) -> Iterator[Cost]:
    """Every backbone times every block type, or those that the overrides name. Raises `OptionError`."""
    named = dict(override.partition("=")[::2] for override in overrides)
    rest = [o for o in overrides if o.partition("=")[0] not in ("backbone", "block_type")]
    every = sorted(path.stem for path in (CONF / "backbone").glob("*.yaml"))
    for backbone in [named["backbone"]] if "backbone" in named else every:
        for block_type in [named["block_type"]] if "block_type" in named else BLOCK_TYPES:
            given = [f"backbone={backbone}", f"block_type={block_type}", "job_dir=unused", *rest]
            cfg = hydra.compose("config", given)
            missing = OmegaConf.missing_keys(cfg)
            if missing and "backbone" in named:
                raise OptionError(sorted(missing)[0], "???", "must be given")
            if not missing:
                yield of(cfg, " ".join([backbone, *([named["backbone.name"]] if "backbone.name" in named else [])]))


def of(cfg: DictConfig, backbone: str) -> Cost:
    conv, build = instantiate(cfg.block_type), instantiate(cfg.backbone)
    block_type = type(conv).__name__
    try:
        network: nn.Module = build(conv=conv, num_classes=CLASSES[32])
        if CLASSES[network.native_size] != CLASSES[32]:
            network = build(conv=conv, num_classes=CLASSES[network.native_size])
    except Failure as error:
        return Cost(backbone, block_type, refused=str(error))
    pixels = network.native_size
    return Cost(
        backbone,
        block_type,
        pixels,
        flops.count_params(network),
        flops.count_macs(network.to("meta"), (3, pixels, pixels)),
    )


def table(rows: list[Cost]) -> Group:
    """A line a network, and below why some are missing."""
    title = "One network, one picture. A MAC is two FLOPs; they are counted by PyTorch's own counter."
    made = Table(title=title, title_justify="left", title_style="")
    for column in ("backbone", "block_type", "picture", "parameters", "MACs", "FLOPs", "MACs / Standard"):
        made.add_column(column, justify="left" if column in ("backbone", "block_type") else "right")
    standard = {row.backbone: row.macs for row in rows if row.block_type == "Standard" and not row.refused}
    for row in rows:
        if not row.refused:
            share = f"{row.macs / standard[row.backbone]:.3f}" if row.backbone in standard else "-"
            numbers = [f"{row.pixels} x {row.pixels}", f"{row.params:,}", f"{row.macs:,}", f"{2 * row.macs:,}", share]
            made.add_row(row.backbone, row.block_type, *numbers)
    return Group(made, *(f"{row.backbone}: {row.refused}" for row in rows if row.refused))


def show(overrides: list[str]) -> int:
    """Prints the table and returns the exit status. Raises what composing raises."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        rows = list(costs(overrides))
    if all(row.refused for row in rows):
        return print_error(rows[0].refused)
    console().print(table(rows))
    return 0
