"""Whole runs, once per promise of the README."""

import csv
import hashlib
import json
import re
from pathlib import Path

import hydra
import pytest
import torch
from conftest import TINY, Begun
from recorder import Recorder
from safetensors import safe_open
from safetensors.torch import load_file

from odcheap.data.in_memory import load_digits
from odcheap.data.splits import hash_pixels, split_stratified
from odcheap.layers import kernels
from odcheap.layers.cheap_conv import DW, RepDW
from odcheap.layers.fuse import fold_branches
from odcheap.models.cifar import CifarResNet
from odcheap.training.summary import write_student
from odcheap.training.train_step import WARM_UP, GraphStep, uses_graphs
from odcheap.utils.errors import OptionError
from odcheap.utils.files import write_checkpoint
from odcheap.utils.parts import find_conf_dir


def summary(job_dir):
    return json.loads((job_dir / "summary.json").read_text())


def metrics(job_dir):
    with open(job_dir / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(path):
    return torch.load(path, weights_only=True)


def hashes(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def finished(trained):
    return trained()


def test_a_run_ends_with_its_results_and_what_can_be_done_next(command, tmp_path):
    job_dir = tmp_path / "run"
    result = command(*TINY, "trainer.max_epochs=1", f"job_dir={job_dir}")
    assert result.status == 0, result.err
    assert "<- chosen" in result.out
    assert "\nnext:\n  export the student:  " in result.out
    assert f"evaluate {job_dir} FOLDER\n" in result.out
    assert "\non the test images, always answering " in result.out


def accuracy(network, held_out=None):
    """On the test images, or on the training images of these numbers."""
    images = load_digits()
    x, target = (
        (images.test, images.test_target)
        if held_out is None
        else (images.train[held_out], images.train_target[held_out])
    )
    with torch.no_grad():
        logits = network.eval()((x / 255 - 0.305) / 0.376)
    return (logits.argmax(1) == target).double().mean().item()


def test_a_run_s_folder(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "checkpoints", "config.yaml", "metrics.csv", "summary.json", "confusion.csv", "student.safetensors",
        "status.json", ".lock", "training_images.json",
    }  # fmt: skip
    found = summary(finished)
    chosen = found["students"][found["selected"]["student"]]
    assert {name: found["selected"][name] for name in chosen} == chosen
    assert found["selected"]["selected_on"] == "val"
    assert (found["teacher"]["kind"], len(found["students"]), len(found["last"]["students"])) == ("head", 2, 2)
    assert (found["epochs"], found["seed"], found["finished"]) == (2, 0, True)
    assert found["cost"]["params"] == sum(p.numel() for p in CifarResNet(8, DW(), 10).parameters())
    student_macs = found["cost"]["macs"]
    teacher_head = 2 * 64 * 10
    assert found["cost"]["training_macs"] == 3 * (2 * student_macs + teacher_head) * 2 * 437
    files = list((finished / "checkpoints").iterdir())
    assert all(path.suffix == ".ckpt" and "state_dict" in checkpoint(path) for path in files)
    with safe_open(finished / "student.safetensors", framework="pt") as file:
        exported = json.loads(file.metadata()["odcheap"])
    assert found["split"] == exported["split"] == checkpoint(files[0])["odcheap"]["split"]


def test_the_chosen_student_is_the_one_that_was_exported_and_tested(finished):
    network = CifarResNet(8, DW(), 10)
    network.load_state_dict(load_file(finished / "student.safetensors"))
    found = summary(finished)
    assert accuracy(network) == pytest.approx(found["selected"]["test_top1"], abs=1e-9)
    split = split_stratified(hash_pixels(load_digits().train, 0), load_digits().train_target.numpy(), 1000)
    assert accuracy(network, split.val) == pytest.approx(found["selected"]["val_top1"], abs=1e-9)
    with open(finished / "confusion.csv", newline="") as file:
        rows = [[int(n) for n in row[1:]] for row in list(csv.reader(file))[1:]]
    assert sum(rows[k][k] for k in range(10)) / sum(map(sum, rows)) == pytest.approx(found["selected"]["test_top1"])
    assert found["selected"]["balanced_accuracy"] == pytest.approx(sum(r[k] / sum(r) for k, r in enumerate(rows)) / 10)


def test_parts_are_known_by_their_option_names_on_disk(finished):
    """Not by Python paths, so that files survive a renamed module."""
    files = [path for path in finished.rglob("*") if path.suffix in (".ckpt", ".safetensors", ".yaml", ".json")]
    assert len(files) >= 5
    for path in files:
        assert not re.search(rb"odcheap\.[a-z_]+\.|_target_", path.read_bytes()), path
    saved = checkpoint(finished / "checkpoints" / "epoch-0001.ckpt")["odcheap"]
    assert saved["config"]["block_type"] == saved["student"]["block_type"] == {"part": "DW"}
    assert saved["student"]["backbone"] == {"part": "resnet20", "depth": 8, "width": 16, "expansion": 1}


def test_selection_is_on_held_out_images(finished):
    best = max(
        (float(row[f"val/student_{k}/top1"]), -int(row["epoch"]), -k) for row in metrics(finished) for k in range(2)
    )
    selected = summary(finished)["selected"]
    assert (selected["val_top1"], -selected["epoch"], -selected["student"]) == pytest.approx(best)


def test_every_term_is_logged_by_name_and_what_is_summed_is_logged(finished):
    for row in metrics(finished):
        terms = {name: float(v) for name, v in row.items() if name.startswith(("train/ce_", "train/kl_"))}
        assert set(terms) == {
            f"train/{t}" for t in ("ce_teacher", "ce_student_0", "kl_student_0", "ce_student_1", "kl_student_1")
        }
        assert sum(terms.values()) == pytest.approx(float(row["train/loss"]), rel=1e-5)


def test_test_only_reproduces_the_summary_and_touches_nothing_else(finished, command):
    before = hashes(finished)
    assert command("test_only=true", f"resume={finished}").status == 0
    found, expected = json.loads((finished / "test.json").read_text()), summary(finished)
    for part in ("selected", "students", "teacher", "ensemble"):
        assert found[part] == expected[part]
    after = hashes(finished)
    del after[finished / "test.json"]
    assert after == before


def test_test_only_takes_the_student_that_the_run_has_selected(finished, command):
    """Also if another one is better on the held-out images now: rounding on another machine can change that."""
    selected = summary(finished)["selected"]
    other = 1 - selected["student"]
    for path in (finished / "checkpoints").iterdir():
        content = checkpoint(path)
        content["callbacks"]["Record"]["selected"]["candidate"] = other
        write_checkpoint(path, content)
    assert command("test_only=true", f"resume={finished}").status == 0
    found = json.loads((finished / "test.json").read_text())["selected"]
    assert (found["student"], found["epoch"]) == (other, selected["epoch"])
    assert found["test_top1"] == summary(finished)["students"][other]["test_top1"]

    content["callbacks"]["Record"]["selected"]["candidate"] = 99
    write_checkpoint(finished / "checkpoints" / "epoch-0001.ckpt", content)
    result = command("test_only=true", f"resume={finished}/checkpoints/epoch-0001.ckpt")
    assert "has selected student 99, which it does not have" in result.err
    assert (result.status, result.err.count("\n")) == (1, 1)


CLOCK = ("seconds", "images_per_second", "train_seconds")  # what no second run can repeat


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a if k not in CLOCK)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


AUGMENTED = ("augment.erasing=0.25", "augment.mixup=0.2", "augment.cutmix=1.0")


GRAY = ("data.channels=1", "data.mean=[0.305]", "data.std=[0.376]")


@pytest.mark.parametrize(
    ("options", "places"),
    [
        (
            ("block_type=DW", "data.flip=true", "trainer.precision=bf16-true", "augment=trivial", *AUGMENTED),
            ("epoch-0000-step-0000010", "epoch-0000"),
        ),
        (("block_type=Shift", "trainer.precision=bf16-mixed", *GRAY), ("epoch-0001-step-0000010",)),
        (
            ("block_type=Group", "select=last", "data.val_size=0.5", "trainer.precision=64-true"),
            ("epoch-0001-step-0000010",),
        ),
    ],
)
def test_a_resumed_run_equals_the_straight_run_bit_for_bit(command, tmp_path, options, places):
    often = ["data.val_size=237", "checkpoint_every=0", "checkpoint_keep=100"]
    straight = tmp_path / "straight"
    assert command(*TINY, *often, *options, f"job_dir={straight}").status == 0
    for place in places:
        again = tmp_path / place
        assert command(f"resume={straight}/checkpoints/{place}.ckpt", f"job_dir={again}").status == 0
        one, two = (checkpoint(job / "checkpoints" / "epoch-0001.ckpt") for job in (straight, again))
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "metrics", "loops"):
            assert equal(one[part], two[part]), part
        assert (straight / "student.safetensors").read_bytes() == (again / "student.safetensors").read_bytes()
        assert equal(summary(straight), summary(again))


