"""What every method must do, whichever it is: the methods are those of `conf/method`."""

import json
import math
from functools import partial

import pytest
import torch
from conftest import TINY
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from recorder import Recorder
from safetensors.torch import load_file
from torch.optim.lr_scheduler import MultiStepLR

from odcheap.data.base import Batch
from odcheap.layers.cheap_conv import DW, Standard
from odcheap.methods.base import Method
from odcheap.methods.students import Students
from odcheap.models.build import load_student
from odcheap.models.cifar import CifarResNet
from odcheap.models.wrappers import TorchvisionBackbone
from odcheap.training.optim import build_optimization
from odcheap.training.summary import write_student
from odcheap.training.train_step import EagerStep, GraphStep
from odcheap.utils.parts import find_conf_dir

METHODS = sorted(path.stem for path in (find_conf_dir() / "method").glob("*.yaml"))
AVERAGED = {f"{name}, averaged": [f"method={name}", "method.average_decay=0.9"] for name in ("alone", "od")}
AVERAGED["dml, averaged"] = ["method=dml", "method.average_decay=0.9", "method.loss=dist", "method.feature=attention"]
DIGITS = {"classes": [str(k) for k in range(10)], "split": "", "image_size": [3, 8, 8], "shorter_side": 8}
DIGITS |= {"mean": [0.305] * 3, "std": [0.376] * 3, "block_type": {"part": "Standard"}}
DIGITS |= {"backbone": {"part": "resnet20", "depth": 8}}
RECIPE = (
    partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=2e-4, fused=True),
    partial(MultiStepLR, milestones=[0.5], fractions=["milestones"]),
)


@pytest.fixture
def options(tmp_path):
    """A method's options, also where it is asked for averages: kd needs a teacher's weights."""
    torch.manual_seed(0)
    write_student(tmp_path / "teacher.safetensors", CifarResNet(8, Standard(), 10), DIGITS)
    given = {"kd": [f"method.teacher_weights={tmp_path}/teacher.safetensors"]}
    return lambda name: AVERAGED.get(name) or [f"method={name}", *given.get(name, [])]


@pytest.fixture
def made(options):
    def build(name, num_stu=2, build=lambda: CifarResNet(8, DW(), 10)) -> Method:
        with initialize_config_dir(str(find_conf_dir()), version_base="1.3"):
            cfg = compose("config", ["job_dir=unused", "data=digits", *options(name)])
        torch.manual_seed(0)
        return instantiate(cfg.method)(students=Students(build, num_stu, seed=0))

    return build


def batch(method, size=8, side=8, dtype=torch.float, seed=0):
    random = torch.Generator().manual_seed(seed)
    views = (len(method.students),) if method.has_own_views else ()
    images = torch.randn(*views, size, 3, side, side, generator=random, dtype=torch.double).to(dtype)
    return Batch(images, torch.randint(10, (size,), generator=random))


@pytest.mark.parametrize(("num_stu", "precision"), [(2, "float32"), (3, "bfloat16"), (4, "float32")])
@pytest.mark.parametrize("name", METHODS)
def test_it_takes_steps_with_several_students(made, name, precision, num_stu):
    method = made(name, num_stu)
    optimizer, _ = build_optimization(method, *RECIPE, 10)
    before = [p.detach().clone() for p in method.students.parameters()]
    for step in range(2):
        method.start_epoch(step, 2)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            taken = EagerStep(method, optimizer)(batch(method, seed=step))
        assert taken.finite
        assert taken.outputs["student_logits"].dtype == torch.float32
        others = sum(term for term_name, term in taken.terms.items() if term_name != "loss")
        torch.testing.assert_close(taken.terms["loss"], others)
    assert all(not torch.equal(a, b) for a, b in zip(before, method.students.parameters(), strict=True))
    found = method.eval()(torch.randn(4, 3, 8, 8))
    assert found["student_logits"].shape == (num_stu, 4, 10)
    assert (found["teacher_logits"] is None) == (method.teacher_kind is None)


@pytest.mark.parametrize("name", METHODS)
def test_losses_are_computed_in_float32_where_the_network_runs_in_bfloat16(made, name):
    method = made(name, 3)
    optimizer, _ = build_optimization(method, *RECIPE, 10)
    images, target, _ = batch(method)
    with torch.autocast("cpu", torch.bfloat16):
        taken = EagerStep(method, optimizer)(Batch(images, target))
    expected = method.loss(taken.outputs, target)
    for term, value in taken.terms.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[term], rtol=1e-6, atol=1e-7, msg=term)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("kdcl", "lmcl")])
