"""Every option of every group builds, and what it builds is called, so that a misspelt key cannot hide."""

import itertools

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

import odcheap.config
import odcheap.distributed.cluster  # noqa: F401  the same
from odcheap.layers.cheap_conv import DW, CheapConv, Standard
from odcheap.methods.students import RUNS, Students
from odcheap.models.cifar import CifarResNet
from odcheap.models.wrappers import find_stride
from odcheap.training.optim import build_optimization
from odcheap.training.summary import write_student
from odcheap.utils.parts import find_conf_dir

CONF = find_conf_dir()


NAMED = {"torchvision": ["backbone.name=densenet121"], "timm": ["backbone.name=resnet10t"]}


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.fixture
def composed():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield lambda *overrides: compose("config", overrides=["job_dir=unused", *overrides])


@pytest.mark.parametrize("block_type", options("block_type"))
def test_block_types_build(composed, block_type):
    conv = instantiate(composed(f"block_type={block_type}").block_type)
    assert type(conv).__name__ == block_type
    assert conv(16, 32, 2)(torch.randn(1, 16, 8, 8)).shape == (1, 32, 4, 4)


EVERY = list(itertools.product(options("backbone"), options("block_type")))
IN_TURN = list(zip(options("backbone"), itertools.cycle(options("block_type"))))


@pytest.mark.parametrize(
    ("backbone", "block_type"),
    [pytest.param(*pair, marks=() if pair in IN_TURN or pair[0] == "resnet20" else pytest.mark.slow) for pair in EVERY],
)
def test_every_backbone_with_every_block_type_learns(composed, backbone, block_type):
    cfg = composed(f"backbone={backbone}", f"block_type={block_type}", *NAMED.get(backbone, []))
    if backbone == "timm":
        pytest.importorskip("timm")
    network = instantiate(cfg.backbone)(conv=instantiate(cfg.block_type), num_classes=3)
    side = find_stride(network)
    maps = network.features(torch.randn(4, 3, side, side))
    assert maps.shape == (4, network.num_features, 1, 1)
    logits = network.head(maps)
    assert logits.shape == (4, network.num_classes) == (4, 3)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert (count_pairs(network) > 0) == (block_type != "Standard") or backbone == "mobilenetv2"


def count_pairs(network):
    return sum(isinstance(m, CheapConv) for m in network.modules())


@pytest.mark.parametrize("method", options("method"))
def test_methods_build_and_their_terms_add_up(composed, method, tmp_path):
    cfg = composed(f"method={method}", "backbone.depth=8")
    backbone, conv = instantiate(cfg.backbone), instantiate(cfg.block_type)
    if method == "kd":  # needs a trained teacher
        settings = {"block_type": {"part": "Standard"}, "backbone": {"part": "resnet56", "depth": 8}}
        settings |= {"classes": ["a", "b", "c"], "split": "", "image_size": [3, 8, 8], "shorter_side": 8}
        settings |= {"mean": [0] * 3, "std": [1] * 3}
        write_student(tmp_path / "student.safetensors", backbone(conv=Standard(), num_classes=3), settings)
        cfg.method.teacher_weights = str(tmp_path)
    students = Students(lambda: backbone(conv=conv, num_classes=3), 2, seed=0)
    made = instantiate(cfg.method)(students=students)
    outputs = made(torch.randn(4, 3, 8, 8))
    assert outputs["student_logits"].shape == (2, 4, 3)
    assert (outputs["teacher_logits"] is None) == (made.teacher_kind is None)
    terms = made.loss(outputs, torch.tensor([0, 1, 2, 0]))
    torch.testing.assert_close(terms["loss"], sum(v for name, v in terms.items() if name != "loss"))


@pytest.mark.parametrize("data", options("data"))
def test_data_modules_build(composed, data):
    made = instantiate(composed(f"data={data}").data)
    assert made.name == data
    if data == "digits":
        made.read()
        assert len(made.labels["val"]) == 237


@pytest.mark.parametrize("optimizer", options("optimizer"))
def test_optimizers_build(composed, optimizer):
    cfg = composed(f"optimizer={optimizer}")
    build_optimization(torch.nn.Conv2d(1, 1, 1), instantiate(cfg.optimizer), instantiate(cfg.scheduler), 100)


