"""Any convolutional network made cheap: its standard K x K convolutions replaced by cheap pairs."""

import copy
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from odcheap.layers.cheap_conv import DW, Cheap, CheapConv, Group, Shift, Window
from odcheap.models import flops
from odcheap.utils.errors import OptionError

INITS = ("auto", "fit", "kaiming")
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def cheapen(
    model: nn.Module,
    block_type: str,
    *,
    groups: int = 4,
    keep: Iterable[str] | None = None,
    init: str = "auto",
) -> nn.Module:
    """A new network in which cheap pairs stand for the standard K x K convolutions; the given one stays as it is.

    `block_type` is "Shift", "DW" or "Group". Each pair has a spatial operator with the convolution's kernel size,
    stride, dilation and padding, then a 1 x 1 convolution with its channels and bias, so that all shapes stay the same.
    `keep` names the convolutions to leave, or modules that hold them, or patterns (`layer4.*`); None keeps the stem,
    which is the network's first convolution, and () keeps none. `init`: "fit" sets each pair to the kernel nearest to
    the replaced one, "kaiming" starts anew, "auto" fits where the network has been trained. All else keeps its weights.

    Raises `ValueError`: nothing to replace, an unknown name.
    """
    parts: dict[str, Cheap] = {"Shift": Shift(), "DW": DW(), "Group": Group(groups)}
    if block_type not in parts:
        raise OptionError("block_type", block_type, f"must be one of {', '.join(parts)}")
    return replace(model, parts[block_type], keep, init)


def replace(model: nn.Module, block_type: Cheap, keep: Iterable[str] | None = None, init: str = "auto") -> nn.Module:
    """`cheapen` with the block type itself. A layer that is kept says why in its attribute `kept`."""
    check(model, keep, init)
    fitted = init == "fit" or (init == "auto" and was_trained(model))
    after = copy.deepcopy(model)
    reasons = why_kept(after, block_type, keep)
    convs = spatial_convs(after)
    for name, reason in reasons.items():
        convs[name].kept = reason
    pairs = {convs[name]: paired(convs[name], block_type, fitted) for name in convs if name not in reasons}
    if not pairs:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
        raise OptionError(
            "block_type", type(block_type).__name__, f"nothing to replace in {type(model).__name__} ({why})"
        )
    if after in pairs:
        return pairs[after]
    for parent in after.modules():
        for name, child in parent._modules.items():
            if child in pairs:
                parent._modules[name] = pairs[child]
    return after


def check(model: nn.Module, keep: Iterable[str] | None, init: str) -> None:
    """`OptionError` for an unknown `init`, or a name in `keep` that no convolution has."""
    if init not in INITS:
        raise OptionError("init", init, f"must be one of {', '.join(INITS)}")
    if keep is not None:
        chosen(list(spatial_convs(model)), keep)


def spatial_convs(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions with more than one tap, by name, in the network's order."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    return {name: conv for name, conv in found.items() if max(conv.kernel_size) > 1}


def why_kept(model: nn.Module, block_type: Cheap, keep: Iterable[str] | None) -> dict[str, str]:
    """Name -> reason for each convolution with more than one tap that is not replaced."""
    reasons = {}
    named = first_conv(model) if keep is None else chosen(list(spatial_convs(model)), keep)
    why = "the stem" if keep is None else "named in keep"
    for name, conv in spatial_convs(model).items():
        own = type(conv).forward is not nn.Conv2d.forward or type(conv)._conv_forward is not nn.Conv2d._conv_forward
        if name in named:
            reasons[name] = why
        elif conv.groups > 1:
            reasons[name] = f"in {conv.groups} groups already"
        elif own:
            reasons[name] = f"a {type(conv).__name__} computes in a way of its own"
        elif "weight" not in conv._parameters:
            reasons[name] = "its weights are computed from others"
        elif reason := block_type.refusal(conv.in_channels, Window.of(conv)):
            reasons[name] = reason
    return reasons


def first_conv(model: nn.Module) -> set[str]:
    return set([name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)][:1])


def chosen(names: list[str], keep: Iterable[str]) -> set[str]:
    """The names that `keep` means; `OptionError` where one of its entries means none."""
    keep = [keep] if isinstance(keep, str) else keep
    if not isinstance(keep, Iterable) or not all(isinstance(entry, str) for entry in keep):
        raise OptionError("keep", keep, "must be a list of names or patterns")
    found = set()
    for entry in keep:
        meant = {name for name in names if fnmatchcase(name, entry) or name.startswith(f"{entry}.")}
        if not meant:
            close = difflib.get_close_matches(entry, names, n=3, cutoff=0.3) or names[:3]
            raise OptionError("keep", entry, f"no K x K convolution is called so; near: {', '.join(close) or 'none'}")
        found |= meant
    return found


