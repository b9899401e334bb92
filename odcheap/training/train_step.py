"""One training step: in eager mode, or recorded as a CUDA graph and replayed.

A step of several small networks consists of thousands of small kernels. On a GPU it takes longer to launch them from
Python than to run them; a CUDA graph launches them all at once.
"""

from collections import Counter
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm

from odcheap.data.base import Batch
from odcheap.methods.base import Method
from odcheap.utils.errors import first_line

# Relative difference up to which a replay equals an eager step: rounding in bfloat16 and sums in changing order stay
# far below it, a stale or missing part of the computation lies far above.
TOLERANCE = 0.05
WARM_UP = 3  # eager steps with each shape of batch, in which libraries choose kernels and momentum is allocated


class StepResult(NamedTuple):
    """What a training step computed, detached from the autograd graph.

    Attributes:
        terms: The loss terms by name, scalars; `loss` is their sum.
        outputs: The method's outputs, in float32.
        finite: Whether every gradient was finite, a boolean scalar on their device; None while gradients are only
            accumulated.
        taken: Whether the optimizer's step was taken.
    """

    terms: dict[str, Tensor]
    outputs: dict[str, Tensor | None]
    finite: Tensor | None
    taken: bool


class GradientOptions(NamedTuple):
    """How a step treats its gradients; the first three are options of Lightning's `Trainer`.

    Attributes:
        accumulate_grad_batches: Batches whose gradients are averaged for one step of the optimizer.
        gradient_clip_val: Largest norm (or value) of the gradients; None does not clip.
        gradient_clip_algorithm: Whether the norm or each value is clipped.
        skip_nonfinite: Whether a step is left out where a gradient is not finite. Each step then waits for the device.
    """

    accumulate_grad_batches: Annotated[int, Field(ge=1)] = 1
    gradient_clip_val: Annotated[float, Field(ge=0)] | None = None
    gradient_clip_algorithm: Literal["norm", "value"] | None = None
    skip_nonfinite: bool = False


