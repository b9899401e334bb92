"""A cheap convolution from a package outside odcheap: one class with one method, and one YAML file."""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from odcheap.layers.cheap_conv import BlockType, CheapConv, Shift
from odcheap.layers.fuse import cheap_form, dense_form, has_pairs
from odcheap.models.build import load_student
from odcheap.models.cifar import CifarResNet
from odcheap.models.convert import cheapen, conversion_table
from odcheap.models.flops import count_macs, count_params
from odcheap.utils.parts import build_part

OWN = """
from torch import nn
from odcheap import BlockType

class AvgPool(BlockType):
    def make_spatial(self, channels, window):
        return nn.AvgPool2d(window.kernel_size, window.stride, window.padding)
"""


@pytest.fixture
def config_dir(tmp_path, monkeypatch):
    (tmp_path / "ownpackage.py").write_text(OWN)
    (tmp_path / "conf" / "block_type").mkdir(parents=True)
    (tmp_path / "conf" / "block_type" / "AvgPool.yaml").write_text("_target_: ownpackage.AvgPool\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "conf"
    sys.modules.pop("ownpackage", None)


@pytest.fixture
def avg_pool(config_dir):
    return build_part("block_type", {"part": "AvgPool"}, config_dirs=[config_dir])


def test_it_is_a_block_of_a_network(avg_pool):
    network = CifarResNet(14, avg_pool, 10)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    shift = CifarResNet(14, Shift(), 10)  # whose spatial operator has no parameters and MACs either
    assert count_params(network) == count_params(shift)
    assert count_macs(network, (3, 32, 32)) == count_macs(shift, (3, 32, 32))


def test_any_network_is_converted_by_its_name(avg_pool, config_dir):
    before = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 5, stride=2, padding=2))
    for block_type in (avg_pool, "AvgPool"):
        after = cheapen(before, block_type, config_dirs=[config_dir])
        x = torch.randn(2, 3, 17, 18)
        assert after(x).shape == before(x).shape
        assert conversion_table(before, after, (3, 16, 16)).rows[1].after == "AvgPool2d + 1 x 1"
    with pytest.raises(ValueError, match="block_type=AvgPool: unknown; must be one of DW, Group, RepDW, Shift"):
        cheapen(before, "AvgPool")


def test_the_fit_is_the_nearest_in_least_squares(avg_pool):
    conv = nn.Conv2d(5, 7, 3, padding=1, bias=False).double()
    pair = cheapen(conv, avg_pool, keep=(), init="fit")
    kernel = conv.weight.mean((2, 3), keepdim=True) * 9  # of a window of ninths, the nearest is the sum
    torch.testing.assert_close(pair.pointwise.weight, kernel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_its_dense_form_computes_the_same(avg_pool, dtype):
    network = CifarResNet(14, avg_pool, 5).to(dtype).eval()
    images = torch.randn(2, 3, 16, 15, dtype=dtype)
    for form in (cheap_form, dense_form):
        torch.testing.assert_close(form(network)(images), network(images), atol=1e-5, rtol=1e-4)
    assert not has_pairs(dense_form(network))


def test_a_student_with_it_is_loaded_again(avg_pool, config_dir, tmp_path):
    network = CifarResNet(8, avg_pool, 2).eval()
    settings = {"backbone": {"part": "resnet20", "depth": 8}, "block_type": {"part": "AvgPool"}, "classes": ["a", "b"]}
    settings |= {"split": "", "image_size": [3, 8, 8], "shorter_side": 8, "mean": [0] * 3, "std": [1] * 3}
    save_file(network.state_dict(), tmp_path / "s.safetensors", metadata={"odcheap": json.dumps(settings)})
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(load_student(tmp_path / "s.safetensors", config_dirs=[config_dir])(images), network(images))
    with pytest.raises(ValueError, match="block_type=AvgPool: unknown"):
        load_student(tmp_path / "s.safetensors")


class MaxPool(BlockType):
    """Against the rules: not linear."""

    def make_spatial(self, channels, window):
        return nn.MaxPool2d(window.kernel_size, window.stride, window.padding)


class Mixing(BlockType):
    """Against the rules: mixes the channels, and is no convolution."""

    def make_spatial(self, channels, window):
        return nn.Sequential(window.make_conv(channels, channels))


@pytest.mark.parametrize("block_type", [MaxPool(), Mixing()])
def test_an_operator_that_is_no_single_kernel_a_channel_stays_a_pair(block_type):
    pair = block_type(6, 4)
    form = dense_form(pair)
    assert isinstance(form, CheapConv)
    images = torch.randn(1, 6, 8, 8)
    assert torch.equal(form(images), pair(images))
