"""One training step: in eager mode, or recorded as a CUDA graph and replayed.

A step of several small networks consists of thousands of small kernels. On a GPU it takes longer to launch these
kernels from Python than to run them; a CUDA graph launches all of them at once.
"""

from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import torch
from omegaconf import DictConfig
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm

from odcheap.data.base import Batch
from odcheap.methods.base import Method
from odcheap.utils.console import say
from odcheap.utils.errors import OptionError, first_line

# The largest relative difference allowed between a replay and an eager step. Rounding in bfloat16 and another order of
# sums give far smaller differences; a part of the computation that is outdated or missing gives far larger ones.
TOLERANCE = 0.05
GRAPH_PRECISIONS = ("32-true", "32", "bf16-mixed", "bf16-true")  # float16 scales the loss by a changing factor
WARM_UP = 3  # eager steps with each batch shape before recording: libraries choose kernels, momentum is allocated


class StepResult(NamedTuple):
    """The result of a training step, detached from the autograd graph.

    Attributes:
        terms: The loss terms by name, scalars that are already multiplied by their weights. The entry `loss` is the sum
            of the other terms.
        outputs: The outputs of the method by name, such as `student_logits`; bfloat16 is converted to float32.
        finite: A boolean scalar on the device of the gradients, true if all of them were finite. None if this step only
            accumulated gradients.
        taken: Whether the optimizer has updated the weights.
    """

    terms: dict[str, Tensor]
    outputs: dict[str, Tensor | None]
    finite: Tensor | None
    taken: bool


class GradientOptions(NamedTuple):
    """How a training step handles gradients. The first three options mean the same as in Lightning's `Trainer`.

    Attributes:
        accumulate_grad_batches: The number of batches whose gradients are averaged for one optimizer step.
        gradient_clip_val: The limit of the gradients' norm or absolute values; None for no clipping.
        gradient_clip_algorithm: "norm" limits the norm, "value" the absolute value of each gradient; None is "norm".
        skip_nonfinite: True to leave the weights unchanged in a step with gradients that are not finite. This check
            makes each step wait for the GPU.
    """

    accumulate_grad_batches: Annotated[int, Field(ge=1)] = 1
    gradient_clip_val: Annotated[float, Field(ge=0)] | None = None
    gradient_clip_algorithm: Literal["norm", "value"] | None = None
    skip_nonfinite: bool = False


