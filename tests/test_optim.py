import pytest
import torch
from pytorch_lightning.plugins.precision import MixedPrecision

from odcheap.backbones import CifarResNet
from odcheap.convs import DW
from odcheap.optim import SGD

RECIPE = {"lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 2e-4, "milestones": (0.5, 0.75), "gamma": 0.1}


@pytest.mark.parametrize("steps", [8, 300])
def test_the_rate_falls_at_half_and_three_quarters(steps):
    optimizer, schedule = SGD(decay_norm=True, **RECIPE).build(CifarResNet(8, DW(), 10), steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    expected = [0.1] * (steps // 2) + [0.01] * (steps // 4) + [0.001] * (steps // 4)
    assert rates == pytest.approx(expected)


def test_float16s_scaled_gradients_can_be_clipped():
    """An optimizer that unscales them itself would hide them from the guard and from clipping."""
    network = CifarResNet(8, DW(), 10)
    optimizer, _ = SGD(decay_norm=True, **RECIPE).build(network, 10)
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
def test_weight_decay_spares_batch_norm_on_request(decay_norm):
    network = CifarResNet(8, DW(), 10)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer, _ = SGD(decay_norm=decay_norm, **RECIPE).build(network, 10)
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in network.named_parameters():
        of_norm = ".bn" in name or name.startswith("bn") or "shortcut.1" in name
        kept = 1.0 if of_norm and not decay_norm else 1 - 0.1 * 2e-4
        torch.testing.assert_close(p, before[name] * kept, rtol=1e-6, atol=0)
