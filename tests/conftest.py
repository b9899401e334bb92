"""What several rooms' tests share: a tiny run, and the command line called as a user would."""

import gc
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hydra._internal.hydra import Hydra
from process_server import ONE_THREAD, popen

import train
from odcheap import cli, predict
from odcheap.layers import kernels

SHARED = Path(__file__).parents[2] / "shared"
TINY = ["data=digits", "data.val_size=1000", "backbone=resnet20", "backbone.depth=8", "num_stu=2", "trainer=cpu"]
TINY += ["trainer.max_epochs=2", "logger=csv"]


def pytest_collection_finish():
    """Collects garbage more seldom: PyTorch and the tests are a million objects, to be gone through each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 10)


def pytest_sessionfinish():
    gc.unfreeze()


class Begun:
    """`python train.py` in a process and a process group of its own, read line by line."""

    def __init__(self, *arguments, cwd, given=TINY, starter=()):
        self.cwd, self.said = cwd, []
        command = [sys.executable, *starter, train.__file__, *given, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = popen(command, cwd=cwd, env=ONE_THREAD, start_new_session=True, **pipes)

    def until(self, words):
        for line in self.process.stdout:
            self.said.append(line)
            if words in line:
                return
        raise AssertionError("".join(self.said))

    def end(self, within=150):
        overdue = threading.Timer(within, os.killpg, (self.process.pid, signal.SIGKILL))
        overdue.start()
        with self.process:
            self.said += self.process.stdout
            status = self.process.wait()
        assert overdue.is_alive(), "it, or a process that it has started, had to be ended"
        overdue.cancel()
        return status


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Result(NamedTuple):
    status: int
    out: str
    err: str


def pytest_configure(config):
    """Compiles the fused CPU operators before the test processes start, which would all compile them."""
    if not hasattr(config, "workerinput"):
        kernels.load_operators("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """Two test processes share two cores."""
    torch.set_num_threads(1)


@pytest.fixture
def kernels_off():
    """PyTorch's own operators, for tests of results to the bit."""
    before = kernels.use("off")
    yield
    kernels.use(before)


read_mode = Hydra.get_mode


def read_mode_if_given(hydra, config_name, overrides):
    """Hydra composes a config twice, first for `hydra.mode` alone, which a recipe or a user's directory can set."""
    can_be_given = any(word in argument for argument in sys.argv for word in ("hydra", "experiment", "--config-dir"))
    return read_mode(hydra, config_name, overrides) if can_be_given else None


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """`command("num_stu=2", ...)` is `python train.py num_stu=2 ...` in an empty folder, without a new process.

    A resumed run does not take its logger from the checkpoint. `default_logger` is that of a test which names none:
    TensorBoard, the default of odcheap, draws the confusion matrix, which takes as long as a tiny training.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Hydra, "get_mode", read_mode_if_given)

    def run(*arguments: str, default_logger: str | None = "csv") -> Result:
        monkeypatch.setattr(sys, "argv", ["train.py"])
        capsys.readouterr()
        is_resumed = any(argument.startswith("resume=") for argument in arguments)
        if default_logger and is_resumed and not any("logger" in argument for argument in arguments):
            arguments = (*arguments, f"logger={default_logger}")
        try:
            status = cli.main(["train", *arguments])
        except SystemExit as stop:
            status = stop.code
        return Result(status, *capsys.readouterr())

    return run


trained_runs: dict[tuple[str, ...], Path] = {}


@pytest.fixture
def trained(command, tmp_path, tmp_path_factory):
    """`trained("num_stu=1", ...)` copies a finished tiny run to the test's folder; it is trained once a process."""

    def copy(*options: str, name: str = "run") -> Path:
        if options not in trained_runs:
            folder = tmp_path_factory.mktemp("trained") / "run"
            result = command(*TINY, *options, f"job_dir={folder}")
            assert result.status == 0, result.err
            trained_runs[options] = folder
        return shutil.copytree(trained_runs[options], tmp_path / name)

    return copy


converted = {}  # programs and files by their networks


def convert_once(monkeypatch, module, name, key):
    """Lets tests that have the same network share what this function of the module makes of it."""
    function = getattr(module, name)

    def convert(source, *given):
        place = (name, key(source), *map(str, given))
        if place not in converted:
            converted[place] = function(source, *given)
        return converted[place]

    monkeypatch.setattr(module, name, convert)


def digest(network):
    return str(network), hashlib.sha256(b"".join(t.numpy().tobytes() for t in network.state_dict().values())).digest()


@pytest.fixture
def light(monkeypatch):
    """Without the bare process and the timings, which other tests have: the dense form then counts as slower.

    A network is traced and written as ONNX once for all of these tests.
    """
    # Imported here because most folders' tests do without ONNX, which takes seconds.
    from odcheap.export import command as export_command
    from odcheap.export import onnx as onnx_export
    from odcheap.export import verify
    from odcheap.export.card_speed import STANDARD, STUDENT
    from odcheap.export.latency import Key
    from odcheap.export.runtimes import ONNX_RUNTIME, PYTORCH

    convert_once(monkeypatch, onnx_export, "export_program", digest)
    convert_once(monkeypatch, onnx_export, "to_onnx", id)
    monkeypatch.setattr(
        verify, "run_in_bare_process", lambda path, preprocess, reference, config_dirs: reference.logits
    )

    def times(run, options, files, folder):
        batches = (1, 64) if options.batch is None else (options.batch,)
        names = [*files, STANDARD, STUDENT]
        keys = [
            Key(name, runtime, batch, 1) for name in names for runtime in (ONNX_RUNTIME, PYTORCH) for batch in batches
        ]
        return {key: predict.Timing(1 + ("dense" in key.name), 2.0) for key in keys}

    monkeypatch.setattr(export_command, "time_files", times)


@pytest.fixture
def soon():
    """Fails a test after half a minute: code that opens a pipe or a device would wait, or read, for ever."""

    def fail(*_):
        raise TimeoutError("the test waits for something that never comes")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def golden():
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip("the golden files of ../shared are not here")
    return folder
