"""What `student.safetensors` says of the machine on which it was written."""

import pytest

from odcheap.layers.cheap_conv import DW, RepDW, Standard
from odcheap.methods.alone import Alone
from odcheap.methods.students import Students
from odcheap.models.build import read_student_settings
from odcheap.models.cifar import CifarResNet
from odcheap.training.command import describe_next_steps
from odcheap.training.summary import build_caption, summarize_costs, write_student
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


@pytest.mark.parametrize(
    ("recall", "verdict"),
    [
        ({"cat": 1.0, "dog": 0.9}, ""),
        ({"cat": 1.0, "dog": 0.0}, "; the student is not better than that"),
        ({"cat": 1.0, "dog": 0.05}, "; so few images do not show that the student is better"),
    ],
)
def test_the_screen_compares_the_student_with_guessing(recall, verdict):
    selected = {"student": 0, "averaged": False, "epoch": 1, "selected_on": "val", "recall": recall}
    classes = {"cat": {"test": 30}, "dog": {"test": 20}}
    line = "on the test images, always answering cat would give 60.00 %, no other class more"
    assert build_caption({"selected": selected, "classes": classes}).split("\n")[1] == line + verdict
    assert "always" not in build_caption({"selected": selected})


def test_an_export_from_before_the_end_is_not_recommended(tmp_path):
    lines = "\n".join(describe_next_steps(str(tmp_path)))
    assert f"predict {tmp_path}/export IMAGE" in lines
    (tmp_path / "export").mkdir()
    lines = "\n".join(describe_next_steps(str(tmp_path)))
    assert f"{tmp_path}/export was written before this training ended\nnext:\n" in lines
    assert f"export {tmp_path} --overwrite" in lines
    assert "IMAGE" not in lines


def test_a_training_computes_the_branches_and_its_student_does_not():
    students = Students(lambda: CifarResNet(8, RepDW(), 10), 2, seed=0)
    costs = summarize_costs(Alone(students, average_decay=0.9), CifarResNet(8, Standard(), 10), (3, 32, 32), 5)
    branches = (16 + 16 + 16 + 32) * 1024 + (32 + 64) * 256  # 1 x 1, at the channels and pixels of each operator
    # Two students, of which the backward pass counts twice, and their two averages, which have none.
    assert costs["training_macs"] == (3 * 2 + 2) * (costs["macs"] + branches) * 5
