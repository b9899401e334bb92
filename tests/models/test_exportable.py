import pytest
import torch
from torch import nn

from odcheap import BlockType
from odcheap.export.onnx import export_program
from odcheap.layers.cheap_conv import DW
from odcheap.models.cifar import CifarResNet
from odcheap.models.exportable import find_export_problem
from odcheap.utils.errors import Failure


class Branching(nn.AvgPool2d):
    """Its code reads values, which a graph cannot contain."""

    def forward(self, x):
        return super().forward(x / 2 if float(x.detach().abs().max()) > 1e9 else x)


class Special(nn.AvgPool2d):
    """It has an operator that a graph can contain and ONNX does not have."""

    def forward(self, x):
        return super().forward(torch.special.bessel_j0(x))


def block_type(spatial):
    class Own(BlockType):
        def make_spatial(self, channels, window):
            return spatial(window.kernel_size, window.stride, window.padding)

    return Own()


@pytest.mark.parametrize("whole", [False, True])
def test_a_network_that_can_be_exported_has_no_problem(whole, capsys):
    assert find_export_problem(CifarResNet(8, DW(), 3), (3, 16, 16), whole) is None
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("spatial", "problem"), [(Branching, "DataDependent"), (Special, "bessel_j0")])
def test_what_the_export_will_refuse_is_known_before(spatial, problem, capfd):
    network = CifarResNet(8, block_type(spatial), 3)
    found = find_export_problem(network, (3, 16, 16), whole=False)
    assert problem in found
    assert "\n" not in found
    if spatial is Branching:
        with pytest.raises(Failure, match="this network cannot be traced: .*DataDependent"):
            export_program(network, (3, 16, 16))
    assert capfd.readouterr() == ("", "")
