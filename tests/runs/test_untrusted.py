"""A checkpoint from a stranger: its options call nothing and write nowhere."""

import pytest
from conftest import TINY

from odcheap.utils.files import read_torch, write_checkpoint

HOSTILE = [
    "method._target_=os.system",
    "method._target_=odcheap.utils.files.write_text",
    "+method.students={_target_: os.system, _args_: [touch owned]}",
    "block_type._target_=torch.load",
    "backbone._target_=torch.hub.load",
    "data.load._target_=odcheap.data.folder_trees.unpack_imagenet",
    "data.load._target_=${seed}",
    "+trainer.profiler={_target_: builtins.open, file: owned, mode: w}",
    "+trainer.plugins=[{_target_: subprocess.run}]",
    "optimizer._target_=odcheap.utils.files.os.system",
    "block_type=../../outside",
]


@pytest.fixture
def checkpoint(command, tmp_path):
    """Of a finished run, the folder of which is gone."""
    assert command(*TINY, "trainer.max_epochs=1", f"job_dir={tmp_path}/run").status == 0
    return tmp_path / "run" / "checkpoints" / "epoch-0000.ckpt"


def test_a_strangers_checkpoint_calls_nothing_of_its_own(checkpoint, command, tmp_path):
    content = read_torch(checkpoint)
    own = list(content["odcheap"]["overrides"])
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    for override in HOSTILE:
        content["odcheap"]["overrides"] = [*own, override]
        write_checkpoint(checkpoint, content)
        for way in (f"resume={checkpoint}", f"resume={tmp_path}/run", "test_only=true"):
            more = [f"resume={checkpoint}"] if way == "test_only=true" else []
            result = command(way, *more)
            assert result.status == 1, (override, way, result.out)
            assert result.err.startswith("error: "), result.err
            assert result.err.count("\n") == 1
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before


def test_where_a_run_writes_is_not_taken_from_a_file(checkpoint, command, tmp_path):
    content = read_torch(checkpoint)
    outside = tmp_path / "outside"
    given = [f"logger.tensorboard.save_dir={outside}", f"trainer.default_root_dir={outside}", "hydra.sweep.dir=/x"]
    given.append(f"+trainer.logger={outside}")
    overrides = [o for o in content["odcheap"]["overrides"] if not o.startswith(("logger", "trainer.max_epochs"))]
    content["odcheap"]["overrides"] = [*overrides, *given]
    write_checkpoint(checkpoint, content)
    result = command(f"resume={checkpoint}", "trainer.max_epochs=2")
    assert result.status == 0, result.err
    assert not outside.exists()
