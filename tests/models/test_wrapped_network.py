"""Networks of other libraries, and hand-written ones, as students."""

import copy
import warnings

import pytest
import torch
import torchvision
from torch import nn

from odcheap import OnlineDistillation, Students, add_weight_noise, cheapen
from odcheap.layers.cheap_conv import DW
from odcheap.models.cifar import CifarResNet
from odcheap.models.wrapped_network import WrappedNetwork, to_backbone
from odcheap.utils.errors import OptionError


class Plain(nn.Module):
    """Calls functions between its layers, one activation module several times, and takes 28 x 28 pixels only."""

    def __init__(self, channels=1):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(channels, 6, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.act = nn.ReLU()
        self.hidden, self.fc = nn.Linear(8 * 14 * 14, 12), nn.Linear(12, 4)

    def forward(self, x):
        x = self.act(self.conv(self.act(self.stem(x))))
        return self.fc(self.act(self.hidden(x.flatten(1))))


class WithParts(nn.Module):
    """A network with the parts of a student that is no `Backbone`."""

    num_features, num_classes = 6, 4

    def __init__(self):
        super().__init__()
        self.body, self.late, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1), nn.Linear(6, 4)

    def features(self, x):
        return self.body(x)

    def head(self, features):
        return self.fc(self.late(features).mean((2, 3)))

    def forward(self, x):
        return self.head(self.features(x))


def layer_output(network, name, images):
    outputs = []
    handle = network.get_submodule(name).register_forward_hook(lambda *given: outputs.append(given[2]))
    network(images)
    handle.remove()
    return outputs[-1]


@pytest.mark.parametrize(
    ("network", "name", "channels", "side"),
    [
        (lambda: torchvision.models.resnet18(num_classes=4), "layer4", 512, 64),
        (lambda: torchvision.models.vgg11(num_classes=4), "avgpool", 512, 32),
        (lambda: torchvision.models.squeezenet1_1(num_classes=4), "classifier.0", 512, 64),
        (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=4), "conv5", 1024, 64),
        (lambda: Plain(3), "act", 8, 28),
    ],
    ids=["resnet18", "vgg11", "squeezenet1_1", "shufflenet_v2_x0_5", "hand-written"],
)
def test_the_last_feature_map_and_the_logits_are_those_of_the_network(network, name, channels, side):
    own = network().eval()
    student = to_backbone(own)
    images = torch.randn(2, 3, side, side)
    maps, logits = student.features_and_logits(images)
    assert (student.num_features, student.num_classes) == (channels, 4) == (maps.shape[1], logits.shape[1])
    assert torch.equal(logits, own(images))
    assert torch.equal(student(images), logits)
    if name != "act":
        assert torch.equal(maps, layer_output(own, name, images))
    else:
        assert torch.equal(maps, own.conv(own.stem(images).relu()).relu())
    assert not any(module._forward_hooks for module in own.modules())
    assert torch.equal(copy.deepcopy(student).features(images), maps)
    assert dict(student.named_modules())[student.classifier].weight.shape[0] == 4


def test_timm_networks_end_their_features_where_timm_says():
    timm = pytest.importorskip("timm")
    network = timm.create_model("resnet18d", num_classes=5).eval()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(to_backbone(network).features(images), network.forward_features(images))


def test_a_backbone_stays_as_it_is_and_own_parts_are_used():
    network = CifarResNet(8, DW(), 10)
    assert to_backbone(network) is network
    student = to_backbone(WithParts())
    maps, _ = student.features_and_logits(torch.randn(2, 3, 16, 16))
    assert isinstance(student, WrappedNetwork)
    assert maps.shape[2:] == (14, 14)
    assert student.map_call is None
    assert student.classifier == "network.fc"


def test_converted_networks_learn_together_and_each_gets_gradients():
    students = Students(lambda: cheapen(torchvision.models.resnet18(num_classes=4), "DW"), num_stu=2, seed=0)
    method = OnlineDistillation(students)
    outputs = method(torch.randn(2, 3, 32, 32))
    assert outputs["student_logits"].shape == (2, 2, 4)
    method.loss(outputs, torch.tensor([0, 3]))["loss"].backward()
    assert all(parameter.grad is not None for parameter in method.parameters())
    assert students.members[0].network.fc.weight.shape == (4, 512)


def test_students_with_equal_weights_are_warned_of():
    network = Plain(3)
    with pytest.warns(UserWarning, match="the students start with equal weights.*add_weight_noise"):
        Students(lambda: copy.deepcopy(network), num_stu=2, seed=0)


