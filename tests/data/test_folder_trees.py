"""The layouts of class folders, and what is wrong with some of them."""

import os
import tarfile

import numpy as np
import pytest
import scipy.io
from torchvision.datasets import imagenet as archives
from torchvision.datasets.utils import calculate_md5

from odcheap.data import folder_trees
from odcheap.utils.errors import OptionError


def grow(base, **counts):
    """`grow(base, train={"cat": 3})` makes the files; the part "root" is the base itself."""
    for part, classes in counts.items():
        for name, count in classes.items():
            folder = base / part.replace("root", ".") / name
            folder.mkdir(parents=True, exist_ok=True)
            for k in range(count):
                (folder / f"{k}.jpg").write_bytes(f"{part} {name} {k}".encode())
    return str(base)


# As file servers, Windows and archives of macOS name them, independent of the list in the code.
JUNK_FOLDERS = ("@eaDir", "__MACOSX", "#recycle", "@Recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information")
TWO = {"cat": 20, "dog": 10}


@pytest.mark.parametrize(
    ("parts", "train", "val", "test"),
    [
        (("root",), 27, None, 3),
        (("train",), 27, None, 3),
        (("train", "val"), 30, None, 30),
        (("train", "test"), 30, None, 30),
        (("train", "val", "test"), 30, 30, 30),
    ],
)
def test_the_layouts(tmp_path, parts, train, val, test):
    tree = folder_trees.list_class_folders(grow(tmp_path, **dict.fromkeys(parts, TWO)), test_size=0.1, split_seed=0)
    assert tree.classes == ["cat", "dog"]
    assert (len(tree.train.names), tree.val and len(tree.val.names), len(tree.test.names)) == (train, val, test)
    for part in (tree.train, tree.val, tree.test):
        for k in range(len(part.names) if part else 0):
            assert part.path(k).is_file()
            assert part.path(k).parent.name == tree.classes[part.target[k]]


def test_a_lone_val_is_the_test_and_beside_a_test_it_is_not(tmp_path):
    lone = folder_trees.list_class_folders(grow(tmp_path / "a", train=TWO, val=TWO), 0.1, 0)
    assert {name.split(b"/")[0] for name in lone.test.names} == {b"val"}
    both = folder_trees.list_class_folders(grow(tmp_path / "b", train=TWO, val=TWO, test=TWO), 0.1, 0)
    assert {name.split(b"/")[0] for name in both.test.names} == {b"test"}
    assert {name.split(b"/")[0] for name in both.val.names} == {b"val"}


def test_what_is_split_off_is_stratified_and_depends_on_the_seed_and_the_contents_alone(tmp_path):
    grow(tmp_path, root={"cat": 40, "dog": 10})

    def contents(seed):
        test = folder_trees.list_class_folders(str(tmp_path), 0.2, seed).test
        return sorted(test.path(k).read_text() for k in range(len(test.names)))

    before = contents(0)
    assert sum("dog" in text for text in before) == 2
    assert len(before) == 10
    assert contents(1) != before
    for k, file in enumerate(sorted((tmp_path / "cat").iterdir())):
        file.rename(tmp_path / "cat" / f"renamed{99 - k}.jpg")
    assert contents(0) == before


def test_folders_within_a_class_belong_to_it_and_other_files_are_skipped(tmp_path):
    grow(tmp_path, train=TWO, test=TWO)
    (tmp_path / "train/cat/more/deep").mkdir(parents=True)
    (tmp_path / "train/cat/more/deep/x.png").write_bytes(b"x")
    (tmp_path / "train/cat/notes.txt").write_text("")
    (tmp_path / "train/cat/.DS_Store").write_text("")
    os.mkfifo(tmp_path / "train/cat/pipe.png")
    (tmp_path / "train/cat/dead.jpg").symlink_to("nowhere")
    (tmp_path / "train/.cache").mkdir()
    for link, target in (("back", ".."), ("self", ".")):
        (tmp_path / "train/cat" / link).symlink_to(target)
    tree = folder_trees.list_class_folders(str(tmp_path), 0.1, 0)
    assert len(tree.train.names) == 32
    assert sorted(tree.skipped) == ["train/cat/back", "train/cat/notes.txt", "train/cat/pipe.png", "train/cat/self"]


