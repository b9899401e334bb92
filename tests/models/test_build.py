import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from odcheap.models.build import load_network
from odcheap.utils.errors import OptionError
from odcheap.utils.parts import find_conf_dir, part_settings

DW = {"part": "DW"}
NETWORK = {"part": "resnet20", "depth": 8}


def settings(*overrides):
    with initialize_config_dir(str(find_conf_dir()), version_base="1.3"):
        cfg = compose("config", ["job_dir=unused", *overrides])
    names = {"backbone": "resnet56", "block_type": "DW"} | dict(o.split("=") for o in overrides if "." not in o)
    parts = {group: part_settings(cfg[group], name) for group, name in names.items()}
    return cfg, {"classes": ["a", "b", "c"], **parts}


@pytest.mark.parametrize(
    "overrides",
    [
        ["backbone=resnet20", "block_type=Group", "block_type.groups=2"],
        ["backbone=resnet20", "block_type=Standard"],
        ["backbone=resnet20", "block_type=RepDW", "backbone.expansion=2", "backbone.width=12"],
        ["backbone=resnet56_converted", "block_type=Shift"],
        ["backbone=mobilenetv2"],
        ["backbone=resnet18", "backbone.pretrained=gone.pth"],
    ],
    ids=" ".join,
)
def test_a_network_comes_back_as_it_was(overrides):
    cfg, kept = settings(*overrides)
    if "pretrained" in cfg.backbone:
        cfg.backbone.pretrained = None
    network = instantiate(cfg.backbone)(conv=instantiate(cfg.block_type), num_classes=3).eval()
    again = load_network(kept, network.state_dict(), "weights", "FILE").eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(images), network(images))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"backbone": {"_target_": "os.system", "command": "touch owned"}}, "its settings build no network"),
        ({"backbone": {**NETWORK, "_target_": "os.system"}}, "its settings build no network"),
        ({"backbone": {**NETWORK, "part": "../block_type/DW"}}, "its settings build no network"),
        ({"backbone": {**NETWORK, "part": "os.system"}}, "its settings build no network"),
        ({"backbone": {**NETWORK, "part": None}}, "its settings build no network"),
        ({"backbone": {**NETWORK, "growth": 3}}, "its settings build no network"),
        ({"backbone": {**NETWORK, "depth": 9}}, "its settings build no network"),
        ({"block_type": "DW"}, "its settings build no network"),
        ({"classes": None}, "its settings build no network"),
        ({"block_type": {"part": "Shift"}}, "its weights are another network's: layer"),
    ],
)
def test_strange_settings_are_refused(change, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = {"classes": ["a", "b"], "backbone": NETWORK, "block_type": DW}
    tensors = load_network(kept, state(kept), "weights", "FILE").state_dict()
    with pytest.raises(OptionError, match=f"weights=FILE: {line}"):
        load_network(kept | change, tensors, "weights", "FILE")
    assert not list(tmp_path.iterdir())


def state(kept):
    from odcheap.layers.cheap_conv import DW
    from odcheap.models.cifar import CifarResNet

    return CifarResNet(8, DW(), len(kept["classes"])).state_dict()
