"""Builds optimizers and learning rate schedules: any class of `torch.optim` and `torch.optim.lr_scheduler`."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

from pydantic import Field
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    ReduceLROnPlateau,
    SequentialLR,
)

from odcheap.layers.cheap_conv import CheapConv
from odcheap.utils.arguments import check_arguments
from odcheap.utils.errors import OptionError, first_line

NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)
BIASED_LAYERS = (_ConvNd, nn.Linear)


def build_optimization(
    network: nn.Module, optimizer: partial[Optimizer], scheduler: partial[LRScheduler], steps: int
) -> tuple[Optimizer, LRScheduler]:
    """Builds the optimizer and the learning rate schedule of a run, and returns both.

    Args:
        network: The network to train.
        optimizer: A class of `torch.optim` with keyword arguments for `build_optimizer`, such as
            `partial(torch.optim.SGD, lr=0.1)`.
        scheduler: A class of `torch.optim.lr_scheduler` with keyword arguments for `build_scheduler`, also as a
            `functools.partial`.
        steps: The number of optimizer steps in the whole run. Call the schedule's `step` once after each of them.

    Raises:
        OptionError: An argument of the optimizer or of the schedule is not allowed.
    """
    built = build_optimizer(optimizer.func, network, **optimizer.keywords)
    return built, build_scheduler(scheduler.func, built, steps, **scheduler.keywords)


@check_arguments("optimizer")
def build_optimizer(
    optimizer: Callable[..., Optimizer],
    network: nn.Module,
    *,
    lr: Annotated[float, Field(gt=0)],
    weight_decay: Annotated[float, Field(ge=0)] = 0.0,
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None,
    decay_norm: bool = True,
    decay_bias: bool = True,
    decay_spatial: bool = True,
    **options: Any,
) -> Optimizer:
    """Builds an optimizer for the trainable parameters of a network.

    Args:
        optimizer: A class of `torch.optim`, such as `torch.optim.SGD`.
        network: The network to train.
        lr: The learning rate at the start; a schedule may change it.
        weight_decay: The weight decay of all parameters that the next options do not exclude.
        momentum: The momentum, for classes that have one; None for the default of the class.
        decay_norm: False to exclude the weights and biases of normalization layers from weight decay.
        decay_bias: False to exclude the biases of convolutions and linear layers from weight decay.
        decay_spatial: False to exclude the K x K weights of cheap convolutions (DW, RepDW, Group) from weight decay.
        options: Further arguments of the optimizer's class, such as `betas`.

    Raises:
        OptionError: `decay_spatial` is False but the network has no spatial operators with weights, or the class
            refuses its arguments.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> optimizer = build_optimizer(torch.optim.SGD, nn.BatchNorm2d(4), lr=0.1, decay_norm=False, momentum=0.9)
        >>> [group["weight_decay"] for group in optimizer.param_groups]
        [0.0]
    """
    groups = group_parameters(network, weight_decay, decay_norm, decay_bias, decay_spatial)
    options |= {} if momentum is None else {"momentum": momentum}
    try:
        return optimizer(groups, lr=lr, **{name: to_plain(value) for name, value in options.items()})
    except (ValueError, RuntimeError) as error:
        raise OptionError("optimizer", getattr(optimizer, "__name__", "optimizer"), first_line(error)) from error


def group_parameters(
    network: nn.Module, weight_decay: float, decay_norm: bool, decay_bias: bool, decay_spatial: bool
) -> list[dict[str, Any]]:
    """Divides the trainable parameters into two groups for an optimizer: with weight decay, and without.

    Args:
        network: The network to train.
        weight_decay: The weight decay of the first group.
        decay_norm: False to put the weights and biases of normalization layers into the second group.
        decay_bias: False to put the biases of convolutions and linear layers into the second group.
        decay_spatial: False to put the K x K weights of cheap convolutions into the second group.

    Returns:
        A list of dicts with the keys `params` and `weight_decay`; a group without parameters is left out.

    Raises:
        OptionError: `decay_spatial` is False but the network has no spatial operators with weights.
    """
    # The parameters without weight decay.
    norms = [] if decay_norm else [m for m in network.modules() if isinstance(m, NORMS)]
    layers = [] if decay_bias else [m for m in network.modules() if isinstance(m, BIASED_LAYERS)]
    biases = [m.bias for m in layers if m.bias is not None]
    pairs = [] if decay_spatial else [m for m in network.modules() if isinstance(m, CheapConv)]
    spatial = [p for pair in pairs for p in pair.spatial.parameters() if p.requires_grad]
    if not (spatial or decay_spatial):
        allowed = "has no effect: the network has no spatial operators of block_type=DW, RepDW or Group"
        raise OptionError("optimizer.decay_spatial", False, allowed)
    exempt = {id(p) for p in [*spatial, *biases]} | {id(p) for norm in norms for p in norm.parameters()}
    trained = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in exempt], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in exempt], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def follow_schedule(
    optimizer: Optimizer, scheduler: LRScheduler, fresh: tuple[Optimizer, LRScheduler], done: int
) -> None:
    """Changes an optimizer and its schedule, in place, to the learning rates of a schedule with another length.

    This is needed if a run is resumed with another number of epochs than its checkpoint has.

    Args:
        optimizer: The optimizer of the run.
        scheduler: The schedule of the run.
        fresh: A newly built optimizer and its schedule, which has the new length. Both are changed.
        done: The number of optimizer steps that the run has taken.
    """
    # Step the new schedule from the start, then copy its state.
    new_optimizer, new_scheduler = fresh
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch expects a step of the optimizer before each of the schedule
        for _ in range(done):
            new_scheduler.step()
    scheduler.load_state_dict(new_scheduler.state_dict())
    for group, new_group in zip(optimizer.param_groups, new_optimizer.param_groups, strict=True):
        group.update({name: value for name, value in new_group.items() if name != "params"})


def is_sequence(value: Any) -> bool:
    """Returns whether a value is a sequence other than a string, such as a list or a tuple."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def to_plain(value: Any) -> Any:
    """Converts a list, also one of OmegaConf, to a tuple, and returns other values unchanged.

    Options are saved in checkpoints, which must not contain OmegaConf's types.
    """
    return tuple(to_plain(entry) for entry in value) if is_sequence(value) else value


