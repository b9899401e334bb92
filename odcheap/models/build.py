"""A network from the settings that our files keep beside its weights; only this project's own parts are called."""

import functools
import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from odcheap.utils.errors import Failure, OptionError, first_line
from odcheap.utils.files import read_safetensors

ROOMS = ("odcheap.models.wrappers", "odcheap.models.cifar", "odcheap.layers.cheap_conv")
LARGEST = 4096  # pixels a side
SETTINGS = {"backbone", "block_type", "classes", "split", "image_size", "shorter_side", "mean", "std"}


class NormalizedNetwork(nn.Module):
    """A network for RGB in [0, 1]: subtracts `mean` and divides by `std`, channel by channel, before the network.

    Args:
        network: (N, 3, H, W), normalized -> logits (N, K).
        mean: One number a channel.
        std: One number a channel.
    """

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(list(mean)).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(list(std)).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / self.std)


def load_student(path: str | Path) -> NormalizedNetwork:
    """A run's or an export's `student.safetensors` as a network in eval mode: RGB in [0, 1], (N, 3, H, W) -> logits.

    The network without the normalisation is its `network`. Raises `OptionError` where the file is damaged, or none of
    ours, or the weights do not fit.
    """
    tensors, metadata = read_safetensors(path)
    settings = settings_of(metadata, "path", path)
    network = rebuilt(settings, tensors, "path", str(path))
    return NormalizedNetwork(network, settings["mean"], settings["std"]).eval()


def settings_of(metadata: dict[str, str], option: str, path: str | Path) -> dict[str, Any]:
    """What a `student.safetensors` says of its network; `OptionError` where it says too little."""
    try:
        settings = json.loads(metadata.get("odcheap", "{}"))
    except ValueError:
        settings = None
    if not isinstance(settings, dict) or not settings.keys() >= SETTINGS or not sensible(settings):
        raise OptionError(option, path, "is no student of a run: it does not say what its network is")
    return settings


def sensible(settings: dict[str, Any]) -> bool:
    """Whether what is asked of images and classes can be meant: a stranger's numbers become sizes in memory."""
    numbers = [*listed(settings["image_size"]), settings["shorter_side"]]
    sizes = len(numbers) == 4 and all(type(n) is int and 1 <= n <= LARGEST for n in numbers)
    spread = [listed(settings[name]) for name in ("mean", "std")]
    colours = all(len(values) == 3 and all(type(v) in (int, float) for v in values) for values in spread)
    classes = listed(settings["classes"])
    return sizes and colours and len(classes) > 1 and all(isinstance(name, str) for name in classes)


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def rebuilt(settings: dict[str, Any], tensors: dict[str, Tensor], option: str, path: str) -> nn.Module:
    """The network of these `settings` (`backbone`, `block_type`, `classes`) with these weights.

    Raises `OptionError`, naming `option` and `path`, where the settings are not ours or the weights do not fit.
    """
    network = built(settings, part(settings, "block_type", option, path), option, path)
    check_state_dict(network.state_dict(), tensors, path, "its weights are another network's", option)
    network.load_state_dict(tensors)
    return network


def built(settings: dict[str, Any], conv: Any, option: str, path: str) -> nn.Module:
    """The same network with fresh weights and this block type."""
    build = part(settings, "backbone", option, path)
    try:
        return build(conv=conv, num_classes=len(settings["classes"]))
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, Failure) as error:
        raise strange(option, path, error) from error


def part(settings: dict[str, Any], name: str, option: str, path: str) -> Any:
    """What the settings call by this name; `OptionError` where that is none of our parts."""
    try:
        return called(settings[name], of_network)
    except (KeyError, TypeError, AttributeError, ValueError, Failure) as error:
        raise strange(option, path, error) from error
    except ImportError as error:
        raise OptionError(option, path, f"its network needs a package that is not here ({error})") from error


def strange(option: str, path: str, error: Exception) -> OptionError:
    return OptionError(option, path, f"its settings build no network ({first_line(error)})")


def called(settings: dict[str, Any], allowed: Callable[[str], bool]) -> Any:
    """What Hydra would make of a `_target_` with its options, for our own classes and functions that are allowed.

    Raises `KeyError` for any other, also deep within the options.
    """
    target = settings["_target_"]
    room, _, name = target.rpartition(".")
    if not allowed(target):
        raise KeyError(target)
    made = getattr(importlib.import_module(room), name)  # here, so that a network asks only for what it is made of
    if name.startswith("_") or not callable(made) or getattr(made, "__module__", None) != room:
        raise KeyError(target)
    options = {key: value for key, value in settings.items() if not key.startswith("_")}
    options = {key: called(v, allowed) if isinstance(v, dict) and "_target_" in v else v for key, v in options.items()}
    if "pretrained" in options:
        options["pretrained"] = None  # the weights are at hand
    return functools.partial(made, **options) if settings.get("_partial_") else made(**options)


def of_network(target: str) -> bool:
    return target.rpartition(".")[0] in ROOMS


def check_state_dict(
    own: dict[str, Tensor], given: dict[str, Tensor], path: str, reason: str, option: str = "weights"
) -> None:
    """Raises `OptionError` where two state dicts differ in names or shapes; names the first difference.

    Args:
        own: The network's state dict.
        given: The file's.
        path: The file, for the message.
        reason: What the difference means.
        option: The option that named the file.
    """
    for name in sorted(own.keys() | given.keys()):
        mine, theirs = (tuple(state[name].shape) if name in state else "none" for state in (own, given))
        if mine != theirs:
            raise OptionError(option, path, f"{reason}: {name} is {theirs} in the file, {mine} in the network")
