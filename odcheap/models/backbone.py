"""The interface of networks that can be trained as students, and how any other network gets it.

What the interface needs to know about another network, a forward pass of a copy on a trial image shows: which of its
modules returns the last feature map, where its stages end, and which layer computes the logits.
"""

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from odcheap.utils.errors import OptionError, first_line

RGB = 3  # channels
TRIAL_SIDES = (224, 299, 96, 64, 32, 28)  # pixels of the images on which a network is tried
MAX_HEAD_LAYERS = 6  # layers with weights after the last feature map; more are the blocks of a transformer
MIN_STAGE_CONVS = 2  # a lone convolution at a resolution is a stem
INTERFACE = ("features", "head", "num_features", "num_classes")

Network = TypeVar("Network", bound=nn.Module)


class Backbone(nn.Module):
    """A classification network in two parts: `features` computes the last feature map, and `head` the logits from it.

    A new backbone is a subclass with both methods, and a YAML file in `conf/backbone`. The constructor of the subclass
    takes `conv`, a `BlockType` that builds the convolutions, and `num_classes`. It sets the attributes.

    Attributes:
        num_features: The number of channels of the last feature map, C.
        num_classes: The number of classes, K.
        classifier: The name of the layer that computes the logits.
        native_size: The side, in pixels, of the images for which the network was designed.
        standard_note: A sentence for reports, which compare the network with the same one with standard convolutions
            (block_type=Standard). It says what else differs between the two; None if nothing else differs.

    Shape:
        Images (N, 3, H, W) -> logits (N, K).
    """

    num_features: int
    num_classes: int
    classifier: str
    native_size: int
    standard_note: str | None = None

    def features(self, x: Tensor) -> Tensor:
        """Returns the last feature map (N, C, h, w) of images (N, 3, H, W)."""
        raise NotImplementedError

    def head(self, features: Tensor) -> Tensor:
        """Returns the logits (N, K) of the last feature map (N, C, h, w)."""
        raise NotImplementedError

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the last feature map (N, C, h, w) and the logits (N, K) of images (N, 3, H, W)."""
        features = self.features(x)
        return features, self.head(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Call(NamedTuple):
    """A call of a module during one forward pass of a network.

    Attributes:
        name: The name of the module in the network, such as `layer1.0.conv1`.
        number: How many times the module was called before in this forward pass.
        shape: The shape of the output of this call.
    """

    name: str
    number: int
    shape: tuple[int, ...]


class WrappedNetwork(Backbone):
    """Makes a `Backbone` of a classification network of any library, so that it can be trained as a student.

    If the network has methods `features` and `head` as in `Backbone`, these are called. Otherwise a forward pass of a
    copy on a trial image shows which of its modules returns the last feature map; a hook then records this output.

    Args:
        network: A network that maps images (N, C, H, W) to logits (N, K).

    Attributes:
        network: The given network.
        map_call: The call of the module that returns the last feature map; None if the network has methods `features`
            and `head`.

    Raises:
        OptionError: No last feature map (N, C, h, w) is found, or no last layer with one output for each class.

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
    """Returns the network itself if it is a `Backbone`, otherwise the network in a `WrappedNetwork`.

    Raises:
        OptionError: The network cannot be trained as a student; the message says what it lacks.
    """
    return network if isinstance(network, Backbone) else WrappedNetwork(network)


def adapt_input(network: Network, channels: int) -> Network:
    """Changes a network for RGB images, in place, so that it takes images with n channels; returns the network.

    Only the first convolution is changed. For gray images (n = 1), its weights are summed over the three channels: the
    network then computes for a gray image what it computed for the RGB image with three equal channels. For another n
    the weights of the channels are repeated (R, G, B, R, ...) and multiplied by 3 / n, as in timm.

    Args:
        network: The network. It is not changed if its first convolution already takes n channels.
        channels: The number of channels of the images that the network should take, n.

    Raises:
        OptionError: The first convolution of the network takes neither 3 nor n channels, or it has groups.

    Example:
        >>> adapt_input(nn.Sequential(nn.Conv2d(3, 8, 3)), 1)
        Sequential(
          (0): Conv2d(1, 8, kernel_size=(3, 3), stride=(1, 1))
        )
    """
    stem = next(iter(find_convs(network).values()), None)
    if channels == RGB or (stem is not None and stem.in_channels == channels):
        return network
    if stem is None or stem.in_channels != RGB or stem.groups != 1:
        allowed = "must be 3: the first convolution of this network is not one that other channels could be given to"
        raise OptionError("data.channels", channels, allowed)
    weight = stem.weight.detach()
    if channels == 1:
        weight = weight.sum(1, keepdim=True)
    else:
        weight = weight[:, torch.arange(channels) % RGB] * (RGB / channels)
    stem.in_channels, stem.weight = channels, nn.Parameter(weight, stem.weight.requires_grad)
    return network


