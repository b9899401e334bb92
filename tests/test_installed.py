"""The package as a wheel lays it out, used from an empty folder."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from conftest import TINY

import odcheap
from odcheap.utils.parts import find_conf_dir


def test_training_in_two_processes_and_a_report_need_no_clone(tmp_path):
    with open(Path(__file__).parents[1] / "pyproject.toml", "rb") as file:
        wheel = tomllib.load(file)["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["odcheap"], "force-include": {"conf": "odcheap/conf"}}
    shutil.copytree(Path(odcheap.__file__).parent, tmp_path / "site" / "odcheap")
    shutil.copytree(find_conf_dir(), tmp_path / "site" / "odcheap" / "conf")
    (tmp_path / "empty").mkdir()

    def run(*arguments):
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "odcheap", *arguments]
        where = {"cwd": tmp_path / "empty", "env": environment}
        return subprocess.run(command, **where, capture_output=True, text=True, timeout=250)

    done = run("train", *TINY, "trainer=ddp", "trainer.accelerator=cpu", "trainer.max_epochs=1", "job_dir=run")
    assert done.returncode == 0, done.stderr
    assert "<- chosen" in done.stdout
    done = run("report", "run", "--no-latency")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "empty" / "run" / "report" / "report.md").is_file()