def test_mixed_labels_count_in_the_cross_entropies_in_proportion(made, name):
    """The terms that depend on the labels are linear in them; the others do not see them."""
    method = made(name, 3).eval()
    method.check_soft_labels()
    images, one, _ = batch(method)
    other = one.roll(1)
    outputs = method(images)
    labels = 0.7 * torch.eye(10)[one] + 0.3 * torch.eye(10)[other]
    mixed, first, second = (method.loss(outputs, target) for target in (labels, one, other))
    assert mixed.keys() == first.keys()
    assert any(first[term] != second[term] for term in first)
    for term, value in mixed.items():
        torch.testing.assert_close(value, 0.7 * first[term] + 0.3 * second[term], rtol=1e-5, atol=1e-6, msg=term)


@pytest.mark.parametrize("name", ["one", "okddip", "ffl", "pcl"])
def test_imitation_grows_and_the_labels_do_not(made, name):
    method = made(name, 3).eval()
    images, target, _ = batch(method)
    outputs, found = method(images), []
    for epoch in (0, 80):
        method.start_epoch(epoch, 300)
        found.append(method.loss(outputs, target))
    for term in found[0].keys() - {"loss"}:
        weak = 1.0 if term.startswith(("L_ce", "L_gt")) else math.exp(-5)
        torch.testing.assert_close(found[0][term], weak * found[1][term], rtol=1e-3, atol=1e-9, msg=term)
    assert any(not term.startswith(("L_ce", "L_gt", "loss")) for term in found[0])


@pytest.mark.parametrize(
    ("extra", "steps"), [([], 14), (["trainer.accumulate_grad_batches=2"], 8), (["on_nonfinite=skip"], 14)]
)
def test_a_run_calls_the_method_before_each_epoch_and_after_each_step(command, tmp_path, extra, steps):
    given = [*TINY, "method=pcl", "method.ramp_up=1.0", "checkpoint_keep=5", *extra, f"job_dir={tmp_path}/run"]
    result = command(*given)
    assert result.status == 0, result.err
    for epoch in (0, 1):
        path = tmp_path / "run" / "checkpoints" / f"epoch-{epoch:04d}.ckpt"
        state = torch.load(path, weights_only=True)["state_dict"]
        assert state["method.averages.steps"] == (epoch + 1) * steps // 2
        assert state["method.ramp.weight"].item() == pytest.approx(math.exp(-5 * (1 - epoch / 2) ** 2))


@pytest.mark.parametrize("name", METHODS)
def test_a_converted_network_of_torchvision_takes_a_step(made, name):
    method = made(name, build=lambda: TorchvisionBackbone("resnet18", DW(), 10))
    optimizer, _ = build_optimization(method, *RECIPE, 10)
    assert EagerStep(method, optimizer)(batch(method, size=4, side=64)).finite


