"""CIFAR from the official files, from folders of images, and from the cache of the decoded images."""

import os
import pickle
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from odcheap.data.cifar import hash_file_stats, is_valid_cache, load_cifar, read_cache, write_cache
from odcheap.data.in_memory import load_digits
from odcheap.data.splits import hash_pixels, split_stratified
from odcheap.utils.errors import OptionError


def grow_tree(root, train=3, test=2, classes=("cat", "dog"), suffix="png"):
    """`root/cifar10/{train,test}/<class>/*` of grey-level pictures, each of its own shade."""
    shade = 0
    for part, count in (("train", train), ("test", test)):
        for name in classes:
            folder = root / "cifar10" / part / name
            folder.mkdir(parents=True)
            for k in range(count):
                shade += 1
                Image.new("RGB", (32, 32), (shade, 0, 255 - shade)).save(folder / f"{k}.{suffix}", lossless=True)
    return root


def read(root, train_images=6, test_images=4, download=False):
    return load_cifar("cifar10", str(root), train_images, test_images, download)


@pytest.mark.parametrize("suffix", ["png", "webp", "bmp"])
def test_a_tree_is_read_in_alphabetical_order(tmp_path, suffix):
    images = read(grow_tree(tmp_path, suffix=suffix))
    assert images.classes == ["cat", "dog"]
    assert images.train.shape == (6, 3, 32, 32)
    assert images.train.dtype == torch.uint8
    assert images.train[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert images.train_target.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.test[:, 2, 0, 0].tolist() == [255 - shade for shade in (7, 8, 9, 10)]


def test_every_source_of_the_same_images_gives_the_same_split(tmp_path):
    one, two = read(grow_tree(tmp_path / "a")), read(grow_tree(tmp_path / "b", suffix="bmp"))
    for file in sorted((tmp_path / "b" / "cifar10" / "train" / "cat").iterdir()):
        file.rename(file.with_name(f"{9 - int(file.stem)}.bmp"))
    renamed = read(tmp_path / "b")
    assert not torch.equal(one.train, renamed.train)
    splits = [split_stratified(hash_pixels(i.train, 0), i.train_target.numpy(), 2) for i in (one, two, renamed)]
    assert len({split.fingerprint for split in splits}) == 1
    for images, split in zip((two, renamed), splits[1:], strict=True):
        assert torch.equal(one.train[splits[0].val], images.train[split.val])
        assert torch.equal(one.train[splits[0].train], images.train[split.train])


def test_digits_have_a_fixed_test_split():
    images = load_digits()
    assert (len(images.train), len(images.test)) == (1437, 360)
    assert images.test.shape[1:] == (3, 8, 8)
    assert images.test.max() == 255
    assert images.classes == [str(k) for k in range(10)]
    assert images.test_target[:6].tolist() == [0, 5, 0, 5, 0, 5]  # samples 0, 5, 10, ... of scikit-learn's


def no_network(*_, **__):
    raise urllib.error.URLError("no route")


@pytest.mark.parametrize("there", [False, True])
def test_without_data_and_network_the_folder_is_named(tmp_path, monkeypatch, there):
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    root = tmp_path / "images"
    if there:
        root.mkdir()
    with pytest.raises(OptionError, match=r"data_dir=.*images: must hold cifar10's .*download failed \(no route\)"):
        read(root, download=True)


def test_without_download_none_is_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_: pytest.fail("tried"))
    with pytest.raises(OptionError, match=r"must hold cifar10's .*data.load.download is false"):
        read(tmp_path)


def test_in_a_folder_that_is_only_read_none_is_tried(tmp_path, monkeypatch):
    """As in one that only a checkpoint names."""
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_: pytest.fail("tried"))
    with pytest.raises(OptionError, match=r"must hold cifar10's .*data.load.read_only is true"):
        load_cifar("cifar10", str(tmp_path), 6, 4, download=True, read_only=True)
    assert not list(tmp_path.iterdir())


def test_half_unpacked_trees_are_refused(tmp_path):
    grow_tree(tmp_path)
    with pytest.raises(
        OptionError, match=r"train: data.load.train_images=9 .*expected, 6 are there \(half unpacked\?\)"
    ):
        read(tmp_path, train_images=9)
    for file in (tmp_path / "cifar10" / "test" / "dog").iterdir():
        file.unlink()
    with pytest.raises(OptionError, match="test/dog: this class has no images"):
        read(tmp_path)
    (tmp_path / "cifar10" / "test" / "dog").rmdir()
    with pytest.raises(OptionError, match="the same classes: dog is only in train"):
        read(tmp_path)


def test_half_unpacked_official_files_are_refused(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(OptionError, match="cifar-10-batches-py is incomplete or damaged"):
        read(tmp_path, download=True)


def test_an_empty_tree_and_a_file_for_a_folder_are_refused(tmp_path):
    (tmp_path / "cifar10").mkdir()
    with pytest.raises(OptionError, match="cifar10/train: no such folder"):
        read(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="file: must be a folder"):
        read(tmp_path / "file", download=True)


def test_a_broken_picture_is_named(tmp_path):
    grow_tree(tmp_path)
    broken = tmp_path / "cifar10" / "train" / "dog" / "1.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(OptionError, match="dog/1.png: cannot be read as an image"):
        read(tmp_path)


def test_pictures_of_several_sizes_are_refused(tmp_path):
    grow_tree(tmp_path)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "cifar10" / "train" / "dog" / "1.png")
    with pytest.raises(OptionError, match="dog/1.png: all images must have one size"):
        read(tmp_path)


def test_official_files_come_first_and_give_the_tree_s_images(tmp_path, monkeypatch):
    """The layout of torchvision's files, made small; their md5 check is switched off for it."""
    tree = read(grow_tree(tmp_path / "a", train=5), train_images=10)
    folder = tmp_path / "b" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    parts = [(f"data_batch_{k + 1}", tree.train[k::5], tree.train_target[k::5]) for k in range(5)]
    for name, images, target in [*parts, ("test_batch", tree.test, tree.test_target)]:
        content = {"data": images.flatten(1).numpy(), "labels": target.tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat", "dog"]}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    (tmp_path / "b" / "cifar10").mkdir()  # an empty tree, which is not looked at
    official = read(tmp_path / "b")
    assert official.classes == tree.classes
    assert torch.equal(official.test, tree.test)
    splits = [split_stratified(hash_pixels(i.train, 0), i.train_target.numpy(), 4) for i in (tree, official)]
    assert splits[0].fingerprint == splits[1].fingerprint
    assert torch.equal(tree.train[splits[0].train], official.train[splits[1].train])


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
