"""The feature maps at the ends of networks' stages, which hooks record during a forward pass."""

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from odcheap.models.wrapped_network import Call, try_network
from odcheap.utils.errors import OptionError

MIN_STAGE_CONVS = 2  # a lone convolution at a resolution is a stem


class StageRecorder:
    """Records the feature maps at the ends of the stages of several networks, with hooks, during forward passes.

    A stage is what a network computes at one resolution; see `find_stages`. The last stages of each network are
    recorded, as many as the network with the fewest stages has.

    Args:
        networks: Networks (N, C, H, W) -> logits (N, K). Nothing is changed in them until they are recorded.
        option: The option that asks for feature maps, such as `method.feature`, for the error message.
        value: Its value.

    Attributes:
        calls: For each network the calls of modules whose outputs are recorded, from the first stage to the last.

    Raises:
        OptionError: A network has no stages, as a transformer.

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
        """For each network the number of channels of each recorded feature map, from the first stage to the last."""
        return [[call.shape[1] for call in calls] for calls in self.calls]

    @contextmanager
    def record(self) -> Generator[list[list[Tensor]]]:
        """A context manager for one forward pass of each network; it returns a list, which is empty at first.

        When the context ends, the list contains for each network the list of its feature maps (N, C, h, w), one for
        each stage.
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
    """Returns the calls of a network's modules whose outputs are the feature maps at the ends of its stages.

    The end of a stage is the last feature map (N, C, h, w) of one size that a module returns; a forward pass of a trial
    image shows which one that is. Modules inside of others do not count if the outer ones return such a map, since the
    first block of the next stage begins at the old resolution. A resolution at which there is a single convolution,
    such as the stem of a network for large images, is no stage, and neither is a map of one pixel.

    Args:
        network: Any network (N, C, H, W) -> logits (N, K).

    Returns:
        The calls from the first stage to the last; an empty list if there are none.
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
