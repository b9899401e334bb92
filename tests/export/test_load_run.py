import json

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from odcheap.export import load_run
from odcheap.layers.cheap_conv import DW, RepDW, Standard
from odcheap.layers.fuse import has_branches
from odcheap.models.build import load_student
from odcheap.models.cifar import CifarResNet
from odcheap.runs.load import read_weights
from odcheap.training.summary import write_student
from odcheap.utils.errors import OptionError

SETTINGS = {
    "backbone": {"part": "resnet20", "depth": 8},
    "block_type": {"part": "DW"},
    "classes": ["cat", "dog", "bird"],
    "split": "abc",
    "image_size": [3, 16, 16],
    "shorter_side": 18,
    "mean": [0.1, 0.2, 0.3],
    "std": [0.5, 0.6, 0.7],
}
CONFIG = "data: {name: x}\ntrainer: {precision: 32-true}\n"
CHOSEN = {"student": 1, "epoch": 4, "averaged": False, "test_top1": 0.5}


def write_run(path, network=None, settings=SETTINGS, summary=True, config=CONFIG):
    """A finished run's folder, without the run."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text(config)
    write_student(path / "student.safetensors", network or CifarResNet(8, DW(), 3), settings)
    found = {"selected": CHOSEN, "students": [{"test_top1": 0.4}, {"test_top1": 0.5}], "finished": summary}
    (path / "summary.json").write_text(json.dumps(found))
    return path


def test_the_chosen_student_comes_back_with_its_standard_network(tmp_path):
    network = CifarResNet(8, DW(), 3).eval()
    found = load_run.load_run_student(write_run(tmp_path / "run", network))
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(found.network(images), network(images))
    assert str(found.standard) == str(CifarResNet(8, Standard(), 3))
    assert (found.title, found.test_top1, found.image_size) == ("student 1 of epoch 5", 0.5, (3, 16, 16))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"settings": SETTINGS | {"block_type": {"part": "DW", "_target_": "os.system", "command": "touch owned"}}},
            "build no network",
        ),
        ({"settings": SETTINGS | {"classes": ["a", "b"]}}, "its weights are another network's: fc"),
        ({"settings": {}}, "is no student of a run"),
        ({"settings": SETTINGS | {"image_size": [3, 10**6, 10**6]}}, "is no student of a run"),
        ({"settings": SETTINGS | {"std": [1, 2, "3"]}}, "is no student of a run"),
        ({"settings": SETTINGS | {"shorter_side": True}}, "is no student of a run"),
        ({"settings": SETTINGS | {"classes": "abc"}}, "is no student of a run"),
        ({"network": CifarResNet(14, DW(), 3)}, "its weights are another network's: layer"),
        ({"config": "{"}, "cannot be read"),
        ({"config": "[]"}, "is not the config of a run"),
        ({"config": "data: 3\n"}, "is not the config of a run"),
        ({"summary": False}, "no epoch of this run has finished"),
    ],
    ids=str,
)
def test_what_is_no_run_is_refused_in_one_line(tmp_path, monkeypatch, change, line):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match=f"JOB_DIR=.*{line}"):
        load_run.load_run_student(write_run(tmp_path / "run", **change))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_config_is_data_and_nothing_in_it_is_resolved(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "42")
    path = write_run(tmp_path / "run", config="data: {name: '${oc.env:SECRET}'}\n")
    assert load_run.read_config(path)["data"]["name"] == "${oc.env:SECRET}"
    with pytest.raises(OptionError, match="holds no run of odcheap"):
        load_run.read_config(tmp_path)


def test_weights_without_settings_are_no_student(tmp_path):
    path = write_run(tmp_path / "run")
    save_file(CifarResNet(8, DW(), 3).state_dict(), path / "student.safetensors")
    with pytest.raises(OptionError, match="it has no valid settings of a network"):
        load_run.load_run_student(path)
    (path / "student.safetensors").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(OptionError, match="not a complete safetensors file"):
        load_run.load_run_student(path)
    assert OmegaConf.load(path / "config.yaml").data.name == "x"


def test_a_student_with_branches_is_exported_in_its_folded_form(tmp_path):
    """The file of the run can be trained further; that of the export holds one depth-wise convolution a layer."""
    settings = SETTINGS | {"block_type": {"part": "RepDW"}}
    network = CifarResNet(8, RepDW(), 3)
    network(torch.randn(8, 3, 16, 16))  # in training: batch norms that are not the identity
    images = torch.rand(4, 3, 16, 16)
    expected = network.eval()(images)
    found = load_run.load_run_student(write_run(tmp_path / "run", network, settings))
    assert not has_branches(found.network)
    torch.testing.assert_close(found.network(images), expected, atol=1e-5, rtol=1e-5)

    exported = tmp_path / "student.safetensors"
    write_student(exported, found.network, found.settings)
    for path, folded in ((exported, True), (tmp_path / "run" / "student.safetensors", False)):
        loaded = load_student(path)
        assert has_branches(loaded.network) is not folded
        torch.testing.assert_close(loaded.network(images), expected, atol=1e-5, rtol=1e-5)
        assert read_weights(path).folded is folded
