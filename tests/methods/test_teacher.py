import json

import pytest
import torch
import torchvision
from torch.nn import functional as F

from odcheap.layers.cheap_conv import Standard
from odcheap.methods.kd import build_offline_distillation
from odcheap.methods.students import Students
from odcheap.methods.teacher import Teacher, load_teacher, read_training_costs
from odcheap.models.backbone import adapt_input
from odcheap.models.cifar import CifarResNet
from odcheap.training.summary import write_student
from odcheap.utils.errors import OptionError

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
OTHER = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
SETTINGS = {
    "backbone": {"part": "resnet20", "depth": 8},
    "block_type": {"part": "Standard"},
    "classes": ["cat", "dog", "bird"],
    "split": "abc",
    "image_size": [3, 16, 16],
    "shorter_side": 16,
    "mean": list(OTHER[0]),
    "std": list(OTHER[1]),
}


@pytest.fixture
def run(tmp_path):
    network = CifarResNet(8, Standard(), 3)
    write_student(tmp_path / "student.safetensors", network, SETTINGS)
    summary = {"train_seconds": 12.5, "cost": {"training_macs": 1000}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    return tmp_path, network.eval()


def read(path, published=None, num_classes=3, mean=None, std=None, size=None):
    return load_teacher(str(path), published, num_classes, (MEAN, STD), mean, std, size)


@pytest.mark.parametrize("side", [16, 24])
def test_it_sees_the_pictures_as_its_own_training_did(run, side):
    folder, network = run
    pixels = torch.rand(4, 3, side, side)
    given, own = ((pixels - column(mean)) / column(std) for mean, std in ((MEAN, STD), OTHER))
    if side != 16:
        own = F.interpolate(own, (16, 16), mode="bilinear", antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(read(folder)(given), network(own), rtol=1e-4, atol=1e-4)


def column(values):
    return torch.tensor(values).view(1, -1, 1, 1)


def test_what_is_known_of_a_run_comes_along(run):
    folder, _ = run
    teacher = read(folder)
    assert (teacher.classes, teacher.split) == (["cat", "dog", "bird"], "abc")
    assert teacher.history == {"train_seconds": 12.5, "training_macs": 1000}
    (folder / "summary.json").unlink()
    assert read(folder / "student.safetensors").history == {"train_seconds": None, "training_macs": None}


def test_neither_mode_nor_gradients_change_it(run):
    teacher = read(run[0])
    around = torch.nn.Sequential(teacher).train()
    assert around.training
    assert not any(m.training for m in [*teacher.modules(), *teacher.network.modules()])
    assert not any(p.requires_grad for p in teacher.network.parameters())
    assert not teacher(torch.randn(2, 3, 16, 16, requires_grad=True)).requires_grad


def test_other_classes_are_refused(run):
    teacher = read(run[0])
    teacher.check_classes(["cat", "dog", "bird"])
    with pytest.raises(OptionError, match=r"method.teacher_weights=.*: the teacher's classes are cat, dog, bird"):
        teacher.check_classes(["cat", "bird", "dog"])
    with pytest.raises(OptionError, match=r"method.teacher_weights=.*: the teacher has 3 classes, the data 5"):
        read(run[0], num_classes=5)


@pytest.mark.parametrize("channels", [1, 4])
def test_images_with_other_channels_than_the_students_have_are_refused(run, channels):
    with pytest.raises(OptionError, match=f"takes images with 3 channels; the data have {channels}"):
        load_teacher(str(run[0]), None, 3, ([0.5] * channels, [0.2] * channels))


def test_a_teacher_of_gray_images(tmp_path):
    network = adapt_input(CifarResNet(8, Standard(), 3), 1)
    own = {"image_size": [1, 16, 16], "mean": [0.1], "std": [0.5]}
    write_student(tmp_path / "student.safetensors", network, SETTINGS | own)
    pixels = torch.rand(4, 1, 16, 16)
    teacher = load_teacher(str(tmp_path), None, 3, ([0.4], [0.2]))
    with torch.no_grad():
        expected = network.eval()((pixels - 0.1) / 0.5)
    torch.testing.assert_close(teacher((pixels - 0.4) / 0.2), expected, rtol=1e-4, atol=1e-4)


def test_published_weights(tmp_path):
    network = torchvision.models.resnet18(num_classes=4).eval()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    teacher = read(tmp_path / "w.pth", "torchvision/resnet18", num_classes=4, size=64)
    pixels = torch.rand(2, 3, 64, 64)
    own = (pixels - column((0.485, 0.456, 0.406))) / column((0.229, 0.224, 0.225))
    with torch.no_grad():
        found = teacher((pixels - column(MEAN)) / column(STD))
        torch.testing.assert_close(found, network(own), rtol=1e-4, atol=1e-4)
    assert (teacher.classes, teacher.split) == (None, None)
    assert teacher.history == {"train_seconds": None, "training_macs": None}
    with pytest.raises(OptionError, match=r"method.teacher_weights=.*: weights of another network: .*fc"):
        read(tmp_path / "w.pth", "torchvision/resnet18", num_classes=3)


@pytest.mark.parametrize("name", ["resnet18", "hub/resnet18", "torchvision/"])
def test_libraries_are_named(name, run):
    with pytest.raises(OptionError, match=f"method.teacher_network={name}: must be torchvision/NAME or timm/NAME"):
        read(run[0], name)


@pytest.mark.parametrize(
    ("option", "value"), [("mean", [0.5]), ("std", [0.0, 0.0, 0.0]), ("std", [1, 1, -1]), ("size", 0), ("size", 10**6)]
)
def test_numbers_that_no_picture_has_are_refused(run, option, value):
    given = Students(lambda: CifarResNet(8, Standard(), 3), 1, seed=0)
    expected = {f"teacher_{name}": value if name == option else None for name in ("mean", "std", "size")}
    with pytest.raises(OptionError, match=f"method.teacher_{option}="):
        build_offline_distillation(given, str(run[0]), None, mean=MEAN, std=STD, **expected)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(OptionError, match=r"method.teacher_weights=.*student.safetensors: no such file"):
        read(tmp_path)
    write_student(tmp_path / "student.safetensors", CifarResNet(8, Standard(), 3), {})
    with pytest.raises(OptionError, match="for published weights method.teacher_network names.*is no student of a run"):
        read(tmp_path)


def test_a_checkpoint_knows_its_teacher_again(run, tmp_path):
    teacher = read(run[0])
    state = teacher.state_dict()
    assert list(state) == ["_extra_state"]
    read(run[0] / "student.safetensors").bfloat16().load_state_dict(state)
    other = tmp_path / "other"
    other.mkdir()
    write_student(other / "student.safetensors", CifarResNet(8, Standard(), 3), SETTINGS)
    with pytest.raises(OptionError, match="other: is not the teacher that the run was started with"):
        read(other).load_state_dict(state)


def test_a_list_of_files_is_several_teachers(run):
    common = [None, None, None, None, MEAN, STD]
    given = Students(lambda: CifarResNet(8, Standard(), 3), 1, seed=0)
    one = build_offline_distillation(given, [str(run[0])], *common).teacher
    several = build_offline_distillation(given, [str(run[0]), f"{run[0]}/student.safetensors"], *common).teacher
    assert isinstance(one, Teacher)
    assert several.history == {"train_seconds": 25.0, "training_macs": 2000}
    images = torch.randn(2, 3, 16, 16)
    expected = 4 * (one(images) / 4).log_softmax(-1)  # the logits of the mean of two equal predictions
    torch.testing.assert_close(several(images), expected)
    with pytest.raises(OptionError, match=r"method.teacher_weights=\[\]: must be a"):
        build_offline_distillation(given, [], *common)


def test_made_directly():
    teacher = Teacher(CifarResNet(8, Standard(), 3), (MEAN, STD), MEAN, STD, 8)
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(teacher(x), teacher.network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "text", ["[1]", "{", '{"cost": [1]}', '{"train_seconds": "x"}', '{"cost": {"training_macs": -1}}']
)
def test_a_summary_of_a_wrong_kind_beside_the_teacher_is_one_line(tmp_path, text):
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(OptionError, match=r"method.teacher_weights=.*summary.json: ") as refused:
        read_training_costs(tmp_path / "student.safetensors")
    assert "\n" not in str(refused.value)
