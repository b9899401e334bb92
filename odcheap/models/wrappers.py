"""Backbones that are standard networks (ours, torchvision's or timm's) with cheap convolutions, made by `cheapen`."""

import argparse
import contextlib
import copy
import difflib
import importlib.util
import re
from collections.abc import Callable, Iterable, Set
from typing import Annotated, Any

import torch
import torchvision
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from odcheap.layers.cheap_conv import BlockType, CheapConv, check_block_type
from odcheap.layers.fuse import replace_modules
from odcheap.layers.spatial import Window
from odcheap.models.backbone import RGB, Backbone, WrappedNetwork, find_split_map, find_stem_channels
from odcheap.models.build import check_state_dict
from odcheap.models.convert import Init, cheapen, check_conversion_options, find_spatial_convs
from odcheap.utils.arguments import check_arguments
from odcheap.utils.errors import Failure, OptionError, first_line
from odcheap.utils.files import read_safetensors, read_torch

PROBE_SIZE = 96  # pixels: enough for every torchvision network, little work
MAX_SMALL_SIZE = 64  # pixels: larger images are refused for networks made for 32
AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")  # of GoogLeNet and Inception, used in training only
# Where checkpoints hold a state dict, and the prefixes that modules around a network give its names.
STATE_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "model.", "network.", "net.", "backbone.", "encoder.")
Noise = Annotated[float, Field(ge=0)]


def converted_backbone(
    network: Callable[..., Backbone], conv: BlockType, num_classes: int, keep: list[str] | str | None = None
) -> Backbone:
    """Builds a standard network, and returns it with cheap convolutions in place of its 3 x 3 convolutions.

    Args:
        network: A function that takes `num_classes` and returns the standard network, such as `vgg16`.
        conv: The block type, which builds the cheap convolutions. `Standard` replaces nothing.
        num_classes: The number of classes, K.
        keep: Convolutions that should not be replaced, given as for `cheapen`; None for the network's first one.
    """
    converted = convert_to(network(num_classes=num_classes), conv, keep, "kaiming")
    converted.standard_note = None
    return converted


def convert_to(network: nn.Module, conv: BlockType, keep: Iterable[str] | None, init: Init) -> Any:
    """Returns a copy of a network with cheap convolutions, or the network itself if the block type is `Standard`.

    It calls `cheapen`, and changes the names of options in errors to those that users set, such as `backbone.keep`.

    Args:
        network: The standard network.
        conv: The block type, which builds the cheap convolutions.
        keep: Convolutions that should not be replaced, given as for `cheapen`; None for the network's first one.
        init: How the weights of the cheap convolutions are set: "fit" approximates the replaced kernels, "kaiming"
            draws random weights, and "auto" is "fit" if the network looks trained.
    """
    check_block_type(conv)
    try:
        if not conv.is_cheap:
            check_conversion_options(network, keep, init)  # a sweep over block types finds mistakes in its first run
            return network
        return cheapen(network, conv, keep=keep, init=init)
    except OptionError as error:
        raise error if str(error).startswith("block_type") else error.with_group("backbone") from None


