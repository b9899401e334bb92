import pickle
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

from odcheap.data.cifar import load_cifar
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
