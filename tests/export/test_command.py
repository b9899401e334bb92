"""From a run to files for a device, as a user would do it."""

import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import TINY
from export.private_words import find_words
from export.test_load_run import SETTINGS, write_run
from safetensors.torch import load_file
from scipy.stats import binomtest
from sklearn.datasets import load_digits

from odcheap import predict
from odcheap.export import command, verify
from odcheap.export import command as export_command
from odcheap.export import onnx as onnx_export
from odcheap.export.load_run import describe_preprocessing, load_run_student
from odcheap.layers.fuse import fold_branches
from odcheap.models.build import build_network, load_student
from odcheap.utils.errors import OptionError
from odcheap.utils.signals import STOP_SIGNALS

QUICK = ["--seconds", "0.005"]
ROOT = Path(__file__).parents[2]


def accuracy(ask):
    raw = load_digits()
    grey = np.round(raw.images[::5] * 255 / 16).astype(np.float32) / 255
    return float((ask(np.repeat(grey[:, None], 3, axis=1)).argmax(1) == raw.target[::5]).mean())


@pytest.mark.parametrize(
    "block_type",
    ["DW", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Shift", "Group", "RepDW", "Standard"))],
)
def test_a_run_becomes_files_that_each_have_its_accuracy(trained, block_type, capsys):
    job_dir = trained(f"block_type={block_type}", "trainer.max_epochs=1")
    capsys.readouterr()
    assert command.main([str(job_dir), *QUICK, "--pt2"]) == 0
    out, folder = capsys.readouterr().out, job_dir / "export"
    expected = json.loads((job_dir / "summary.json").read_text())["selected"]["test_top1"]
    low, high = (100 * limit for limit in binomtest(round(360 * expected), 360).proportion_ci(method="wilson"))
    line = f"Test accuracy {100 * expected:.2f} % (95 % interval {low:.2f} to {high:.2f}) on 360 images; "
    assert f"{line}{100 * expected:.2f} % by the run's summary, in 32-true." in out
    names = {path.name for path in folder.iterdir()} - {"student-dense.onnx"}  # there where it was faster
    assert names == {"README.md", "labels.json", "predict.py", "preprocess.json", "results.json"} | {
        f"student.{suffix}" for suffix in ("onnx", "pt2", "safetensors")
    }
    assert (
        accuracy(predict.create_predictor(predict.create_session((folder / "student.onnx").read_bytes()))) == expected
    )
    program = torch.export.load(folder / "student.pt2").module()
    for network in (program, load_student(folder / "student.safetensors")):
        assert accuracy(lambda images, n=network: n(torch.from_numpy(images)).detach().numpy()) == expected
    listed = (folder / "README.md").read_text().partition("## Checks")[2].partition("##")[0]
    dense = {"student-dense.onnx"} if (folder / "student-dense.onnx").exists() else set()
    assert set(re.findall(r"- `(.*?)`: \d", listed)) == dense | {f"student.{s}" for s in ("onnx", "pt2", "safetensors")}
    weights = [load_file(path / "student.safetensors") for path in (job_dir, folder)]
    if block_type == "RepDW":  # the export has the weights of the folded form
        weights[0] = fold_branches(load_student(job_dir / "student.safetensors").network).state_dict()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0] | weights[1])
    results = json.loads((folder / "results.json").read_text())
    assert (results["data"], results["verified_on_data"]) == ("digits", True)
    assert results["test"] | {"images": 360, "top1": expected} == results["test"]
    assert results["test"]["top1_interval"] == pytest.approx([low / 100, high / 100])
    assert set(results["top1"].values()) == {expected}
    check = re.search(r"^`(.*sha256sum -c)`", (folder / "README.md").read_text(), re.MULTILINE)
    done = subprocess.run(check[1], shell=True, cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(": OK") == len(list(folder.iterdir())) - 1


def test_another_student_static_and_in_integers(trained, light, tmp_path, capsys):
    job_dir = trained()
    other = 1 - json.loads((job_dir / "summary.json").read_text())["selected"]["student"]
    options = ["--student", str(other), "--batch", "4", "--opset", "13", "--int8", "--qat", "1"]
    options += ["--out", str(tmp_path / "out")]
    assert command.main([str(job_dir), *QUICK, *options]) == 0
    model = onnx.load(tmp_path / "out" / "student.onnx")
    assert model.opset_import[0].version == 13
    assert [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim] == [4, 3, 8, 8]
    expected = json.loads((job_dir / "summary.json").read_text())["students"][other]["test_top1"]
    out = capsys.readouterr().out
    assert re.search(rf"Test accuracy {100 * expected:.2f} % \(.*\) on 360 images; {100 * expected:.2f} % by", out)
    assert "fine-tuning with the rounding of 8-bit integers, 1 epoch of 437 training images" in out
    assert re.search(r"on the held-out images: [\d.]+ % floats, [\d.]+ % calibrated, [\d.]+ % fine-tuned; the ", out)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "(4, 3, 8, 8), a static graph for exactly 4 images; ONNX opset 13;" in card
    line = r"- `student-int8.onnx` \((QOperator|QDQ) form(, fine-tuned for 1 epoch)?\): accuracy [\d.]+ %, [+-][\d.]+ p"
    assert re.search(line, card)
    assert accuracy(
        predict.create_predictor(predict.create_session((tmp_path / "out" / "student-int8.onnx").read_bytes()))
    ) == pytest.approx(expected, abs=0.05)
    assert re.search(r"In 8-bit integers [\d.]+ %: .* classified correctly", out)
    assert not (job_dir / "export").exists()


@pytest.mark.parametrize(("int8", "lost"), [(0.83, None), (0.82, "1.00")])
def test_integers_that_lose_much_accuracy_name_the_fine_tuning(tmp_path, int8, lost):
    run = load_run_student(write_run(tmp_path / "run"))
    seen = verify.Verification(100, {}, {"student.onnx": 0.83, "student-int8.onnx": int8}, "")
    expected = f"8-bit integers lose {lost} percentage points: --qat fine-tunes the network with their rounding"
    assert command.advise_fine_tuning(run, seen) == (expected if lost else None)
    assert command.advise_fine_tuning(run, verify.Verification(64, {}, {}, "no data")) is None


def test_a_stopped_run_is_exported_as_far_as_it_came_and_one_without_an_epoch_is_not(trained, light, capsys):
    job_dir = trained()
    (job_dir / "summary.json").unlink()
    (job_dir / "student.safetensors").unlink()
    assert command.main([str(job_dir), *QUICK]) == 0
    card = (job_dir / "export" / "README.md").read_text()
    assert "which has not finished" in card
    assert card.split("\n")[2] == "**The run has not finished**: a later epoch may be better."
    for path in (job_dir / "checkpoints").iterdir():
        path.unlink()
    assert command.main([str(job_dir), *QUICK, "--overwrite"]) == 1
    assert "no epoch of this run has finished" in capsys.readouterr().err
    assert (job_dir / "export" / "README.md").read_text() == card


@pytest.mark.parametrize("suffix", ["pt2", "safetensors"])
def test_every_kind_of_file_is_held_against_the_trained_network(trained, light, capsys, monkeypatch, suffix):
    job_dir = trained("trainer.max_epochs=1")
    compute_logits = verify.compute_logits

    def wrong(path, runtime, preprocess, reference, *given):
        is_slow = path.suffix == ".safetensors"
        logits = reference.logits if is_slow else compute_logits(path, runtime, preprocess, reference, *given)
        return logits + 0.01 * (path.suffix == f".{suffix}")

    monkeypatch.setattr(verify, "compute_logits", wrong)
    assert command.main([str(job_dir), *QUICK, "--pt2"]) == 1
    assert f"error: student.{suffix}: a logit differs" in capsys.readouterr().err
    assert not (job_dir / "export").exists()


def test_another_accuracy_than_the_summary_s_is_an_error(trained, light, capsys):
    job_dir = trained("trainer.max_epochs=1")
    path = job_dir / "summary.json"
    summary = json.loads(path.read_text())
    summary["selected"]["test_top1"] += 0.02
    path.write_text(json.dumps(summary))
    assert command.main([str(job_dir), *QUICK]) == 1
    assert "other images than the run's, or other weights" in capsys.readouterr().err


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_the_dense_file_is_there_where_it_was_faster(trained, light, monkeypatch, ratio):
    job_dir, made = trained("trainer.max_epochs=1"), command.time_files

    def times(*given):
        return {key: predict.Timing(ratio if "dense" in key.name else 1.0, 2.0) for key in made(*given)}

    monkeypatch.setattr(command, "time_files", times)
    assert command.main([str(job_dir), *QUICK]) == 0
    assert (job_dir / "export" / "student-dense.onnx").exists() == (ratio < 1)


def test_a_failed_check_leaves_nothing_that_looks_finished(trained, light, capsys, monkeypatch):
    job_dir = trained("trainer.max_epochs=1")
    right = onnx_export.to_onnx

    def wrong(program, opset):
        model = onnx.load_from_string(right(program, opset))
        tensor = next(t for t in model.graph.initializer if len(t.dims) == 4)
        values = onnx.numpy_helper.to_array(tensor) * 1.01
        tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), tensor.name))
        return model.SerializeToString()

    monkeypatch.setattr(onnx_export, "to_onnx", wrong)
    before = set(job_dir.iterdir())
    assert command.main([str(job_dir), *QUICK]) == 1
    assert "error: student.onnx: a logit differs from the trained network's by" in capsys.readouterr().err
    assert set(job_dir.iterdir()) == before


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_an_export_that_a_signal_ends_leaves_nothing(tmp_path, capsys, monkeypatch, name):
    folder, signum = write_run(tmp_path / "run"), getattr(signal, name)
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    files = sorted(folder.rglob("*"))

    def write(run, options, data, part):
        (part / "student.onnx").touch()
        os.kill(os.getpid(), signum)

    monkeypatch.setattr(command, "write_files", write)
    try:
        assert command.main([str(folder)]) == 128 + signum
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert capsys.readouterr().err == f"error: {name}: interrupted, nothing was written\n"
    assert sorted(folder.rglob("*")) == files


