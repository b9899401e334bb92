"""Local files of published weights into a standard network, and how students made from one file come to differ."""

import re

import torch
from torch import Tensor, nn

from odcheap.layers.cheap_conv import CheapConv
from odcheap.models.convert import spatial_convs
from odcheap.runs.load import refuse_difference
from odcheap.utils.errors import OptionError
from odcheap.utils.files import read_safetensors, read_torch

AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # GoogLeNet's and Inception's extra classifiers, used in training only


def disturb(network: nn.Module, noise: float) -> None:
    """Adds Gaussian noise of `noise` times each weight's own spread to the converted layers.

    Students that start from one file would otherwise be equal and, seeing the same batches, stay so. In a network that
    was not converted the convolutions with more than one tap are disturbed.
    """
    pairs = [m for m in network.modules() if isinstance(m, CheapConv)]
    with torch.no_grad():
        for module in pairs or spatial_convs(network).values():
            for p in module.parameters():
                if p.ndim == 4:
                    p += noise * p.std() * torch.randn_like(p)


def load_pretrained(
    network: nn.Module, path: str, num_classes: int, option: str = "backbone.pretrained", new_head: bool = True
) -> None:
    """Copies a state dict's tensors; with `new_head` a classifier of another size stays new.

    Raises `OptionError`, nothing changed; `option` says what asked for the file.
    """
    content = read_safetensors(path, option)[0] if str(path).endswith(".safetensors") else read_torch(path, option)
    for wrapper in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    tensors = {renamed(name): t for name, t in content.items() if isinstance(t, Tensor)}
    state = {name: t for name, t in tensors.items() if not name.startswith(AUXILIARY)}
    own = network.state_dict()
    last = f"{last_layer(network, num_classes)}."
    if new_head and any(
        name in own and state[name].shape != own[name].shape for name in state if name.startswith(last)
    ):
        state |= {name: t for name, t in own.items() if name.startswith(last)}
    counters = {name: t for name, t in own.items() if name.endswith("num_batches_tracked")}  # old files have none
    state = counters | state
    refuse_difference(own, state, path, "weights of another network", option)
    network.load_state_dict(state)


def renamed(name: str) -> str:
    """Today's name of a tensor: without a parallel wrapper's prefix; torchvision's first DenseNets had more dots."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", name.removeprefix("module."))


def last_layer(network: nn.Module, num_classes: int) -> str:
    """The name of the layer that gives the logits."""
    named = [(name, m) for name, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    found = next((name for name, m in reversed(named) if m.weight.shape[0] == num_classes), None)
    if found is None:
        raise OptionError("backbone", type(network).__name__, "has no linear layer that gives the logits")
    return found
