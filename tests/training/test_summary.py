"""What `student.safetensors` says of the machine on which it was written."""

from odcheap.layers.cheap_conv import DW
from odcheap.models.build import read_student_settings
from odcheap.models.cifar import CifarResNet
from odcheap.training.summary import write_student
from odcheap.utils.files import read_safetensors


def test_a_student_has_the_names_of_the_files_it_came_from_and_not_their_folders(tmp_path):
    settings = {
        "backbone": {"part": "torchvision", "name": "resnet18", "pretrained": "/home/zqme/my weights/resnet18.pth"},
        "block_type": {"part": "DW", "files": [{"path": "~/zqme/a.bin"}], "groups": 4},
        "classes": ["cat", "~dog"],
        "split": "abc",
        "image_size": [3, 32, 32],
        "shorter_side": 32,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.2, 0.2, 0.2],
    }
    write_student(tmp_path / "student.safetensors", CifarResNet(8, DW(), 2), settings)
    assert b"zqme" not in (tmp_path / "student.safetensors").read_bytes()
    read = read_student_settings(read_safetensors(tmp_path / "student.safetensors")[1], "path", "x")
    assert read["backbone"] == settings["backbone"] | {"pretrained": "resnet18.pth"}
    assert read["block_type"] == settings["block_type"] | {"files": [{"path": "a.bin"}]}
    assert read["classes"] == ["cat", "~dog"]
