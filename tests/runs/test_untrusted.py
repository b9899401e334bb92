"""A checkpoint from a stranger: its options call nothing and write nowhere."""

import socket

import numpy as np
import pytest
from conftest import TINY
from PIL import Image

from odcheap.utils.files import read_torch, write_checkpoint

CANARY = "canary-of-the-environment"

# Each is put into a checkpoint with a correct checksum. OUT is a folder outside of the run, URL a server of the test.
REFUSED = [  # within the closed list of options, but no plain value
    "method._target_=os.system",
    "method._target_=odcheap.utils.files.write_text",
    "block_type._target_=torch.load",
    "backbone._target_=torch.hub.load",
    "data.load._target_=odcheap.data.folder_trees.unpack_imagenet",
    "data.load._target_=${seed}",
    "optimizer._target_=odcheap.utils.files.os.system",
    "block_type=../../outside",
    "data.name=${oc.env:CANARY}",
    "data.name='${oc.decode:${oc.env:CANARY}}'",
    "seed=${oc.env:CANARY}",
    "data_dir=${oc.env:CANARY}",
    "backbone.name=hf-hub:stranger/model",
    "optimizer.lr={_target_: os.system, _args_: [touch OUT]}",
    "seed=1,2",
    "trainer.precision=${oc.env:CANARY}",
    "trainer.max_epochs=${oc.env:CANARY}",
    "experiment=../x",
    "experiment=[quickstart,../x]",
    "data@trainer=digits",
]
# How the closed list refuses; what comes after it, such as a file that is not there, must not be needed.
REFUSALS = ["plain names and numbers only", "must be a single value", "needs a YAML file in a config directory"]
LEFT_OUT = [  # outside of the closed list: the run goes on without them
    "+method.students={_target_: os.system, _args_: [touch OUT]}",
    "+trainer.profiler={_target_: builtins.open, file: OUT, mode: w}",
    "+trainer.profiler=simple",
    "+trainer.plugins=[{_target_: subprocess.run}]",
    "+trainer.callbacks=[{_target_: pytorch_lightning.callbacks.ModelCheckpoint, dirpath: OUT}]",
    "+trainer.logger=OUT",
    "+trainer.fast_dev_run=true",
    "+trainer.limit_test_batches=1",
    "trainer.default_root_dir=OUT",
    "trainer.devices=64",
    "trainer=ddp",
    "logger=mlflow",
    "logger=wandb",
    "logger=tensorboard",
    "logger.mlflow.tracking_uri=URL/${oc.env:CANARY}",
    "logger.tensorboard.save_dir=OUT",
    "+logger.tensorboard={_target_: pytorch_lightning.loggers.TensorBoardLogger, save_dir: OUT}",
    "+logger.mlflow={_target_: pytorch_lightning.loggers.MLFlowLogger, tracking_uri: URL}",
    "hydra.sweep.dir=OUT",
    "hydra/launcher=joblib",
    "+note=${oc.env:CANARY}",
    "data.workers=64",
    "data_dir=OUT",
    "checkpoint_keep=1",
    "backbone.pretrained=URL/model.pth",
    "~method",
]


@pytest.fixture
def checkpoint(trained):
    """The checkpoint of the first of two epochs, as a run leaves it that was interrupted."""
    job_dir = trained("trainer.max_epochs=1")
    for name in ("summary.json", "student.safetensors"):
        (job_dir / name).unlink()
    return job_dir / "checkpoints" / "epoch-0000.ckpt"


@pytest.fixture
def hostile(checkpoint, tmp_path, monkeypatch):
    """`hostile(*overrides)` writes a checkpoint with these; a connection ends the test, and CANARY is set."""

    def connect(_, address):
        pytest.fail(f"connects to {address}")

    monkeypatch.setenv("CANARY", CANARY)
    monkeypatch.setattr(socket.socket, "connect", connect)
    content = read_torch(checkpoint)
    own = [o for o in content["odcheap"]["overrides"] if not o.startswith("trainer.max_epochs")]

    def write(*overrides):
        overrides = [
            o.replace("OUT", str(tmp_path / "outside")).replace("URL", "http://127.0.0.1:9") for o in overrides
        ]
        content["odcheap"]["overrides"] = [*own, "trainer.max_epochs=2", *overrides]
        content["odcheap"]["config"]["trainer"]["max_epochs"] = 2
        write_checkpoint(checkpoint, content)
        return checkpoint

    return write