def test_a_link_to_a_pipe_does_not_stop_the_listing(tmp_path, soon):
    grow(tmp_path, root=TWO)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "cat" / "x.jpg").symlink_to(tmp_path / "pipe")
    folder_trees.list_class_folders(str(tmp_path), 0.1, 0)
    files = folder_trees.Files(str(tmp_path), np.array([b"pipe"]), np.array([0]))
    assert len(folder_trees.hash_files(files, 0)) == 1  # and it is not opened, either, if it is listed


def test_a_class_may_be_a_link_and_keeps_its_only_picture(tmp_path):
    grow(tmp_path / "far", root={"bird": 1, "fish": 1})
    grow(tmp_path / "near", root={"cat": 8})
    for name in ("bird", "fish"):
        (tmp_path / "near" / name).symlink_to(tmp_path / "far" / name)
    tree = folder_trees.list_class_folders(str(tmp_path / "near"), 0.3, 0)
    assert np.bincount(tree.train.target).tolist() == [1, 5, 1]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (
            {"train": TWO, "test": {"cat": 1, "bird": 1}},
            "must have the same classes: bird is only in test",
        ),
        ({"train": TWO, "test": {"cat": 1}}, "dog is only in train"),
        ({"root": {"cat": 3, "dog": 0}}, "dog: this class has no images"),
        ({"root": {"cat": 3}}, "needs two classes or more"),
        ({"val": TWO, "test": TWO}, "has val and test but no train"),
        ({"train": TWO, "valid": TWO}, "valid: folders of classes are called train, val and test: rename it"),
        ({"Train": TWO, "Test": TWO}, "Test: folders of classes are called train, val and test"),
        ({"training": TWO, "validation": TWO}, "training: folders of classes are called"),
        ({"root": {"bus": 3, "car": 3, "train": 3}}, "train: is read as the train images, not as a class"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, counts, message):
    with pytest.raises(OptionError, match=f"data_dir=.*{message}"):
        folder_trees.list_class_folders(grow(tmp_path, **counts), 0.1, 0)


@pytest.mark.parametrize("junk", JUNK_FOLDERS)
def test_thumbnails_and_other_junk_are_passed_over_and_said(tmp_path, junk):
    grow(tmp_path, root=TWO)
    grow(tmp_path / "cat" / junk, root={"0.jpg": 3})
    grow(tmp_path, root={junk: 4})
    tree = folder_trees.list_class_folders(str(tmp_path), 0.1, 0)
    assert tree.classes == ["cat", "dog"]
    assert len(tree.train.names) + len(tree.test.names) == 30
    assert sorted(tree.skipped) == sorted([f"{junk}/", f"cat/{junk}/"])


def test_a_data_set_once_more_inside_itself_is_passed_over_and_said(tmp_path):
    grow(tmp_path, root=TWO)
    grow(tmp_path / "pets", root=TWO)
    tree = folder_trees.list_class_folders(str(tmp_path), 0.1, 0)
    assert (tree.classes, tree.skipped) == (["cat", "dog"], ["pets/"])
    assert len(tree.train.names) + len(tree.test.names) == 30


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"seg_train/seg_train": TWO, "seg_test/seg_test": TWO}, "put what is in seg_test/seg_test into a folder"),
        ({"my-train": TWO, "my-test": TWO}, "my-test: folders of classes are called train, val and test: rename it"),
        ({"pets": TWO}, r"\(are the 2 folders in pets the classes, one level too deep\?\)"),
        ({"train/pets": TWO, "test/pets": TWO}, r"\(are the 2 folders in train/pets the classes"),
    ],
)
def test_folders_one_level_too_deep_are_named(tmp_path, parts, message):
    with pytest.raises(OptionError, match=message):
        folder_trees.list_class_folders(grow(tmp_path, **parts), 0.1, 0)


