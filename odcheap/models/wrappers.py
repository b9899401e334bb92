"""Standard networks, ours or those of torchvision and timm, as backbones: converted, with features and a head."""

import copy
import difflib
import importlib.util
from collections.abc import Callable, Iterable

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from odcheap.layers.cheap_conv import DW, Standard, Window
from odcheap.models.cifar import Conv
from odcheap.models.convert import check, replace
from odcheap.models.pretrained import disturb, last_layer, load_pretrained
from odcheap.utils.errors import Failure, OptionError

PROBE = 96  # pixels: enough for every torchvision network, little work
LARGEST_FOR_SMALL = 64  # pixels that a network made for 32 still makes sense of


def converted(
    network: Callable[..., nn.Module], conv: Conv, num_classes: int, keep: Iterable[str] | None = None
) -> nn.Module:
    """One of our standard networks, its 3 x 3 convolutions but the stem's replaced by the block type's pairs."""
    standard = network(num_classes=num_classes)
    made = replaced(standard, conv, keep, "kaiming")
    made.standard_note = None
    return made


def replaced(network: nn.Module, conv: Conv, keep: Iterable[str] | None, init: str) -> nn.Module:
    """`convert.replace`, whose errors then name the options as they are called in `conf/`; Standard changes nothing."""
    try:
        if isinstance(conv, Standard):
            check(network, keep, init)  # a sweep over block types finds its mistakes in the first run
            return network
        return replace(network, conv, keep, init)
    except OptionError as error:
        raise error if str(error).startswith("block_type") else error.with_group("backbone") from None


def mobilenetv2(conv: Conv, num_classes: int) -> nn.Module:
    """MobileNetV2 for 32 x 32 images, its strides before 8 pixels left out: (N, 3, H, W) -> (N, 1280, H/8, W/8).

    Its spatial operators stand between 1 x 1 convolutions already, so the block type takes their place without another
    1 x 1: depth-wise for DW and Standard (the published network), a shift, or groups. Source: Sandler et al.,
    "MobileNetV2: Inverted residuals and linear bottlenecks", 2018.
    """
    stages = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1]]
    network = torchvision.models.MobileNetV2(num_classes, inverted_residual_setting=stages)
    network.features[0][0].stride = (1, 1)
    block_type = DW() if isinstance(conv, Standard) else conv
    for block in network.modules():
        for name, layer in block.named_children():
            if isinstance(layer, nn.Conv2d) and layer.groups > 1:
                spatial = block_type.spatial(layer.in_channels, Window.from_conv(layer))
                for p in spatial.parameters():
                    nn.init.kaiming_normal_(p, mode="fan_out")  # as torchvision does
                setattr(block, name, spatial)
    made = checked(Torchvision(network, num_classes), "mobilenetv2")
    made.made_for = 32
    return made