def was_trained(model: nn.Module) -> bool:
    """Whether normalisation has moved from where it starts.

    A network without normalisation that could tell counts as trained where a convolution's weights have left the range
    of PyTorch's default initialisation and its biases are not those of a fresh layer (zero).
    """
    norms = [m for m in model.modules() if isinstance(m, NORMS) or hasattr(m, "running_mean")]
    telling = [getattr(norm, name, None) for norm in norms for name in ("running_mean", "bias")]
    telling = [t for t in telling if t is not None]
    if telling:
        return any(bool(t.any()) for t in telling)
    for conv in spatial_convs(model).values():
        bound = 1.0001 * conv.weight[0].numel() ** -0.5
        if conv.bias is not None and bool(conv.bias.any()) and conv.weight.abs().max() > bound:
            return True
    return False


def paired(conv: nn.Conv2d, block_type: Cheap, fitted: bool) -> CheapConv:
    """The pair for one convolution, on its device and of its type, fitted or with fresh Kaiming-normal weights."""
    spatial = block_type.spatial(conv.in_channels, Window.of(conv))
    made = CheapConv(spatial, conv.in_channels, conv.out_channels, bias=conv.bias is not None).to(conv.weight)
    made.train(conv.training)
    with torch.no_grad():
        for p in spatial.parameters():
            nn.init.kaiming_normal_(p, nonlinearity="linear")  # no non-linearity follows
        nn.init.kaiming_normal_(made.pointwise.weight)
        if conv.bias is not None:
            made.pointwise.bias.copy_(conv.bias) if fitted else made.pointwise.bias.zero_()
        if fitted:
            of_spatial, of_pointwise = block_type.fit(conv.weight)
            made.pointwise.weight.copy_(of_pointwise)
            if of_spatial is not None:
                spatial.weight.copy_(torch.where(of_spatial.isnan(), spatial.weight, of_spatial))
    made.requires_grad_(conv.weight.requires_grad)
    return made


@dataclass(frozen=True)
class Row:
    """A convolution with more than one tap: what became of it, its parameters and MACs before and after."""

    name: str
    before: str
    after: str
    params: tuple[int, int]
    macs: tuple[int, int]


@dataclass(frozen=True)
class Conversion:
    """`rows` in the network's order, and the whole network's `params` and `macs`, each (before, after)."""

    rows: list[Row]
    params: tuple[int, int]
    macs: tuple[int, int]

    def __str__(self) -> str:
        lines = [("layer", "before", "after", "parameters", "after", "MACs", "after")]
        for row in [*self.rows, Row("the whole network", "", "", self.params, self.macs)]:
            lines.append((row.name, row.before, row.after, *(f"{number:,}" for number in row.params + row.macs)))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        signs = "<<<>>>>"
        cells = ([f"{c:{s}{w}}" for c, s, w in zip(line, signs, widths, strict=True)] for line in lines)
        return "\n".join("  ".join(line).rstrip() for line in cells)


def table(before: nn.Module, after: nn.Module, image_size: tuple[int, int, int] = (3, 224, 224)) -> Conversion:
    """What `cheapen` made of `before`, for one (C, H, W) image; `print` shows it as a table."""
    macs = [flops.macs_by_module(network, image_size) for network in (before, after)]
    rows = []
    for name, conv in spatial_convs(before).items():
        now = after.get_submodule(name)
        params = (flops.params(conv), flops.params(now))
        rows.append(
            Row(name, describe_layer(conv), describe_layer(now), params, (macs[0].get(name, 0), macs[1].get(name, 0)))
        )
    total = (flops.macs(before, image_size), flops.macs(after, image_size))
    return Conversion(rows, (flops.params(before), flops.params(after)), total)


def describe_layer(layer: nn.Module) -> str:
    """A layer in a few words; why it was kept, where it was."""
    if isinstance(layer, CheapConv):
        return f"{describe_layer(layer.spatial)} + 1 x 1"
    if not isinstance(layer, nn.Conv2d):
        return "shift"
    rows, columns = layer.kernel_size
    if layer.groups == 1:
        kind = f"{rows} x {columns}"
    else:
        kind = "depth-wise" if layer.groups == layer.in_channels else f"groups {layer.groups}"
    reason = getattr(layer, "kept", None)
    return f"kept: {reason}" if reason else kind
