"""Converts any convolutional network: replaces its standard K x K convolutions by cheap convolutions.

A cheap convolution, also called a pair, is a `CheapConv`: a spatial operator, then a 1 x 1 convolution.
"""

import contextlib
import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from odcheap.layers.cheap_conv import BlockType, CheapConv, check_block_type
from odcheap.layers.spatial import Window
from odcheap.models import flops
from odcheap.models.backbone import (
    copy_network,
    copy_to_meta,
    find_convs,
    find_stem_channels,
    make_trial_images,
    record_calls,
)
from odcheap.utils.errors import OptionError, first_line
from odcheap.utils.parts import build_part, read_part

Init = Literal["auto", "fit", "kaiming"]
PROBE_SIDES = (64, 32, 224, 28)  # pixels of images on which a network is tried
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def cheapen(
    model: nn.Module,
    block_type: str | BlockType,
    *,
    groups: int = 4,
    keep: Iterable[str] | None = None,
    init: Init = "auto",
    config_dirs: Sequence[Path] = (),
) -> nn.Module:
    """Returns a copy of a network with cheap convolutions (`CheapConv`) in place of its standard K x K convolutions.

    A `CheapConv` is a spatial operator, which has the kernel size, stride, dilation and padding of the replaced
    convolution, and then a 1 x 1 convolution, which has its number of output channels and its bias. All shapes stay the
    same, and all other layers keep their weights.

    Some convolutions are not replaced: those with groups, with hooks, or of other classes than `nn.Conv2d`, those whose
    weights are shared with other layers or computed from other tensors, and those whose weights the network's code
    reads without calling them. The last kind is found only if the network takes images of a usual size, such as
    64 x 64. In the copy each of these convolutions has an attribute `reason_kept`, a text that says why.

    Args:
        model: The network; it is not changed.
        block_type: The kind of cheap convolution: "Shift", "DW" (depth-wise), "RepDW" (depth-wise with three branches
            in training), "Group" (grouped), a name from `config_dirs`, or a `BlockType` object.
        groups: The number of groups of "Group". A layer whose number of channels it does not divide gets the largest
            divisor of this number that is smaller than `groups`.
        keep: Convolutions that should not be replaced: a list of their names, of names of modules that contain them, or
            of patterns such as `layer4.*`. None keeps the stem, which is the network's first convolution. () keeps
            none.
        init: How the weights of the cheap convolutions are set. "fit" computes the least-squares approximation of the
            replaced kernel, "kaiming" draws random weights, and "auto" is "fit" if the network looks trained, otherwise
            "kaiming".
        config_dirs: Further `conf` directories with block types of your own.

    Raises:
        ValueError: There is nothing to replace, a name is unknown, or the copy cannot be run although the network can.

    Example:
        >>> import torchvision
        >>> network = torchvision.models.resnet18(num_classes=10)
        >>> student = cheapen(network, "DW")
        >>> student(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 10])
    """
    if isinstance(block_type, str):
        options = {"groups": groups} if "groups" in read_part("block_type", block_type, config_dirs) else {}
        block_type = build_part("block_type", {"part": block_type, **options}, config_dirs=config_dirs)
    check_block_type(block_type)
    if not block_type.is_cheap:
        raise OptionError("block_type", type(block_type).__name__, "is no cheap convolution")
    check_conversion_options(model, keep, init)

    # Replace all convolutions without a reason to keep them, and try the copy if a usual image size suits the network.
    fit = init == "fit" or (init == "auto" and looks_trained(model))
    reasons = find_reasons_to_keep(model, block_type, keep)
    converted = replace_convs(model, block_type, fit, reasons)
    trial = try_usual_shapes(model)
    if trial is None:
        return converted

    # Code that reads a layer's weights and does not call the layer fails with a pair: keep such layers, and try again.
    shape, called = trial
    error = find_error(converted, shape)
    if error is not None:
        uncalled = find_spatial_convs(model).keys() - called - reasons.keys()
        reasons |= dict.fromkeys(uncalled, "only its weights are used")
        converted = replace_convs(model, block_type, fit, reasons)
        error = find_error(converted, shape)
    if error is not None and not isinstance(error, NotImplementedError):  # raised by operators without a meta form
        allowed = f"{type(model).__name__} cannot be run after the conversion ({first_line(error)}); keep leaves layers"
        raise OptionError("block_type", type(block_type).__name__, allowed) from error
    return converted


