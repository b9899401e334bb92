"""Wraps any classification network as a backbone; a forward pass of a trial image shows its last feature map."""

from collections import Counter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from odcheap.models.backbone import Backbone
from odcheap.models.convert import copy_network, prepare_for_shapes
from odcheap.utils.errors import OptionError, first_line

TRIAL_SIDES = (224, 299, 96, 64, 32, 28)  # pixels of the images on which a network is tried
MAX_HEAD_LAYERS = 6  # layers with weights after the last feature map; more are the blocks of a transformer
INTERFACE = ("features", "head", "num_features", "num_classes")


class Call(NamedTuple):
    """A call of a module in the forward pass of a trial image.

    Attributes:
        name: The name of the module.
        number: How many times the module was called before in this forward pass.
        shape: The shape of its output.
    """

    name: str
    number: int
    shape: tuple[int, ...]


class WrappedNetwork(Backbone):
    """A classification network of any library as a backbone.

    If the network has methods `features` and `head` as in `Backbone`, these are called. Otherwise the last feature map
    is the output of one of its modules, which a hook records during the forward pass.

    Args:
        network: A network that maps images (N, C, H, W) to logits (N, K).

    Attributes:
        network: The network.
        map_call: The call of a module whose output is the last feature map; None if the network has `features` and
            `head`.

    Raises:
        OptionError: The last feature map or the last layer is not found.

    Example:
        >>> import torchvision
        >>> student = WrappedNetwork(torchvision.models.resnet18(num_classes=10))
        >>> student.num_features, student.num_classes, student.map_call.name, student.classifier
        (512, 10, 'layer4', 'network.fc')
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        calls, logits, side = try_network(network)
        self.native_size = getattr(network, "native_size", side)
        self.network, self.num_classes = network, logits[1]
        classifier = find_classifier(network, calls, self.num_classes)
        self.classifier = f"network.{classifier.name}"
        self.map_call: Call | None = None
        if has_interface(network):
            self.num_features = cast(int, network.num_features)
        else:
            self.map_call = find_last_map(network, calls[: calls.index(classifier)])
            self.num_features = self.map_call.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def features(self, x: Tensor) -> Tensor:
        """Returns the last feature map (N, C', h, w) of images (N, C, H, W)."""
        return self.features_and_logits(x)[0]

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the last feature map (N, C', h, w) and the logits (N, K) of images (N, C, H, W)."""
        # One forward pass computes both.
        network: Any = self.network
        if self.map_call is None:
            features = network.features(x)
            return features, network.head(features)
        outputs: list[Tensor] = []
        module = network.get_submodule(self.map_call.name)
        handle = module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        try:
            logits = network(x)
        finally:
            handle.remove()
        return outputs[self.map_call.number], logits


def to_backbone(network: nn.Module) -> Backbone:
    """Returns a network as a `Backbone`, wrapped in `WrappedNetwork` if it is of another class.

    Raises:
        OptionError: The network cannot be trained as a student; the message says what it lacks.
    """
    return network if isinstance(network, Backbone) else WrappedNetwork(network)


def has_interface(network: Any) -> bool:
    """Returns whether a network has `features`, `head`, `num_features` and `num_classes`, as in `Backbone`.

    Its own forward pass must also be equal to `head(features(images))`.

    Args:
        network: A network of any class.
    """
    # The names alone are not enough: networks of libraries have attributes of these names that mean other things.
    if not callable(getattr(network, "features", None)) or not callable(getattr(network, "head", None)):
        return False
    if not all(isinstance(getattr(network, name, None), int) for name in INTERFACE[2:]):
        return False
    trial = copy_network(network).cpu().eval()
    stem = find_stem_channels(network)
    for side in reversed(TRIAL_SIDES):
        images = torch.linspace(-2, 2, 2 * stem * side * side).view(2, stem, side, side)
        try:
            with torch.no_grad():
                features = trial.features(images)
                is_map = features.ndim == 4 and features.shape[1] == network.num_features
                return is_map and torch.allclose(trial.head(features), trial(images), atol=1e-5, rtol=1e-4)
        except Exception:  # the network's own code may raise anything at a size that it does not take
            continue
    return False


def try_network(network: nn.Module) -> tuple[list[Call], torch.Size, int]:
    """Runs a copy of a network on two images of a usual size.

    It runs on the meta device, which computes shapes only, or on the CPU if that fails.

    Returns:
        The calls of the network's modules in the order in which they ended, the shape of the logits, and the side of
        the images in pixels.

    Raises:
        OptionError: The network takes no image of a usual size, or does not return logits.
    """
    channels, problem = find_stem_channels(network), ""
    for on_cpu in (False, True):
        for side in reversed(TRIAL_SIDES) if on_cpu else TRIAL_SIDES:
            trial = copy_network(network).cpu().eval() if on_cpu else prepare_for_shapes(network)
            example = next(trial.parameters())
            images = torch.empty(2, channels, side, side, dtype=example.dtype, device=example.device).zero_()
            try:
                with torch.no_grad():
                    calls, logits = record_calls(trial, images)
                    in_training = trial.train()(images)
            except Exception as error:  # the network's own code may raise anything
                problem = problem or f"it cannot be run on an image of {side} x {side}: {first_line(error)}"
                continue
            for output, mode in ((logits, "in eval mode"), (in_training, "in training")):
                if not isinstance(output, Tensor) or output.ndim != 2:
                    found = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
                    raise refuse(network, f"{mode} it does not return logits (N, K) but {found}")
            return calls, logits.shape, side
    raise refuse(network, problem)


def find_stem_channels(network: nn.Module) -> int:
    """Returns the number of channels of the images that a network takes.

    Raises:
        OptionError: The network has no convolution.
    """
    stem = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if stem is None:
        raise refuse(network, "it has no convolution")
    return stem.in_channels


def record_calls(network: nn.Module, images: Tensor) -> tuple[list[Call], Any]:
    """Runs a network once, and records which of its modules are called.

    Args:
        network: The network.
        images: (N, C, H, W).

    Returns:
        The calls that returned a tensor, in the order in which they ended, and the output of the network.
    """
    calls: list[Call] = []
    counts: Counter[str] = Counter()

    def record(name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            calls.append(Call(name, counts[name], tuple(output.shape)))
        counts[name] += 1

    # Hooks record each call when it ends; they are removed afterwards.
    modules = list(network.named_modules())
    handles = [
        m.register_forward_hook(lambda module, inputs, output, name=name: record(name, output)) for name, m in modules
    ]
    output = network(images)
    for handle in handles:
        handle.remove()
    return calls, output


def find_classifier(network: nn.Module, calls: list[Call], classes: int) -> Call:
    """Returns the last call of a linear or convolutional layer with one output for each class.

    Args:
        network: The network.
        calls: The calls of its modules in a forward pass; see `try_network`.
        classes: The number of classes.

    Raises:
        OptionError: There is no such layer.
    """
    for call in reversed(calls):
        layer = network.get_submodule(call.name)
        if isinstance(layer, nn.Linear | nn.Conv2d) and len(layer.weight) == classes:
            return call
    raise refuse(network, f"it has no last layer (nn.Linear or nn.Conv2d) with {classes} outputs, one for each class")


def find_last_map(network: nn.Module, calls: list[Call]) -> Call:
    """Returns the last call whose output is a feature map (N, C, h, w) with more than one pixel.

    If all feature maps have one pixel, it is the last call with such a map.

    Args:
        network: The network.
        calls: The calls of its modules before the classifier.

    Raises:
        OptionError: There is no feature map, or too many layers come after the last one.
    """
    maps = [k for k, call in enumerate(calls) if len(call.shape) == 4]
    large = [k for k in maps if calls[k].shape[2] * calls[k].shape[3] > 1]
    if not maps:
        raise refuse(network, "none of its modules returns a feature map (N, C, h, w)")
    last = (large or maps)[-1]
    layers = [call for call in calls[last + 1 :] if network.get_submodule(call.name)._parameters]
    if len(layers) > MAX_HEAD_LAYERS:
        raise refuse(network, "its last feature map (N, C, h, w) is far from its end (a transformer?)")
    channels = getattr(network, "num_features", None)
    if isinstance(channels, int) and channels != calls[last].shape[1]:
        shape = f"(N, {', '.join(map(str, calls[last].shape[1:]))})"
        raise refuse(network, f"its num_features={channels} are not the channels of its last feature map {shape}")
    return calls[last]


def refuse(network: nn.Module, reason: str) -> OptionError:
    """Returns an error, to be raised, that says why a network cannot be trained as a student, and what it lacks.

    Args:
        network: The network.
        reason: Why it cannot be a student, such as "it has no convolution".
    """
    needed, lacking = (
        ", ".join(f"`{name}`" for name in names)
        for names in (INTERFACE, [name for name in INTERFACE if not hasattr(network, name)])
    )
    what = f"; with {needed} of its own it could be one, and it lacks {lacking}" if lacking else ""
    return OptionError("backbone", type(network).__name__, f"cannot be a student: {reason}{what}")
