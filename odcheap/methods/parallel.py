"""How the S students of one architecture run: each way gives the same maps and logits within rounding.

A way is called with the students and a view of the images for each, (N, C, H, W), and returns their S last feature
maps and their logits (S, N, K). Which is fastest is a matter of the device: `python -m odcheap.bench`.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.func import functional_call

from odcheap.utils.errors import OptionError
from odcheap.utils.seeds import derive_seed

Maps = tuple[list[Tensor], Tensor]


def sequential(members: Sequence[nn.Module], views: Sequence[Tensor]) -> Maps:
    """One after another. On a CPU each draws (dropout) from a stream of its own in training, whoever runs beside it."""
    features, logits = [], []
    apart = members[0].training and not views[0].is_cuda  # a CUDA graph draws from the one generator it was made with
    base = int(torch.randint(2**62, ())) if apart else 0
    with torch.random.fork_rng(devices=[], enabled=apart):
        for k, (student, view) in enumerate(zip(members, views, strict=True)):
            if apart:
                torch.manual_seed(derive_seed(base, "student", k))
            features.append(student.features(view))
            logits.append(student.head(features[-1]))
    return features, torch.stack(logits)


def streams(members: Sequence[nn.Module], views: Sequence[Tensor]) -> Maps:
    """Each student on a CUDA stream of its own: in a CUDA graph they become parallel branches.

    The backward pass follows by itself, since autograd runs each operation on the stream of its forward pass. On a CPU,
    where costs are counted after training, there are no streams and they run one after another.
    """
    if not views[0].is_cuda:
        return sequential(members, views)
    here, features, logits = torch.cuda.current_stream(), [], []
    beside = streams_of(views[0].device, len(members))
    for student, view, stream in zip(members, views, beside, strict=True):
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            features.append(student.features(view))
            logits.append(student.head(features[-1]))
    for stream in beside:
        here.wait_stream(stream)
    return features, torch.stack(logits)


@lru_cache
def streams_of(device: torch.device, count: int) -> tuple[torch.cuda.Stream, ...]:
    """The same in every step: memory is kept for each stream."""
    return tuple(torch.cuda.Stream(device) for _ in range(count))


def check(way: Callable[..., Maps], device: torch.device) -> None:
    """`OptionError` where this way cannot run on this device."""
    if getattr(way, "func", way) is streams and device.type != "cuda":
        raise OptionError("together", "streams", f"needs a CUDA device; the run is on {device}")


def vmap(members: Sequence[nn.Module], views: Sequence[Tensor]) -> Maps:
    """All as one batched network: `torch.vmap` over their stacked weights, with convolutions in groups."""
    network = Both(members[0])
    weights = stacked([dict(Both(m).named_parameters()) for m in members])
    buffers = stacked([dict(Both(m).named_buffers()) for m in members])

    def one(weights: dict[str, Tensor], buffers: dict[str, Tensor], view: Tensor) -> tuple[Tensor, Tensor]:
        return functional_call(network, (weights, buffers), (view,))

    features, logits = torch.vmap(one, randomness="different")(weights, buffers, torch.stack(list(views)))
    for k, student in enumerate(members):  # batch norm has written its statistics into the stacked copies
        for name, buffer in Both(student).named_buffers():
            buffer.copy_(buffers[name][k])
    return list(features), logits


class Both(nn.Module):
    """A student whose forward pass gives its last map and its logits."""

    def __init__(self, student: nn.Module):
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.student.features(images)
        return features, self.student.head(features)


def stacked(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def auto(members: Sequence[nn.Module], views: Sequence[Tensor]) -> Maps:
    """On streams where the step becomes a CUDA graph, else one after another, which wins on CPUs by far."""
    capturing = views[0].is_cuda and torch.cuda.is_current_stream_capturing()
    return streams(members, views) if capturing else sequential(members, views)


WAYS = {"auto": auto, "sequential": sequential, "streams": streams}  # by the values of the option `together`
