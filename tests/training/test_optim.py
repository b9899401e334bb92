from functools import partial

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from odcheap.layers.cheap_conv import DW, Shift, Standard
from odcheap.models.cifar import CifarResNet
from odcheap.training.optim import (
    build_optimization,
    build_optimizer,
    build_scheduler,
    follow_schedule,
    warmup_cosine,
    warmup_multistep,
)
from odcheap.utils.errors import OptionError

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=2e-4, fused=True)
STEPS = partial(lr_scheduler.MultiStepLR, milestones=[0.5, 0.75], gamma=0.1, fractions=["milestones"])
COSINE = partial(lr_scheduler.CosineAnnealingLR, T_max=1.0, fractions=["T_max"])
ONE_CYCLE = partial(
    lr_scheduler.OneCycleLR,
    max_lr=0.1,
    total_steps=1.0,
    pct_start=0.3,
    anneal_strategy="linear",
    cycle_momentum=False,
    fractions=["total_steps"],
)
WARMUP_STEPS = partial(
    warmup_multistep, milestones=[0.5, 0.75], gamma=0.1, warmup=0.1, fractions=["milestones", "warmup"]
)
WARMUP = partial(warmup_cosine, total=1.0, warmup=0.1, start_factor=0.01, fractions=["total", "warmup"])


def rates(scheduler, steps):
    """The learning rate of every step of a run."""
    optimizer, schedule = build_optimization(torch.nn.Linear(1, 1), SGD, scheduler, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 8, 237, 300])
@pytest.mark.parametrize("milestones", [[0.5, 0.75], [0.3, 0.6, 0.9], []])
def test_steps_are_the_closed_form(steps, milestones):
    scheduler = partial(lr_scheduler.MultiStepLR, milestones=milestones, gamma=0.1, fractions=["milestones"])
    expected = [0.1 * 0.1 ** sum(step >= round(m * steps) for m in milestones) for step in range(steps)]
    assert rates(scheduler, steps) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("steps", [10, 237])
def test_cosine_is_half_a_cosine(steps):
    expected = 0.05 * (1 + np.cos(np.pi * np.arange(steps) / steps))
    assert rates(COSINE, steps) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("steps", [10, 237])
def test_one_cycle_rises_and_falls_linearly(steps):
    expected = np.interp(np.arange(steps), [0, 0.3 * steps - 1, steps - 1], [0.004, 0.1, 4e-7])
    assert rates(ONE_CYCLE, steps) == pytest.approx(expected, abs=1e-9)


def test_warmup_then_cosine():
    found = rates(WARMUP, 200)
    assert found[:20] == pytest.approx(np.linspace(0.001, 0.1, 21)[:20], rel=1e-9)
    assert found[20:] == pytest.approx(0.05 * (1 + np.cos(np.pi * np.arange(180) / 180)), abs=1e-9)


def test_warmup_then_steps():
    expected = [0.1 * min(1, 0.01 + 0.99 * s / 20) * 0.1 ** ((s >= 100) + (s >= 150)) for s in range(200)]
    assert rates(WARMUP_STEPS, 200) == pytest.approx(expected, rel=1e-9)


def test_no_warmup_is_the_plain_schedule_and_a_short_run_has_one_step_of_it():
    assert rates(partial(WARMUP_STEPS, warmup=0), 20) == pytest.approx(rates(STEPS, 20), rel=1e-12)
    assert rates(partial(WARMUP_STEPS, warmup=0.001), 20)[:2] == pytest.approx([0.001, 0.1])


def test_schedules_within_a_schedule_are_built_too():
    parts = [
        partial(lr_scheduler.ConstantLR, factor=0.5, total_iters=0.5, fractions=["total_iters"]),
        partial(lr_scheduler.ExponentialLR, gamma=0.5),
    ]
    sequence = partial(lr_scheduler.SequentialLR, schedulers=parts, milestones=[0.5], fractions=["milestones"])
    assert rates(sequence, 4) == pytest.approx([0.05, 0.05, 0.1, 0.05])


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "NAdam", "Adagrad", "SGD"])
def test_any_optimizer_of_torch_takes_a_step(name):
    network = torch.nn.Linear(2, 1)
    before = network.weight.detach().clone()
    optimizer = build_optimizer(getattr(torch.optim, name), network, lr=0.1, weight_decay=0.1)
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(network.weight, before)