@check_arguments("backbone")
class LibraryBackbone(Backbone):
    """A classification network of another library, with its convolutions replaced by cheap convolutions.

    A subclass creates the standard network, and splits its forward pass into `features` and `head`.

    Args:
        name: The name of the network in the library.
        conv: The block type, which builds the cheap convolutions. `Standard` replaces nothing.
        num_classes: The number of classes, K.
        pretrained: A local file with weights of the standard network, which are loaded before the conversion; None for
            random weights. The classifier is not loaded if the file has another number of classes.
        keep: Convolutions that should not be replaced, given as for `cheapen`; None for the network's first one.
        init: How the weights of the cheap convolutions are set: "fit" approximates the replaced kernels, "kaiming"
            draws random weights, and "auto" is "fit" if `pretrained` is given, otherwise "kaiming".
        noise: The standard deviation of the noise that is added to the cheap convolutions if `pretrained` is given, as
            a fraction of that of each weight tensor. With noise, students from the same file differ.

    Raises:
        OptionError: The name is unknown, the weights do not fit, no convolution can be replaced, or the network has no
            last feature map (N, C, h, w).
    """

    native_size = 224
    network: Any  # a module whose parts are found by their names

    def __init__(
        self,
        name: str,
        conv: BlockType,
        num_classes: int,
        pretrained: str | None = None,
        keep: list[str] | str | None = None,
        init: Init = "auto",
        noise: Noise = 0.0,
    ):
        super().__init__()
        # The weights are loaded into the standard network, since the file has its names and shapes.
        network = self.create_network(name, num_classes, pretrained is not None)
        self.set_network(network, num_classes, name)
        if pretrained is not None:
            load_pretrained(network, pretrained, num_classes)
        if init == "auto":
            init = "kaiming" if pretrained is None else "fit"
        self.network = convert_to(network, conv, keep, init)
        if pretrained is not None:
            add_weight_noise(self.network, noise)

    def create_network(self, name: str, num_classes: int, is_pretrained: bool) -> nn.Module:
        """Returns the standard network of the library, with random weights.

        Args:
            name: The name of the network in the library, such as `resnet18`.
            num_classes: The number of classes, K.
            is_pretrained: True if published weights will be loaded into the network afterwards, so that a slow random
                initialization can be left out.
        """
        raise NotImplementedError

    def set_network(self, network: nn.Module, num_classes: int, name: str) -> None:
        """Sets the standard network and the attributes that depend on it, such as `num_features`.

        Args:
            network: The standard network of the library, with `num_classes` outputs.
            num_classes: The number of classes, K.
            name: The name of the network in its library, such as `resnet18`, for the error message.

        Raises:
            OptionError: The network has no last feature map (N, C, h, w), or `head(features(x))` differs from its own
                forward pass.
        """
        self.network, self.num_classes = network, num_classes
        self.classifier = f"network.{find_last_layer(network, num_classes)}"
        # Try the two parts on one image: together they must compute what the network itself computes.
        allowed = "has no 4-D last feature map (N, C, H, W) before its head (a transformer?): the teacher needs one"
        features = None
        self.eval()
        with contextlib.suppress(RuntimeError, ValueError, AssertionError, TypeError):
            features = find_split_map(self, network, RGB, PROBE_SIZE)
        if features is None:
            raise OptionError("backbone.name", name, allowed)
        self.num_features = features.shape[1]
        self.train()


class TorchvisionBackbone(LibraryBackbone):
    """A torchvision network with cheap convolutions; `features` ends before its global pool, where `head` begins.

    The arguments are those of `LibraryBackbone`. `name` is a name that `torchvision.models.list_models` returns.
    """

    def create_network(self, name: str, num_classes: int, is_pretrained: bool) -> nn.Module:
        check_name(name, torchvision.models.list_models(module=torchvision.models), "torchvision")
        has_auxiliary_heads = name in ("googlenet", "inception_v3")
        options = {"aux_logits": False, "init_weights": not is_pretrained} if has_auxiliary_heads else {}
        network: Any = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
        if has_auxiliary_heads:
            network.transform_input = True  # the published weights expect TensorFlow's normalization
        return network

    def set_network(self, network: nn.Module, num_classes: int, name: str) -> None:
        # All torchvision networks run their children in order; the names below are those of the first child after the
        # last feature map.
        names = [name for name, _ in network.named_children()]
        split = next((k for k, n in enumerate(names) if n in ("avgpool", "dropout", "classifier", "fc")), len(names))
        self.body, self.tail = names[:split], [name for name in names[split:] if name != "avgpool"]
        tail_types = [type(module) for name in self.tail for module in network.get_submodule(name).modules()]
        self.tail_pools, self.tail_flattens = nn.AdaptiveAvgPool2d in tail_types, nn.Flatten in tail_types
        super().set_network(network, num_classes, name)

    def features(self, x: Tensor) -> Tensor:
        """Returns the last feature map (N, C, h, w) of images (N, 3, H, W)."""
        # What the networks do in their own `forward` and not in a child: Inception's normalization, DenseNet's ReLU.
        if getattr(self.network, "transform_input", False):
            x = self.network._transform_input(x)
        for name in self.body:
            x = getattr(self.network, name)(x)
        return F.relu(x) if isinstance(self.network, torchvision.models.DenseNet) else x

    def head(self, features: Tensor) -> Tensor:
        """Returns the logits (N, K) of the last feature map (N, C, h, w)."""
        # The pool and the flattening are in a child of some networks, and in the own `forward` of others.
        x = features
        if not self.tail_pools:
            pool = getattr(self.network, "avgpool", None)
            x = x.mean((2, 3), keepdim=True) if pool is None else pool(x)
            x = x if self.tail_flattens else x.flatten(1)
        for name in self.tail:
            x = getattr(self.network, name)(x)
        return x.flatten(1)