def test_a_class_may_have_a_part_s_word_in_its_name(tmp_path):
    grow(tmp_path, **{"root": TWO, "crash test": {"front": 5, "side": 5}})
    assert folder_trees.list_class_folders(str(tmp_path), 0.1, 0).classes == ["cat", "crash test", "dog"]


def test_tiny_imagenet_s_layout(tmp_path):
    grow(tmp_path, **{f"train/{name}": {"images": 4} for name in TWO}, val={"images": 5}, test={"images": 3})
    labels = ["cat", "dog", "dog", "cat"]
    lines = [f"{k}.jpg\t{label}\t0\t32\t44\t62\n" for k, label in enumerate(labels)]
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(lines))
    tree = folder_trees.list_class_folders(str(tmp_path), 0.1, 0)
    assert tree.classes == ["cat", "dog"]
    assert dict(zip(tree.test.names.tolist(), tree.test.target.tolist(), strict=True)) == {
        f"val/images/{k}.jpg".encode(): tree.classes.index(label) for k, label in enumerate(labels)
    }
    assert tree.skipped == ["val/val_annotations.txt", "val/images/4.jpg", "test/"]


@pytest.mark.parametrize("place", [".", "val"])
def test_imagenet_s_validation_images_as_they_come(tmp_path, place):
    grow(tmp_path, train={"n01": 4, "n02": 4}, root={"val": 3})
    with pytest.raises(OptionError, match=r"val: has 3 images outside folders of classes.*add LOC_val_solution.csv"):
        folder_trees.list_imagenet(str(tmp_path))
    rows = ["ImageId,PredictionString", "0,n02 85 1 499 272 n02 1 2 3 4 ", "1,n01 1 2 3 4 ", "2,n02 1 2 3 4 "]
    (tmp_path / place / "LOC_val_solution.csv").write_text("\n".join(rows))
    tree = folder_trees.list_imagenet(str(tmp_path))
    assert tree.test.names.tolist() == [b"val/1.jpg", b"val/0.jpg", b"val/2.jpg"]
    assert tree.test.target.tolist() == [0, 1, 1]
    assert folder_trees.list_class_folders(str(tmp_path), 0.1, 0).test.target.tolist() == [0, 1, 1]


def test_a_class_of_another_format_is_named_and_one_without_suffixes_is_read(tmp_path):
    grow(tmp_path, root=TWO)
    for k, path in enumerate(sorted((tmp_path / "cat").iterdir())):
        path.write_bytes(b"\xff\xd8\xff" + bytes([k]))
        path.rename(path.with_suffix(""))
    tree = folder_trees.list_class_folders(str(tmp_path), 0.1, 0)
    assert len(tree.train.names) + len(tree.test.names) == 30
    for path in (tmp_path / "dog").iterdir():
        path.rename(path.with_suffix(".HEIC"))
    message = r"dog: this class has no images that can be read, but 10 other files, such as dog/.*HEIC: convert HEIC to"
    with pytest.raises(OptionError, match=message):
        folder_trees.list_class_folders(str(tmp_path), 0.1, 0)


def test_equal_files_in_training_and_test_are_found(tmp_path):
    grow(tmp_path, train=TWO, test=TWO)
    middle = b"x" * 10_000
    for name, content in (("train/cat/0", b"a"), ("test/cat/5", b"a"), ("test/dog/5", b"b"), ("test/dog/6", b"a")):
        (tmp_path / f"{name}.jpg").write_bytes(middle + content + middle)
    tree = folder_trees.list_class_folders(str(tmp_path), 0.1, 0)
    ends = folder_trees.hash_ends(tree.train, 0), folder_trees.hash_ends(tree.test, 0)
    found = folder_trees.find_duplicates(tree.train, tree.test, ends)
    assert [tree.test.names[k] for k in found] == [b"test/cat/5.jpg", b"test/dog/6.jpg"]


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(OptionError, match=r"data_dir=.*nowhere: no such folder"):
        folder_trees.list_class_folders(str(tmp_path / "nowhere"), 0.1, 0)
    with pytest.raises(OptionError, match="needs two classes or more"):
        folder_trees.list_class_folders(str(tmp_path), 0.1, 0)
    with pytest.raises(OptionError, match=r"must hold train/<wnid>.*ILSVRC2012_img_train.tar"):
        folder_trees.list_imagenet(str(tmp_path))
    with pytest.raises(OptionError, match=r"data.load.test_size=0: there is no test folder"):
        folder_trees.list_class_folders(grow(tmp_path, root=TWO), 0, 0)


