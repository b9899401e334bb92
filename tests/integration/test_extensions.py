"""Parts of a user, from a folder outside the package: train, resume, export and report work with them."""

import json

import pytest
import torch
from conftest import Result

from odcheap import cli, load_student
from odcheap.utils.files import read_torch

PARTS = '''
"""One part of each kind."""

from typing import Annotated

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from odcheap.data.in_memory import Images
from odcheap.layers.cheap_conv import BlockType
from odcheap.methods.base import Method


class AveragePool(BlockType):
    """A 3 x 3 average pool as the spatial operator."""

    def make_spatial(self, channels, window):
        return nn.AvgPool2d(window.kernel_size, window.stride, window.padding)


class BranchingPool(nn.AvgPool2d):
    """Its code reads values, which no graph can contain."""

    def forward(self, x):
        return super().forward(x / 2 if float(x.detach().abs().max()) > 1e9 else x)


class Branching(BlockType):
    def make_spatial(self, channels, window):
        return BranchingPool(window.kernel_size, window.stride, window.padding)


class PlainNet(nn.Module):
    """A network without the parts of a student, which calls functions between its layers."""

    def __init__(self, conv, num_classes, width=8):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, width, 3, padding=1), conv(width, 2 * width, stride=2)
        self.fc = nn.Linear(2 * width, num_classes)

    def forward(self, x):
        return self.fc(self.block(self.stem(x).relu()).relu().mean((2, 3)))


class BestLogit(Method):
    """Every student learns from the largest logit that any student has for each class."""

    teacher_kind = "maximum"

    def __init__(self, students, weight: Annotated[float, Field(gt=0)] = 1.0):
        super().__init__(students)
        self.weight = weight

    def forward(self, images):
        logits = self.students(images)[1]
        return {"student_logits": logits, "teacher_logits": logits.amax(0)}

    def loss(self, outputs, target):
        students, teacher = outputs["student_logits"], outputs["teacher_logits"].detach().softmax(-1)
        terms = {f"ce_student_{k}": F.cross_entropy(logits, target) for k, logits in enumerate(students)}
        terms["teaching"] = self.weight * sum(F.cross_entropy(logits, teacher) for logits in students)
        return terms | {"loss": sum(terms.values())}


def load_stripes(count: Annotated[int, Field(ge=100)]):
    """Horizontal and vertical stripes, 8 x 8."""
    random = torch.Generator().manual_seed(0)
    target = torch.arange(count) % 2
    stripes = (255 * (torch.arange(8) % 2)).repeat(8, 1)
    images = torch.stack([stripes.T if label else stripes for label in target])[:, None].expand(-1, 3, -1, -1)
    noise = torch.randint(0, 100, images.shape, generator=random)
    images = (images * 0.6 + noise).clamp(0, 255).to(torch.uint8)
    test = count // 4
    return Images(images[test:], target[test:], images[:test], target[:test], ["horizontal", "vertical"])


class SignSGD(torch.optim.Optimizer):
    """Steps by the sign of the gradient."""

    def __init__(self, params, lr: float, weight_decay: float = 0.0, scale: Annotated[float, Field(gt=0)] = 1.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "scale": scale})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    decayed = parameter.grad + group["weight_decay"] * parameter
                    parameter.sub_(group["lr"] * group["scale"] * decayed.sign())
        return loss
'''
CONF = {
    "block_type/average_pool": "_target_: parts_of_a_user.AveragePool\n",
    "block_type/branching": "_target_: parts_of_a_user.Branching\n",
    "backbone/plain_net": "_target_: parts_of_a_user.PlainNet\n_partial_: true\nwidth: 8\n",
    "method/best_logit": "_target_: parts_of_a_user.BestLogit\n_partial_: true\nweight: 0.5\n",
    "optimizer/sign": "_target_: parts_of_a_user.SignSGD\n_partial_: true\nlr: 0.002\nweight_decay: 0.0\nscale: 1.0\n",
    "data/stripes": """_target_: odcheap.data.in_memory.InMemoryData
name: stripes
load: {_target_: parts_of_a_user.load_stripes, _partial_: true, count: 400}
batch_size: 50
eval_batch_size: 100
val_size: 60
split_seed: 0
flip: false
crop_padding: 1
mean: [0.5, 0.5, 0.5]
std: [0.25, 0.25, 0.25]
seed: ${seed}
select: ${select}
select_by: top1
""",
}
CHOICES = ["block_type=average_pool", "method=best_logit", "optimizer=sign", "scheduler=cosine", "data=stripes"]


