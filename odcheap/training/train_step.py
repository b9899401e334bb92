"""One training step, and the same as a CUDA graph: recorded once, then replayed without a word from Python.

A step of several small networks is thousands of small kernels; on a GPU starting them takes longer than running them.
"""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from odcheap.methods.base import Method
from odcheap.utils.errors import first_line

ALIKE = 0.05  # bfloat16 and sums in changing order stay far below, a stale or missing part far above
WARM_UP = 3  # plain steps with each shape of batch, in which libraries choose their kernels and momentum is made


class Taken(NamedTuple):
    """What a step leaves: loss terms, the method's outputs, and whether every gradient was finite (a scalar)."""

    terms: dict[str, Tensor]
    outputs: dict[str, Tensor | None]
    finite: Tensor


def single_precision(outputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Losses and figures are computed in float32 where the network ran in bfloat16."""
    return {name: t.float() if t is not None and t.dtype == torch.bfloat16 else t for name, t in outputs.items()}


def all_finite(network: nn.Module) -> Tensor:
    """Whether every gradient is finite; a scalar on their device, which nobody has to wait for."""
    return torch.isfinite(get_total_norm([p.grad for p in network.parameters() if p.grad is not None]))


def take(method: Method, optimizer: torch.optim.Optimizer, images: Tensor, target: Tensor) -> Taken:
    """A whole training step on images (N, C, H, W) and labels (N,), under whatever autocast is in force."""
    optimizer.zero_grad(set_to_none=True)
    outputs = single_precision(method(images))
    with torch.autocast(images.device.type, enabled=False):  # losses in float32; backward follows the forward pass
        terms = method.loss(outputs, target)
        terms["loss"].backward()
        finite = all_finite(method)
        optimizer.step()
        method.after_step()
    kept = {name: t if t is None else t.detach() for name, t in outputs.items()}
    return Taken({name: term.detach() for name, term in terms.items()}, kept, finite)


class CudaGraphs:
    """Runs work on a stream of its own, or records it there as a CUDA graph."""

    def __init__(self):
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def run(self, work: Callable[[], Taken]) -> Taken:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            done = work()
        torch.cuda.current_stream().wait_stream(self.stream)
        return done

    def record(self, work: Callable[[], Taken]) -> tuple[Callable[[], None], Taken]:
        """What replays the work, and where each replay leaves its results. Nothing is computed yet."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: loaders of pictures pin memory in threads of their own meanwhile
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            done = work()
        return graph.replay, done


class Recording(NamedTuple):
    """A step that can be replayed: its inputs' places, its learning rates' places, its results' places."""

    images: Tensor
    target: Tensor
    rates: list[Tensor]
    replay: Callable[[], None]
    taken: Taken


class CapturedStep:
    """`take`, recorded for each shape of batch after some plain steps with it. Results last until the next call.

    Before a recording is used it is replayed beside a plain step from the same weights, and must change them alike.
    Where it does not, or where the step cannot be recorded (it waits for the GPU, for instance), `refused` is told why
    and the steps stay plain.
    """

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        graphs: CudaGraphs,
        refused: Callable[[str], None],
    ):
        self.method, self.optimizer, self.graphs, self.refused = method, optimizer, graphs, refused
        self.seen: Counter[tuple[int, ...]] = Counter()
        self.recordings: dict[tuple[int, ...], Recording] = {}
        self.plain_only = False

    def __call__(self, images: Tensor, target: Tensor) -> Taken:
        shape = tuple(images.shape)
        self.seen[shape] += 1
        if shape not in self.recordings and self.seen[shape] > WARM_UP and not self.plain_only:
            self.try_recording(shape, images, target)
        if shape in self.recordings:
            return self.replayed(self.recordings[shape], images, target)
        return self.plain(images, target)

    def plain(self, images: Tensor, target: Tensor) -> Taken:
        return self.graphs.run(lambda: take(self.method, self.optimizer, images, target))

    def replayed(self, recording: Recording, images: Tensor, target: Tensor) -> Taken:
        recording.images.copy_(images)
        recording.target.copy_(target)
        for rate, group in zip(recording.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        recording.replay()
        return recording.taken

    def try_recording(self, shape: tuple[int, ...], images: Tensor, target: Tensor) -> None:
        try:
            expected = self.change(lambda: self.plain(images, target))
            recording = self.recorded(images, target)
            found = self.change(lambda: self.replayed(recording, images, target))
        except RuntimeError as error:
            self.plain_only = True
            self.refused(first_line(error.__context__ or error))  # leaving the recording fails too, and says less
            return
        apart = max(relative(a, b) for a, b in zip(found, expected, strict=True))
        if apart < ALIKE:
            self.recordings[shape] = recording
        else:
            self.plain_only = True
            self.refused(f"its replay changes the weights otherwise than a plain step, by {apart:.1%}")

    def recorded(self, images: Tensor, target: Tensor) -> Recording:
        images, target = images.clone(), target.clone()
        groups = self.optimizer.param_groups
        given = [group["lr"] for group in groups]
        rates = [
            torch.full((), lr, device=images.device, dtype=torch.float32) for lr in given
        ]  # read anew by each replay
        torch.clear_autocast_cache()  # weights cast before the recording would stay as they are now
        try:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
            replay, taken = self.graphs.record(lambda: take(self.method, self.optimizer, images, target))
        finally:
            for group, lr in zip(groups, given, strict=True):
                group["lr"] = lr
            torch.clear_autocast_cache()
        return Recording(images, target, rates, replay, taken)

    def change(self, step: Callable[[], Taken]) -> list[list[Tensor]]:
        """What a step changes in weights, momentum and buffers; they and the random state are set back."""
        before = [[t.detach().clone() for t in kind] for kind in self.state()]
        device = next(self.method.parameters()).device
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                step()
            return [
                [(a.detach() - b).double() for a, b in zip(now, old, strict=True)]
                for old, now in zip(before, self.state(), strict=True)
            ]
        finally:
            with torch.no_grad():
                for old, now in zip(before, self.state(), strict=True):
                    for a, b in zip(now, old, strict=True):
                        a.copy_(b)

    def state(self) -> list[list[Tensor]]:
        momentum = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return [list(self.method.parameters()), momentum, list(self.method.buffers())]


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    """The distance of two lists of tensors over the length of the second."""
    if not expected:
        return 0.0
    apart = get_total_norm([a - b for a, b in zip(found, expected, strict=True)])
    length = get_total_norm(expected)
    return (apart / length).item() if length > 0 else apart.item()