def replace_convs(model: nn.Module, block_type: BlockType, fit: bool, reasons: Mapping[str, str]) -> nn.Module:
    """Returns a copy of a network in which each K x K convolution is replaced, unless `reasons` contains its name.

    Args:
        model: The network; it is not changed.
        block_type: The kind of cheap convolution.
        fit: True sets the new weights so that they approximate the replaced kernels, False draws random weights.
        reasons: A dict from the name of each convolution that is not replaced to the reason, a text. Its copy gets the
            text as the attribute `reason_kept`.

    Raises:
        OptionError: There is nothing to replace: `reasons` contains all convolutions.
    """
    # Build a pair for each convolution of the copy.
    converted = copy_network(model)
    convs: dict[str, Any] = find_spatial_convs(converted)
    for name, reason in reasons.items():
        convs[name].reason_kept = reason
    pairs: dict[Any, CheapConv] = {
        conv: make_pair(conv, block_type, fit) for name, conv in convs.items() if name not in reasons
    }
    if not pairs:
        examples = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
        allowed = f"nothing to replace in {type(model).__name__} ({examples})"
        raise OptionError("block_type", type(block_type).__name__, allowed)

    # Replace each convolution in all modules that hold it.
    if converted in pairs:
        return pairs[converted]
    for parent in converted.modules():
        for name, child in parent._modules.items():  # named_children lists a shared layer once only
            if child in pairs:
                parent._modules[name] = pairs[child]
    return converted


def try_usual_shapes(model: nn.Module) -> tuple[tuple[int, int, int], set[str]] | None:
    """Runs a network on images of usual sizes, such as 64 x 64, until one works.

    Returns:
        A tuple: the shape (C, H, W) of the image that worked, and the names of the modules that were called. None if no
        size works.
    """
    for side in PROBE_SIDES:
        shape = (find_stem_channels(model), side, side)
        with contextlib.suppress(Exception):  # the network's own code may raise anything
            return shape, list_called_modules(model, shape)
    return None


def find_error(model: nn.Module, shape: tuple[int, int, int]) -> Exception | None:
    """Runs a network on an image with the shape (C, H, W); returns the error that it raises, or None."""
    try:
        list_called_modules(model, shape)
    except Exception as error:  # the network's own code may raise anything
        return error
    return None


def list_called_modules(model: nn.Module, shape: tuple[int, int, int]) -> set[str]:
    """Returns the names of the modules that a network calls for an image with the shape (C, H, W).

    A copy is run on the meta device, which computes shapes only.
    """
    network = copy_to_meta(model)
    return {call.name for call in record_calls(network, make_trial_images(network, 1, *shape))[0]}


def check_conversion_options(model: nn.Module, keep: Iterable[str] | None, init: str) -> None:
    """Raises `OptionError` if the argument `keep` or `init` of `cheapen` is not valid.

    Args:
        model: The network that will be converted.
        keep: Names of layers, or patterns such as `layer1.*`, each of which must select a K x K convolution; None for
            the default of `cheapen`.
        init: Must be "auto", "fit" or "kaiming".
    """
    if init not in get_args(Init):
        raise OptionError("init", init, f"must be one of {', '.join(get_args(Init))}")
    if keep is not None:
        match_names(list(find_spatial_convs(model)), keep)


