import pytest
import torch
import torchvision

from odcheap.layers.cheap_conv import DW, Shift, Standard
from odcheap.models.cifar import CifarResNet, densenet, vgg16, wide_resnet
from odcheap.models.stages import StageRecorder
from odcheap.models.wrapped_network import WrappedNetwork
from odcheap.models.wrappers import TorchvisionBackbone
from odcheap.utils.errors import OptionError

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
