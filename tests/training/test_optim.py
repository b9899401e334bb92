import numpy as np
import pytest
import torch
from pytorch_lightning.plugins.precision import MixedPrecision

from odcheap.layers.cheap_conv import DW, Shift, Standard
from odcheap.models.cifar import CifarResNet
from odcheap.training.optim import SGD, Cosine, OneCycle, Steps
from odcheap.utils.errors import OptionError

RECIPE = {"lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 2e-4}
STEPS = Steps((0.5, 0.75), 0.1)


def rates(schedule, steps, network=None):
    network = network or CifarResNet(8, DW(), 10)
    optimizer, scheduler = SGD(decay_norm=True, decay_spatial=True, schedule=schedule, **RECIPE).build(network, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("steps", [8, 300])
def test_the_rate_falls_at_half_and_three_quarters(steps):
    expected = [0.1] * (steps // 2) + [0.01] * (steps // 4) + [0.001] * (steps // 4)
    assert rates(STEPS, steps) == pytest.approx(expected)


@pytest.mark.parametrize("steps", [10, 237])
def test_cosine_and_one_cycle_are_pytorch_s_own(steps):
    """Those step in other units, but pass through the same rates."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for rate in rates(Cosine(), steps):
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        cosine.step()
    parts = torch.arange(steps, dtype=torch.double) / steps
    expected = np.interp(parts, [0, 0.3, 1], [0.004, 0.1, 0])
    assert rates(OneCycle(start=0.04, peak=0.3, end=0.0), steps) == pytest.approx(expected)


def test_a_peak_outside_the_run_is_refused():
    with pytest.raises(OptionError, match="optimizer.schedule.peak=1: must be a part of the run"):
        OneCycle(start=0.04, peak=1, end=0.0)


def test_float16s_scaled_gradients_can_be_clipped():
    """An optimizer that unscales them itself would hide them from the guard and from clipping."""
    network = CifarResNet(8, DW(), 10)
    optimizer, _ = SGD(decay_norm=True, decay_spatial=True, schedule=STEPS, **RECIPE).build(network, 10)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    scaler.scale(network(torch.randn(2, 3, 8, 8)).sum()).backward()
    scaler.unscale_(optimizer)
    precision.clip_gradients(optimizer, 0.1)
    assert torch.nn.utils.get_total_norm([p.grad for p in network.parameters()]) < 0.11
    before = [p.detach().clone() for p in network.parameters()]
    scaler.step(optimizer)
    assert all(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


@pytest.mark.parametrize("decay_norm", [True, False])
@pytest.mark.parametrize("decay_spatial", [True, False])
def test_weight_decay_spares_what_it_is_told_to(decay_norm, decay_spatial):
    network = CifarResNet(8, DW(), 10)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    recipe = SGD(decay_norm=decay_norm, decay_spatial=decay_spatial, schedule=STEPS, **RECIPE)
    optimizer, _ = recipe.build(network, 10)
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in network.named_parameters():
        of_norm = ".bn" in name or name.startswith("bn") or "shortcut.1" in name
        spared = (of_norm and not decay_norm) or (".spatial." in name and not decay_spatial)
        torch.testing.assert_close(p, before[name] * (1.0 if spared else 1 - 0.1 * 2e-4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("conv", [Shift(), Standard()])
def test_to_spare_spatial_operators_that_are_not_there_is_refused(conv):
    recipe = SGD(decay_norm=True, decay_spatial=False, schedule=STEPS, **RECIPE)
    with pytest.raises(
        OptionError,
        match="optimizer.decay_spatial=false: finds none of the spatial operators that block_type=DW or Group puts in",
    ):
        recipe.build(CifarResNet(8, conv, 10), 10)