def find_spatial_convs(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Returns a dict from the name of each `nn.Conv2d` with a kernel larger than 1 x 1 to the module, in order."""
    return {name: conv for name, conv in find_convs(model).items() if max(conv.kernel_size) > 1}


def find_reasons_to_keep(model: nn.Module, block_type: BlockType, keep: Iterable[str] | None) -> dict[str, str]:
    """Returns a dict from the name of each K x K convolution that must not be replaced to the reason, a text.

    Args:
        model: The network.
        block_type: The kind of cheap convolution; its method `reason_to_keep` is asked too.
        keep: Convolutions that the user does not want to replace: names, or patterns such as `layer1.*`. None for the
            network's first convolution.
    """
    convs = find_spatial_convs(model)
    chosen = set([*find_convs(model)][:1]) if keep is None else match_names(list(convs), keep)
    # A parameter that several modules have is counted several times.
    reasons = {}
    owners = Counter(id(value) for module in model.modules() for value in module._parameters.values())
    for name, conv in convs.items():
        # A subclass of `nn.Conv2d`, or a hook, may do more than the convolution that a pair would replace.
        hooks = (conv._forward_hooks, conv._forward_pre_hooks, conv._backward_hooks, conv._backward_pre_hooks)
        is_own_class = type(conv).forward is not nn.Conv2d.forward
        is_own_class |= type(conv)._conv_forward is not nn.Conv2d._conv_forward
        if name in chosen:
            reasons[name] = "the stem" if keep is None else "named in keep"
        elif conv.groups > 1:
            reasons[name] = f"in {conv.groups} groups already"
        elif is_own_class:
            reasons[name] = f"a {type(conv).__name__} computes in a way of its own"
        elif "weight" not in conv._parameters:
            reasons[name] = "its weights are computed from others"
        elif owners[id(conv.weight)] > 1:
            reasons[name] = "its weights are shared with another layer"
        elif any(hooks):
            reasons[name] = "it has hooks"
        elif reason := block_type.reason_to_keep(conv.in_channels, Window.from_conv(conv)):
            reasons[name] = reason
    return reasons


def match_names(names: list[str], patterns: Iterable[str]) -> set[str]:
    """Returns those of the given names of convolutions that at least one pattern selects.

    Args:
        names: The names of all convolutions.
        patterns: Patterns such as `layer4.*`, names of convolutions, or names of modules that contain convolutions.

    Raises:
        OptionError: A pattern selects no convolution, or is no text.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, Iterable) or not all(isinstance(pattern, str) for pattern in patterns):
        raise OptionError("keep", patterns, "must be a list of names or patterns")
    matched = set()
    for pattern in patterns:
        matches = {name for name in names if fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")}
        if not matches:
            similar = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            allowed = f"no K x K convolution has this name; similar: {', '.join(similar) or 'none'}"
            raise OptionError("keep", pattern, allowed)
        matched |= matches
    return matched


def looks_trained(model: nn.Module) -> bool:
    """Returns True if a network looks trained: its weights do not look like PyTorch's initial weights.

    A network with normalization layers looks trained if at least one value in all their running means and biases is not
    zero. A network without normalization layers looks trained if at least one of its convolutions has both a bias that
    is not zero and a weight outside of the range of PyTorch's default initialization.
    """
    norms = [module for module in model.modules() if isinstance(module, NORMS) or hasattr(module, "running_mean")]
    values = [getattr(norm, name, None) for norm in norms for name in ("running_mean", "bias")]
    values = [value for value in values if value is not None]
    if values:
        return any(bool(value.any()) for value in values)
    for conv in find_spatial_convs(model).values():
        bound = 1.0001 * conv.weight[0].numel() ** -0.5
        if conv.bias is not None and bool(conv.bias.any()) and conv.weight.abs().max() > bound:
            return True
    return False


@torch.no_grad()
def make_pair(conv: nn.Conv2d, block_type: BlockType, fit: bool) -> CheapConv:
    """Returns a new `CheapConv` that can replace a convolution, with the same device, dtype and mode.

    Args:
        conv: The convolution that will be replaced.
        block_type: The kind of cheap convolution.
        fit: If True, the new weights are the least-squares approximation of the kernel of `conv`, and the bias is
            copied. If False, the weights are Kaiming-normal and the bias is zero.
    """
    # Random weights first: those that the factorization leaves open keep them.
    has_bias = conv.bias is not None
    pair = block_type.make_pair(conv.in_channels, conv.out_channels, Window.from_conv(conv), has_bias).to(conv.weight)
    pair.train(conv.training)
    for parameter in pair.spatial.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="linear")  # no non-linearity follows
    nn.init.kaiming_normal_(pair.pointwise.weight)
    if conv.bias is not None and pair.pointwise.bias is not None:
        pair.pointwise.bias.copy_(conv.bias) if fit else pair.pointwise.bias.zero_()

    # NaN in the spatial weights stands for a value that the kernel does not determine.
    if fit:
        spatial, pointwise = block_type.factorize(conv.weight, pair)
        pair.pointwise.weight.copy_(pointwise)
        if spatial is not None:
            fresh: Any = pair.spatial.weight
            fresh.copy_(torch.where(spatial.isnan(), fresh, spatial))
    return pair.requires_grad_(conv.weight.requires_grad)