def test_lists_of_options_are_plain_in_checkpoints():
    from omegaconf import OmegaConf

    betas = OmegaConf.create([0.9, 0.99])
    optimizer = build_optimizer(torch.optim.AdamW, torch.nn.Linear(1, 1), lr=0.1, betas=betas)
    assert type(optimizer.state_dict()["param_groups"][0]["betas"]) is tuple


@pytest.mark.parametrize(
    ("scheduler", "line"),
    [
        (
            partial(STEPS, milestones=[0.5, 2]),
            r"scheduler.milestones=\[0.5, 2\]: must be a fraction of the run's steps",
        ),
        (partial(STEPS, gamma=0.0), "scheduler.gamma=0.0: must be a number, above 0"),
        (partial(COSINE, T_max=-1), "scheduler.T_max=-1: must be a fraction of the run's steps"),
        (partial(ONE_CYCLE, pct_start=2.0), "scheduler=OneCycleLR: Expected float between 0 and 1 pct_start"),
        (partial(lr_scheduler.ReduceLROnPlateau), "scheduler=ReduceLROnPlateau: must depend on the step only"),
    ],
)
def test_schedules_that_cannot_be_are_one_line(scheduler, line):
    with pytest.raises(OptionError, match=line):
        build_optimization(torch.nn.Linear(1, 1), SGD, scheduler, 100)


@pytest.mark.parametrize(("option", "value"), [("lr", 0.0), ("lr", -1.0), ("momentum", 1.0), ("weight_decay", -1e-4)])
def test_options_outside_their_range_are_refused_by_name(option, value):
    with pytest.raises(OptionError, match=f"optimizer.{option}={value}: must be a number"):
        build_optimizer(torch.optim.SGD, torch.nn.Linear(1, 1), **{"lr": 0.1, option: value})


def test_what_the_optimizer_refuses_is_one_line():
    with pytest.raises(OptionError, match="optimizer=SGD: Nesterov momentum requires a momentum"):
        build_optimizer(torch.optim.SGD, torch.nn.Linear(1, 1), lr=0.1, nesterov=True)


@pytest.mark.parametrize("decay_norm", [True, False])
@pytest.mark.parametrize("decay_bias", [True, False])
@pytest.mark.parametrize("decay_spatial", [True, False])
def test_weight_decay_spares_what_it_is_told_to(decay_norm, decay_bias, decay_spatial):
    network = CifarResNet(8, DW(), 10)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    recipe = partial(SGD, decay_norm=decay_norm, decay_bias=decay_bias, decay_spatial=decay_spatial)
    optimizer, _ = build_optimization(network, recipe, STEPS, 10)
    torch.nn.init.ones_(network.fc.bias)
    before["fc.bias"] = network.fc.bias.detach().clone()
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in network.named_parameters():
        of_norm = ".bn" in name or name.startswith("bn") or "shortcut.1" in name
        spared = (of_norm and not decay_norm) or (".spatial." in name and not decay_spatial)
        spared = spared or (name == "fc.bias" and not decay_bias)
        torch.testing.assert_close(p, before[name] * (1.0 if spared else 1 - 0.1 * 2e-4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("conv", [Shift(), Standard()])
def test_to_spare_spatial_operators_that_are_not_there_is_refused(conv):
    with pytest.raises(
        OptionError,
        match="optimizer.decay_spatial=false: has no effect: the network has no spatial operators of",
    ):
        build_optimizer(torch.optim.SGD, CifarResNet(8, conv, 10), lr=0.1, decay_spatial=False)


def test_build_scheduler_keeps_whole_steps():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    assert build_scheduler(lr_scheduler.StepLR, optimizer, 100, step_size=7).step_size == 7


@pytest.mark.parametrize("scheduler", [STEPS, COSINE, ONE_CYCLE, WARMUP, WARMUP_STEPS])
def test_a_schedule_of_another_length_goes_on_as_if_it_had_been_so_from_the_start(scheduler):
    straight = rates(scheduler, 40)
    optimizer, schedule = build_optimization(torch.nn.Linear(1, 1), SGD, scheduler, 40)
    _, shorter = build_optimization(torch.nn.Linear(1, 1), SGD, scheduler, 10)
    schedule.load_state_dict(shorter.state_dict())  # what a checkpoint of the shorter run brings
    fresh = build_optimization(torch.nn.Linear(1, 1), SGD, scheduler, 40)
    follow_schedule(optimizer, schedule, fresh, 10)
    found = []
    for _ in range(30):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert found == pytest.approx(straight[10:], rel=1e-12)