@pytest.mark.parametrize("name", [*METHODS, *AVERAGED])
def test_recorded_steps_train_as_plain_ones_do(made, name):
    """Averages and growing weights belong to the recorded step."""
    states = []
    for recorded in (False, True):
        method = made(name).double()
        optimizer, schedule = build_optimization(method, *RECIPE, 8)
        eager = EagerStep(method, optimizer)
        step = GraphStep(eager, Recorder(method, optimizer), pytest.fail)
        for k in range(8):
            method.start_epoch(k // 2, 4)
            (step if recorded else eager)(batch(method, dtype=torch.double, seed=k))
            schedule.step()
        assert not recorded or step.recordings
        assert (name == "pcl" or name in AVERAGED) == (method.averages is not None and method.averages.steps == 8)
        states.append(method.state_dict())
    for key, expected in states[0].items():
        torch.testing.assert_close(states[1][key], expected, atol=1e-9, rtol=1e-9, msg=key)


@pytest.mark.parametrize("name", [*METHODS, "od, averaged"])
def test_a_run_beats_chance_and_resumes_exactly(command, options, name, tmp_path):
    straight, again = tmp_path / "straight", tmp_path / "again"
    given = [*TINY, "data.val_size=237", "trainer.max_epochs=3", "checkpoint_every=0", "checkpoint_keep=100"]
    result = command(
        *given, *(taught(command, given, tmp_path) if name == "kd" else options(name)), f"job_dir={straight}"
    )
    assert result.status == 0, result.err
    found = json.loads((straight / "summary.json").read_text())
    assert found["selected"]["test_top1"] > 0.4
    assert found["last"]["ensemble"]["test_top1"] > 0.4
    place = straight / "checkpoints" / "epoch-0002-step-0000010.ckpt"
    assert command(f"resume={place}", f"job_dir={again}").status == 0
    one, two = (torch.load(job / "checkpoints" / "epoch-0002.ckpt", weights_only=True) for job in (straight, again))
    for key, tensor in one["state_dict"].items():
        assert torch.equal(tensor, two["state_dict"][key]), key
    assert (straight / "student.safetensors").read_bytes() == (again / "student.safetensors").read_bytes()


# What is trained for few methods in the normal tests, and for each method that has it in the slow ones.
COMBINED = {
    "dml": AVERAGED["dml, averaged"],
}
MORE = {
    f"{name}, {feature}": [f"method={name}", f"method.feature={feature}"]
    for name in ("kd", "od", "dml")
    for feature in ("attention", "l2")
}
SEVERAL = "method.teacher_weights=[FOLDER/teacher.safetensors,FOLDER/teacher]"  # of which the first knows nothing
MORE["kd, several"] = ["method=kd", SEVERAL, "method.alpha=0.3", "method.feature=attention"]
MORE |= {
    f"{name}, {loss}": [f"method={name}", f"method.loss={loss}", "method.average_decay=0.9"]
    for name in METHODS
    if name != "alone"
    for loss in ("dkd", "dist", "standardized")
}
MORE["od, dkd"] += ["method.detach_teacher=true", "method.loss_weights=[1,2]"]  # these learn in few epochs


@pytest.mark.parametrize("name", [*COMBINED, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_a_run_with_other_terms_learns_resumes_exactly_and_exports(command, options, name, tmp_path):
    straight, again = tmp_path / "straight", tmp_path / "again"
    given = [*TINY, "data.val_size=237", "checkpoint_every=0", "checkpoint_keep=100", "trainer.max_epochs=3"]
    own = (COMBINED | MORE)[name]
    teacher = [] if own[0] != "method=kd" else taught(command, given, tmp_path)
    several = [o.replace("FOLDER", str(tmp_path)) for o in own]
    result = command(*given, *teacher, *several, f"job_dir={straight}")
    assert result.status == 0, result.err
    found = json.loads((straight / "summary.json").read_text())
    assert found["last"]["ensemble"]["test_top1"] > 0.4
    place = straight / "checkpoints" / "epoch-0002-step-0000010.ckpt"
    result = command(f"resume={place}", f"job_dir={again}")
    assert result.status == 0, result.err
    one, two = (torch.load(job / "checkpoints" / "epoch-0002.ckpt", weights_only=True) for job in (straight, again))
    for key, tensor in one["state_dict"].items():
        assert torch.equal(tensor, two["state_dict"][key]), key
    students = [load_student(job / "student.safetensors") for job in (straight, again)]
    images = torch.rand(4, 3, 8, 8)
    assert torch.equal(*(student(images) for student in students))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*COMBINED, *MORE])
def test_a_run_of_two_processes_with_other_terms(command, options, name, tmp_path):
    processes = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]
    given = [o for o in TINY if not o.startswith("trainer=")]
    own = (COMBINED | MORE)[name]
    more = options("kd")[1:] if own[0] == "method=kd" else []
    own = [o for o in own if o != SEVERAL]
    result = command(*given, *processes, *own, *more, "trainer.max_epochs=1", f"job_dir={tmp_path}/run")
    assert result.status == 0, result.err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["finished"]


def taught(command, given, folder):
    alone = command(*given, "method=alone", "num_stu=1", "block_type=Standard", f"job_dir={folder}/teacher")
    assert alone.status == 0, alone.err
    return ["method=kd", f"method.teacher_weights={folder}/teacher"]


