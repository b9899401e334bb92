"""Networks of other libraries, and hand-written ones, as students: last map, stages, and channels of the images."""

import copy
import warnings

import pytest
import torch
import torchvision
from torch import nn

from odcheap import OnlineDistillation, Students, add_weight_noise, cheapen
from odcheap.layers.cheap_conv import DW, Shift, Standard
from odcheap.models.backbone import StageRecorder, WrappedNetwork, adapt_input, to_backbone
from odcheap.models.build import build_network
from odcheap.models.cifar import CifarResNet, densenet, vgg16, wide_resnet
from odcheap.models.wrappers import TorchvisionBackbone, find_stride
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


RESNET18 = ["layer1", "layer2", "layer3", "layer4"]


@pytest.mark.parametrize(
    ("build", "side", "names", "sides"),
    [
        (lambda: CifarResNet(14, Shift(), 10), 32, ["layer1", "layer2", "layer3"], [32, 16, 8]),
        (lambda: CifarResNet(8, Standard(), 10), 8, ["layer1", "layer2", "layer3"], [8, 4, 2]),
        (lambda: wide_resnet(10, 1, 10), 32, ["body.1", "body.2", "body"], [32, 16, 8]),
        (lambda: densenet(10, 4, 10), 32, ["body.4", "body.9", "body"], [32, 16, 8]),
        (lambda: vgg16(10), 32, ["body.5", "body.12", "body.22", "body.32", "body.42"], [32, 16, 8, 4, 2]),
        (lambda: TorchvisionBackbone("resnet18", DW(), 10), 64, [f"network.{n}" for n in RESNET18], [16, 8, 4, 2]),
        (lambda: WrappedNetwork(torchvision.models.resnet18()), 64, [f"network.{n}" for n in RESNET18], [16, 8, 4, 2]),
    ],
)
def test_a_stage_ends_where_the_maps_shrink(build, side, names, sides):
    network = build()
    recorder = StageRecorder([network], "method", "x")
    assert [call.name for call in recorder.calls[0]] == names
    with recorder.record() as maps:
        network.features_and_logits(torch.randn(2, 3, side, side))
    assert [m.shape for m in maps[0]] == [(2, c, s, s) for c, s in zip(recorder.channels[0], sides, strict=True)]
    assert all(m.requires_grad for m in maps[0])
    assert not any(module._forward_hooks for module in network.modules())


def test_a_transformer_has_none():
    with pytest.raises(OptionError, match="method=x: needs feature maps .* and SwinTransformer has none"):
        StageRecorder([torchvision.models.swin_t()], "method", "x")


def test_a_module_that_is_called_several_times_is_recorded_at_the_right_call():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.ReLU()
            self.pool, self.fc = torch.nn.AvgPool2d(2), torch.nn.Linear(3, 2)

        def forward(self, x):
            for _ in range(2):
                x = self.act(self.conv(self.act(self.conv(x))))
                x = self.pool(x)
            return self.fc(x.mean((2, 3)))

    network = Twice()
    recorder = StageRecorder([network], "method", "x")
    assert [(call.name, call.number) for call in recorder.calls[0]] == [("act", 1), ("act", 3)]
    x = torch.randn(1, 3, 8, 8)
    with recorder.record() as maps:
        network(x)
    first = network.act(network.conv(network.act(network.conv(x))))
    torch.testing.assert_close(maps[0][0], first)


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
