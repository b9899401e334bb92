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

# The largest relative difference between a replay and an eager step. Differences by rounding in bfloat16 and by another
# order of sums are far smaller; if a part of the computation is outdated or missing, they are far larger.
TOLERANCE = 0.05
WARM_UP = 3  # eager steps with each batch shape before recording: libraries choose kernels, momentum is allocated


class StepResult(NamedTuple):
    """The result of a training step, detached from the autograd graph.

    Attributes:
        terms: The loss terms by name, scalars; the entry `loss` is the sum of the others.
        outputs: The method's outputs, in float32.
        finite: Whether every gradient was finite, a boolean scalar on the gradients' device; None while gradients are
            only accumulated.
        taken: Whether the optimizer's step was taken.
    """

    terms: dict[str, Tensor]
    outputs: dict[str, Tensor | None]
    finite: Tensor | None
    taken: bool


class GradientOptions(NamedTuple):
    """How a step treats its gradients; the first three are options of Lightning's `Trainer`.

    Attributes:
        accumulate_grad_batches: Number of batches whose gradients are averaged for one optimizer step.
        gradient_clip_val: Largest norm or value of the gradients; None does not clip.
        gradient_clip_algorithm: Whether the norm or each value is clipped.
        skip_nonfinite: Whether steps whose gradients are not finite are skipped. Each step then waits for the device.
    """

    accumulate_grad_batches: Annotated[int, Field(ge=1)] = 1
    gradient_clip_val: Annotated[float, Field(ge=0)] | None = None
    gradient_clip_algorithm: Literal["norm", "value"] | None = None
    skip_nonfinite: bool = False