CLIPPED = (
    "trainer.gradient_clip_val=0.5",
    "trainer.accumulate_grad_batches=3",
)  # batch 10, after which is saved, is no third one


@pytest.mark.parametrize(
    "options",
    [
        ("optimizer=adamw", "optimizer.lr=0.01", "optimizer.decay_bias=false", "scheduler=warmup_cosine"),
        ("optimizer.nesterov=true", "optimizer.decay_norm=false", "scheduler=one_cycle", *CLIPPED),
    ],
)
def test_other_optimizers_and_schedules_learn_and_resume_exactly(command, tmp_path, options):
    straight, again = tmp_path / "straight", tmp_path / "again"
    often = ["data.val_size=237", "checkpoint_every=0", "checkpoint_keep=100", "trainer.max_epochs=3"]
    assert command(*TINY, *often, *options, f"job_dir={straight}").status == 0
    assert command(f"resume={straight}/checkpoints/epoch-0000-step-0000010.ckpt", f"job_dir={again}").status == 0
    assert (straight / "student.safetensors").read_bytes() == (again / "student.safetensors").read_bytes()
    rates = [float(row["lr"]) for row in metrics(straight)]
    assert rates[0] > rates[2] > 0
    assert summary(straight)["selected"]["test_top1"] > 0.3


