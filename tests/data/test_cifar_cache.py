import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from odcheap.data.cifar import hash_file_stats, is_valid_cache, load_cifar, read_cache, write_cache

TARGET = {"train": torch.tensor([0, 1, 0, 1]), "test": torch.tensor([0, 1])}
TENSORS = {
    "train": torch.arange(4 * 12, dtype=torch.uint8).view(4, 3, 2, 2),
    "test": torch.zeros(2, 3, 2, 2, dtype=torch.uint8),
}
TENSORS |= {f"{part}_target": labels for part, labels in TARGET.items()}


def test_a_cache_is_read_as_it_was_written_until_the_key_changes(tmp_path):
    path = tmp_path / "kept"
    assert read_cache(path, "key", TARGET) is None
    write_cache(path, "key", TENSORS)
    found = read_cache(path, "key", TARGET)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert read_cache(path, "another", TARGET) is None
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]


def test_a_damaged_cache_is_not_used_and_a_line_says_so(tmp_path, capsys):
    path = tmp_path / "kept"
    write_cache(path, "key", TENSORS)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:20], b"", b"\x80\x04pickle"):
        path.write_bytes(damaged)
        assert read_cache(path, "key", TARGET) is None
        assert "decoding again: " in capsys.readouterr().out
        write_cache(path, "key", TENSORS)
        assert path.read_bytes() == whole


def test_where_it_cannot_be_written_a_line_says_so(tmp_path, capsys):
    write_cache(tmp_path / "no such folder" / "kept", "key", TENSORS)
    assert "not cached for the next start" in capsys.readouterr().out


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_folder_or_a_pipe_in_its_place_stays_and_all_goes_on(tmp_path, make, soon):
    make(tmp_path / "kept")
    assert read_cache(tmp_path / "kept", "key", TARGET) is None
    write_cache(tmp_path / "kept", "key", TENSORS)
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]


def test_the_key_sees_every_change_of_the_files(tmp_path):
    paths = []
    for part in ("train", "test"):
        for k in range(2):
            path = tmp_path / part / "cat" / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"abc")
            os.utime(path, ns=(10**18, 10**18))
            paths.append(path)
    keys = [hash_file_stats(paths), hash_file_stats(paths[:3]), hash_file_stats(paths[::-1])]
    paths[0].write_bytes(b"abcd")
    os.utime(paths[0], ns=(10**18, 10**18))
    keys.append(hash_file_stats(paths))
    paths[0].write_bytes(b"abc")
    keys.append(hash_file_stats(paths))  # the old length, a new time
    paths[1].rename(tmp_path / "test" / "cat" / "9.png")
    keys.append(hash_file_stats([paths[0], tmp_path / "test" / "cat" / "9.png", *paths[2:]]))
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "change",
    [
        lambda images: images.pop("test_target"),
        lambda images: images.update(extra=torch.zeros(1)),
        lambda images: images.update(train=images["train"].float()),
        lambda images: images.update(train=images["train"][:2].clone()),
        lambda images: images.update(train=images["train"][:, :1].clone(), test=images["test"][:, :1].clone()),
        lambda images: images.update(test=images["test"][..., :9].clone()),
        lambda images: images.update(train_target=images["train_target"] + 1000),
        lambda images: images.update(train_target=images["train_target"].int()),
        lambda images: images.update({part: images[part][:, :, :0].clone() for part in ("train", "test")}),
        lambda images: images.update({part: images[part][..., None] for part in ("train", "test")}),
    ],
)
def test_a_cache_that_does_not_fit_the_files_is_made_again(tmp_path, change):
    for part, count in (("train", 4), ("test", 2)):
        for k in range(count):
            folder = tmp_path / "cifar10" / part / ("cat", "dog")[k % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((32, 32, 3), 20 * k, np.uint8)).save(folder / f"{k}.png")
    first = load_cifar("cifar10", str(tmp_path), 4, 2, download=False)
    cache = tmp_path / ".cifar10.safetensors"
    images = load_file(cache)
    with safe_open(cache, framework="pt") as file:
        metadata = file.metadata()
    change(images)
    save_file(images, cache, metadata=metadata)
    again = load_cifar("cifar10", str(tmp_path), 4, 2, download=False)
    assert torch.equal(again.train, first.train)
    assert torch.equal(again.train_target, first.train_target)
    assert torch.equal(again.test, first.test)
    assert (again.train.dtype, again.train_target.dtype) == (torch.uint8, torch.int64)  # `equal` compares values only
    assert load_file(cache)["train"].shape == (4, 3, 32, 32)


KINDS = st.sampled_from([torch.uint8, torch.int64, torch.float32])
ODD_TENSORS = st.builds(
    lambda shape, kind: torch.zeros(shape, dtype=kind), st.lists(st.integers(0, 4), max_size=5), KINDS
)
NAMES = ("train", "train_target", "test", "test_target")


@given(
    odd=st.dictionaries(st.sampled_from([*NAMES, "more"]), ODD_TENSORS, max_size=3),
    missing=st.sets(st.sampled_from(NAMES)),
)
def test_any_tensors_in_a_cache_fit_or_do_not(odd, missing):
    found = {name: tensor for name, tensor in (TENSORS | odd).items() if name not in missing}
    same = found.keys() == TENSORS.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in TENSORS.items()
    )
    assert is_valid_cache(found, TARGET) or not same
    assert is_valid_cache(TENSORS, TARGET)
