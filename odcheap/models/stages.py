"""The feature maps at the ends of a network's stages, which hooks record during a forward pass."""

from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from odcheap.models.wrapped_network import Call, try_network

MIN_STAGE_CONVS = 2  # a lone convolution at a resolution is a stem


class StageRecorder:
    """Records the feature maps at the ends of a network's stages, with hooks, during forward passes.

    A stage is what a network computes at one resolution. Its end is the last feature map (N, C, h, w) of this size that
    a module returns; a forward pass of a trial image shows which one that is. Modules inside of others do not count
    if the outer ones return such a map, since the first block of the next stage begins at the old resolution. A
    resolution at which there is a single convolution, such as the stem of a network for large images, is no stage, and
    neither is a map of one pixel.

    Args:
        network: Any network (N, C, H, W) -> logits (N, K). Nothing is changed in it until it is recorded.

    Attributes:
        calls: The calls of modules whose outputs are recorded (see `wrapped_network.Call`), from the first stage to the
            last; empty if the network has no stages, as a transformer.

    Example:
        >>> import torch
        >>> from odcheap.layers.cheap_conv import DW
        >>> from odcheap.models.cifar import CifarResNet
        >>> network = CifarResNet(8, DW(), num_classes=10)
        >>> recorder = StageRecorder(network)
        >>> recorder.channels
        [16, 32, 64]
        >>> with recorder.record() as maps:
        ...     logits = network(torch.zeros(1, 3, 32, 32))
        >>> [tuple(stage.shape) for stage in maps]
        [(1, 16, 32, 32), (1, 32, 16, 16), (1, 64, 8, 8)]
    """

    def __init__(self, network: nn.Module):
        self.network = network
        ends: dict[tuple[int, ...], Call] = {}
        convs: defaultdict[tuple[int, ...], int] = defaultdict(int)
        for call in try_network(network)[0]:
            size = call.shape[2:]
            if len(size) == 2 and size[0] * size[1] > 1:
                if size not in ends or call.name.count(".") <= ends[size].name.count("."):
                    ends[size] = call
                convs[size] += isinstance(network.get_submodule(call.name), nn.Conv2d)
        self.calls = [call for size, call in ends.items() if convs[size] >= MIN_STAGE_CONVS]

    @property
    def channels(self) -> list[int]:
        """The number of channels of each recorded feature map, from the first stage to the last."""
        return [call.shape[1] for call in self.calls]

    @contextmanager
    def record(self) -> Generator[list[Tensor]]:
        """A context manager for one forward pass of the network; it returns a list, which is empty at first.

        When the context ends, the list contains the feature maps (N, C, h, w) of that forward pass, one for each stage.
        """
        outputs: defaultdict[str, list[Any]] = defaultdict(list)
        maps: list[Tensor] = []

        def keep(name: str) -> Any:
            return lambda module, inputs, output: outputs[name].append(output)

        names = dict.fromkeys(call.name for call in self.calls)
        handles = [self.network.get_submodule(name).register_forward_hook(keep(name)) for name in names]
        try:
            yield maps
            maps += [outputs[call.name][call.number] for call in self.calls]
        finally:
            for handle in handles:
                handle.remove()