def test_a_run_that_goes_on_elsewhere_takes_the_selected_epoch_along(command, tmp_path):
    """After the first epoch the rate is far too high, so that epoch 0 stays the best."""
    first = tmp_path / "first"
    options = ["scheduler.milestones=[0.3]", "scheduler.gamma=10", "checkpoint_keep=9"]
    assert command(*TINY, *options, "trainer.max_epochs=3", f"job_dir={first}").status == 0
    assert summary(first)["selected"]["epoch"] == 0
    place = f"resume={first}/checkpoints/epoch-0001.ckpt"
    assert command(place, f"job_dir={tmp_path}/second").status == 0
    assert equal(summary(tmp_path / "second"), summary(first))
    (first / "checkpoints" / "epoch-0000.ckpt").unlink()
    result = command(place, f"job_dir={tmp_path}/third")
    assert result.status == 1
    assert "the selected epoch's epoch-0000.ckpt must be in the same folder" in result.err


def test_a_run_that_ended_before_its_summary_was_written_is_completed(finished, command):
    before = summary(finished)
    (finished / "summary.json").unlink()
    assert command(f"resume={finished}").status == 0
    assert equal(summary(finished), before)


def test_test_only_without_a_run_is_refused(command, tmp_path):
    result = command(*TINY, "test_only=true", "resume=auto", f"job_dir={tmp_path}/none")
    assert result.status == 1
    assert "none holds no usable checkpoint" in result.err


def test_test_only_never_clears_a_folder(finished, command):
    before = hashes(finished)
    weights = finished / "student.safetensors"
    assert command(*TINY, "test_only=true", f"weights={weights}", "overwrite=true", f"job_dir={finished}").status == 0
    after = hashes(finished)
    del after[finished / "test.json"]
    assert after == before


def test_going_back_within_a_run_is_refused_or_throws_the_later_part_away(finished, command):
    before = hashes(finished)
    place = f"resume={finished}/checkpoints/epoch-0000.ckpt"
    result = command(place)
    assert result.status == 1
    assert "is not its run's newest checkpoint; overwrite=true removes the newer ones" in result.err
    assert hashes(finished) == before
    straight = summary(finished)
    assert command(place, "overwrite=true").status == 0
    assert equal(summary(finished), straight)


def test_another_finished_run_is_no_place_to_go_on_in(finished, command, tmp_path):
    other = tmp_path / "other"
    assert command(*TINY, "seed=1", f"job_dir={other}").status == 0
    place = f"resume={finished}/checkpoints/epoch-0000.ckpt"
    result = command(place, f"job_dir={other}")
    assert result.status == 1
    assert "holds a finished run" in result.err
    assert command(place, f"job_dir={other}", "overwrite=true").status == 0
    assert equal(summary(other), summary(finished))


def test_a_checkpoint_outside_a_run_needs_a_folder_and_the_same_images(finished, command, tmp_path):
    alone = tmp_path / "alone.ckpt"
    newest = finished / "checkpoints" / "epoch-0000.ckpt"
    content = checkpoint(newest)
    write_checkpoint(alone, content)
    result = command(f"resume={alone}")
    assert result.status == 1
    assert "is in no run's folder: give the folder of the continued run with job_dir=" in result.err
    content["odcheap"]["split"] = "of other images"
    write_checkpoint(alone, content)
    result = command(f"resume={alone}", f"job_dir={tmp_path}/new")
    assert result.status == 1
    assert "data_dir=data: has other images than those with which the resumed run" in result.err


def test_test_only_passes_over_a_broken_newest_checkpoint(finished, command):
    newest = finished / "checkpoints" / "epoch-0001.ckpt"
    newest.write_bytes(newest.read_bytes()[:99])
    result = command("test_only=true", f"resume={finished}")
    assert f"skipped: resume={newest}" in result.out
    assert result.status == 0 or "epoch-0001.ckpt" in result.err  # where the broken one is itself the chosen one