def test_offline_distillation_tells_of_its_teacher(command, tmp_path):
    given = [*TINY, "trainer.max_epochs=1"]
    options = taught(command, given, tmp_path)
    for split, known in ((0, True), (1, False)):  # under another split the teacher has seen some held-out images
        job_dir = tmp_path / f"split-{split}"
        result = command(*given, *options, f"data.split_seed={split}", f"job_dir={job_dir}")
        assert result.status == 0, result.err
        found, of_teacher = (json.loads((d / "summary.json").read_text()) for d in (job_dir, tmp_path / "teacher"))
        assert found["teacher"]["kind"] == "frozen"
        assert (found["teacher"]["val_top1"] is not None) == known
        assert found["teacher"]["test_top1"] == of_teacher["selected"]["test_top1"]
        if known:
            assert found["teacher"]["val_top1"] == of_teacher["selected"]["val_top1"]
        cost, its = found["cost"], of_teacher["cost"]
        assert cost["teacher"]["train_seconds"] == of_teacher["train_seconds"]
        assert cost["teacher"]["training_macs"] == its["training_macs"] == 3 * its["macs"] * 437
        assert (cost["teacher"]["params"], cost["teacher"]["macs"]) == (its["params"], its["macs"])
        assert cost["training_macs_with_teacher"] == cost["training_macs"] + its["training_macs"]
        assert cost["training_macs"] == (3 * 2 * cost["macs"] + its["macs"]) * 437


@pytest.mark.parametrize("name", ["kdcl", "pcl", "od"])
def test_a_run_gives_each_student_a_view_where_the_method_wants_it(command, tmp_path, monkeypatch, name):
    seen, run = [], Students.forward

    def watched(self, images):
        seen.append((self.training, images.ndim))
        return run(self, images)

    monkeypatch.setattr(Students, "forward", watched)
    result = command(*TINY, "trainer.max_epochs=1", f"method={name}", f"job_dir={tmp_path}/run")
    assert result.status == 0, result.err
    assert set(seen) == {(True, 4 if name == "od" else 5), (False, 4)}


def test_a_run_goes_on_with_its_own_teacher_only(command, tmp_path):
    given = [*TINY, "trainer.max_epochs=1"]
    options = taught(command, given, tmp_path)
    assert command(*given, *options, f"job_dir={tmp_path}/run").status == 0
    (tmp_path / "teacher").rename(tmp_path / "moved")
    taught(command, [*given, "seed=1"], tmp_path)
    more = [f"resume={tmp_path}/run", "trainer.max_epochs=2"]
    result = command(*more)
    assert result.status == 1
    assert "is not the teacher that the run was started with" in result.err
    assert result.err.count("\n") == 1
    result = command(*more, f"method.teacher_weights={tmp_path}/moved")  # an option of kd, which is the run's method
    assert result.status == 0, result.err
    newest = tmp_path / "run" / "checkpoints" / "epoch-0001.ckpt"
    result = command(*given, *options, f"weights={newest}", f"job_dir={tmp_path}/new")  # another teacher by that path
    assert result.status == 0, result.err


@pytest.mark.parametrize("name", ["pcl", "od, averaged"])
def test_an_average_can_be_the_product(command, options, tmp_path, monkeypatch, name):
    def choose(self, epoch, figures, candidates):
        self.selected = {"candidate": 3, "epoch": epoch, "score": 0.5}

    monkeypatch.setattr("odcheap.training.callbacks.Record.select_best", choose)
    job_dir = tmp_path / "run"
    result = command(*TINY, *options(name), f"job_dir={job_dir}")
    assert result.status == 0, result.err
    assert "average of student 1 <- chosen" in result.out
    found = json.loads((job_dir / "summary.json").read_text())
    assert (found["selected"]["student"], found["selected"]["averaged"]) == (1, True)
    assert found["selected"]["test_top1"] == found["averages"][1]["test_top1"]
    content = torch.load(job_dir / "checkpoints" / "epoch-0001.ckpt", weights_only=True)["state_dict"]
    for name, tensor in load_file(job_dir / "student.safetensors").items():
        assert torch.equal(tensor, content[f"method.averages.members.1.{name}"]), name


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_run_of_two_processes(command, options, name, tmp_path):
    processes = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]
    given = [o for o in TINY if not o.startswith("trainer=")]
    result = command(*given, *processes, *options(name), f"job_dir={tmp_path}/run")
    assert result.status == 0, result.err
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert found["finished"]


@pytest.mark.parametrize("name", METHODS)
def test_too_few_students_are_refused_by_name(command, options, name, tmp_path):
    given = [*TINY, "trainer.max_epochs=1", *options(name), "num_stu=1", f"job_dir={tmp_path}/run"]
    result = command(*given)
    if name in ("alone", "kd", "od"):
        assert result.status == 0, result.err
    else:
        assert (result.status, result.err) == (1, f"error: num_stu=1: must be 2 or more with method={name}\n")
        assert not (tmp_path / "run").exists()
