"""Folders that a run may use, by the files in them, and the checkpoints in a folder."""

import copy
import functools
import json
import os

import pytest
import torch

from odcheap.runs.folder import (
    check_usable,
    epoch_path,
    find_newest_usable,
    is_run_folder,
    list_checkpoints,
    prune_checkpoints,
    read_checkpoint,
    remove_partial_files,
    step_path,
)
from odcheap.utils.errors import OptionError
from odcheap.utils.files import write_checkpoint

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


def run_content(**more):
    """As little as a checkpoint of a run may hold."""
    about = {"overrides": ["seed=1"], "config": {}, "split": "abc", "classes": ["a", "b"], "student": {}}
    record = {"history": [], "selected": {"candidate": 0, "epoch": 0}}
    known = {"odcheap": about, "loops": {}, "epoch": 0, "state_dict": {}, "callbacks": {"Record": record}}
    return known | more


def write(path, number):
    path.parent.mkdir(exist_ok=True)
    write_checkpoint(path, run_content(number=number))


def test_files_sort_by_age_and_the_newest_whole_one_is_taken(tmp_path, capsys):
    paths = [epoch_path(tmp_path, 0), step_path(tmp_path, 1, 20), step_path(tmp_path, 1, 100), epoch_path(tmp_path, 1)]
    for number, path in enumerate(paths):
        write(path, number)
    assert list_checkpoints(tmp_path) == paths
    paths[3].write_bytes(paths[3].read_bytes()[:50])
    paths[2].write_bytes(b"")
    path, content = find_newest_usable(tmp_path)
    assert (path, content["number"]) == (paths[1], 1)
    assert [
        f"skipped: resume={p}" in line
        for p, line in zip(paths[:1:-1], capsys.readouterr().out.splitlines(), strict=True)
    ] == [True, True]


def test_the_order_is_that_of_the_numbers(tmp_path):
    paths = [epoch_path(tmp_path, 9999), step_path(tmp_path, 10_000, 999), step_path(tmp_path, 10_000, 10_000_000)]
    paths += [epoch_path(tmp_path, 10_000), epoch_path(tmp_path, 100_000)]
    for path in reversed(paths):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "checkpoints" / "epoch-best.ckpt").touch()
    assert list_checkpoints(tmp_path) == paths
    prune_checkpoints(tmp_path, keep=2, selected=None)
    assert list_checkpoints(tmp_path) == paths[-2:]
    assert (tmp_path / "checkpoints" / "epoch-best.ckpt").exists()


def test_none_is_usable_where_there_is_none(tmp_path):
    assert find_newest_usable(tmp_path) is None


def test_the_number_kept_is_bounded_and_the_selected_one_stays(tmp_path):
    paths = [epoch_path(tmp_path, k) for k in range(8)]
    for path in paths:
        write(path, 0)
        prune_checkpoints(tmp_path, keep=2, selected=paths[1])
    assert list_checkpoints(tmp_path) == [paths[1], paths[6], paths[7]]


def test_files_that_are_no_run_s_are_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(
        OptionError, match=r"resume=.*other.ckpt: not a complete checkpoint of an odcheap run.*weights="
    ):
        read_checkpoint(tmp_path / "other.ckpt")


def test_a_flipped_bit_anywhere_is_noticed(tmp_path):
    """PyTorch's own reader lets nine of ten pass."""
    path = tmp_path / "x.ckpt"
    write_checkpoint(path, run_content(weights=torch.randn(300)))
    whole = path.read_bytes()
    assert torch.load(path, weights_only=True)["weights"].shape == (300,)
    for place in [*range(0, len(whole), 7), *range(len(whole) - 100, len(whole))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(OptionError, match="its checksum is missing or does not match"):
            read_checkpoint(path)
    for end in range(0, len(whole), 11):
        path.write_bytes(whole[:end])
        with pytest.raises(OptionError, match="its checksum is missing or does not match"):
            read_checkpoint(path)
    path.write_bytes(whole)
    assert read_checkpoint(path)["odcheap"]["overrides"] == ["seed=1"]


@pytest.mark.parametrize(
    "change",
    [
        {"odcheap": {}},
        {"odcheap": "x"},
        {"odcheap": run_content()["odcheap"] | {"overrides": [{"a": 1}]}},
        {"odcheap": run_content()["odcheap"] | {"classes": None}},
        {"callbacks": None},
        {"callbacks": {"Record": {"history": 3}}},
        {"callbacks": {"Record": {"history": [{"val/student_0/top1": [1]}], "selected": {"candidate": 0, "epoch": 0}}}},
        {"callbacks": {"Record": {"history": [], "selected": {"candidate": 0, "epoch": 0, "score": float("nan")}}}},
        {"callbacks": {"Record": {"history": [], "selected": {"candidate": "../x", "epoch": 0}}}},
        {"epoch": "0"},
    ],
    ids=str,
)
def test_one_that_somebody_made_up_is_refused(tmp_path, change):
    write_checkpoint(tmp_path / "x.ckpt", run_content() | change)
    with pytest.raises(OptionError, match="not a checkpoint of an odcheap run"):
        read_checkpoint(tmp_path / "x.ckpt")


def test_each_entry_that_is_read_before_the_training_must_be_there(tmp_path):
    whole = run_content()
    entries = [(), ("odcheap",), ("callbacks",), ("callbacks", "Record"), ("callbacks", "Record", "selected")]
    for path in entries:
        for name in functools.reduce(dict.get, path, whole):
            content = copy.deepcopy(whole)
            del functools.reduce(dict.get, path, content)[name]
            write_checkpoint(tmp_path / "x.ckpt", content)
            with pytest.raises(OptionError, match=rf"not a checkpoint of an odcheap run .*{name}: field required"):
                read_checkpoint(tmp_path / "x.ckpt")