def test_what_a_killed_export_has_left_is_removed_by_the_next_and_nothing_else_is(tmp_path):
    """A second signal ends an export at once, and SIGKILL does at any time."""
    out, mine = tmp_path / "export", tmp_path / ".export.mine.part"
    contents = {".export.a1b2c3d4.part": "student.onnx", ".export.a1b2c3d5.part": ".student.pt2.7-0123abcd.part"}
    contents |= {
        ".export.a1b2c3d6.part": "thesis.tex",
        ".other.a1b2c3d4.part": "student.onnx",
        mine.name: "labels.json",
    }
    for folder, file in contents.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("?")
    (tmp_path / ".export.a1b2c3d7.part").symlink_to(mine)
    with command.replace_folder(out) as running:
        assert not (tmp_path / ".export.a1b2c3d4.part").exists()
        (running / "student.onnx").write_text("new")
        command.remove_partial_exports(out)  # as another process does that begins meanwhile
        assert (running / "student.onnx").exists()
    left = {path.name for path in tmp_path.iterdir()} - {out.name}
    assert left == {*list(contents)[2:], ".export.a1b2c3d7.part"}
    assert (mine / "labels.json").exists()


@pytest.mark.parametrize("depth", [None, 12])
def test_an_export_says_how_many_of_sixteen_bits_are_used(tmp_path, depth):
    loaded = load_run_student(write_run(tmp_path / "run", settings=SETTINGS | {"bit_depth": depth}))
    assert describe_preprocessing(loaded.settings)["bit_depth"] == depth