def contents(folder):
    """Every file below the folder, with its bytes, and every folder."""
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.mark.parametrize("in_each_way", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("override", REFUSED)
def test_what_is_no_plain_value_in_a_checkpoint_is_refused(hostile, command, tmp_path, override, in_each_way):
    checkpoint = hostile(override)
    before = contents(tmp_path)
    ways = ([f"resume={checkpoint}"], [f"resume={tmp_path}/run"], ["test_only=true", f"resume={checkpoint}"])
    for arguments in ways if in_each_way else [ways[REFUSED.index(override) % 3]]:
        result = command(*arguments)
        assert (result.status, result.err[:7], result.err.count("\n")) == (1, "error: ", 1), (arguments, result)
        refusals = REFUSALS[2:] if "._target_=" in override and "$" not in override else REFUSALS[:2]
        assert any(words in result.err for words in refusals), result.err
        assert CANARY not in result.out + result.err
        assert contents(tmp_path) == before


SEVERAL = [LEFT_OUT[k::6] for k in range(6)]
EACH = [pytest.param([override], marks=pytest.mark.slow) for override in LEFT_OUT]


@pytest.mark.parametrize("overrides", SEVERAL + EACH, ids=" ".join)
def test_what_is_outside_the_closed_list_is_left_out(hostile, command, tmp_path, overrides):
    hostile(*overrides)
    before = contents(tmp_path)
    # An option that is given replaces the one in the checkpoint, so the one that is tested is not given.
    names = {override.partition("=")[0] for override in overrides}
    given = [option for option in ("trainer=cpu", "logger=csv") if option.partition("=")[0] not in names]
    result = command(f"resume={tmp_path}/run", *given, default_logger=None)
    left_out = result.out.partition("not taken from the checkpoint: ")[2].partition(" (give them again")[0]
    for override in overrides:
        assert override.partition("OUT")[0].partition("URL")[0] in left_out
    assert result.status == 0, result.err
    after = contents(tmp_path)
    outside = {path for path in after.keys() - before.keys() if tmp_path / "run" not in path.parents}
    assert not outside
    assert all(after.get(path) == content for path, content in before.items() if tmp_path / "run" not in path.parents)
    assert not [path for path, content in after.items() if CANARY.encode() in content]
    assert CANARY not in result.out + result.err
    assert [name for name in ("wandb", "mlruns", "mlflow.db") if (tmp_path / "run" / name).exists()] == []
    assert "logger=csv" not in given or not (tmp_path / "run" / "tensorboard").exists()


def test_a_folder_of_images_that_only_the_checkpoint_names_is_read_and_never_written(command, tmp_path):
    for k in range(24):
        path = tmp_path / "pictures" / "cifar10" / ("train", "test")[k // 12] / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), 10 * k, np.uint8)).save(path)
    sizes = ["data.load.train_images=12", "data.load.test_images=12", "data.val_size=4", "data.batch_size=8"]
    run = [*TINY[2:], "data=cifar10", *sizes, f"data_dir={tmp_path}/pictures", f"job_dir={tmp_path}/run"]
    assert command(*run, "trainer.max_epochs=1").status == 0
    (tmp_path / "pictures" / ".cifar10.safetensors").unlink()
    result = command(f"resume={tmp_path}/run", "trainer.max_epochs=2", "trainer=cpu", "logger=csv")
    assert result.status == 0, result.err
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["cifar10"]


def test_no_value_of_the_environment_is_written(command, tmp_path, monkeypatch):
    monkeypatch.setenv("CANARY", CANARY)
    (tmp_path / CANARY).mkdir()
    given = ["data_dir=${oc.env:CANARY}"]
    assert command(*TINY, *given, "trainer.max_epochs=1", f"job_dir={tmp_path}/run").status == 0
    assert not [path for path, content in contents(tmp_path / "run").items() if CANARY.encode() in content]
    result = command(*TINY, *given, "trainer.max_epochs=2", f"job_dir={tmp_path}/run", "resume=auto")
    assert result.status == 0, result.err


# Each change is made to a checkpoint of an interrupted run, which then has a correct checksum.
WRONG_STATES = {
    "no weights": {"state_dict": {}},
    "weights of a wrong type": {"state_dict": {"method.students.members.0.conv1.weight": 3}},
    "no place in the training": {"loops": {}},
    "no optimizer": {"optimizer_states": 3},
    "another optimizer": {"optimizer_states": [{"state": {}, "param_groups": []}]},
    "no schedule": {"lr_schedulers": [3]},
    "metrics of another kind": {"metrics": {"scores": 3}},
    "no version": {"pytorch-lightning_version": 3},
    "a student that is not there": {"selected": {"candidate": 99, "epoch": 0, "score": 0.9}},
}


@pytest.mark.parametrize("name", list(WRONG_STATES))
def test_a_state_that_does_not_fit_the_run_is_one_line(checkpoint, command, tmp_path, name):
    content, change = read_torch(checkpoint), dict(WRONG_STATES[name])
    if "selected" in change:
        content["callbacks"]["Record"]["selected"] = change.pop("selected")
    write_checkpoint(checkpoint, content | change)
    tested = [["test_only=true"]] if "weights" in name or "student" in name else []
    for more in ([], *tested):
        result = command(f"resume={tmp_path}/run", "trainer=cpu", "logger=csv", *(more or ["trainer.max_epochs=2"]))
        assert (result.status, result.err.count("\n")) == (1, 1), result
        assert f"resume={checkpoint}: " in result.err
        assert "its state does not fit the run (" in result.err or "has selected student 99, which" in result.err