class MobileNetV2(TorchvisionBackbone):
    """MobileNetV2 for images of 32 x 32 pixels; its last feature map is (N, 1280, H/8, W/8).

    The first two strides of 2 of the published network are 1 here. Only the depth-wise convolutions are replaced, each
    by the spatial operator of the block type, such as a shift. No 1 x 1 convolution is added, since the network already
    has one before and after each of them. With `DW` and `Standard` they stay depth-wise convolutions. Source: Sandler
    et al., "MobileNetV2: Inverted residuals and linear bottlenecks", 2018.

    Args:
        conv: The block type (kind of cheap convolution), whose spatial operator replaces the depth-wise convolutions.
        num_classes: The number of classes, K.
    """

    native_size = 32

    def __init__(self, conv: BlockType, num_classes: int):
        check_block_type(conv)
        Backbone.__init__(self)
        # The rows are expansion factor, channels, number of blocks and stride, as in the paper's table 2.
        stages = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2]]
        stages += [[6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1]]
        network: Any = torchvision.models.MobileNetV2(num_classes, inverted_residual_setting=stages)
        network.features[0][0].stride = (1, 1)

        def make_spatial(layer: nn.Conv2d) -> nn.Module:
            if layer.groups == 1:
                return layer
            spatial = conv.make_spatial(layer.in_channels, Window.from_conv(layer))
            for parameter in spatial.parameters():
                if parameter.ndim > 1:
                    nn.init.kaiming_normal_(parameter, mode="fan_out")  # as torchvision does
            return spatial

        self.set_network(replace_modules(network, nn.Conv2d, make_spatial), num_classes, "mobilenetv2")


