"""The package as a wheel lays it out, used from an empty folder."""

import csv
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import TINY
from process_server import ONE_THREAD, popen

import odcheap
from odcheap import load_student
from odcheap.data.in_memory import load_digits
from odcheap.utils.parts import find_conf_dir


def test_a_sweep_with_a_run_of_two_processes_and_a_report_need_no_clone(tmp_path):
    """gloo on the CPU: the figures are exact, the rate is not scaled."""
    with open(Path(__file__).parents[1] / "pyproject.toml", "rb") as file:
        wheel = tomllib.load(file)["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["odcheap"], "force-include": {"conf": "odcheap/conf"}}
    shutil.copytree(Path(odcheap.__file__).parent, tmp_path / "site" / "odcheap")
    shutil.copytree(find_conf_dir(), tmp_path / "site" / "odcheap" / "conf")
    (tmp_path / "empty").mkdir()

    def run(*arguments):
        command = [sys.executable, "-m", "odcheap", *arguments]
        where = {"cwd": tmp_path / "empty", "env": ONE_THREAD | {"PYTHONPATH": str(tmp_path / "site")}}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with popen(command, **where, **pipes) as process:
            out, err = process.communicate(timeout=250)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    several = ("num_stu=2", "trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "hydra.sweep.dir=sweep")
    done = run("train", "-m", *TINY, *several)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("<- chosen") == 1
    sweep = tmp_path / "empty" / "sweep"
    (folder,) = (path for path in sweep.iterdir() if path.is_dir())
    summary = json.loads((folder / "summary.json").read_text())
    assert len(summary["students"]) == 2
    with open(folder / "confusion.csv", newline="") as file:
        counts = [int(n) for row in list(csv.reader(file))[1:] for n in row[1:]]
    assert sum(counts) == 360
    with open(folder / "metrics.csv", newline="") as file:
        assert float(next(csv.DictReader(file))["lr"]) == 0.1
    images, student = load_digits(), load_student(folder / "student.safetensors")
    with torch.no_grad():
        accuracy = (student(images.test / 255).argmax(1) == images.test_target).double().mean().item()
    assert accuracy == pytest.approx(summary["selected"]["test_top1"], abs=1e-9)

    done = run("report", "sweep", "--no-latency")
    assert done.returncode == 0, done.stderr
    assert (sweep / "report" / "report.md").is_file()
