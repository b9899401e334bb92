import pytest
import torch
import torchvision
from torch import nn

from odcheap.layers.cheap_conv import DW, Shift
from odcheap.models.build import build_network
from odcheap.models.cifar import CifarResNet
from odcheap.models.input_channels import adapt_input
from odcheap.models.wrapped_network import to_backbone
from odcheap.models.wrappers import find_stride
from odcheap.utils.errors import OptionError


def build(kind):
    torch.manual_seed(0)
    if kind == "cifar":
        return CifarResNet(8, DW(), 4).eval()
    return to_backbone(torchvision.models.squeezenet1_1(num_classes=4)).eval()


@pytest.mark.parametrize("kind", ["cifar", "of a library"])
def test_a_gray_image_gives_the_logits_that_it_gave_in_three_channels(kind):
    gray = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = build(kind)(gray.expand(-1, 3, -1, -1))
    network = adapt_input(build(kind), 1)
    torch.testing.assert_close(network(gray), expected, rtol=1e-4, atol=1e-5)
    network(gray).square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    assert find_stride(network) == find_stride(build(kind))


def test_more_channels_repeat_the_weights():
    before, after = (next(m for m in network.modules() if isinstance(m, nn.Conv2d)).weight for network in both(5))
    torch.testing.assert_close(after, torch.cat([before, before[:, :2]], dim=1) * 0.6)


def both(channels):
    return build("cifar"), adapt_input(build("cifar"), channels)


def test_three_channels_and_a_network_that_fits_stay_as_they_are():
    assert all(torch.equal(a, b) for a, b in zip(*(net.parameters() for net in both(3)), strict=True))
    own = nn.Sequential(nn.Conv2d(2, 4, 3))
    assert adapt_input(own, 2)[0].weight is own[0].weight


@pytest.mark.parametrize("network", [nn.Linear(3, 2), nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(4, 6, 3)])
def test_a_first_convolution_that_cannot_be_changed_is_refused(network):
    with pytest.raises(OptionError, match="data.channels=1: must be 3: the first convolution"):
        adapt_input(network, 1)


def test_settings_build_the_network_for_their_images():
    settings = {"backbone": {"part": "resnet20", "depth": 8}, "block_type": {"part": "Shift"}, "classes": ["a", "b"]}
    assert build_network(settings, "path", "file").conv1.in_channels == 3
    for block_type in (None, Shift()):
        network = build_network(settings | {"image_size": [1, 8, 8]}, "path", "file", block_type)
        assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 2)
