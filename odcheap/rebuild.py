"""A network from the settings that our files keep beside its weights; only this project's own parts are called."""

import functools
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from odcheap import adapters, backbones, convs
from odcheap.errors import Failure, OptionError, first_line
from odcheap.weights import refuse_difference

ROOMS: dict[str, ModuleType] = {room.__name__: room for room in (adapters, backbones, convs)}


def rebuilt(settings: dict[str, Any], tensors: dict[str, Tensor], option: str, path: str) -> nn.Module:
    """The network of these `settings` (`backbone`, `block_type`, `classes`) with these weights.

    Raises `OptionError`, naming `option` and `path`, where the settings are not ours or the weights do not fit.
    """
    try:
        conv, build = part(settings["block_type"]), part(settings["backbone"])
        network = build(conv=conv, num_classes=len(settings["classes"]))
    except (KeyError, TypeError, AttributeError, ValueError, Failure) as error:
        raise OptionError(option, path, f"its settings build no network ({first_line(error)})") from error
    refuse_difference(network.state_dict(), tensors, path, "its weights are another network's", option)
    network.load_state_dict(tensors)
    return network


def part(settings: dict[str, Any]) -> Any:
    """What Hydra would make of a `_target_` with its options, for the classes and functions of `ROOMS` alone."""
    room, _, name = settings["_target_"].rpartition(".")
    made = getattr(ROOMS[room], name)
    if name.startswith("_") or not callable(made) or getattr(made, "__module__", None) != room:
        raise KeyError(settings["_target_"])
    options = {key: value for key, value in settings.items() if not key.startswith("_")}
    options = {key: part(v) if isinstance(v, dict) and "_target_" in v else v for key, v in options.items()}
    if "pretrained" in options:
        options["pretrained"] = None  # the weights are at hand
    return functools.partial(made, **options) if settings.get("_partial_") else made(**options)