def test_a_sweep_of_tests_ends_with_a_table(finished, command, tmp_path):
    weights = finished / "student.safetensors"
    arguments = ["test_only=true", f"weights={weights}", "seed=0,1", f"hydra.sweep.dir={tmp_path}/sweep"]
    result = command("-m", *TINY, *arguments)
    assert result.status == 0, result.err
    assert result.out.count("│ finished") == 2


def test_two_runs_in_one_folder_exclude_each_other(command, tmp_path):
    job_dir = tmp_path / "run"
    other = Begun("trainer.max_epochs=300", f"job_dir={job_dir}", cwd=tmp_path)
    other.until("epoch 2/300")
    result = command(*TINY, "trainer.max_epochs=300", f"job_dir={job_dir}", "resume=auto")
    assert result.status == 1
    assert f"job_dir={job_dir}: another process trains here (process {other.process.pid} on" in result.err
    other.process.kill()
    other.end()
    assert command(*TINY, f"job_dir={job_dir}", "overwrite=true").status == 0  # nothing is left behind


def test_resume_auto_starts_continues_and_ends(command):
    job_dir = Path("5")  # in the working directory; without the ./ it would be a number
    arguments = [*TINY, f"job_dir=./{job_dir}", "resume=auto", "data.split_seed=${seed}"]
    assert command(*arguments).status == 0
    whole = summary(job_dir)
    result = command(*arguments)
    assert result.status == 0
    assert "nothing to do" in result.out
    (job_dir / "summary.json").unlink()
    newest = job_dir / "checkpoints" / "epoch-0001.ckpt"
    newest.write_bytes(newest.read_bytes()[:1000])
    torn = [job_dir / ".summary.json.1.part", job_dir / "checkpoints" / ".epoch-0002.ckpt.1.part"]
    for path in torn:
        path.write_bytes(b"half")
    result = command(*arguments)
    assert not any(path.exists() for path in torn)
    assert result.status == 0
    assert f"skipped: resume={newest}" in result.out
    assert "continuing from" in result.out
    assert equal(summary(job_dir), whole)


def test_a_run_can_be_moved_and_resumed_and_resume_applies_its_overrides(finished, command, tmp_path):
    moved = tmp_path / "elsewhere" / "block_type=DW,num_stu=2"
    moved.parent.mkdir()
    finished.rename(moved)
    (moved / "summary.json").unlink()
    (moved / "checkpoints" / "epoch-0001.ckpt").unlink()
    assert command(f"resume={moved}").status == 0
    assert summary(moved)["epochs"] == 2
    assert not finished.exists()
    assert f"job_dir: {moved}" in (moved / "config.yaml").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere"}


def test_resume_refuses_another_experiment_by_name_and_lets_the_trainer_change(finished, command):
    changes = ["num_stu=3", "method.temperature=2", "block_type=Shift", "data.val_size=900", "seed=1"]
    changes.append(f"weights={next((finished / 'checkpoints').glob('*.ckpt'))}")
    for changed in changes:
        result = command(f"resume={finished}", changed)
        assert result.status == 1
        assert result.err.startswith(f"error: {changed.split('=')[0]}")
        assert "would change the experiment that is resumed" in result.err
    longer = command(f"resume={finished}", "trainer.max_epochs=3", "logger=tensorboard")
    assert longer.status == 0
    assert "trainer.max_epochs: 3 in place of 2; the learning rate follows the schedule for 3 epochs" in longer.out
    assert summary(finished)["epochs"] == 3


def test_a_finished_run_is_refused_or_overwritten(finished, command):
    before = hashes(finished)
    result = command(*TINY, f"job_dir={finished}")
    assert result.status == 1
    assert "holds a finished run; overwrite=true replaces it, another job_dir keeps it, resume=auto with" in result.err
    assert hashes(finished) == before
    assert command(*TINY, "seed=1", f"job_dir={finished}", "overwrite=true").status == 0
    assert summary(finished)["seed"] == 1


def test_fine_tuning_from_an_exported_student_and_from_a_checkpoint(finished, command, tmp_path):
    student = finished / "student.safetensors"
    result = command(*TINY, f"weights={student}", "test_only=true", f"job_dir={tmp_path}/a", "data.split_seed=1")
    assert result.status == 0
    assert "1 of 2 students" in result.out
    assert "warning: the weights were selected under another split" in result.out
    assert "warning: the file has one student; the results of the others" in result.out
    tested = json.loads((tmp_path / "a" / "test.json").read_text())
    assert tested["students"][0]["test_top1"] == summary(finished)["selected"]["test_top1"]
    last = finished / "checkpoints" / "epoch-0001.ckpt"
    result = command(*TINY, f"weights={last}", "test_only=true", f"job_dir={tmp_path}/b")
    assert json.loads((tmp_path / "b" / "test.json").read_text())["students"] == summary(finished)["last"]["students"]
    assert "warning" not in result.out
    result = command(*TINY, f"weights={last}", "weights_head=new", "trainer.max_epochs=1", f"job_dir={tmp_path}/c")
    assert result.status == 0
    assert "classifiers are new" in result.out


