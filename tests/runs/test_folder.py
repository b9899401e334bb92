"""Folders that a run may use, by the files in them."""

import json
import os

import pytest

from odcheap.runs.folder import check_usable, is_run_folder, remove_partial_files
from odcheap.utils.errors import OptionError

NAMES = ("config.yaml", "metrics.csv", "summary.json", "student.safetensors", "status.json", "test.json")


@pytest.mark.parametrize("content", ["mine", "{}", '{"finished": true}', '{"state": "running"}'])
@pytest.mark.parametrize("name", NAMES)
def test_one_file_of_somebody_is_no_run(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert not is_run_folder(tmp_path)
    with pytest.raises(OptionError, match=rf"holds files that no run of odcheap has written \({name}\)"):
        check_usable(tmp_path)


def test_an_unfinished_download_is_no_partial_file_of_a_run(tmp_path):
    own, others = (".summary.json.7.part", ".metrics.csv.7-0123abcd.part"), (".film.mkv.part", ".film.mkv.7.part")
    for name in (*own, *others):
        (tmp_path / name).touch()
    check_usable(tmp_path)  # an empty folder, apart from names that begin with a dot
    remove_partial_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_events_of_tensorboard_are_not_written_through_a_link(tmp_path):
    (tmp_path / "run" / "tensorboard").mkdir(parents=True)
    status = {"state": "stopped", "host": "here", "pid": os.getpid()}
    (tmp_path / "run" / "status.json").write_text(json.dumps(status))
    check_usable(tmp_path / "run")
    (tmp_path / "run" / "tensorboard" / "events.out.tfevents.1").symlink_to(tmp_path / "precious")
    with pytest.raises(OptionError, match="its tensorboard holds a link, through which a run does not write"):
        check_usable(tmp_path / "run")