def torchvision_backbone(
    name: str,
    conv: Conv,
    num_classes: int,
    pretrained: str | None = None,
    keep: Iterable[str] | None = None,
    init: str = "auto",
    noise: float = 0.0,
) -> nn.Module:
    """A classification network of torchvision, by its name there, converted to the block type.

    `pretrained` is a local file of its weights, loaded before the conversion; a classifier for another number of
    classes is left out of it. `noise` (see `disturb`) makes the students that start from one file differ. Raises
    `OptionError`: an unknown name, weights that do not fit, nothing to replace, no 4-D last feature map.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    refuse_unknown(name, known, "torchvision")
    with_auxiliary = name in ("googlenet", "inception_v3")
    options = {"aux_logits": False, "init_weights": pretrained is None} if with_auxiliary else {}
    network = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    if with_auxiliary:
        network.transform_input = True  # the published weights expect TensorFlow's normalisation
    made = checked(Torchvision(network, num_classes), name)
    made.network = prepared(network, conv, num_classes, pretrained, keep, init, noise)
    return made


def timm_backbone(
    name: str,
    conv: Conv,
    num_classes: int,
    pretrained: str | None = None,
    keep: Iterable[str] | None = None,
    init: str = "auto",
    noise: float = 0.0,
) -> nn.Module:
    """The same for a network of timm. Raises `Failure` where timm is not installed."""
    if importlib.util.find_spec("timm") is None:
        raise Failure("backbone=timm: the timm package is not installed; uv sync --extra timm (or pip install timm)")
    import timm

    refuse_unknown(name, timm.list_models(), "timm")
    network = timm.create_model(name, pretrained=False, num_classes=num_classes)
    made = checked(Timm(network, num_classes), name)
    made.network = prepared(network, conv, num_classes, pretrained, keep, init, noise)
    return made


def refuse_unknown(name: str, known: list[str], library: str) -> None:
    if name not in known:
        close = ", ".join(difflib.get_close_matches(str(name), known, n=4, cutoff=0.4)) or "none"
        raise OptionError("backbone.name", name, f"no classification network of {library} is called so; near: {close}")


def prepared(
    network: nn.Module,
    conv: Conv,
    num_classes: int,
    pretrained: str | None,
    keep: Iterable[str] | None,
    init: str,
    noise: float,
) -> nn.Module:
    """Weights from the file, then the conversion, then the noise."""
    if pretrained is None:
        return replaced(network, conv, keep, "kaiming" if init == "auto" else init)
    load_pretrained(network, pretrained, num_classes)
    made = replaced(network, conv, keep, "fit" if init == "auto" else init)
    disturb(made, noise)
    return made


class Torchvision(nn.Module):
    """A torchvision network cut before its global pool: `head(features(x))` is its own forward pass."""

    made_for = 224

    def __init__(self, network: nn.Module, num_classes: int):
        super().__init__()
        self.network, self.num_classes = network, num_classes
        self.classifier = f"network.{last_layer(network, num_classes)}"
        names = [name for name, _ in network.named_children()]
        cut = next((k for k, n in enumerate(names) if n in ("avgpool", "dropout", "classifier", "fc")), len(names))
        self.trunk, self.tail = names[:cut], [name for name in names[cut:] if name != "avgpool"]
        inside = [type(m) for name in self.tail for m in network.get_submodule(name).modules()]
        self.pools_itself, self.flattens_itself = nn.AdaptiveAvgPool2d in inside, nn.Flatten in inside

    def features(self, x: Tensor) -> Tensor:
        if getattr(self.network, "transform_input", False):
            x = self.network._transform_input(x)
        for name in self.trunk:
            x = getattr(self.network, name)(x)
        return F.relu(x) if isinstance(self.network, torchvision.models.DenseNet) else x

    def head(self, features: Tensor) -> Tensor:
        x = features
        if not self.pools_itself:
            pool = getattr(self.network, "avgpool", None)
            x = x.mean((2, 3), keepdim=True) if pool is None else pool(x)
            x = x if self.flattens_itself else x.flatten(1)
        for name in self.tail:
            x = getattr(self.network, name)(x)
        return x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Timm(nn.Module):
    """A timm network, which says itself where its features end."""

    made_for = 224

    def __init__(self, network: nn.Module, num_classes: int):
        super().__init__()
        self.network, self.num_classes = network, num_classes
        self.classifier = f"network.{last_layer(network, num_classes)}"

    def features(self, x: Tensor) -> Tensor:
        return self.network.forward_features(x)

    def head(self, features: Tensor) -> Tensor:
        return self.network.forward_head(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def checked(backbone: Torchvision | Timm, name: str) -> nn.Module:
    """Sets `num_features`; `OptionError` unless the network has a 4-D last feature map and the head that follows it.

    Whether the cut is right the network itself decides: its own forward pass must give the same logits.
    """
    x = torch.linspace(-2, 2, 3 * PROBE * PROBE).view(1, 3, PROBE, PROBE)
    training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            maps = backbone.features(x)
            same = maps.ndim == 4 and torch.allclose(backbone.head(maps), backbone.network(x), atol=1e-5, rtol=1e-4)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise no_maps(name) from error
    if not same or maps.shape[1] != getattr(backbone.network, "num_features", maps.shape[1]):
        raise no_maps(name)
    backbone.num_features = maps.shape[1]
    backbone.train(training)
    return backbone


def no_maps(name: str) -> OptionError:
    allowed = "has no 4-D last feature map (N, C, H, W) with a head behind it (a transformer?): the teacher needs one"
    return OptionError("backbone.name", name, allowed)


def check_image_size(backbone: nn.Module, image_size: tuple[int, int, int], name: str) -> None:
    """`OptionError` where the images are too large for a network made for small ones, or too small for its strides."""
    _, height, width = image_size
    if backbone.made_for <= LARGEST_FOR_SMALL < max(height, width):
        allowed = f"is made for {backbone.made_for} x {backbone.made_for} pictures, and these have {height} x {width}"
        raise OptionError("backbone", name, f"{allowed}; resnet18 and its like are made for larger ones")
    stride = stride_of(backbone)
    fits = min(height, width) >= stride
    if fits:
        try:
            copy.deepcopy(backbone).to("meta").eval().features(torch.empty(1, 3, height, width, device="meta"))
        except RuntimeError:  # a convolution or pool without padding has nothing left to work on
            fits = False
    if not fits:
        raise OptionError("backbone", name, f"pictures of {height} x {width} are too small: its stride is {stride}")


def stride_of(backbone: nn.Module) -> int:
    """How many pixels of the image's side one of the last feature map's stands for; nothing is computed."""
    side = 1024
    copied = copy.deepcopy(backbone).to("meta").eval()
    return side // copied.features(torch.empty(1, 3, side, side, device="meta")).shape[-1]