def test_an_exported_student_with_folded_branches_is_tested_but_not_trained(command, tmp_path):
    settings = {"classes": [str(k) for k in range(10)], "block_type": {"part": "RepDW"}, "split": ""}
    settings |= {"backbone": {"part": "resnet20", "depth": 8}, "image_size": [3, 8, 8], "shorter_side": 8}
    settings |= {"mean": [0.305] * 3, "std": [0.376] * 3}
    network = CifarResNet(8, RepDW(), 10)
    network(torch.randn(50, 3, 8, 8))  # in training: batch norms that are not the identity
    write_student(tmp_path / "own.safetensors", network.eval(), settings)
    write_student(tmp_path / "folded.safetensors", fold_branches(network), settings | {"folded": True})
    given, found = [*TINY, "block_type=RepDW", "method.average_decay=0.9"], []
    for name in ("own", "folded"):
        own = [f"weights={tmp_path}/{name}.safetensors", f"job_dir={tmp_path}/{name}"]
        result = command(*given, *own, "test_only=true")
        assert result.status == 0, result.err
        tested = json.loads((tmp_path / name / "test.json").read_text())
        found.append([tested["students"], tested["averages"]])
    assert found[0] == found[1]
    refused = command(*given, own[0], f"job_dir={tmp_path}/none")
    assert (refused.status, refused.err.count("\n")) == (1, 1)
    assert "folded.safetensors: holds a folded network, which cannot be trained; the run's own" in refused.err


def test_weights_of_the_2019_code(golden, command, tmp_path):
    from odcheap.runs.reference import load_reference

    model = load_reference(golden / "reference_dw_resnet8.pt")
    arguments = [*TINY, f"weights={golden}/reference_dw_resnet8.pt", "test_only=true", f"job_dir={tmp_path}/run"]
    assert command(*arguments, "num_stu=4").status == 0
    found = json.loads((tmp_path / "run" / "test.json").read_text())
    expected = [accuracy(student) for student in model.method.students.members]
    assert [student["test_top1"] for student in found["students"]] == pytest.approx(expected)
    result = command(*arguments, "num_stu=4", "block_type=Shift")
    assert result.status == 1
    assert "another architecture" in result.err


def test_select_last_uses_all_images_and_reports_no_val_figure(command, tmp_path):
    assert command(*TINY, "select=last", "data.val_size=0", f"job_dir={tmp_path}/run").status == 0
    found = summary(tmp_path / "run")
    assert (found["selected"]["student"], found["selected"]["epoch"]) == (0, 1)
    assert found["selected"]["selected_on"] == "last"
    everybody = [found["selected"], *found["students"], found["teacher"], found["ensemble"]]
    assert {member["val_top1"] for member in everybody} == {None}
    assert found["students"] == found["last"]["students"]


def test_select_test_is_labelled_and_its_figure_is_never_called_val(command, tmp_path):
    result = command(*TINY, "select=test", "data.val_size=0", f"job_dir={tmp_path}/run")
    assert result.status == 0
    assert "select=test picks student and epoch on the test images" in result.out
    found = summary(tmp_path / "run")
    assert found["selected"]["selected_on"] == "test"
    assert found["selected"]["val_top1"] is None
    row = metrics(tmp_path / "run")[found["selected"]["epoch"]]
    assert not any(name.startswith("val/") for name in row)
    watched = float(row[f"test/student_{found['selected']['student']}/top1"])
    assert watched == pytest.approx(found["selected"]["test_top1"])


def test_a_sweep_makes_a_folder_a_run_skips_what_is_done_and_survives_a_failure(command, tmp_path):
    arguments = ["-m", *TINY, "trainer.max_epochs=1", "num_stu=0,1,2", f"hydra.sweep.dir={tmp_path}/sweep"]
    result = command(*arguments)
    assert result.status == 1
    assert "failed: num_stu=0" in result.out
    folders = {path.name.split("num_stu=")[1][0]: path for path in (tmp_path / "sweep").iterdir() if path.is_dir()}
    assert {path.name for path in folders["0"].iterdir()} == {"status.json", ".lock"}
    assert "num_stu=0: must be a whole number" in json.loads((folders["0"] / "status.json").read_text())["reason"]
    assert len(summary(folders["2"])["students"]) == 2
    before = hashes(folders["1"]) | hashes(folders["2"])
    result = command(*arguments)
    assert result.out.count("was finished") == 2
    assert hashes(folders["1"]) | hashes(folders["2"]) == before