@check_arguments("scheduler")
def build_scheduler(
    scheduler: Callable[..., LRScheduler],
    optimizer: Optimizer,
    steps: int,
    *,
    fractions: Sequence[str] = (),
    gamma: Annotated[float, Field(gt=0)] | None = None,
    **options: Any,
) -> LRScheduler:
    """Builds a learning rate schedule. Its method `step` must be called once after each step of the optimizer.

    Args:
        scheduler: A class of `torch.optim.lr_scheduler`, or a function that returns a schedule.
        optimizer: The optimizer whose learning rate the schedule sets.
        steps: The number of optimizer steps in the whole run.
        fractions: The names of those arguments in `options` that are given as fractions of `steps`, in [0, 1]. They are
            converted to numbers of steps.
        gamma: The factor by which the learning rate is multiplied, for classes that have it; None for the default of
            the class.
        options: Further arguments of the class. Each `functools.partial` of a schedule in them, as in `schedulers` of
            `SequentialLR`, is built in the same way.

    Raises:
        OptionError: A fraction is outside [0, 1], the class refuses its arguments, or the schedule depends on a metric.

    Example:
        >>> import torch
        >>> from torch.optim.lr_scheduler import CosineAnnealingLR
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> cosine = build_scheduler(CosineAnnealingLR, optimizer, 1000, T_max=0.5, fractions=["T_max"])
        >>> cosine.T_max
        500
    """
    # Convert the fractions first, then build the schedules among the arguments, which have fractions of their own.
    options |= {} if gamma is None else {"gamma": gamma}
    arguments = {
        name: count_steps(name, value, steps) if name in fractions else value for name, value in options.items()
    }
    arguments = {name: build_nested(value, optimizer, steps) for name, value in arguments.items()}
    name = getattr(scheduler, "__name__", "scheduler")
    try:
        built = scheduler(optimizer, **arguments)
    except (ValueError, ZeroDivisionError) as error:
        raise OptionError("scheduler", name, first_line(error)) from error
    if isinstance(built, ReduceLROnPlateau):
        raise OptionError("scheduler", name, "must depend on the step only, and not on a metric")
    return built