def test_an_older_export_is_replaced_only_when_asked(trained, light, tmp_path, capsys):
    job_dir = trained("trainer.max_epochs=1")
    assert command.main([str(job_dir), *QUICK]) == 0
    before = (job_dir / "export" / "README.md").read_text()
    assert ".pt2" not in before
    assert not (job_dir / "export" / "student.pt2").exists()  # a format that can hold pickled objects
    assert command.main([str(job_dir), *QUICK]) == 1
    assert "holds an export; --overwrite replaces it" in capsys.readouterr().err
    assert (job_dir / "export" / "README.md").read_text() == before
    assert command.main([str(job_dir), *QUICK, "--overwrite"]) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    assert command.main([str(job_dir), *QUICK, "--overwrite", "--out", str(tmp_path / "mine")]) == 1
    assert "exists and is not an export" in capsys.readouterr().err
    (tmp_path / "mine" / "preprocess.json").write_text("{}")  # of somebody else's project
    assert command.main([str(job_dir), *QUICK, "--overwrite", "--out", str(tmp_path / "mine")]) == 1
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"
    (job_dir / "export" / "engine.trt").write_text("compiled for hours")
    assert command.main([str(job_dir), *QUICK, "--overwrite"]) == 1
    assert "(engine.trt is not a file of an export)" in capsys.readouterr().err
    assert (job_dir / "export" / "engine.trt").exists()
    (job_dir / "export" / "engine.trt").unlink()
    (job_dir / "export" / "labels.json").unlink()
    (job_dir / "export" / "labels.json").mkdir()
    assert command.main([str(job_dir), *QUICK, "--overwrite"]) == 1
    assert "(labels.json is not a file of an export)" in capsys.readouterr().err
    (job_dir / "export").rename(tmp_path / "elsewhere")
    (job_dir / "export").symlink_to(tmp_path / "elsewhere")
    assert command.main([str(job_dir), *QUICK, "--overwrite"]) == 1
    assert "export: is a link to elsewhere" in capsys.readouterr().err