def test_a_sweep_that_was_killed_goes_on_with_the_same_command(command, tmp_path):
    """Three runs, the kill in the second: what had finished stays as it is, all end as if nothing had been."""
    sweep = ["hydra.mode=MULTIRUN", "seed=0,1,2", "num_stu=1", "trainer.max_epochs=5"]
    disturbed = Begun(*sweep, f"hydra.sweep.dir={tmp_path}/disturbed", cwd=tmp_path)
    disturbed.until(": finished")
    disturbed.until("epoch 2/5")
    disturbed.process.kill()
    assert disturbed.end() == -9
    done = {path.parent for path in (tmp_path / "disturbed").glob("*/summary.json")}
    assert len(done) == 1
    before = {name: digest for folder in done for name, digest in hashes(folder).items()}
    again = command(*TINY, *sweep, f"hydra.sweep.dir={tmp_path}/disturbed")
    assert again.status == 0
    assert (again.out.count("│ was finished"), again.out.count("│ finished")) == (1, 2)
    assert again.out.count("continuing from") == 1
    assert {name: hashes(folder)[name] for folder in done for name in hashes(folder)} == before
    assert command(*TINY, *sweep, f"hydra.sweep.dir={tmp_path}/straight").status == 0
    for straight in (tmp_path / "straight").glob("*/student.safetensors"):
        name = straight.relative_to(tmp_path / "straight")
        assert (tmp_path / "disturbed" / name).read_bytes() == straight.read_bytes()


@pytest.fixture
def recorded(monkeypatch):
    """Runs as on one GPU: steps are recorded and replayed, here by a stand-in."""
    made = []

    def step(eager, graphs, refused):
        made.append(GraphStep(eager, Recorder(eager.method, eager.optimizer), refused))
        return made[-1]

    monkeypatch.setattr("odcheap.training.experiment.uses_graphs", lambda cfg: True)
    monkeypatch.setattr("odcheap.training.module.CudaGraphs", lambda: None)
    monkeypatch.setattr("odcheap.training.module.GraphStep", step)
    return made


def test_a_run_of_recorded_steps_equals_the_plain_run(command, tmp_path, finished, recorded):
    found = tmp_path / "recorded"
    result = command(*TINY, "checkpoint_every=0", "checkpoint_keep=100", f"job_dir={found}")
    assert result.status == 0, result.err
    assert "without a CUDA graph" not in result.out
    assert [sum(step.graphs.replays) for step in recorded] == [12 - WARM_UP + 1]  # the full batches; a trial
    assert equal(summary(found), summary(finished))
    timed = ("seconds", "images_per_second")
    for row, expected in zip(metrics(found), metrics(finished), strict=True):
        assert {k: v for k, v in row.items() if k not in timed} == {k: v for k, v in expected.items() if k not in timed}
    assert (found / "student.safetensors").read_bytes() == (finished / "student.safetensors").read_bytes()
    again = tmp_path / "again"
    assert command(f"resume={found}/checkpoints/epoch-0000.ckpt", f"job_dir={again}").status == 0
    assert (again / "student.safetensors").read_bytes() == (finished / "student.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], True),
        (["capture=true"], True),
        (["capture=false"], False),
        (["trainer=cpu"], False),
        (["trainer=ddp"], False),
        (["on_nonfinite=skip"], False),
        (["trainer.gradient_clip_val=1.0"], False),
        (["trainer.accumulate_grad_batches=2"], False),
        (["trainer.precision=16-mixed"], False),
    ],
)
def test_steps_are_recorded_on_one_gpu_where_nothing_acts_within_them(monkeypatch, overrides, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: True)
    with hydra.initialize_config_dir(str(find_conf_dir()), version_base="1.3"):
        cfg = hydra.compose("config", ["job_dir=unused", *overrides])
        assert uses_graphs(cfg) == expected
        if not expected and "capture=false" not in overrides:
            with pytest.raises(OptionError, match="capture=true: is not possible: "):
                uses_graphs(hydra.compose("config", ["job_dir=unused", *overrides, "capture=true"]))


def test_kernels_are_set_by_the_option_and_may_change_on_resume(command, tmp_path):
    before = kernels.use("auto")
    try:
        assert command(*TINY, "trainer.max_epochs=1", "kernels=off", f"job_dir={tmp_path}").status == 0
        assert kernels.use("auto") == "off"
        kernels.use("off")
        assert command(f"resume={tmp_path}", "kernels=auto", "trainer.max_epochs=2").status == 0
        assert kernels.use("auto") == "auto"
    finally:
        kernels.use(before)


