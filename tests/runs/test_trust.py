import pytest
from conftest import TINY
from omegaconf import OmegaConf

from odcheap.runs import trust
from odcheap.utils.errors import OptionError
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
]


def test_the_parts_are_those_that_conf_names():
    assert {
        "odcheap.layers.cheap_conv.DW",
        "odcheap.methods.od.OnlineDistillation",
        "pytorch_lightning.Trainer",
    } <= trust.parts()
    assert not {
        name for name in trust.parts() if not name.startswith(("odcheap.", "pytorch_lightning.", "torch.optim."))
    }


def test_a_part_deep_in_lists_is_seen():
    cfg = OmegaConf.create({"a": [{"b": {"_target_": "x.y"}}], "c": {"_target_": "odcheap.layers.cheap_conv.DW"}})
    assert set(trust.targets(cfg)) == {"x.y", "odcheap.layers.cheap_conv.DW"}
    with pytest.raises(OptionError, match=r"resume=F: its options call 'x.y', which is no part of odcheap"):
        trust.refuse_foreign(cfg, OmegaConf.create({}), "resume", "F")
    trust.refuse_foreign(cfg, OmegaConf.create({"z": {"_target_": "x.y"}}), "resume", "F")  # asked for by the user


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
    assert trust.kept([*given, "seed=1", f"+trainer.logger={outside}"]) == ["seed=1"]
    overrides = [o for o in content["odcheap"]["overrides"] if not o.startswith(("logger", "trainer.max_epochs"))]
    content["odcheap"]["overrides"] = [*overrides, *given]
    write_checkpoint(checkpoint, content)
    result = command(f"resume={checkpoint}", "trainer.max_epochs=2")
    assert result.status == 0, result.err
    assert not outside.exists()