@pytest.mark.parametrize("scheduler", options("scheduler"))
def test_schedules_build(composed, scheduler):
    cfg = composed(f"scheduler={scheduler}")
    parts = instantiate(cfg.optimizer), instantiate(cfg.scheduler)
    optimizer, schedule = build_optimization(torch.nn.Conv2d(1, 1, 1), *parts, 100)
    for _ in range(100):
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("trainer", options("trainer"))
def test_trainers_build(composed, trainer):
    cfg = OmegaConf.to_container(composed(f"trainer={trainer}").trainer, resolve=True)
    if trainer == "gpu" and not torch.cuda.is_available():
        cfg["accelerator"] = "cpu"
    if trainer in ("ddp", "multinode"):
        cfg["accelerator"] = "cpu"
    assert isinstance(instantiate(cfg), pl.Trainer)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # mlflow calls SQLAlchemy by names of its time
@pytest.mark.parametrize("logger", options("logger"))
def test_loggers_build(composed, logger, tmp_path):
    for name, part in composed(f"logger=[{logger}]", f"job_dir={tmp_path}").logger.items():
        if part is not None:
            pytest.importorskip(name if name != "tensorboard" else "torch.utils.tensorboard")
            instantiate(part)


@pytest.mark.parametrize("experiment", options("experiment"))
def test_experiments_compose(composed, experiment):
    cfg = composed(f"experiment={experiment}")
    assert cfg.trainer.max_epochs >= 1
    instantiate(cfg.optimizer)
    instantiate(composed(f"experiment={experiment}", "scheduler=cosine").scheduler)


@pytest.mark.parametrize(
    ("short", "options"),
    [
        ([], []),
        (["cifar10_short"], ["trainer.max_epochs=120"]),
        (["short"], ["num_stu=1", "trainer.max_epochs=30"]),
    ],
)
def test_matched_compute_is_one_student_for_as_long_as_all_of_od_s(composed, short, options):
    """In each form, by the command that its recipe tells."""
    one, all_of_them = (
        composed(f"experiment=[{','.join([name, *short])}]", "block_type=DW", *given)
        for name, given in (("cifar10_matched", options), ("cifar10_od", []))
    )
    assert one.num_stu == 1
    assert one.trainer.max_epochs == all_of_them.num_stu * all_of_them.trainer.max_epochs
    assert one.optimizer == all_of_them.optimizer
    head = (CONF / "experiment" / "cifar10_matched.yaml").read_text().partition("defaults:")[0]
    assert not short or f"experiment=[{','.join(['cifar10_matched', *short])}] {' '.join(options)}" in head


def test_reference_is_the_2019_code_to_the_letter(composed):
    cfg = composed("experiment=reference")
    assert (cfg.method.kl_reduction, cfg.method.temperature, cfg.method.detach_teacher) == ("mean", 4.0, False)
    assert (cfg.select, cfg.data.val_size, cfg.data.batch_size) == ("test", 0, 128)
    assert (cfg.data.crop_padding, cfg.data.flip) == (4, True)
    assert (cfg.data.mean, cfg.data.std) == ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])
    recipe = (cfg.optimizer.lr, cfg.optimizer.momentum, cfg.optimizer.nesterov, cfg.optimizer.weight_decay)
    assert recipe == (0.1, 0.9, False, 2e-4)
    schedule = cfg.scheduler
    assert (cfg.optimizer.decay_norm, list(schedule.milestones), schedule.gamma) == (True, [0.5, 0.75], 0.1)
    assert schedule.warmup == 0
    assert (cfg.trainer.max_epochs, cfg.backbone.depth, cfg.num_stu) == (300, 56, 4)


def test_augmentation_belongs_to_the_data_set(composed):
    cfg = composed("data=digits", "backbone=resnet56")
    assert (cfg.data.flip, cfg.data.crop_padding) == (False, 1)


def test_the_default_run_fits_one_screen():
    assert len((CONF / "config.yaml").read_text().splitlines()) <= 50


@pytest.mark.parametrize("way", RUNS)
def test_ways_to_run_the_students_build(composed, way):
    assert composed(f"together={way}").together == way
    students = Students(lambda: CifarResNet(8, DW(), 3), 2, seed=0, run=RUNS[way])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    maps, logits = students.to(device)(torch.randn(4, 3, 8, 8, device=device))
    assert [f.shape for f in maps] == [(4, 64, 2, 2)] * 2
    assert logits.shape == (2, 4, 3)