def to_single_precision(outputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Converts bfloat16 outputs to float32, in which losses and accuracies are computed."""
    return {name: t.float() if t is not None and t.dtype == torch.bfloat16 else t for name, t in outputs.items()}


def has_finite_gradients(network: nn.Module) -> Tensor:
    """Returns whether all gradients are finite, as a boolean scalar on their device, without waiting for it."""
    return torch.isfinite(get_total_norm([p.grad for p in network.parameters() if p.grad is not None]))


class EagerStep:
    """A training step in eager mode: forward, losses, backward, clipping, optimizer, and the method's own updates.

    Args:
        method: The method to train.
        optimizer: An optimizer of its parameters.
        options: How gradients are accumulated, clipped and checked.
        scaler: The gradient scaler of float16 training; `backward` then scales the loss.
        backward: A function that computes the gradients of a loss. Lightning's averages them over processes.
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
        """Trains on a batch, under the current autocast.

        Args:
            batch: Images (N, C, H, W), or (S, N, C, H, W) with a view for each student, and labels (N,).
            update: Whether the optimizer takes a step. False only accumulates gradients.
        """
        if not self.accumulating:
            self.optimizer.zero_grad(set_to_none=True)
            if self.options.skip_nonfinite:  # to restore batch norm's statistics if the step is skipped
                self.buffers = [buffer.clone() for buffer in self.method.buffers()]
        self.accumulating = not update
        outputs = to_single_precision(self.method(batch.images))
        # Losses are computed in float32. The backward pass uses the types of the forward pass anyway.
        with torch.autocast(batch.images.device.type, enabled=False):
            terms = self.method.loss(outputs, batch.target)
            weight = batch.share / self.options.accumulate_grad_batches
            self.backward(terms["loss"] if weight == 1 else terms["loss"] * weight)
            finite, taken = self.update() if update else (None, False)
        kept = {name: t if t is None else t.detach() for name, t in outputs.items()}
        return StepResult({name: term.detach() for name, term in terms.items()}, kept, finite, taken)

    def update(self) -> tuple[Tensor, bool]:
        """Takes the optimizer's step. Returns whether the gradients were finite and whether the step was taken."""
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
        """Clips the gradients: each value by itself, or the norm of each of the method's `clip_groups`."""
        limit = self.options.gradient_clip_val
        if not limit:
            return
        if self.options.gradient_clip_algorithm == "value":
            clip_grad_value_(self.method.parameters(), limit)
            return
        for parameters in self.method.clip_groups():
            clip_grad_norm_(parameters, limit)


class CudaGraphs:
    """Runs steps on a separate CUDA stream, or records them there as CUDA graphs."""

    def __init__(self) -> None:
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def run(self, work: Callable[[], StepResult]) -> StepResult:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = work()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def record(self, work: Callable[[], StepResult]) -> tuple[Callable[[], None], StepResult]:
        """Records the work without running it.

        Returns:
            A function that replays the work, and the result, whose tensors each replay overwrites.
        """
        graph = torch.cuda.CUDAGraph()
        # thread_local, since data loaders pin memory in other threads meanwhile
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            result = work()
        return graph.replay, result


class Recording(NamedTuple):
    """A recorded step: the batch and the learning rates that it reads, its replay, and the result that it writes."""

    batch: Batch
    rates: list[Tensor]
    replay: Callable[[], None]
    result: StepResult


class GraphStep:
    """A training step that is recorded as a CUDA graph for each batch shape, after a few eager steps with that shape.

    Before a recording is used it is compared with an eager step: from the same state, both must change the weights in
    the same way. If they do not, or if the step cannot be recorded (for example because it waits for the GPU),
    `on_refused` is called with the reason, and all further steps are eager. Results are valid until the next call.

    Args:
        eager: The step to record. It must not accumulate, clip, scale or skip, and there must be one process.
        graphs: Runs and records the step.
        on_refused: A function that is called with the reason if the step stays eager.
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
        """Records a step for this shape, and keeps the recording if its replay equals an eager step."""
        try:
            expected = self.measure_change(lambda: self.run_eager(batch))
            recording = self.record(batch)
            replayed = self.measure_change(lambda: self.replay(recording, batch))
        except RuntimeError as error:
            self.is_refused = True
            # The end of a failed recording raises a second error, which says less than the first one.
            self.on_refused(first_line(error.__context__ or error))
            return
        difference = max(relative_difference(a, b) for a, b in zip(replayed, expected, strict=True))
        if difference < TOLERANCE:
            self.recordings[shape] = recording
        else:
            self.is_refused = True
            self.on_refused(f"its replay changes the weights differently from an eager step, by {difference:.1%}")

    def record(self, batch: Batch) -> Recording:
        """Records a step on a copy of the batch, into which replays copy theirs."""
        batch = batch._replace(images=batch.images.clone(), target=batch.target.clone())
        # The learning rates become tensors, which each replay reads. As numbers they would be constants of the graph.
        groups = self.optimizer.param_groups
        numbers = [group["lr"] for group in groups]
        rates = [torch.full((), lr, device=batch.images.device, dtype=torch.float32) for lr in numbers]
        torch.clear_autocast_cache()  # otherwise the graph would read weights that were cast before the recording
        try:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
            replay, result = self.graphs.record(lambda: self.eager(batch))
        finally:
            for group, lr in zip(groups, numbers, strict=True):
                group["lr"] = lr
            torch.clear_autocast_cache()
        return Recording(batch, rates, replay, result)

    def measure_change(self, step: Callable[[], object]) -> list[list[Tensor]]:
        """Returns the changes of weights, optimizer state and buffers by a step, and then undoes the step."""
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
        """Returns the tensors that a step changes: weights, optimizer state and buffers."""
        states = self.optimizer.state.values()
        of_optimizer = [t for state in states for t in state.values() if isinstance(t, Tensor)]
        return [list(self.method.parameters()), of_optimizer, list(self.method.buffers())]


def relative_difference(measured: list[Tensor], expected: list[Tensor]) -> float:
    """Returns the norm of the difference of two lists of tensors, divided by the norm of the second one."""
    if not expected:
        return 0.0
    difference = get_total_norm([a - b for a, b in zip(measured, expected, strict=True)])
    norm = get_total_norm(expected)
    return (difference / norm).item() if norm > 0 else difference.item()
