"""`odcheap report --costs`: the parameters and multiply-accumulates of every backbone with every block type."""

import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from odcheap.config.compose import compose_config
from odcheap.models import flops
from odcheap.models.build import build_backbone
from odcheap.models.wrappers import MAX_SMALL_SIZE
from odcheap.report.tables import build_console_table
from odcheap.utils.console import console, print_error, say, show_steps
from odcheap.utils.errors import Failure, OptionError
from odcheap.utils.parts import list_parts
from odcheap.utils.text import format_macs

FEW_CLASSES, MANY_CLASSES = 10, 1000  # of the usual data set of small images (CIFAR-10), and of larger ones (ImageNet)
OPTIONAL = ("MACs", "parameters", "MACs / Standard", "image", "FLOPs")  # columns, the most important first
TITLE = "One network, one image. A MAC is two FLOPs; MACs are counted by PyTorch's own counter."


class Cost(NamedTuple):
    """The costs of a backbone with a block type (the kind of cheap convolution, such as DW).

    Attributes:
        backbone: The name of the backbone.
        block_type: The name of the block type.
        pixels: The side of the square image for which MACs are counted.
        params: The number of parameters.
        macs: The number of multiply-accumulates for one image.
        refused: Why the network cannot be built; an empty text if it can be built.
    """

    backbone: str
    block_type: str
    pixels: int = 0
    params: int = 0
    macs: int = 0
    refused: str = ""


def show_costs(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> int:
    """Prints a table of the costs of networks, and below it which networks cannot be built and why.

    Args:
        overrides: Options such as `backbone=resnet56`, which restrict the table to this backbone or block type.
        config_dirs: Folders with config files of your own, for block types and backbones.

    Returns:
        The exit status: 0, or 1 if no network can be built.

    Raises:
        OptionError: An entry of `overrides` is not an option with a value.
    """
    for override in overrides:
        if "=" not in override:
            allowed = "needs options such as backbone=resnet56 instead of this; it counts networks, without any run"
            raise OptionError("--costs", override, allowed)
    if not any(override.startswith("backbone=") for override in overrides):
        say("counting every network, in half a minute or more; backbone=NAME counts one of them")
    costs = []
    with show_steps() as show_step:
        for cost in count_costs(overrides, config_dirs):
            costs.append(cost)
            if sys.stdout.isatty():  # otherwise it would be a line for each network
                show_step(f"counted {cost.backbone} with {cost.block_type}")
    if all(cost.refused for cost in costs):
        return print_error(costs[0].refused)
    standard = {cost.backbone: cost.macs for cost in costs if cost.block_type == "Standard" and not cost.refused}
    rows = [
        {
            "backbone": cost.backbone,
            "block_type": cost.block_type,
            "image": f"{cost.pixels} x {cost.pixels}",
            "parameters": f"{cost.params:,}",
            "MACs": format_macs(cost.macs),
            "FLOPs": format_macs(2 * cost.macs),
            "MACs / Standard": f"{cost.macs / standard[cost.backbone]:.3f}" if cost.backbone in standard else "-",
        }
        for cost in costs
        if not cost.refused
    ]
    console().print(TITLE)
    console().print(build_console_table(rows, ("backbone", "block_type"), console().width, OPTIONAL))
    for cost in costs:
        if cost.refused:
            console().print(f"{cost.backbone}: {cost.refused}")
    return 0


def count_costs(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> Iterator[Cost]:
    """Yields the costs of every backbone with every block type, or only of those that the overrides name.

    Args:
        overrides: Options such as `backbone=resnet56`.
        config_dirs: Folders with config files of your own, for block types and backbones.

    Raises:
        OptionError: The backbone that the overrides name needs an option that is not given, or `students` is given.
    """
    chosen = dict(override.partition("=")[::2] for override in overrides)
    if "students" in chosen:
        allowed = "must not be given: the table has a row for each network, by backbone and block_type"
        raise OptionError("students", chosen["students"], allowed)
    backbones, block_types = (
        [chosen[group]] if group in chosen else list_parts(group, config_dirs) for group in ("backbone", "block_type")
    )
    for backbone, block_type in product(backbones, sorted(block_types, key=lambda name: name != "Standard")):
        cfg = compose_config([*overrides, f"backbone={backbone}", f"block_type={block_type}"], config_dirs)
        missing = OmegaConf.missing_keys(cfg.backbone)
        if missing and "backbone" in chosen:
            raise OptionError(f"backbone.{min(missing)}", "???", "must be given")
        if not missing:
            name = f"{backbone} {chosen['backbone.name']}" if "backbone.name" in chosen else backbone
            yield count_cost(cfg, name, block_type)


def count_cost(cfg: DictConfig, backbone: str, block_type: str) -> Cost:
    """Returns the costs of the network that a config describes.

    Args:
        cfg: The config of a run, of which `backbone` and `block_type` are used.
        backbone: The name of the backbone, for the result.
        block_type: The name of the block type, for the result.
    """
    # The number of classes is that of the usual data set for the size of images.
    conv, build = instantiate(cfg.block_type), instantiate(cfg.backbone)
    try:
        network = build_backbone(build, conv, FEW_CLASSES, for_comparison=True)
        if network.native_size > MAX_SMALL_SIZE:
            network = build_backbone(build, conv, MANY_CLASSES, for_comparison=True)
    except Failure as error:
        return Cost(backbone, block_type, refused=str(error))
    pixels, params = network.native_size, flops.count_params(network)
    return Cost(backbone, block_type, pixels, params, flops.count_macs(network.to("meta"), (3, pixels, pixels)))
