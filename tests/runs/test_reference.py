import re

import pytest
import torch

from odcheap.layers.cheap_conv import DW, Group, Shift
from odcheap.methods.od import OnlineDistillation
from odcheap.methods.students import Students
from odcheap.models.cifar import CifarResNet
from odcheap.runs.reference import load_reference
from odcheap.utils.errors import OptionError


def test_golden_logits_loss_and_gradients(golden):
    expected = torch.load(golden / "reference_dw_resnet8_expected.pt", weights_only=True)
    model = load_reference(golden / "reference_dw_resnet8.pt")
    assert (model.block_type, model.depth, model.groups, model.num_stu) == ("DW", 8, 1, 4)
    assert not model.training
    x, target = expected["x"].float(), expected["y"]
    for mode in ("eval", "train"):
        model.train(mode == "train")
        students, teacher = model(x)
        assert (students - expected[f"{mode}_students"]).abs().max() <= 1e-4
        assert (teacher - expected[f"{mode}_teacher"]).abs().max() <= 1e-4
    loss = model.loss(students, teacher, target)
    assert loss.item() == pytest.approx(expected["loss_mean"], rel=1e-3)
    loss.backward()
    norms = {theirs(name): p.grad.norm().item() for name, p in model.method.named_parameters()}
    assert norms == pytest.approx(expected["grad_norms"], rel=1e-3, abs=1e-6)


def theirs(name: str) -> str:
    """Our name of a parameter under the 2019 code's, written down here a second time and in the other direction."""
    name = re.sub(r"students\.members\.(\d+)", lambda m: f"resnet_m{int(m[1]) + 1}", name)
    name = re.sub(r"conv([12])\.pointwise", r"conv\1", name)
    return re.sub(r"conv([12])\.spatial", r"dw\1", name)


def write_like_2019(path, conv, kind, depth, num_stu, prefix="", zipped=False, expansion=1):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        method = OnlineDistillation(Students(lambda: CifarResNet(depth, conv, 10, expansion), num_stu, 0))
    state = {prefix + theirs(name).replace("dw", kind): t for name, t in method.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, path, _use_new_zipfile_serialization=zipped)
    return method.eval()


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    ("conv", "kind", "groups"),
    [(Shift(), "dw", 1), (DW(), "dw", 1)] + [(Group(g), "group", g) for g in (1, 2, 8, 16)],
)
def test_block_type_depth_groups_and_students_are_read_from_the_file(tmp_path, conv, kind, groups, prefix):
    expansion = 3 if groups == 2 else 1
    method = write_like_2019(tmp_path / "old.pt", conv, kind, 14, 3, prefix, expansion=expansion)
    model = load_reference(tmp_path / "old.pt")
    assert (model.block_type, model.depth, model.groups, model.num_stu) == (type(conv).__name__, 14, groups, 3)
    x = torch.randn(2, 3, 16, 16)
    students, teacher = model(x)
    torch.testing.assert_close(students, method(x)["student_logits"])
    torch.testing.assert_close(teacher, method(x)["teacher_logits"])


def test_other_and_incomplete_files_are_refused(tmp_path):
    torch.save({"state_dict": {"conv.weight": torch.ones(1)}}, tmp_path / "other.pt")
    with pytest.raises(OptionError, match="no tensor is named resnet_m1"):
        load_reference(tmp_path / "other.pt")
    write_like_2019(tmp_path / "old.pt", DW(), "dw", 8, 2)
    content = torch.load(tmp_path / "old.pt", weights_only=True)
    del content["state_dict"]["resnet_m2.fc.weight"], content["state_dict"]["resnet_m1.layer2.0.conv1.weight"]
    torch.save(content, tmp_path / "part.pt")
    with pytest.raises(OptionError, match="do not fit"):
        load_reference(tmp_path / "part.pt")
    del content["state_dict"]["resnet_m1.fc.weight"]
    torch.save(content, tmp_path / "part.pt")
    with pytest.raises(OptionError, match="lacks 'fc.weight'"):
        load_reference(tmp_path / "part.pt")