def test_digests_tell_files_apart_at_either_end(tmp_path):
    for k, content in enumerate([b"a" + b"x" * 20000, b"x" * 20000 + b"a", b"x" * 20001, b"x" * 20001]):
        (tmp_path / str(k)).write_bytes(content)
    found = folder_trees.hash_files(
        folder_trees.Files(str(tmp_path), np.array([b"0", b"1", b"2", b"3", b"gone"]), np.zeros(5)), 0
    )
    assert len(set(found)) == 4
    assert found[2] == found[3]


def test_files_that_differ_in_the_middle_only_are_told_apart(tmp_path):
    """Scans with white margins."""
    for k in range(5):
        content = bytearray(b"\xff" * 20_000)
        content[10_000] = k
        (tmp_path / str(k)).write_bytes(content)
    files = folder_trees.Files(str(tmp_path), np.array([str(k).encode() for k in range(5)]), np.zeros(5))
    assert len(set(folder_trees.hash_files(files, 0))) == 5


def archive(path, members):
    """A tar file of (name, content); content may be a list of members: a tar within."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for file in members:
            tar.add(file, arcname=str(file.relative_to(path.parent / "raw")))


@pytest.fixture
def official(tmp_path, monkeypatch):
    """ImageNet's three archives in the small: two classes, their own checksums."""
    raw = tmp_path / "raw"
    wnids = ["n01", "n02"]
    for wnid in wnids:
        grow(raw / "pictures", root={wnid: 3})
        inner = tmp_path / "raw" / f"{wnid}.tar"
        with tarfile.open(inner, "w") as tar:
            for file in sorted((raw / "pictures" / wnid).iterdir()):
                tar.add(file, arcname=file.name)
    archive(tmp_path / "ILSVRC2012_img_train.tar", [raw / f"{wnid}.tar" for wnid in wnids])
    for k in range(4):
        (raw / f"ILSVRC2012_val_{k:08d}.JPEG").write_bytes(f"val {k}".encode())
    archive(tmp_path / "ILSVRC2012_img_val.tar", sorted(raw.glob("*.JPEG")))
    kit = raw / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    synsets = np.array(
        [(1, "n01", "cat, house cat", "", 0), (2, "n02", "dog", "", 0)],
        dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")],
    )
    scipy.io.savemat(kit / "meta.mat", {"synsets": synsets})
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n1\n1\n2\n")
    archive(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", [kit.parent])
    meta = {part: (name, calculate_md5(tmp_path / name)) for part, (name, _) in archives.ARCHIVE_META.items()}
    monkeypatch.setattr(archives, "ARCHIVE_META", meta)
    return tmp_path


def test_the_official_archives_are_unpacked_once(official, capsys):
    for _ in range(2):
        tree = folder_trees.list_imagenet(str(official))
        assert tree.classes == ["n01", "n02"]
        assert (len(tree.train.names), len(tree.test.names)) == (6, 4)
        assert sorted(tree.test.path(k).read_text() for k in range(4) if tree.test.target[k] == 0) == ["val 1", "val 2"]
    assert capsys.readouterr().out.count("unpacking") == 1
    assert not (official / folder_trees.UNPACKING).exists()


def test_damaged_and_half_unpacked_archives_are_refused(official):
    (official / folder_trees.UNPACKING).mkdir()
    with pytest.raises(OptionError, match="another process is unpacking here; if none is, delete this folder"):
        folder_trees.list_imagenet(str(official))
    (official / folder_trees.UNPACKING).rmdir()
    (official / "ILSVRC2012_img_val.tar").write_bytes(b"?")
    with pytest.raises(OptionError, match="an archive is missing or damaged"):
        folder_trees.list_imagenet(str(official))
    assert not (official / "train").exists()