def to_single_precision(outputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Returns a dict of outputs in which bfloat16 tensors are converted to float32, for losses and accuracies."""
    return {name: t.float() if t is not None and t.dtype == torch.bfloat16 else t for name, t in outputs.items()}


def has_finite_gradients(network: nn.Module) -> Tensor:
    """Returns a boolean scalar on the device of the gradients: whether all are finite. It does not wait for a GPU."""
    return torch.isfinite(get_total_norm([p.grad for p in network.parameters() if p.grad is not None]))


class EagerStep:
    """A training step in eager mode: forward pass, loss, backward pass, clipping, optimizer step, moving averages.

    Args:
        method: The networks to train and their loss.
        optimizer: The optimizer of the method's parameters.
        options: How gradients are accumulated, clipped and checked.
        scaler: The gradient scaler of float16 training, with which `backward` scales the loss; None without scaling.
        backward: A function that computes the gradients of a loss. In training it is Lightning's `manual_backward`,
            which also averages the gradients over all processes.
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
        """Trains on a batch in the caller's autocast context.

        Args:
            batch: Images and targets. The images are (N, C, H, W), or (S, N, C, H, W) if each of the S students has its
                own augmentation. The targets are labels (N,) or probabilities of the classes (N, K).
            update: True to update the weights after the backward pass. False only accumulates gradients.
        """
        # The first batch of an optimizer step: no gradients are left from before.
        if not self.accumulating:
            self.optimizer.zero_grad(set_to_none=True)
            if self.options.skip_nonfinite:  # to restore batch norm's statistics if the step is skipped
                self.buffers = [buffer.clone() for buffer in self.method.buffers()]
        self.accumulating = not update
        outputs = to_single_precision(self.method(batch.images))
        # The loss is computed in float32. The backward pass uses the dtypes of the forward pass anyway.
        with torch.autocast(batch.images.device.type, enabled=False):
            terms = self.method.loss(outputs, batch.target)
            weight = batch.share / self.options.accumulate_grad_batches
            self.backward(terms["loss"] if weight == 1 else terms["loss"] * weight)
            finite, taken = self.update() if update else (None, False)
        kept = {name: t if t is None else t.detach() for name, t in outputs.items()}
        return StepResult({name: term.detach() for name, term in terms.items()}, kept, finite, taken)

    def state_dict(self) -> dict[str, Any]:
        """Returns what has been accumulated since the last update of the weights.

        Returns:
            A dict with two keys, which is empty just after an update:

            - `gradients`: the accumulated gradients by the names of the parameters;
            - `buffers`: a list of the method's buffers, such as batch norm statistics, before the first of the batches.
              It is needed to undo a skipped step, and empty if steps are not skipped.
        """
        if not self.accumulating:
            return {}
        gradients = {name: p.grad for name, p in self.method.named_parameters() if p.grad is not None}
        return {"gradients": gradients, "buffers": self.buffers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues the accumulation from what `state_dict` returned."""
        self.accumulating = bool(state)
        if not state:
            return
        for name, p in self.method.named_parameters():
            gradient = state["gradients"].get(name)
            p.grad = None if gradient is None else gradient.to(p.device)
        buffers = zip(self.method.buffers(), state["buffers"], strict=False)  # none are saved if no step is skipped
        self.buffers = [before.to(buffer.device) for buffer, before in buffers]

    def update(self) -> tuple[Tensor, bool]:
        """Updates the weights. If `skip_nonfinite` is on and a gradient is not finite, it undoes the step instead.

        Returns:
            Two values: a boolean scalar on the device, true if all gradients are finite, and whether the weights were
            updated.
        """
        # The gradients of float16 training are scaled: they are checked and clipped without the scale.
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
        """Clips the gradients: each value, or the norm of each group of parameters from the method's `clip_groups`."""
        limit = self.options.gradient_clip_val
        if not limit:
            return
        if self.options.gradient_clip_algorithm == "value":
            clip_grad_value_(self.method.parameters(), limit)
            return
        for parameters in self.method.clip_groups():
            clip_grad_norm_(parameters, limit)


class CudaGraphs:
    """Runs functions on a separate CUDA stream, or records them as CUDA graphs. All graphs share one memory pool."""

    def __init__(self) -> None:
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def run(self, work: Callable[[], StepResult]) -> StepResult:
        """Calls a function on the separate stream, and returns its result without waiting for the GPU."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = work()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def record(self, work: Callable[[], StepResult]) -> tuple[Callable[[], None], StepResult]:
        """Records a function as a CUDA graph; its kernels do not run yet.

        Args:
            work: The function, which takes no arguments and carries out a training step.

        Returns:
            A function that runs the recorded kernels, and the result of `work`, whose tensors each such run overwrites.
        """
        graph = torch.cuda.CUDAGraph()
        # thread_local, since data loaders pin memory in other threads meanwhile
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            result = work()
        return graph.replay, result


class Recording(NamedTuple):
    """A training step that was recorded as a CUDA graph.

    Attributes:
        batch: The batch whose tensors the graph reads. A new batch is copied into them before a replay.
        rates: The learning rates that the graph reads, a scalar tensor for each parameter group of the optimizer.
        replay: A function that runs the graph.
        result: The result of the step. Each replay overwrites its tensors.
    """

    batch: Batch
    rates: list[Tensor]
    replay: Callable[[], None]
    result: StepResult


class GraphStep:
    """A training step that is recorded as a CUDA graph and then replayed.

    A graph is recorded for each batch shape, after a few eager steps with this shape. Before a graph is used, it is
    compared with an eager step: both must change the weights in the same way. If they do not, or if the step cannot be
    recorded, `on_refused` is called and no further graphs are recorded. Batches of all shapes without a graph are then
    trained in eager mode. The tensors of a result are valid until the next call.

    Args:
        eager: The step to record. It must not accumulate, clip, scale or skip gradients, and there must be only one
            process.
        graphs: The object that runs and records functions.
        on_refused: A function that is called with the reason, a text, if no graph can be used.
    """

    def __init__(self, eager: EagerStep, graphs: CudaGraphs, on_refused: Callable[[str], None]):
        self.eager, self.graphs, self.on_refused = eager, graphs, on_refused
        self.method, self.optimizer = eager.method, eager.optimizer
        self.seen: Counter[tuple[int, ...]] = Counter()
        self.recordings: dict[tuple[int, ...], Recording] = {}
        self.is_refused = False

    def __call__(self, batch: Batch, update: bool = True) -> StepResult:
        """Trains on a batch and updates the weights. `update` is ignored, since nothing is accumulated here."""
        shape = tuple(batch.images.shape)
        self.seen[shape] += 1
        if shape not in self.recordings and self.seen[shape] > WARM_UP and not self.is_refused:
            self.try_recording(shape, batch)
        if shape in self.recordings:
            return self.replay(self.recordings[shape], batch)
        return self.run_eager(batch)

    def run_eager(self, batch: Batch) -> StepResult:
        """Trains on a batch in eager mode, on the stream on which graphs are recorded."""
        return self.graphs.run(lambda: self.eager(batch))

    def replay(self, recording: Recording, batch: Batch) -> StepResult:
        """Trains on a batch by running a recorded graph, with the optimizer's current learning rates."""
        recording.batch.images.copy_(batch.images)
        recording.batch.target.copy_(batch.target)
        for rate, group in zip(recording.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        recording.replay()
        return recording.result

    def try_recording(self, shape: tuple[int, ...], batch: Batch) -> None:
        """Records a step for a batch shape, and keeps the recording if its replay is equal to an eager step.

        The weights are the same before and after.

        Args:
            shape: The shape of the batch's images.
            batch: A batch with images of this shape.
        """
        # Both changes are measured from the same state and undone: only the caller's step counts.
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
        """Records a step on a copy of the batch; `replay` copies each new batch into this copy."""
        batch = batch._replace(images=batch.images.clone(), target=batch.target.clone())
        # The learning rates become tensors, which each replay reads. As numbers they would be constants of the graph.
        groups = self.optimizer.param_groups
        before = [dict(group) for group in groups]
        rates = [torch.full((), g["lr"], device=batch.images.device, dtype=torch.float32) for g in groups]
        torch.clear_autocast_cache()  # otherwise the graph would read weights that were cast before the recording
        try:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
                # Adam and its variants refuse to be recorded without it. Their fused forms count steps on the GPU, so
                # a replay does what a step does; other forms are refused by PyTorch, or by the comparison afterwards.
                if "capturable" in group:
                    group["capturable"] = True
            replay, result = self.graphs.record(lambda: self.eager(batch))
        finally:
            for group, old in zip(groups, before, strict=True):
                group.update(old)
            torch.clear_autocast_cache()
        return Recording(batch, rates, replay, result)

    def measure_change(self, step: Callable[[], object]) -> list[list[Tensor]]:
        """Runs a step, undoes it, and returns how it changed weights, optimizer state and buffers.

        Returns:
            Three lists with the changes of all weights, of all tensors in the optimizer state, and of all buffers. The
            changes are float64 tensors.
        """
        # The random state is restored too, so that both steps that are compared draw the same numbers.
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
        """Returns the tensors that a step changes, as three lists: weights, optimizer state, and buffers."""
        states = self.optimizer.state.values()
        of_optimizer = [t for state in states for t in state.values() if isinstance(t, Tensor)]
        return [list(self.method.parameters()), of_optimizer, list(self.method.buffers())]


def relative_difference(measured: list[Tensor], expected: list[Tensor]) -> float:
    """Returns the norm of the difference of two lists of tensors, divided by the norm of the second list."""
    if not expected:
        return 0.0
    difference = get_total_norm([a - b for a, b in zip(measured, expected, strict=True)])
    norm = get_total_norm(expected)
    return (difference / norm).item() if norm > 0 else difference.item()


def uses_graphs(cfg: DictConfig) -> bool:
    """Returns whether the training steps of a run will be recorded as CUDA graphs.

    This needs a run on one GPU, options that allow it, and the option `capture` must not be false.

    Raises:
        OptionError: The option `capture` is true, but another option makes it impossible to record steps.
    """
    # Each reason for eager steps, as text for the user, and whether it holds.
    on_gpu = cfg.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    obstacles = {
        f"trainer.accelerator={cfg.trainer.accelerator}: there is no CUDA device to use": not on_gpu,
        "several processes average their gradients in each step": cfg.trainer.devices != 1
        or cfg.trainer.num_nodes != 1
        or cfg.trainer.strategy != "auto",
        "on_nonfinite=skip checks the gradients before each step": cfg.on_nonfinite == "skip",
        "trainer.gradient_clip_val needs eager steps": cfg.trainer.get("gradient_clip_val") is not None,
        "trainer.accumulate_grad_batches needs eager steps": cfg.trainer.get("accumulate_grad_batches", 1) != 1,
        f"trainer.precision={cfg.trainer.precision}": str(cfg.trainer.precision) not in GRAPH_PRECISIONS,
    }
    if cfg.test_only:
        return False
    reasons = [reason for reason, holds in obstacles.items() if holds]
    if cfg.capture is True and reasons:
        raise OptionError("capture", True, f"is not possible: {reasons[0]}")
    return cfg.capture is not False and not reasons


def report_eager(capture: bool | str, reason: str) -> None:
    """Prints that training steps are not recorded as a CUDA graph, and why.

    Args:
        capture: The option `capture`, which is not false here. True demands CUDA graphs, and "auto" uses them if
            possible.
        reason: Why steps cannot be recorded.

    Raises:
        OptionError: `capture` is true.
    """
    if capture is True:
        raise OptionError("capture", True, f"is not possible: {reason}")
    say(f"the step runs without a CUDA graph: {reason} (capture=false skips the attempt)")