def test_an_older_export_comes_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    out = tmp_path / "export"
    out.mkdir()
    (out / "student.onnx").write_text("old")
    rename = Path.rename

    def fails(path, target):
        if path.suffix == ".part":
            raise OSError(16, "Device or resource busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    versions = command.read_versions(out)
    with pytest.raises(OSError, match="busy"), command.replace_folder(out, versions) as folder:
        (folder / "student.onnx").write_text("new")
    assert (out / "student.onnx").read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("is_export", [False, True])
def test_what_somebody_writes_into_the_folder_meanwhile_is_kept(tmp_path, is_export):
    out = tmp_path / "export"
    if is_export:
        out.mkdir()
        (out / "student.onnx").write_text("old")
    versions = command.read_versions(out) if is_export else None

    def export():
        with command.replace_folder(out, versions) as folder:
            (folder / "student.onnx").write_text("new")
            out.mkdir(exist_ok=True)
            (out / "thesis.tex").write_text("mine")

    with pytest.raises(OptionError, match="another process has written here meanwhile"):
        export()
    assert (out / "thesis.tex").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [out]


def test_of_two_exports_to_one_folder_the_second_is_refused(tmp_path):
    out = tmp_path / "export"

    def export_twice():
        with command.replace_folder(out) as second:
            with command.replace_folder(out) as first:
                (first / "student.onnx").write_text("first")
            (second / "student.onnx").write_text("second")

    with pytest.raises(OptionError, match="another process has written here meanwhile"):
        export_twice()
    assert (out / "student.onnx").read_text() == "first"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["NOWHERE"], "JOB_DIR=NOWHERE: no such folder"),
        (["."], "holds no run of odcheap"),
        (["run", "--student", "2"], "--student=2: must be 0 to 1"),
        (["run", "--batch", "0"], "--batch=0: must be 1 or more"),
        (["run", "--opset", "5"], "--opset=5: must be 7 to"),
        (["run", "--data-dir", "x"], "--data-dir=x: must not be given: the run's images are not read"),
        (["run", "--out", "run"], "exists and is not an export"),
        (["run", "--out", "/"], "--out=/: is a mount point"),
        (["run", "--int8", "--batch", "600"], "--batch=600: must be at most 512 with --int8"),
        (["run", "--int8", "--opset", "11"], "--opset=11: must be 13 or more with --int8"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_line(trained, tmp_path, capsys, options, line):
    trained("trainer.max_epochs=1")
    capsys.readouterr()
    assert command.main([*options, *QUICK]) == 1
    err = capsys.readouterr().err
    assert line in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_the_hub_loads_a_student_from_a_clone(trained, tmp_path):
    job_dir = trained("trainer.max_epochs=1")
    path = str(job_dir / "student.safetensors")
    code = f"import torch; s = torch.hub.load({str(ROOT)!r}, 'student', source='local', path={path!r}); "
    code += "print(tuple(s(torch.zeros(2, 3, 8, 8)).shape))"
    blocked = "import sys; sys.modules.update(dict.fromkeys(['pytorch_lightning', 'hydra', 'omegaconf'])); "
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", blocked + code],
        cwd=tmp_path,
        env=os.environ | {"TORCH_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "(2, 10)\n", done.stderr


def test_pictures_in_folders_are_checked_from_their_own_files(command, light, tmp_path, capsys):
    from data.test_image_files import saved

    mine = tmp_path / "zqmy files"  # a folder that the card must not name
    for k in range(24):
        folder = mine / "pictures" / ("dark", "bright")[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        saved(folder / f"{k}.png", size=(30 + k, 40), mode=("RGB", "L", "LA")[k % 3])
    options = ["data=imagefolder", f"data_dir={mine / 'pictures'}", "data.image_size=32", "data.val_size=4"]
    options += ["data.load.test_size=6", "data.workers=0", "num_stu=1", "method=alone", "backbone=resnet20"]
    options += ["backbone.depth=8", "trainer=cpu", "trainer.max_epochs=1", "logger=csv", "data.batch_size=8"]
    result = command(*options, f"job_dir={tmp_path / 'run'}")
    assert result.status == 0, result.err
    capsys.readouterr()
    shutil.move(mine / "pictures", mine / "moved")
    assert export_command.main([str(tmp_path / "run"), *QUICK]) == 0
    assert "warning: not verified on data" in capsys.readouterr().out
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "**not verified on data**" in card.split("```")[0]
    assert find_words(tmp_path / "run" / "export", ["zqmy", "pictures", str(tmp_path)]) == []
    assert export_command.main([str(tmp_path / "run"), *QUICK, "--overwrite", "--int8"]) == 1
    assert "; --data-dir says where they are\n" in capsys.readouterr().err
    assert export_command.main([str(tmp_path / "run"), *QUICK, "--overwrite", "--data-dir", str(mine / "moved")]) == 0
    assert "on 6 images" in capsys.readouterr().out
    assert find_words(tmp_path / "run" / "export", ["zqmy", "pictures", str(tmp_path)]) == []
    (mine / "moved" / "dark" / "0.png").unlink()
    assert export_command.main([str(tmp_path / "run"), *QUICK, "--overwrite", "--data-dir", str(mine / "moved")]) == 1
    assert "holds other images than the run was trained with" in capsys.readouterr().err


AVERAGE_POOLING = """
from torch import nn
from odcheap.layers.cheap_conv import BlockType


class AvgPool(BlockType):
    def make_spatial(self, channels, window):
        return nn.AvgPool2d(window.kernel_size, window.stride, window.padding)
"""


def test_a_block_type_of_a_user_is_exported_with_its_dense_form(light, tmp_path, monkeypatch):
    (tmp_path / "my_average_pooling.py").write_text(AVERAGE_POOLING)
    monkeypatch.syspath_prepend(tmp_path)
    conf = tmp_path / "conf"
    (conf / "block_type").mkdir(parents=True)
    (conf / "block_type" / "AvgPool.yaml").write_text("_target_: my_average_pooling.AvgPool\n")
    settings = SETTINGS | {"block_type": {"part": "AvgPool"}}
    network = build_network(settings, "settings", "", config_dirs=[conf])
    job_dir = write_run(tmp_path / "run", network, settings)
    monkeypatch.setattr(command, "is_faster", lambda timings, name: True)
    assert command.main([str(job_dir), *QUICK]) == 1  # odcheap itself has no such block type
    assert command.main([str(job_dir), *QUICK, "--config-dir", str(conf)]) == 0
    models = {path.name: onnx.load(path) for path in (job_dir / "export").glob("*.onnx")}
    counts = {name: sum(node.op_type == "AveragePool" for node in m.graph.node) for name, m in models.items()}
    assert counts["student.onnx"] > 0
    assert counts["student-dense.onnx"] == 0
    assert (job_dir / "export" / "README.md").read_text().startswith("# `AvgPool, resnet20, depth 8`")


def test_no_exported_file_names_a_folder_a_user_the_machine_or_its_environment(command, light, tmp_path, monkeypatch):
    words = {"HOME": "zqhome", "USER": "zquser", "LOGNAME": "zqlogname", "HOSTNAME": "zqhost", "MY_TOKEN": "zqsecret"}
    for name, word in words.items():
        monkeypatch.setenv(name, str(tmp_path / word) if name == "HOME" else word)
    for name in ("zqhome", "zqtemp", "zqwork"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "zqwork")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "zqtemp"))
    monkeypatch.setattr(socket, "gethostname", lambda: "zqhost")
    monkeypatch.setattr(platform, "node", lambda: "zqhost")
    machine = os.uname()
    monkeypatch.setattr(os, "uname", lambda: os.uname_result((machine[0], "zqhost", *machine[2:])))
    job_dir = tmp_path / "zqhome" / "zqfolder" / "run"
    assert command(*TINY, "trainer.max_epochs=1", f"job_dir={job_dir}").status == 0
    assert export_command.main([str(job_dir), *QUICK, "--int8", "--pt2"]) == 0
    names = {path.name for path in (job_dir / "export").iterdir()}
    assert names >= {"README.md", "results.json", "student.onnx", "student-int8.onnx", "student.pt2"}
    for name in ("summary.json", "confusion.csv", "student.safetensors"):  # of the run; users share them too
        shutil.copy(job_dir / name, job_dir / "export" / f"run-{name}")
    private = [*words.values(), "MY_TOKEN", "zqtemp", "zqwork", "zqfolder", str(tmp_path), str(ROOT), sys.prefix]
    private += [str(Path.home()), os.getcwd(), str(Path(torch.__file__).parent)]
    assert find_words(job_dir / "export", private) == []