def build_nested(value: Any, optimizer: Optimizer, steps: int) -> Any:
    """Returns an argument of a schedule, in which each `functools.partial` of a further schedule is built."""
    if is_sequence(value):
        return [build_nested(entry, optimizer, steps) for entry in value]
    if isinstance(value, partial) and inspect.isclass(value.func) and issubclass(value.func, LRScheduler):
        return build_scheduler(value.func, optimizer, steps, **value.keywords)
    return value


def count_steps(name: str, value: Any, steps: int) -> Any:
    """Converts a fraction of the run, or a list of fractions, to numbers of steps.

    Args:
        name: The name of the option, for messages.
        value: A fraction in [0, 1], or a list of fractions.
        steps: The number of optimizer steps in the whole run.

    Returns:
        The number of steps, or a list of numbers if `value` is a list. Fractions above 0 give 1 step or more.

    Raises:
        OptionError: A fraction is outside [0, 1].
    """
    fractions = list(value) if is_sequence(value) else [value]
    if not all(0 <= fraction <= 1 for fraction in fractions):
        allowed = "must be a fraction of the run's steps: 0 to 1"
        raise OptionError(f"scheduler.{name}", fractions if is_sequence(value) else value, allowed)
    counts = [round(fraction * steps) for fraction in fractions]
    return counts if is_sequence(value) else max(int(value > 0), counts[0])


@check_arguments("scheduler")
def warmup_multistep(
    optimizer: Optimizer,
    *,
    milestones: Sequence[int],
    warmup: int = 0,
    gamma: Annotated[float, Field(gt=0)] = 0.1,
    start_factor: Annotated[float, Field(gt=0, le=1)] = 0.01,
) -> LambdaLR:
    """Returns a schedule with a linear warm-up, which then multiplies the learning rate by `gamma` at each milestone.

    Source: He et al., "Deep residual learning", 2015, section 4.2 (milestones, and a warm-up of the deepest network);
    Goyal et al., "Accurate, large minibatch SGD: training ImageNet in 1 hour", 2017, section 2.2 (linear warm-up).

    Args:
        optimizer: The optimizer whose learning rate is set.
        milestones: The milestones as numbers of steps from the start of the run.
        warmup: The number of steps during which the learning rate increases linearly; 0 for no warm-up.
        gamma: The factor by which the learning rate is multiplied at each milestone.
        start_factor: The learning rate at the first step of the warm-up, as a fraction of the optimizer's `lr`.
    """

    def factor(step: int) -> float:
        increase = start_factor + (1 - start_factor) * min(1.0, step / warmup) if warmup else 1.0
        return increase * gamma ** sum(step >= milestone for milestone in milestones)

    return LambdaLR(optimizer, factor)


@check_arguments("scheduler")
def warmup_cosine(
    optimizer: Optimizer, *, total: int, warmup: int, start_factor: Annotated[float, Field(gt=0, le=1)] = 0.01
) -> SequentialLR:
    """Returns a schedule with a linear warm-up, and then cosine annealing to 0.

    Source: Goyal et al., "Accurate, large minibatch SGD: training ImageNet in 1 hour", 2017, section 2.2 (warm-up);
    Loshchilov, Hutter, "SGDR: stochastic gradient descent with warm restarts", 2017, equation 5 (annealing).

    Args:
        optimizer: The optimizer whose learning rate is set.
        total: The number of steps of the whole run.
        warmup: The number of steps of the warm-up.
        start_factor: The learning rate at the first step, as a fraction of the optimizer's `lr`.
    """
    linear = LinearLR(optimizer, start_factor, total_iters=warmup)
    cosine = CosineAnnealingLR(optimizer, max(1, total - warmup))
    return SequentialLR(optimizer, [linear, cosine], [warmup])