class StageRecorder:
    """Records, during forward passes, the feature maps at the ends of the stages of several networks.

    A stage consists of the layers of a network that compute at one resolution. The same number of stages is recorded
    for all networks: that of the network with the fewest stages. They are the last stages of each network.

    Args:
        networks: Networks (N, C, H, W) -> logits (N, K). They get hooks only while `record` is active.
        option: The option for which feature maps are needed, such as `method.feature`, for the error message.
        value: The value of this option, for the error message.

    Attributes:
        calls: A list for each network, from the first recorded stage to the last: the calls of the modules whose
            outputs are recorded.

    Raises:
        OptionError: A network has no stages; a transformer is an example.

    Example:
        >>> import torch
        >>> from odcheap.layers.cheap_conv import DW
        >>> from odcheap.models.cifar import CifarResNet
        >>> network = CifarResNet(8, DW(), num_classes=10)
        >>> recorder = StageRecorder([network], "method.feature", "l2")
        >>> recorder.channels
        [[16, 32, 64]]
        >>> with recorder.record() as maps:
        ...     logits = network(torch.zeros(1, 3, 32, 32))
        >>> [tuple(stage.shape) for stage in maps[0]]
        [(1, 16, 32, 32), (1, 32, 16, 16), (1, 64, 8, 8)]
    """

    def __init__(self, networks: Iterable[nn.Module], option: str, value: str):
        self.networks = list(networks)
        found = [find_stages(network) for network in self.networks]
        if not all(found):
            lacking = self.networks[found.index([])]
            name = type(getattr(lacking, "network", lacking)).__name__
            allowed = f"needs feature maps (N, C, h, w) at the ends of stages, and {name} has none"
            raise OptionError(option, value, allowed)
        count = min(map(len, found))
        self.calls = [calls[-count:] for calls in found]

    @property
    def channels(self) -> list[list[int]]:
        """A list for each network: the number of channels of each recorded feature map, from the first stage on."""
        return [[call.shape[1] for call in calls] for calls in self.calls]

    @contextmanager
    def record(self) -> Generator[list[list[Tensor]]]:
        """A context manager in which each network must run once; it gives an empty list and fills it at its end.

        When the context has ended, the list has an entry for each network: a list of its feature maps (N, C, h, w), one
        for each recorded stage.
        """
        outputs: defaultdict[tuple[nn.Module, str], list[Any]] = defaultdict(list)
        maps: list[list[Tensor]] = []

        def make_hook(network: nn.Module, name: str) -> Callable[..., None]:
            return lambda module, inputs, output: outputs[network, name].append(output)

        pairs = list(zip(self.networks, self.calls, strict=True))
        recorded = dict.fromkeys((network, call.name) for network, calls in pairs for call in calls)
        handles = [
            network.get_submodule(name).register_forward_hook(make_hook(network, name)) for network, name in recorded
        ]
        try:
            yield maps
            maps += [[outputs[network, call.name][call.number] for call in calls] for network, calls in pairs]
        finally:
            for handle in handles:
                handle.remove()


def find_stages(network: nn.Module) -> list[Call]:
    """Finds the calls of modules that return the last feature map of each stage of a network.

    A stage consists of the layers that compute at one resolution, h x w pixels. A copy of the network runs on a trial
    image. Among the modules that return a feature map (N, C, h, w) at a resolution, the outermost ones are chosen, and
    of these the one that is called last. In a ResNet, for example, the first stage ends with `layer1`: a convolution
    inside of `layer2` may return a map of the same size later, but `layer1` is not inside of another layer.

    A resolution of one pixel is no stage, nor is one with a single convolution, such as that of an ImageNet stem.

    Args:
        network: Any network (N, C, H, W) -> logits (N, K).

    Returns:
        One call for each stage, from the first stage to the last. The list is empty if the network has no stages.
    """
    ends: dict[tuple[int, ...], Call] = {}
    convs: defaultdict[tuple[int, ...], int] = defaultdict(int)
    for call in try_network(network)[0]:
        size = call.shape[2:]
        if len(size) == 2 and size[0] * size[1] > 1:
            if size not in ends or call.name.count(".") <= ends[size].name.count("."):
                ends[size] = call
            convs[size] += isinstance(network.get_submodule(call.name), nn.Conv2d)
    return [call for size, call in ends.items() if convs[size] >= MIN_STAGE_CONVS]


def find_convs(network: nn.Module) -> dict[str, nn.Conv2d]:
    """Returns a dict from the name of each `nn.Conv2d` of a network to the module; the first one is the stem."""
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}


def find_stem_channels(network: nn.Module) -> int:
    """Returns the number of channels of the images that a network takes: the input channels of its first convolution.

    Raises:
        OptionError: The network has no convolution.
    """
    for stem in find_convs(network).values():
        return stem.in_channels
    raise refuse(network, "it has no convolution")


def copy_network(network: nn.Module) -> Any:
    """Returns a deep copy of a network.

    PyTorch cannot copy tensors that are computed from parameters, as the old `weight_norm` does. They are detached in
    the copy.
    """
    computed: dict[int, Any] = {}
    for module in network.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                computed[id(value)] = value.detach().clone()
    return copy.deepcopy(network, computed)


