import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from odcheap.runs.folder import check_unoccupied
from odcheap.runs.resume import reapply_overrides
from odcheap.runs.settings import RunConfig, complete_settings, flatten, name_run, override_key
from odcheap.utils.errors import OptionError


def test_a_run_is_named_by_what_it_computes():
    assert name_run(["num_stu=4", "block_type=DW"]) == "block_type=DW,num_stu=4"
    assert name_run(["resume=auto", "data_dir=/tmp/x", "logger=csv", "hydra.sweep.dir=a"]) == "default"
    assert name_run(["seed=1"]) != name_run(["seed=2"])


@given(st.lists(st.text(min_size=1, max_size=400), max_size=5))
def test_a_name_is_always_one_folder_s(overrides):
    name = name_run([f"weights={text}" for text in overrides])
    assert 0 < len(name.encode()) <= 255
    assert not {"/", "\0", "\n", "\x1b"} & set(name)
    assert name not in (".", "..")


def test_long_names_stay_different():
    assert name_run(["a=" + "x" * 300 + "1"]) != name_run(["a=" + "x" * 300 + "2"])


@pytest.mark.parametrize("override", ["seed=1", "+seed=1", "++seed=a=b", "~seed"])
def test_the_key_of_an_override(override):
    assert override_key(override) == "seed"


def test_settings_of_an_earlier_version_get_the_defaults_of_what_is_new():
    old = {"block_type": {"part": "Group", "groups": 2}, "data": {"part": "digits", "name": "own"}, "seed": 0}
    found = complete_settings(old)
    assert found["augment"] == {"part": "standard", "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0}
    assert found["block_type"] == old["block_type"]
    assert (found["data"]["name"], found["data"]["channels"], found["seed"]) == ("own", 3, 0)
    assert "load" not in found["data"]
    assert not any("${" in str(value) for value in found["data"].values())
    own = {"augment": {"part": "mine", "strength": 2}}
    assert complete_settings(own) == own
    assert complete_settings({"augment": {"part": "trivial"}})["augment"]["mixup"] == 0.0


def test_flat():
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}


def test_an_occupied_folder_is_refused_with_the_three_ways_out(tmp_path):
    check_unoccupied(tmp_path, overwrite=False)
    ways = "overwrite=true replaces it, another job_dir keeps it"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "epoch-0000.ckpt").write_text("")
    with pytest.raises(OptionError, match=f"holds an unfinished run; resume=auto continues it, {ways}$"):
        check_unoccupied(tmp_path, overwrite=False)
    (tmp_path / "summary.json").write_text(json.dumps({"finished": True}))
    with pytest.raises(
        OptionError, match=f"holds a finished run; {ways}, resume=auto with a larger trainer.max_epochs"
    ):
        check_unoccupied(tmp_path, overwrite=False)
    check_unoccupied(tmp_path, overwrite=True)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(OptionError, match="its summary.json cannot be read"):
        check_unoccupied(tmp_path, overwrite=False)


def test_a_run_of_an_earlier_version_continues_with_the_defaults_of_newer_options(tmp_path):
    """Its checkpoint does not name an option that did not exist; given anew, the option would change the experiment."""

    def compose(overrides):
        width = 32 if "backbone.width=32" in overrides else 16
        return RunConfig(OmegaConf.create({"seed": 0, "data": {}, "backbone": {"width": width}}), {}, overrides)

    saved = {"overrides": ["seed=0"], "config": {"seed": 0, "data": {}, "backbone": {}}}
    assert reapply_overrides(saved, [], tmp_path, compose).cfg.backbone.width == 16
    message = (
        r"backbone\.width=32: would change the experiment that is resumed; its version did not have backbone\.width"
    )
    with pytest.raises(OptionError, match=message):
        reapply_overrides(saved, ["backbone.width=32"], tmp_path, compose)
