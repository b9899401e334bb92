"""From a network that was trained in Python to files for a device."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from export.private_words import find_words
from PIL import Image
from torch import nn

from odcheap import cheapen, export_student
from odcheap.export import onnx as onnx_export
from odcheap.utils.errors import Failure, OptionError

CLASSES = ["dark", "bright"]
IMAGES = {"image_size": 16, "shorter_side": 20, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "seconds": 0.005}


class Net(nn.Module):
    """A network of nobody's library: it calls functions between its layers."""

    def __init__(self, classes=2):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 9, 3, padding=1), nn.Conv2d(9, 12, 3, stride=2, padding=1)
        self.fc = nn.Linear(12, classes)

    def forward(self, x):
        x = self.conv(self.stem(x).relu()).relu()
        return self.fc(x.mean((2, 3)))


def by_brightness(network):
    """Sets a network's last layer so that it says "bright" for bright images."""
    with torch.no_grad():
        for conv in (module for module in network.modules() if isinstance(module, nn.Conv2d)):
            nn.init.constant_(conv.weight, 0.1)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        network.fc.weight.copy_(torch.tensor([[-1.0], [1.0]]).expand(2, 12))
        network.fc.bias.copy_(torch.tensor([1.0, -1.0]))
    return network


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("photos"), []
    for k in range(8):
        noise = np.random.default_rng(k).integers(0, 60, (24 + k, 30, 3))
        Image.fromarray((noise + 180 * (k % 2)).astype(np.uint8)).save(folder / f"{k}.png")
        found.append((str(folder / f"{k}.png"), k % 2))
    return found