def copy_to_meta(network: nn.Module) -> nn.Module:
    """Returns a copy of a network in eval mode and without hooks on the meta device, which computes shapes only.

    Hooks that `torch.nn.utils` sets to compute the weights of a layer are kept, since the forward pass needs them.
    """
    copied = copy_network(network).to("meta").eval()
    for module in copied.modules():
        module._forward_hooks.clear()
        for key, hook in list(module._forward_pre_hooks.items()):
            if not type(hook).__module__.startswith("torch.nn.utils"):
                del module._forward_pre_hooks[key]
        # A computed weight is an attribute and no parameter, so `to` has not moved it.
        if not isinstance(vars(module).get("weight"), nn.Parameter) and "weight" in vars(module):
            module.weight = vars(module)["weight"].to("meta")
    return copied


def make_trial_images(network: nn.Module, *shape: int) -> Tensor:
    """Returns zeros of the given shape (N, C, H, W), with the device and the dtype of a network's first parameter."""
    example = next(network.parameters())
    return torch.zeros(shape, dtype=example.dtype, device=example.device)


@torch.no_grad()
def record_calls(network: nn.Module, images: Tensor) -> tuple[list[Call], Any]:
    """Runs a network once, and records the calls of its modules.

    Args:
        network: The network.
        images: (N, C, H, W).

    Returns:
        A tuple: the calls of modules that returned a tensor, in the order in which they ended; and the output of the
        network.
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


def try_network(network: nn.Module) -> tuple[list[Call], torch.Size, int]:
    """Runs a copy of a network on two images of zeros, of the first usual size, such as 224 x 224, that works.

    It runs on the meta device, which computes shapes only, or on the CPU if that fails.

    Returns:
        A tuple: the calls of the network's modules, in the order in which they ended; the shape (2, K) of the logits;
        and the side of the images in pixels.

    Raises:
        OptionError: The network takes no image of a usual size, or does not return logits (N, K).
    """
    channels, problem = find_stem_channels(network), ""
    for on_cpu in (False, True):
        for side in reversed(TRIAL_SIDES) if on_cpu else TRIAL_SIDES:
            trial = copy_network(network).cpu().eval() if on_cpu else copy_to_meta(network)
            images = make_trial_images(trial, 2, channels, side, side)
            try:
                calls, logits = record_calls(trial, images)
                with torch.no_grad():
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


def has_interface(network: Any) -> bool:
    """Returns True if a network has `features`, `head`, `num_features` and `num_classes` as in `Backbone`.

    The logits of its forward pass must also be equal to `head(features(images))`; this is tried on an image.

    Args:
        network: A network of any class.
    """
    # The names alone are not enough: networks of libraries have attributes of these names that mean other things.
    if not callable(getattr(network, "features", None)) or not callable(getattr(network, "head", None)):
        return False
    if not all(isinstance(getattr(network, name, None), int) for name in INTERFACE[2:]):
        return False
    trial, channels = copy_network(network).cpu().eval(), find_stem_channels(network)
    for side in reversed(TRIAL_SIDES):
        try:
            return find_split_map(trial, trial, channels, side) is not None
        except Exception:  # the network's own code may raise anything at a size that it does not take
            continue
    return False


@torch.no_grad()
def find_split_map(parts: Any, network: nn.Module, channels: int, side: int) -> Tensor | None:
    """Tries on one image whether `features` and `head` together compute the same logits as a network.

    Args:
        parts: An object with methods `features` and `head`, as in `Backbone`.
        network: The network. If it has `num_features`, the last feature map must have this number of channels.
        channels: The number of channels of the image.
        side: The side of the image, in pixels.

    Returns:
        The last feature map (1, C, h, w), which `features` returned; None if the logits differ, or if `features`
        returns no such map.
    """
    image = torch.linspace(-2, 2, channels * side * side).view(1, channels, side, side)
    features = parts.features(image)
    if features.ndim != 4 or features.shape[1] != getattr(network, "num_features", features.shape[1]):
        return None
    return features if torch.allclose(parts.head(features), network(image), atol=1e-5, rtol=1e-4) else None


def find_classifier(network: nn.Module, calls: list[Call], classes: int) -> Call:
    """Returns the last call of a linear or convolutional layer with one output for each class.

    Args:
        network: The network.
        calls: The calls of its modules in a forward pass, in the order in which they ended.
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

    If all feature maps have only one pixel, the last call that returns a feature map is returned.

    Args:
        network: The network.
        calls: The calls of its modules before the classifier, in the order in which they ended.

    Raises:
        OptionError: There is no feature map, more than `MAX_HEAD_LAYERS` layers with parameters come after the last
            feature map, or the network has an attribute `num_features` that is not its number of channels.
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
    """Returns, and does not raise, an error that says why a network cannot be a student, and what it lacks.

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
