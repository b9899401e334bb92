import pytest
import torch
from torch import nn

from odcheap.layers.cheap_conv import DW, Group, Shift, Standard
from odcheap.models.cifar import CifarResNet
from odcheap.models.flops import count_macs, count_params

# Parameters and MACs of a ResNet-56 student, 32 x 32 x 3, 10 classes: counted from the shapes of the 2019 code.
TABLE = [
    (Standard(), 855_770, 125_747_840),
    (Shift(), 102_106, 15_385_216),
    (DW(), 119_818, 20_472_448),
    (Group(1), 938_458, 156_942_976),
    (Group(2), 520_282, 86_164_096),
    (Group(4), 311_194, 50_774_656),
    (Group(8), 206_650, 33_079_936),
    (Group(16), 154_378, 24_232_576),
]


@pytest.mark.parametrize(("block_type", "parameters", "multiplications"), TABLE)
def test_resnet56_costs_what_the_reference_costs(block_type, parameters, multiplications):
    network = CifarResNet(56, block_type, 10)
    assert (count_params(network), count_macs(network, (3, 32, 32))) == (parameters, multiplications)


@pytest.mark.parametrize("block_type", [Standard(), Shift(), DW(), Group(4)])
def test_macs_equal_a_count_by_hand(block_type):
    network = CifarResNet(14, block_type, 10).eval()
    counted = []

    def by_hand(module, inputs, output):
        if isinstance(module, nn.Conv2d):
            counted.append(output.numel() * module.weight[0].numel())
        elif isinstance(module, nn.Linear):
            counted.append(module.weight.numel())

    handles = [m.register_forward_hook(by_hand) for m in network.modules()]
    network(torch.zeros(1, 3, 32, 32))
    for handle in handles:
        handle.remove()
    assert count_macs(network, (3, 32, 32)) == sum(counted)


def test_counting_leaves_the_network_as_it_was():
    network = CifarResNet(8, DW(), 10).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    count_macs(network, (3, 32, 32))
    assert network.training
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