def test_a_network_becomes_a_checked_folder_that_classifies(tmp_path, samples):
    network = by_brightness(cheapen(Net(), "DW"))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    wrong = [(samples[0][0], 1), *samples[1:]]  # one of eight labels
    files = [path for path, _ in samples]
    folder = export_student(network, CLASSES, tmp_path / "out", samples=wrong, calibration=files, **IMAGES)
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())

    names = {path.name for path in folder.iterdir()} - {"student-dense.onnx"}  # is kept if it is faster
    assert names == {"README.md", "labels.json", "predict.py", "preprocess.json", "results.json"} | {
        f"student{end}" for end in (".onnx", "-int8.onnx")
    }
    assert find_words(folder, [str(tmp_path), str(Path(files[0]).parent), "photos", str(Path(__file__).parent)]) == []
    assert json.loads((folder / "labels.json").read_text()) == CLASSES
    results = json.loads((folder / "results.json").read_text())
    assert (results["network"], results["data"], results["test"]["top1"]) == ("depth-wise + 1 x 1, Net", None, 0.875)
    settings = json.loads((folder / "preprocess.json").read_text())
    assert (settings["size"], settings["shorter_side"], settings["std"]) == ([16, 16], 20, [0.2, 0.3, 0.4])
    card = (folder / "README.md").read_text()
    assert card.startswith("# `depth-wise + 1 x 1, Net`\n")
    assert "load_student" not in card  # there are no settings that build the network again
    assert re.search(r"accuracy.*(0\.8750|87\.50).* on 8 (images|pictures)", card)
    check = re.search(r"^`(.*sha256sum -c)`", (folder / "README.md").read_text(), re.MULTILINE)
    done = subprocess.run(check[1], shell=True, cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(": OK") == len(list(folder.iterdir())) - 1

    command = [sys.executable, str(folder / "predict.py"), "--json", *files]
    answers = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert [answer["label"] for answer in answers] == [CLASSES[label] for _, label in samples]


def test_an_older_export_is_replaced_only_when_asked(light, tmp_path):
    network = by_brightness(cheapen(Net(), "DW"))
    folder = export_student(network, CLASSES, tmp_path / "out", **IMAGES)
    first = (folder / "README.md").read_text()
    assert "ot verified on data" in first
    with pytest.raises(OptionError, match=r"out=.*holds an export; overwrite replaces it, another out leaves it"):
        export_student(network, CLASSES, folder, **IMAGES)
    assert (folder / "README.md").read_text() == first
    assert "torch.export.load" not in first
    export_student(network, CLASSES, folder, overwrite=True, batch=2, pt2=True, **IMAGES)
    card = (folder / "README.md").read_text()
    assert "(2, 3, 16, 16)" in card
    assert (folder / "student.pt2").exists()
    assert "**Do not load a `.pt2` file of a stranger**" in card


def test_a_file_that_computes_something_else_leaves_nothing(tmp_path, samples, monkeypatch):
    right = onnx_export.to_onnx
    other = onnx_export.export_program(by_brightness(cheapen(Net(), "DW")), (3, 16, 16))
    monkeypatch.setattr(onnx_export, "to_onnx", lambda program, opset: right(other, opset))
    with pytest.raises(Failure, match=r"student.*onnx: a logit differs from the trained network's by"):
        export_student(cheapen(Net(), "DW"), CLASSES, tmp_path / "out", samples=samples, **IMAGES)
    assert list(tmp_path.iterdir()) == []


class TwoOutputs(Net):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize(
    ("network", "changes", "line"),
    [
        (
            Net(3),
            {},
            r"network=Net: must return logits \(N, 2\) for 2 classes; for two images it returns shape \(2, 3\)",
        ),
        (TwoOutputs(), {}, "network=TwoOutputs: must return logits .*returns a tuple"),
        (nn.Conv2d(1, 2, 3), {}, "network=Conv2d: cannot be run on images of 3 x 16 x 16"),
        (Net(), {"std": (0.1, 0.0, 0.1)}, "std=.*must be one number above 0 for each channel"),
        (Net(), {"mean": 0.5}, r"mean=0.5: must be three numbers, or one for gray images; \(0, 0, 0\) if"),
        (Net(), {"std": "0.1"}, r"std=0.1: must be three numbers, or one for gray images; \(1, 1, 1\) if"),
        (Net(), {"mean": (0.5, 0.5)}, r"mean=\(0.5, 0.5\): must be three numbers"),
        (Net(), {"mean": (0.5,)}, r"mean=\[0.5\]: must be one number for each channel; data.std has 3"),
        (Net(), {"mean": (0.5,), "std": (0.2,)}, "network=Net: cannot be run on images of 1 x 16 x 16"),
        (Net(), {"image_size": 0}, "image_size=0: must be a whole number of pixels"),
        (Net(), {"shorter_side": 8}, "shorter_side=8: must be image_size=16 or more"),
        (Net(), {"samples": [("nowhere.png", 0)]}, "samples=nowhere.png: no such file"),
        (Net(), {"samples": [("nowhere.png", 2)]}, "samples=.*its label must be 0 to 1"),
        (Net(), {"calibration": ["a.png"]}, "samples=.*must be given with calibration"),
        (Net(), {"batch": 0}, "^batch=0: must be 1 or more"),
    ],
    ids=str,
)
def test_what_cannot_be_exported_is_one_line(tmp_path, network, changes, line):
    with pytest.raises(OptionError, match=line) as caught:
        export_student(network, CLASSES, tmp_path / "out", **IMAGES | changes)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_network_of_gray_images_is_checked_on_gray_images(tmp_path, samples, light):
    gray = IMAGES | {"mean": (0.5,), "std": (0.2,)}
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    for given in ({"samples": samples}, {}):  # without images it is checked on noise
        folder = export_student(network, CLASSES, tmp_path / "out", overwrite=True, **given, **gray)
    settings = json.loads((folder / "preprocess.json").read_text())
    assert (settings["channels"], settings["mean"]) == (1, [0.5])
    assert "The input of `student.onnx` is gray in [0, 1], (n, 1, height, width)" in (folder / "README.md").read_text()


@pytest.mark.parametrize("classes", ["ab", 2])
def test_classes_must_be_a_list_of_names(tmp_path, classes):
    with pytest.raises(OptionError, match=f"classes={classes}: must be a list with the name of each class"):
        export_student(Net(), classes, tmp_path / "out", **IMAGES)
