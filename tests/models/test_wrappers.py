from functools import partial

import pytest
import torch
import torchvision
from torch import nn

from odcheap.layers.cheap_conv import DW, CheapConv, Group, Shift, Standard
from odcheap.layers.spatial import Shift2d
from odcheap.models import flops
from odcheap.models.cifar import CifarResNet, densenet, vgg16, wide_resnet
from odcheap.models.convert import cheapen
from odcheap.models.wrappers import MobileNetV2, TimmBackbone, TorchvisionBackbone, check_image_size, find_stride
from odcheap.utils.errors import OptionError
from odcheap.utils.parts import build_part

FAMILIES = ["alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "mnasnet0_5"]
FAMILIES += ["mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "resnext50_32x4d"]
FAMILIES += ["shufflenet_v2_x0_5", "squeezenet1_1"]
TRANSFORMERS = ("vit", "maxvit", "swin")
OTHERS = [
    name
    for name in torchvision.models.list_models(module=torchvision.models)
    if name not in FAMILIES and not name.startswith(TRANSFORMERS)
]


def check_torchvision(name):
    """Features and head together are the network's own forward pass, in training mode too."""
    backbone = TorchvisionBackbone(name, Standard(), 7)
    x = torch.randn(2, 3, 96, 96)
    for mode in (True, False):
        backbone.train(mode)
        torch.manual_seed(0)  # dropout
        maps = backbone.features(x)
        logits = backbone.head(maps)
        torch.manual_seed(0)
        torch.testing.assert_close(logits, backbone.network(x))
    assert maps.shape[:2] == (2, backbone.num_features)
    assert logits.shape == (2, backbone.num_classes) == (2, 7)
    assert backbone.get_submodule(backbone.classifier).weight.shape[0] == 7


@pytest.mark.parametrize("name", FAMILIES)
def test_torchvision_families(name):
    check_torchvision(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_other_torchvision_network(name):
    check_torchvision(name)


@pytest.mark.parametrize(
    "name", ["resnet10t", "mobilenetv3_small_050", "convnext_atto", "repvgg_a0", "ese_vovnet19b_dw"]
)
def test_timm_networks(name):
    pytest.importorskip("timm")
    backbone = TimmBackbone(name, Standard(), 7).eval()
    x = torch.randn(2, 3, 64, 64)
    maps = backbone.features(x)
    assert maps.shape[:2] == (2, backbone.num_features)
    torch.testing.assert_close(backbone.head(maps), backbone.network(x))
    assert backbone.get_submodule(backbone.classifier).weight.shape[0] == 7


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (TorchvisionBackbone, "vit_b_16"),
        (TorchvisionBackbone, "maxvit_t"),
        (TimmBackbone, "vit_tiny_patch16_224"),
        (TimmBackbone, "swin_tiny_patch4_window7_224"),
        (TimmBackbone, "mixer_s32_224"),
    ],
)
def test_transformers_are_refused_by_name(build, name):
    if build is TimmBackbone:
        pytest.importorskip("timm")
    with pytest.raises(OptionError, match=f"backbone.name={name}: has no 4-D last feature map"):
        build(name, Standard(), 7)


def test_unknown_names_are_answered_with_near_ones():
    with pytest.raises(OptionError, match=r"backbone.name=resnet81: no classification network.*resnet18"):
        TorchvisionBackbone("resnet81", DW(), 7)
    with pytest.raises(OptionError, match="nothing to replace"):
        TorchvisionBackbone("mobilenet_v2", DW(), 7)


@pytest.mark.parametrize(
    ("network", "parameters"),
    [
        (densenet(40, 12, 10), 1_019_722),
        (wide_resnet(16, 4, 10), 2_748_890),
        (MobileNetV2(Standard(), 10), 2_236_682),
    ],
)
def test_small_networks_have_the_published_number_of_parameters(network, parameters):
    """DenseNet-40-12: 1.0 M, WRN-16-4: 2.75 M, MobileNetV2: 2.2 M with 10 classes."""
    assert flops.count_params(network) == parameters


def test_vgg16_by_hand():
    widths = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    by_hand = sum(9 * a * b + 2 * b for a, b in zip([3, *widths], widths, strict=False)) + 512 * 10 + 10
    assert flops.count_params(vgg16(10)) == by_hand


@pytest.mark.parametrize(("block_type", "kind"), [(Shift(), Shift2d), (Group(4), nn.Conv2d), (DW(), nn.Conv2d)])
def test_mobilenetv2_takes_the_block_type_s_spatial_operator(block_type, kind):
    network = MobileNetV2(block_type, 10)
    assert not any(isinstance(m, CheapConv) for m in network.modules())
    spatial = [block.conv[-3][0] for block in network.network.features[1:-1]]
    assert all(isinstance(layer, kind) for layer in spatial)
    if isinstance(block_type, Group):
        assert {layer.groups for layer in spatial} == {4}
    assert network.features(torch.randn(2, 3, 32, 32)).shape == (2, 1280, 4, 4)


@pytest.mark.parametrize(("backbone", "stride"), [(CifarResNet(8, DW(), 3), 4), (vgg16(3), 32), (densenet(7, 4, 3), 4)])
def test_pictures_smaller_than_the_stride_are_refused(backbone, stride):
    assert find_stride(backbone) == stride
    check_image_size(backbone, (3, stride, stride), "it")
    with pytest.raises(OptionError, match=f"backbone=it: pictures of {stride - 1} x 40 are too small: its stride is"):
        check_image_size(backbone, (3, stride - 1, 40), "it")


def test_pictures_that_leave_nothing_are_refused():
    with pytest.raises(OptionError, match="backbone=it: pictures of 40 x 40 are too small"):
        check_image_size(TorchvisionBackbone("inception_v3", Standard(), 3), (3, 40, 40), "it")


def test_a_network_for_small_pictures_refuses_large_ones():
    check_image_size(CifarResNet(8, DW(), 3), (3, 64, 64), "resnet56")
    with pytest.raises(OptionError, match="backbone=resnet56: is made for 32 x 32 pictures, and these have 65 x 65"):
        check_image_size(CifarResNet(8, DW(), 3), (3, 65, 65), "resnet56")
    check_image_size(TorchvisionBackbone("resnet18", DW(), 3), (3, 224, 224), "resnet18")


class PlainBlock(nn.Sequential):
    """A block that is no `BlockType`, with the arguments of one."""

    def __init__(self, in_channels, out_channels, stride=1):
        super().__init__(nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False))


@pytest.mark.parametrize(
    "conv", [PlainBlock, partial(PlainBlock), lambda *_: PlainBlock(*_)], ids=["class", "partial", "function"]
)
@pytest.mark.parametrize("part", ["resnet18", "mobilenetv2", "resnet56_converted", "resnet20"])
def test_a_plain_block_is_refused_in_one_line(conv, part):
    line = "block_type=(PlainBlock|<lambda>): is no subclass of odcheap.BlockType"
    with pytest.raises(OptionError, match=line):
        build_part("backbone", {"part": part})(conv=conv, num_classes=4)
    with pytest.raises(OptionError, match=line):
        cheapen(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), conv)