class TimmBackbone(LibraryBackbone):
    """A timm network with cheap convolutions; `features` and `head` are its `forward_features` and `forward_head`.

    The arguments are those of `LibraryBackbone`. `name` is a name that `timm.list_models` returns.

    Raises:
        Failure: timm is not installed.
    """

    def create_network(self, name: str, num_classes: int, is_pretrained: bool) -> nn.Module:
        if importlib.util.find_spec("timm") is None:
            raise Failure("backbone=timm: timm is not installed; uv sync --extra timm (or pip install timm)")
        import timm

        check_name(name, timm.list_models(), "timm")
        return timm.create_model(name, pretrained=False, num_classes=num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Returns the last feature map (N, C, h, w) of images (N, 3, H, W)."""
        return self.network.forward_features(x)

    def head(self, features: Tensor) -> Tensor:
        """Returns the logits (N, K) of the last feature map (N, C, h, w)."""
        return self.network.forward_head(features)


def check_name(name: str, known: list[str], library: str) -> None:
    """Raises an `OptionError` that names similar networks if a library has no network of the given name.

    Args:
        name: The name of the network.
        known: The names of all networks of the library.
        library: The name of the library, for the message.
    """
    if name not in known:
        similar = ", ".join(difflib.get_close_matches(str(name), known, n=4, cutoff=0.4)) or "none"
        allowed = f"no classification network of {library} has this name; similar: {similar}"
        raise OptionError("backbone.name", name, allowed)


def load_pretrained(
    network: nn.Module, path: str, num_classes: int, option: str = "backbone.pretrained", new_head: bool = True
) -> None:
    """Loads published weights from a local file into a standard network.

    Args:
        network: The network, whose weights are set in place.
        path: The file, written by `torch.save` or as safetensors: a state dict, or a checkpoint with a state dict under
            one of the usual keys, such as "state_dict". The names of its tensors may have the prefixes that
            `torch.compile`, `DataParallel` and modules around the network add.
        num_classes: The number of classes, K.
        option: The name of the option with which the user gave the file, for error messages.
        new_head: What happens if the classifier of the file has another number of classes. With True, the network keeps
            its own classifier; with False, `OptionError` is raised.

    Raises:
        OptionError: The weights do not fit; the network is not changed then.
    """
    # The state dict in the checkpoint, with the network's names.
    content = read_published(path, option)
    for key in STATE_KEYS:
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    tensors = {update_name(str(name)): value for name, value in content.items() if isinstance(value, Tensor)}
    own, classifier = network.state_dict(), find_last_layer(network, num_classes)
    tensors = strip_prefixes(tensors, own.keys())
    state = {name: tensor for name, tensor in tensors.items() if not name.startswith(AUXILIARY_HEADS)}

    # The classifier may be that of other classes, and old files have no counters of batches.
    head = {name: tensor for name, tensor in own.items() if name.startswith(f"{classifier}.")}
    if new_head and any(name in state and state[name].shape != tensor.shape for name, tensor in head.items()):
        state |= head
    counters = {name: tensor for name, tensor in own.items() if name.endswith("num_batches_tracked")}
    state = counters | state
    check_state_dict(own, state, path, "weights of another network", option)
    network.load_state_dict(state)


def read_published(path: str, option: str) -> Any:
    """Reads a file of published weights, and returns its content, such as a state dict.

    Args:
        path: The file, written by `torch.save`, or as safetensors with the suffix `.safetensors`.
        option: The name of the option with which the user gave the file, for error messages.
    """
    if str(path).endswith(".safetensors"):
        return read_safetensors(path, option)[0]
    # The scripts of timm and torchvision store their arguments too. A namespace holds values and runs no code.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return read_torch(path, option)


def update_name(name: str) -> str:
    """Returns the name that a tensor from a file has in today's networks.

    The prefix `_orig_mod.` of `torch.compile` is removed, and so are extra dots in the names of old DenseNets.
    """
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", name.replace("_orig_mod.", ""))


def strip_prefixes(tensors: dict[str, Tensor], own: Set[str]) -> dict[str, Tensor]:
    """Removes prefixes such as "module." from the names of a file's tensors, which modules around a network have added.

    A prefix is removed if more than half of the names begin with it. Tensors whose names do not begin with it, such as
    those of a loss, are left out. This is repeated until at least one name is in `own`, or no prefix is so frequent.

    Args:
        tensors: The tensors of the file by name.
        own: The names that the tensors have in the network itself.
    """
    # One prefix after the other is removed, until a name is one of the network's, or no prefix is that of most names.
    while not own & tensors.keys():
        inside = {prefix: [name for name in tensors if name.startswith(prefix)] for prefix in PREFIXES}
        prefix = max(inside, key=lambda prefix: len(inside[prefix]))
        if 2 * len(inside[prefix]) <= len(tensors):
            break
        tensors = {name.removeprefix(prefix): tensors[name] for name in inside[prefix]}
    return tensors


def find_last_layer(network: nn.Module, num_classes: int) -> str:
    """Returns the name of the layer that computes the logits: the last linear layer or convolution with K outputs.

    Args:
        network: The network.
        num_classes: The number of classes, K.

    Raises:
        OptionError: There is no such layer.
    """
    layers = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    last = next((name for name, module in reversed(layers) if module.weight.shape[0] == num_classes), None)
    if last is None:
        raise OptionError("backbone", type(network).__name__, "has no last layer with one output for each class")
    return last


@torch.no_grad()
def add_weight_noise(network: nn.Module, noise: float = 0.1, all_layers: bool = False) -> None:
    """Adds Gaussian noise to the weights of the cheap convolutions of a network, in place.

    Students (networks that are trained together on the same batches) would otherwise stay equal if they start from the
    same weights. If the network has no cheap convolutions, convolutions larger than 1 x 1 get the noise.

    Args:
        network: The network, which is changed.
        noise: The standard deviation of the noise, as a fraction of the standard deviation of each weight tensor.
        all_layers: True adds the noise to the weights of all convolutions and linear layers. With False, layers that
            `cheapen` has copied, such as the stem and the classifier, stay equal in all students.

    Example:
        >>> network = nn.Conv2d(3, 8, 3)
        >>> before = network.weight.clone()
        >>> add_weight_noise(network)
        >>> bool((network.weight != before).all())
        True
    """
    pairs = [module for module in network.modules() if isinstance(module, CheapConv)]
    for module in [network] if all_layers else pairs or find_spatial_convs(network).values():
        for parameter in module.parameters():
            if parameter.ndim == 4 or (all_layers and parameter.ndim >= 2):
                parameter += noise * parameter.std() * torch.randn_like(parameter)


def check_image_size(backbone: Backbone, image_size: tuple[int, int, int], name: str) -> None:
    """Raises `OptionError` if images are too small for a network, or too large for one designed for small images.

    Args:
        backbone: The network.
        image_size: (C, H, W) of the images.
        name: The name of the backbone in `conf/backbone`, for the message.
    """
    _, height, width = image_size
    if isinstance(backbone, WrappedNetwork):  # a network of the user, of which only a trial says what it takes
        try:
            find_map_size(backbone, image_size)
        except Exception as error:  # the network's own code may raise anything
            allowed = f"cannot be run on pictures of {height} x {width} ({first_line(error)})"
            raise OptionError("backbone", name, allowed) from error
        return
    # Too large: the network would work, but on maps that are much larger than those for which it was designed.
    native = backbone.native_size
    if native <= MAX_SMALL_SIZE < max(height, width):
        allowed = f"is made for {native} x {native} pictures, and these have {height} x {width}"
        raise OptionError("backbone", name, f"{allowed}; resnet18 and its like are made for larger ones")
    # Too small: the last feature map would have less than one pixel.
    stride = find_stride(backbone)
    try:
        find_map_size(backbone, image_size)
        fits = min(height, width) >= stride
    except RuntimeError:  # a convolution or pool without padding has no pixels left
        fits = False
    if not fits:
        raise OptionError("backbone", name, f"pictures of {height} x {width} are too small: its stride is {stride}")


@torch.no_grad()
def find_map_size(backbone: Backbone, image_size: tuple[int, int, int]) -> tuple[int, int]:
    """Returns the height and the width of a network's last feature map.

    A copy of the network runs on the meta device, where PyTorch computes shapes only, or on the CPU if that fails.

    Args:
        backbone: The network.
        image_size: (C, H, W) of the images.
    """
    network = copy.deepcopy(backbone).eval()
    try:
        features = copy.deepcopy(network).to("meta").features(torch.empty(1, *image_size, device="meta"))
    except RuntimeError:  # also raised if the images are too small, and then again on the CPU
        features = network.cpu().features(torch.zeros(1, *image_size))
    return features.shape[2], features.shape[3]


def find_stride(backbone: Backbone) -> int:
    """Returns the total stride of a network: the side of an image divided by the side of the last feature map."""
    return 1024 // find_map_size(backbone, (find_stem_channels(backbone), 1024, 1024))[1]
