import pytest
import torch

from odcheap.checkpoint import all_paths, epoch_path, newest_usable, prune, read_run, step_path
from odcheap.errors import OptionError


def write(path, number):
    path.parent.mkdir(exist_ok=True)
    torch.save({"odcheap": {}, "loops": {}, "number": number}, path)


def test_files_sort_by_age_and_the_newest_whole_one_is_taken(tmp_path):
    paths = [epoch_path(tmp_path, 0), step_path(tmp_path, 1, 20), step_path(tmp_path, 1, 100), epoch_path(tmp_path, 1)]
    for number, path in enumerate(paths):
        write(path, number)
    assert all_paths(tmp_path) == paths
    paths[3].write_bytes(paths[3].read_bytes()[:50])
    paths[2].write_bytes(b"")
    said = []
    path, content = newest_usable(tmp_path, said.append)
    assert (path, content["number"]) == (paths[1], 1)
    assert [f"passed over: resume={p}" in line for p, line in zip(paths[:1:-1], said, strict=True)] == [True, True]


def test_none_is_usable_where_there_is_none(tmp_path):
    assert newest_usable(tmp_path, print) is None


def test_the_number_kept_is_bounded_and_the_selected_one_stays(tmp_path):
    paths = [epoch_path(tmp_path, k) for k in range(8)]
    for path in paths:
        write(path, 0)
        prune(tmp_path, keep=2, selected=paths[1])
    assert all_paths(tmp_path) == [paths[1], paths[6], paths[7]]


def test_files_that_are_no_run_s_are_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(OptionError, match=r"resume=.*other.ckpt: not a checkpoint of an odcheap run; weights="):
        read_run(tmp_path / "other.ckpt")