def test_capture_that_must_be_and_cannot_ends_the_run(command, tmp_path, recorded, monkeypatch):
    def waits(self, work):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Recorder, "record", waits)
    given = (*TINY, "checkpoint_every=0", f"job_dir={tmp_path}/run")
    result = command(*given, "capture=true")
    assert result.status == 1
    assert result.err == "error: capture=true: is not possible: operation not permitted when stream is capturing\n"
    result = command(*given, "overwrite=true")
    assert result.status == 0
    assert "the step runs without a CUDA graph: operation not permitted when stream is capturing" in result.out


def test_recorded_steps_that_go_astray_end_the_run_before_a_checkpoint(command, tmp_path, recorded):
    result = command(*TINY, "optimizer.lr=1e30", f"job_dir={tmp_path}/run", "checkpoint_every=0")
    assert result.status == 1
    assert "on_nonfinite=stop: epoch 1, step 2: ce_teacher" in result.err
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


def test_a_loss_that_is_not_finite_stops_the_run_or_is_skipped(command, tmp_path):
    bad = [*TINY, "optimizer.lr=1e30"]
    result = command(*bad, f"job_dir={tmp_path}/a")
    assert result.status == 1
    assert "on_nonfinite=stop: epoch 1, step 2: ce_teacher" in result.err
    result = command(*bad, f"job_dir={tmp_path}/b", "on_nonfinite=skip", "max_skipped=3")
    assert result.out.count("skipped epoch 1, step") == 3
    assert "more than max_skipped=3 times" in result.err