@dataclass(frozen=True)
class ConvertedLayer:
    """A row of a `ConversionTable`: a K x K convolution before and after `cheapen` replaced it or kept it.

    Attributes:
        name: The name of the convolution in the network.
        before: A short description of the layer before the conversion.
        after: A short description of the layer after the conversion; if it was kept, this says why.
        params: The numbers of parameters, (before, after).
        macs: The numbers of multiply-accumulates for one image, (before, after).
    """

    name: str
    before: str
    after: str
    params: tuple[int, int]
    macs: tuple[int, int]


@dataclass(frozen=True)
class ConversionTable:
    """A table of the convolutions that `cheapen` replaced or kept; `print` shows it with aligned columns.

    Attributes:
        rows: A row for each K x K convolution (larger than 1 x 1), in the network's order.
        params: The numbers of parameters of the whole network, (before, after).
        macs: The numbers of multiply-accumulates of the whole network for one image, (before, after).
    """

    rows: list[ConvertedLayer]
    params: tuple[int, int]
    macs: tuple[int, int]

    def __str__(self) -> str:
        lines = [("layer", "before", "after", "parameters", "after", "MACs", "after")]
        for row in [*self.rows, ConvertedLayer("the whole network", "", "", self.params, self.macs)]:
            lines.append((row.name, row.before, row.after, *(f"{number:,}" for number in row.params + row.macs)))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = ([f"{c:{a}{w}}" for c, a, w in zip(line, "<<<>>>>", widths, strict=True)] for line in lines)
        return "\n".join("  ".join(line).rstrip() for line in aligned)


def conversion_table(
    before: nn.Module, after: nn.Module, image_size: tuple[int, int, int] = (3, 224, 224)
) -> ConversionTable:
    """Returns a table of the convolutions that `cheapen` replaced or kept, with parameters and multiply-accumulates.

    Args:
        before: The network before the conversion, the argument of `cheapen`.
        after: The network after the conversion, the result of `cheapen`.
        image_size: (C, H, W) of the image for which multiply-accumulates (MACs) are counted.

    Example:
        >>> before = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, bias=False))
        >>> table = conversion_table(before, cheapen(before, "DW"), (3, 32, 32))
        >>> table.rows[1].after, table.rows[1].params
        ('depth-wise + 1 x 1', (4608, 656))
    """
    macs = [flops.count_macs_by_module(network, image_size) for network in (before, after)]
    rows = []
    for name, conv in find_spatial_convs(before).items():
        replaced = after.get_submodule(name)
        params = (flops.count_params(conv), flops.count_params(replaced))
        costs = (macs[0].get(name, 0), macs[1].get(name, 0))
        rows.append(ConvertedLayer(name, describe_layer(conv), describe_layer(replaced), params, costs))
    params = (flops.count_params(before), flops.count_params(after))
    return ConversionTable(rows, params, (macs[0][""], macs[1][""]))


def describe_layer(layer: nn.Module) -> str:
    """Returns a short description of a layer, such as "3 x 3", "depth-wise + 1 x 1" or "kept: the stem"."""
    if isinstance(layer, CheapConv):
        return f"{describe_layer(layer.spatial)} + 1 x 1"
    if not isinstance(layer, nn.Conv2d):
        return getattr(layer, "description", type(layer).__name__)
    if hasattr(layer, "reason_kept"):
        return f"kept: {layer.reason_kept}"
    if layer.groups > 1:
        return "depth-wise" if layer.groups == layer.in_channels else f"groups {layer.groups}"
    return f"{layer.kernel_size[0]} x {layer.kernel_size[1]}"
