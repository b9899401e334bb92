"""`odcheap report --costs`: parameters and multiply-accumulates of every network with every block type."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Group
from rich.table import Table

from odcheap.models import flops
from odcheap.models.backbone import Backbone
from odcheap.utils.console import console, print_error
from odcheap.utils.errors import Failure, OptionError
from odcheap.utils.parts import find_conf_dir, list_parts

CONF = find_conf_dir()
NUM_CLASSES = {32: 10, 224: 1000}  # of the usual data set for each image size


class Cost(NamedTuple):
    """Parameters and MACs of one network for one square image of `pixels` a side; `refused` says why there are none."""

    backbone: str
    block_type: str
    pixels: int = 0
    params: int = 0
    macs: int = 0
    refused: str = ""


def count_costs(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> Iterator[Cost]:
    """Yields every backbone with every block type, or those that the overrides name.

    Args:
        overrides: Options such as `backbone=resnet56`.
        config_dirs: Further `conf` directories with block types and backbones.

    Raises:
        OptionError: An option without which the backbone cannot be built is missing.
    """
    named = dict(override.partition("=")[::2] for override in overrides)
    rest = [o for o in overrides if o.partition("=")[0] not in ("backbone", "block_type")]
    if config_dirs:
        rest.append(f"hydra.searchpath=[{','.join(f'file://{folder.resolve()}' for folder in config_dirs)}]")
    parts = {
        group: [named[group]] if group in named else list_parts(group, config_dirs)
        for group in ("backbone", "block_type")
    }
    block_types = sorted(parts["block_type"], key=lambda name: name != "Standard")  # the first is compared with
    for backbone, block_type in (
        (backbone, block_type) for backbone in parts["backbone"] for block_type in block_types
    ):
        cfg = hydra.compose("config", [f"backbone={backbone}", f"block_type={block_type}", "job_dir=unused", *rest])
        missing = OmegaConf.missing_keys(cfg.backbone)
        if missing and "backbone" in named:
            raise OptionError(f"backbone.{min(missing)}", "???", "must be given")
        if not missing:
            name = f"{backbone} {named['backbone.name']}" if "backbone.name" in named else backbone
            yield count_cost(cfg, name, block_type)


def count_cost(cfg: DictConfig, backbone: str, block_type: str) -> Cost:
    """Builds the config's network and counts."""
    conv, build = instantiate(cfg.block_type), instantiate(cfg.backbone)
    try:
        network: Backbone = build(conv=conv, num_classes=NUM_CLASSES[32])
        if NUM_CLASSES[network.native_size] != NUM_CLASSES[32]:
            network = build(conv=conv, num_classes=NUM_CLASSES[network.native_size])
    except Failure as error:
        return Cost(backbone, block_type, refused=str(error))
    pixels, params = network.native_size, flops.count_params(network)
    return Cost(backbone, block_type, pixels, params, flops.count_macs(network.to("meta"), (3, pixels, pixels)))


def build_table(rows: list[Cost]) -> Group:
    """Returns a table with a line for each network, and below it why some are missing."""
    title = "One network, one image. A MAC is two FLOPs; they are counted by PyTorch's own counter."
    table = Table(title=title, title_justify="left", title_style="")
    for column in ("backbone", "block_type", "image", "parameters", "MACs", "FLOPs", "MACs / Standard"):
        table.add_column(column, justify="left" if column in ("backbone", "block_type") else "right")
    standard = {row.backbone: row.macs for row in rows if row.block_type == "Standard" and not row.refused}
    for row in rows:
        if not row.refused:
            share = f"{row.macs / standard[row.backbone]:.3f}" if row.backbone in standard else "-"
            numbers = [f"{row.pixels} x {row.pixels}", f"{row.params:,}", f"{row.macs:,}", f"{2 * row.macs:,}", share]
            table.add_row(row.backbone, row.block_type, *numbers)
    return Group(table, *(f"{row.backbone}: {row.refused}" for row in rows if row.refused))


def show_costs(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> int:
    """Prints the table and returns the exit status; raises what Hydra raises for unknown options."""
    with hydra.initialize_config_dir(str(find_conf_dir()), version_base="1.3"):
        rows = list(count_costs(overrides, config_dirs))
    if all(row.refused for row in rows):
        return print_error(rows[0].refused)
    console().print(build_table(rows))
    return 0