def to_single_precision(outputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Converts bfloat16 outputs to float32: losses and accuracies are computed in single precision."""
    return {name: t.float() if t is not None and t.dtype == torch.bfloat16 else t for name, t in outputs.items()}


def has_finite_gradients(network: nn.Module) -> Tensor:
    """Returns a boolean scalar on the gradients' device, without waiting for it."""
    return torch.isfinite(get_total_norm([p.grad for p in network.parameters() if p.grad is not None]))


class EagerStep:
    """A training step in eager mode: forward, losses, backward, clipping, optimizer, and the method's own updates.

    Args:
        method: The method to train.
        optimizer: An optimizer over its parameters.
        options: How gradients are accumulated, clipped and checked.
        scaler: The scaler of float16 training, whose scaled loss `backward` differentiates.
        backward: Computes the gradients of a loss; `Tensor.backward`, or Lightning's, which averages over processes.
    """

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        options: GradientOptions = GradientOptions(),  # noqa: B008 - immutable
        scaler: torch.amp.GradScaler | None = None,
        backward: Callable[[Tensor], None] = Tensor.backward,
    ):
        self.method, self.optimizer, self.options = method, optimizer, options
        self.scaler, self.backward = scaler, backward
        self.accumulating = False
        self.buffers: list[Tensor] = []

    def __call__(self, batch: Batch, update: bool = True) -> StepResult:
        """Trains on a batch, under the autocast in force.

        Args:
            batch: Images (N, C, H, W), or (S, N, C, H, W) with a view for each student, and labels (N,).
            update: Whether the optimizer takes a step; False only accumulates gradients.
        """
        if not self.accumulating:
            self.optimizer.zero_grad(set_to_none=True)
            if self.options.skip_nonfinite:  # a bad batch changes batch norm's statistics before its loss is known
                self.buffers = [buffer.clone() for buffer in self.method.buffers()]
        self.accumulating = not update
        outputs = to_single_precision(self.method(batch.images))
        # Losses are computed in float32; backward uses the types of the forward pass by itself.
        with torch.autocast(batch.images.device.type, enabled=False):
            terms = self.method.loss(outputs, batch.target)
            weight = batch.share / self.options.accumulate_grad_batches
            self.backward(terms["loss"] if weight == 1 else terms["loss"] * weight)
            finite, taken = self.update() if update else (None, False)
        kept = {name: t if t is None else t.detach() for name, t in outputs.items()}
        return StepResult({name: term.detach() for name, term in terms.items()}, kept, finite, taken)

    def update(self) -> tuple[Tensor, bool]:
        """Takes the optimizer's step; returns whether the gradients were finite and whether the step was taken."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        finite = has_finite_gradients(self.method)
        taken = not self.options.skip_nonfinite or bool(finite)
        if taken:
            self.clip()
            self.optimizer.step() if self.scaler is None else self.scaler.step(self.optimizer)
            self.method.after_step()
        else:
            for buffer, before in zip(self.method.buffers(), self.buffers, strict=True):
                buffer.copy_(before)
        if self.scaler is not None:
            self.scaler.update()
        return finite, taken

    def clip(self) -> None:
        limit = self.options.gradient_clip_val
        if not limit:
            return
        if self.options.gradient_clip_algorithm == "value":
            clip_grad_value_(self.method.parameters(), limit)
            return
        for parameters in self.method.clip_groups():
            clip_grad_norm_(parameters, limit)


class CudaGraphs:
    """Runs work on a CUDA stream of its own, or records it there as a CUDA graph."""

    def __init__(self) -> None:
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def run(self, work: Callable[[], StepResult]) -> StepResult:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = work()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def record(self, work: Callable[[], StepResult]) -> tuple[Callable[[], None], StepResult]:
        """Records the work without computing anything.

        Returns:
            A function that replays it, and the result whose tensors each replay overwrites.
        """
        graph = torch.cuda.CUDAGraph()
        # thread_local: data loaders pin memory in threads of their own meanwhile
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            result = work()
        return graph.replay, result


class Recording(NamedTuple):
    """A recorded step: the tensors it reads (batch, learning rates), its replay, and the result that it writes."""

    batch: Batch
    rates: list[Tensor]
    replay: Callable[[], None]
    result: StepResult


class GraphStep:
    """An eager step that is recorded as a CUDA graph for each shape of batch, after some eager steps with it.

    A recording is compared with an eager step before it is used: both must change the weights alike, from the same
    state. Where they do not, or where the step cannot be recorded (because it waits for the GPU, for instance),
    `on_refused` is called with the reason and all steps stay eager. Results are valid until the next call.

    Args:
        eager: The step to record, of one process, without accumulation, clipping, skipping and scaling.
        graphs: Runs and records.
        on_refused: Is called with the reason where the step stays eager.
    """

    def __init__(self, eager: EagerStep, graphs: CudaGraphs, on_refused: Callable[[str], None]):
        self.eager, self.graphs, self.on_refused = eager, graphs, on_refused
        self.method, self.optimizer = eager.method, eager.optimizer
        self.seen: Counter[tuple[int, ...]] = Counter()
        self.recordings: dict[tuple[int, ...], Recording] = {}
        self.is_refused = False

    def __call__(self, batch: Batch, update: bool = True) -> StepResult:
        """Trains on a batch, as `EagerStep`; each call updates the weights."""
        shape = tuple(batch.images.shape)
        self.seen[shape] += 1
        if shape not in self.recordings and self.seen[shape] > WARM_UP and not self.is_refused:
            self.try_recording(shape, batch)
        if shape in self.recordings:
            return self.replay(self.recordings[shape], batch)
        return self.run_eager(batch)

    def run_eager(self, batch: Batch) -> StepResult:
        return self.graphs.run(lambda: self.eager(batch))

    def replay(self, recording: Recording, batch: Batch) -> StepResult:
        recording.batch.images.copy_(batch.images)
        recording.batch.target.copy_(batch.target)
        for rate, group in zip(recording.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        recording.replay()
        return recording.result

    def try_recording(self, shape: tuple[int, ...], batch: Batch) -> None:
        """Records a step for this shape and keeps it where its replay equals an eager step."""
        try:
            expected = self.measure_change(lambda: self.run_eager(batch))
            recording = self.record(batch)
            found = self.measure_change(lambda: self.replay(recording, batch))
        except RuntimeError as error:
            self.is_refused = True
            # Leaving the recording fails as well, with an error that says less than the first one.
            self.on_refused(first_line(error.__context__ or error))
            return
        difference = max(relative_difference(a, b) for a, b in zip(found, expected, strict=True))
        if difference < TOLERANCE:
            self.recordings[shape] = recording
        else:
            self.is_refused = True
            self.on_refused(f"its replay changes the weights otherwise than an eager step, by {difference:.1%}")

    def record(self, batch: Batch) -> Recording:
        batch = batch._replace(images=batch.images.clone(), target=batch.target.clone())
        groups = self.optimizer.param_groups
        given = [group["lr"] for group in groups]
        # As tensors, the learning rates are read anew by each replay; as numbers they would be part of the graph.
        rates = [torch.full((), lr, device=batch.images.device, dtype=torch.float32) for lr in given]
        torch.clear_autocast_cache()  # weights that were cast before the recording would keep their values of now
        try:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
            replay, result = self.graphs.record(lambda: self.eager(batch))
        finally:
            for group, lr in zip(groups, given, strict=True):
                group["lr"] = lr
            torch.clear_autocast_cache()
        return Recording(batch, rates, replay, result)

    def measure_change(self, step: Callable[[], object]) -> list[list[Tensor]]:
        """Returns how a step changes weights, optimizer state and buffers; all of it and the random state are reset."""
        before = [[t.detach().clone() for t in kind] for kind in self.list_state()]
        device = next(self.method.parameters()).device
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                step()
            return [
                [(a.detach() - b).double() for a, b in zip(now, old, strict=True)]
                for old, now in zip(before, self.list_state(), strict=True)
            ]
        finally:
            with torch.no_grad():
                for old, now in zip(before, self.list_state(), strict=True):
                    for a, b in zip(now, old, strict=True):
                        a.copy_(b)

    def list_state(self) -> list[list[Tensor]]:
        states = self.optimizer.state.values()
        of_optimizer = [t for state in states for t in state.values() if isinstance(t, Tensor)]
        return [list(self.method.parameters()), of_optimizer, list(self.method.buffers())]


def relative_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Returns the norm of the difference of two lists of tensors, divided by the norm of the second."""
    if not expected:
        return 0.0
    difference = get_total_norm([a - b for a, b in zip(found, expected, strict=True)])
    length = get_total_norm(expected)
    return (difference / length).item() if length > 0 else difference.item()