@pytest.fixture
def run(tmp_path, monkeypatch, command, capsys):
    """`run("train", ...)` is `odcheap train ...` in a folder with the user's parts."""
    (tmp_path / "parts_of_a_user.py").write_text(PARTS)
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in CONF.items():
        path = tmp_path / "conf" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def call(name, *arguments):
        if name == "train":
            return command(*arguments)
        capsys.readouterr()
        return Result(cli.main([name, *arguments]), *capsys.readouterr())

    return call


def test_train_resume_export_and_report_with_parts_of_a_user(run, tmp_path):
    given = ["--config-dir", "conf", *CHOICES, "backbone=resnet20", "backbone.depth=8", "num_stu=2"]
    given += ["trainer=cpu", "logger=csv", "trainer.max_epochs=2"]

    done = run("train", *given, "job_dir=run")
    assert done.status == 0, done.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["teacher"]["kind"] == "maximum"
    assert summary["cost"]["macs"] < summary["cost"]["standard"]["macs"]

    search = f"hydra.searchpath=[file://{tmp_path / 'conf'}]"
    again = run("train", search, "resume=run/checkpoints/epoch-0000.ckpt", "job_dir=again")
    assert again.status == 0, again.err
    first, second = (tmp_path / name / "student.safetensors" for name in ("run", "again"))
    assert first.read_bytes() == second.read_bytes()
    refused = run("train", *given, "job_dir=other", "method.weight=0")
    assert refused.err == "error: method.weight=0: must be a number, above 0\n"
    refused = run("train", "resume=run")
    assert (refused.status, refused.err.count("\n")) == (1, 1)
    assert "unknown; must be one of" in refused.err  # the folder with its parts was not given

    refused = run("export", "run", "--seconds", "0.01")
    assert "block_type=average_pool: unknown" in refused.err
    assert "--config-dir DIR (config_dirs=[DIR] in Python) adds parts of your own" in refused.err
    done = run("export", "run", "--seconds", "0.01", "--config-dir", "conf")
    assert done.status == 0, done.err
    assert {"student.onnx", "student.safetensors"} <= {path.name for path in (tmp_path / "run" / "export").iterdir()}
    # A network of the user that is no `Backbone`, and a teacher with a part of the user.
    plain = ["--config-dir", "conf", "data=stripes", "backbone=plain_net", "method=kd", "method.teacher_weights=run"]
    done = run("train", *plain, "num_stu=1", "trainer=cpu", "logger=csv", "trainer.max_epochs=1", "job_dir=plain")
    assert (done.status, done.err) == (0, "")
    assert "warning" not in done.out
    loaded = load_student(tmp_path / "plain" / "student.safetensors", config_dirs=[tmp_path / "conf"])
    assert loaded(torch.rand(1, 3, 8, 8)).shape == (1, 2)
    done = run("report", "run", "--config-dir", "conf")
    assert done.status == 0, done.err
    assert "best_logit" in (tmp_path / "run" / "report" / "report.md").read_text()

    saved = read_torch(tmp_path / "run" / "checkpoints" / "epoch-0001.ckpt")["odcheap"]
    assert saved["config"]["block_type"] == {"part": "average_pool"}
    assert saved["config"]["optimizer"]["part"] == "sign"
    for path in (tmp_path / "run").rglob("*"):
        if path.suffix in (".ckpt", ".safetensors", ".yaml"):
            assert b"parts_of_a_user" not in path.read_bytes(), path

    student = load_student(first, config_dirs=[tmp_path / "conf"])
    assert student(torch.rand(1, 3, 8, 8)).shape == (1, 2)


def test_what_cannot_be_exported_or_is_not_used_is_said_before_the_training(run, tmp_path):
    (tmp_path / "conf" / "method").mkdir(exist_ok=True)
    (tmp_path / "conf" / "method" / "alone.yaml").write_text("_target_: parts_of_a_user.BestLogit\n_partial_: true\n")
    given = ["--config-dir", "conf", "block_type=branching", "data=stripes", "method=alone", "num_stu=1", "trainer=cpu"]
    given += ["backbone=resnet20", "backbone.depth=8", "logger=csv", "trainer.max_epochs=1", "job_dir=run"]
    done = run("train", *given)
    assert done.status == 0, done.err
    before = done.out.partition("epoch 1/1")[0]
    assert "warning: block_type=branching: this network can be trained but not exported (GuardOnDataDependent" in before
    assert "method/alone.yaml is not used: odcheap has a method of this name" in before