CKPT = "{tmp}/broken.ckpt"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["block_type=Foo"], "block_type=Foo: unknown; must be one of DW, Group, RepDW, Shift, Standard"),
        (
            ["backbone=resnet57"],
            "backbone=resnet57: unknown; must be one of densenet40, mobilenetv2, resnet110, resnet18",
        ),
        (["data=nope"], "data=nope: unknown; must be one of cifar10, cifar100, digits"),
        (["logger=[csv,nope]"], "logger=nope: unknown; must be one of csv, mlflow, tensorboard, wandb"),
        (["num_stu=0"], "num_stu=0: must be a whole number, 1 or more"),
        (["block_type=Group", "block_type.groups=5"], "block_type.groups=5: must divide the layer's 16 channels"),
        (["data=cifar10", "data_dir={tmp}/none", "data.load.download=false"], "data_dir={tmp}/none: must hold"),
        (["resume={tmp}/none.ckpt"], "resume={tmp}/none.ckpt: no such file"),
        (["resume=" + CKPT], "resume=" + CKPT + ": not a complete checkpoint of an odcheap run"),
        (["weights=" + CKPT], "weights=" + CKPT + ": not a complete checkpoint of plain tensors"),
        (["weights={tmp}/none.safetensors"], "weights={tmp}/none.safetensors: no such file"),
        (["job_dir={tmp}/broken.ckpt/run"], "job_dir={tmp}/broken.ckpt/run: cannot be written"),
        (["test_only=true"], "test_only=true: needs resume=JOB_DIR, resume=CHECKPOINT or weights=FILE"),
        (["data.val_size=1437"], "data.val_size=1437: must leave images to train on: there are 1437"),
        (["method.temperature=0"], "method.temperature=0: must be a number, 1e-06 or more"),
        (["method.kl_reduction=sum"], "method.kl_reduction=sum: must be one of batchmean, mean"),
        (["select=best"], "select=best: must be one of val, last, test"),
        (["on_nonfinite=ignore"], "on_nonfinite=ignore: must be one of stop, skip"),
        (["capture=true"], "capture=true: is not possible: trainer.accelerator=cpu: there is no CUDA device to use"),
        (["capture=perhaps"], "capture=perhaps: must be one of auto, true, false"),
        (["together=vmap"], "together=vmap: must be one of auto, sequential, streams"),
        (["together=streams"], "together=streams: needs a CUDA device; the run is on cpu"),
        (["weights_head=old"], "weights_head=old: must be one of keep, new"),
        (["data.batch_size=1"], "data.batch_size=1: must be a whole number"),
        (["trainer.max_epochs=0"], "trainer.max_epochs=0: must be a whole number, 1 or more"),
        (["trainer.precision=7"], "trainer: "),
        (["trainer.sync_batchnorm=true"], "trainer.sync_batchnorm=true: must be false on CPUs"),
        (["num_stu=1.5"], "num_stu=1.5: must be a whole number"),
        (["num_stu=two"], "num_stu=two: must be a whole number, 1 or more"),
        (["data.val_size=abc"], "data.val_size=abc: must be a number"),
        (["optimizer.lr=abc"], "optimizer.lr=abc: must be a number"),
        (["seed=abc"], "seed=abc: must be a whole number"),
        (["data.flip=abc"], "data.flip=abc: must be true or false"),
        (["data.eval_batch_size=0"], "data.eval_batch_size=0: must be a whole number, 1 or more"),
        (["data.val_size=1436"], "data.val_size=1436: must leave 2 images or more to train on"),
        (["num_stu=[1"], ""),
        (["num_stu=${nope}"], "Interpolation key 'nope' not found"),
        (["trainer.strategy=ddp", "trainer.devices=2", "trainer.precision=7"], "trainer: "),
        (["data=cifar10", "data.load.name=x"], "data.load.name=x: must be one of cifar10, cifar100"),
        (
            ["trainer.devices=auto"],
            "trainer.devices=auto: must be a whole number, 1 or more; CUDA_VISIBLE_DEVICES chooses the GPUs",
        ),
        (
            ["trainer.num_nodes=2"],
            "trainer.num_nodes=2: this run was started on 1 machine; torchrun or srun starts several",
        ),
        (["trainer.strategy=ddp_spawn"], "trainer.strategy=ddp_spawn: must be one of auto, ddp"),
        (["num_stu=???"], "num_stu=???: must be given"),
        (["+method.alpha=3"], "method.alpha=3: is not an option of this method"),
        (["+logger.csv.x=1"], "logger.csv={'x': 1}: is a part; choose it with logger=NAME"),
        (["capture=0"], "capture=0: must be one of auto, true, false"),
        (["block_type=Shift", "optimizer.decay_spatial=false"], "optimizer.decay_spatial=false: has no effect"),
        (["method.average_decay=0.9", "trainer.precision=bf16-true"], "trainer.precision=bf16-true: averages, which"),
        (["data.crop_padding=8"], "data.crop_padding=8: must be 0 or more, below the images' 8 pixels a side"),
        (
            ["augment=randaugment", "augment.magnitude=31"],
            "augment.magnitude=31: must be a whole number, 0 or more and",
        ),
        (["data.channels=1"], "data.mean=[0.305, 0.305, 0.305]: must be one number: the images have 1 channel (data."),
        (["data.channels=2", "data.mean=[0,0]", "data.std=[1,1]"], "data.channels=2: must be 1 (gray) or 3 (RGB)"),
        (["augment.mixup=-1"], "augment.mixup=-1: must be a number, 0 or more and at most 100"),
        (["augment.magnitude=3"], "augment.magnitude"),
        (["method.loss=dkd", "augment.cutmix=1"], "method.loss=dkd: needs one label for each image, and mixed images"),
        (["method=kdcl", "augment.mixup=0.2"], "method.soft_target=minlogit: needs one label for each image, which"),
        (["checkpoint_every=-1"], "checkpoint_every=-1: must be a number, 0 or more, or null"),
        (["max_skipped=-1"], "max_skipped=-1: must be a whole number, 0 or more"),
    ],
)
def test_bad_input_is_one_line_without_a_traceback_and_nothing_is_lost(command, tmp_path, arguments, line):
    (tmp_path / "broken.ckpt").write_bytes(b"PK\x03\x04 half a checkpoint")
    before = hashes(tmp_path)
    given = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    result = command(*TINY, *given)
    assert result.status == 1
    assert result.err.startswith("error: " + line.replace("{tmp}", str(tmp_path)))
    assert result.err.count("\n") == 1
    assert "Traceback" not in result.err + result.out
    assert hashes(tmp_path) == before


def test_a_logger_that_cannot_begin_ends_the_run_in_one_line_before_it_trains(command, tmp_path):
    result = command(*TINY[:-1], "logger=tensorboard", "+logger.tensorboard.nope=1", f"job_dir={tmp_path}/run")
    assert (result.status, result.err.count("\n")) == (1, 1)
    assert result.err.startswith("error: logger=tensorboard: cannot be started: SummaryWriter")
    assert not list(tmp_path.rglob("*.ckpt"))


def test_another_class_count_is_refused_by_name(finished, command, tmp_path):
    last = finished / "checkpoints" / "epoch-0001.ckpt"
    content = checkpoint(last)
    for name, tensor in content["state_dict"].items():
        if name.endswith("fc.weight") or name.endswith("fc.bias"):
            content["state_dict"][name] = tensor[:7]
    write_checkpoint(tmp_path / "seven.ckpt", content)
    result = command(*TINY, f"weights={tmp_path}/seven.ckpt", f"job_dir={tmp_path}/new")
    assert result.status == 1
    assert "has 7 classes, the data 10; weights_head=new keeps the bodies only" in result.err
    result = command(*TINY, f"weights={last}", "block_type=Group", f"job_dir={tmp_path}/new")
    assert "another architecture" in result.err