def test_layers_that_were_copied_from_one_network_are_warned_of_with_their_share():
    network = torchvision.models.resnet18(num_classes=4)
    line = r"13 % of the parameters are equal .*\(conv1, layer2.0.downsample.0, .* 2 more\).*all_layers=True"
    with pytest.warns(UserWarning, match=line):
        Students(lambda: cheapen(network, "DW"), num_stu=2, seed=0)

    def with_noise():
        student = cheapen(network, "DW")
        add_weight_noise(student, all_layers=True)
        return student

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Students(with_noise, num_stu=2, seed=0)


class Holder(Plain):
    """A new network around a layer that it shares with others."""

    def __init__(self, conv):
        super().__init__(3)
        self.conv = conv


def test_a_function_must_make_new_students():
    network, conv = Plain(3), nn.Conv2d(6, 8, 3, stride=2, padding=1)
    line = "build=function that returns Plain: returned the same network twice; .*deepcopy.*cheapen"
    with pytest.raises(OptionError, match=line):
        Students(lambda: network, num_stu=2, seed=0)
    with pytest.raises(OptionError, match="two networks that share the parameter conv.weight"):
        Students(lambda: Holder(conv), num_stu=2, seed=0)
    backbone = CifarResNet(8, DW(), 10)
    with pytest.raises(OptionError, match="CifarResNet: returned the same network twice"):
        Students(lambda: backbone, num_stu=3, seed=0)
    Students(lambda: network, num_stu=1, seed=0)


@pytest.mark.parametrize(("given", "what"), [(Plain(3), "this is a network"), ("resnet18", "this is no function")])
def test_a_network_in_place_of_a_function_is_one_line(given, what):
    line = f"build={type(given).__name__}: must be a function that makes a new network in each call, .*{what}"
    with pytest.raises(OptionError, match=line):
        Students(given, num_stu=2, seed=0)


class TwoOutputs(Plain):
    def forward(self, x):
        return super().forward(x), x


class Transformer(nn.Module):
    num_classes = 4

    def __init__(self):
        super().__init__()
        self.patches, self.fc = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 4)
        self.blocks = nn.Sequential(*(nn.Linear(8, 8) for _ in range(12)))

    def forward(self, x):
        return self.fc(self.blocks(self.patches(x).flatten(2).mT).mean(1))


class Untyped(nn.Module):
    """Its last layer is a parameter."""

    def __init__(self):
        super().__init__()
        self.conv, self.weight = nn.Conv2d(3, 8, 3), nn.Parameter(torch.zeros(8, 4))

    def forward(self, x):
        return self.conv(x).mean((2, 3)) @ self.weight


LACKS = "with `features`, `head`, `num_features`, `num_classes` of its own it could be one, and it lacks "


@pytest.mark.parametrize(
    ("network", "reason", "lacking"),
    [
        (
            Transformer(),
            r"its last feature map \(N, C, h, w\) is far from its end",
            "`features`, `head`, `num_features`$",
        ),
        (TwoOutputs(), r"in eval mode it does not return logits \(N, K\) but tuple", ""),
        (nn.Linear(3, 4), "it has no convolution", "`features`, `head`, `num_features`, `num_classes`$"),
        (Untyped(), "it has no last layer .* with 4 outputs, one for each class", ""),
        (nn.Conv2d(3, 4, 3), r"in eval mode it does not return logits \(N, K\) but shape", ""),
        (nn.Sequential(nn.Conv2d(3, 4, 500)), "it cannot be run on an image of 224 x 224", ""),
    ],
    ids=["transformer", "two outputs", "no convolution", "no last layer", "a map", "no usual size"],
)
def test_what_cannot_be_a_student_is_said_in_one_line(network, reason, lacking):
    line = f"backbone={type(network).__name__}: cannot be a student: {reason}.*; {LACKS}{lacking}"
    with pytest.raises(OptionError, match=line) as caught:
        Students(lambda: network, num_stu=1, seed=0)
    assert "\n" not in str(caught.value)


def test_a_network_that_returns_more_in_training_is_refused():
    network = torchvision.models.googlenet(num_classes=4, init_weights=False)
    with pytest.raises(OptionError, match=r"in training it does not return logits \(N, K\) but GoogLeNetOutputs"):
        to_backbone(network)


def test_the_channels_must_be_those_that_the_network_names():
    class Other(Plain):
        num_features = 7

    with pytest.raises(
        OptionError, match=r"its num_features=7 are not the channels of its last feature map \(N, 8, 14, 14\)"
    ):
        to_backbone(Other())
