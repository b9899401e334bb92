"""Evaluations as a user would make them: of runs and of exports, on folders and on data sets."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
import torch
from export.test_load_run import SETTINGS, write_run
from PIL import Image
from scipy.stats import binomtest

from odcheap import cli, predict
from odcheap.data.base import ImageDigests, join_digests
from odcheap.data.folder_trees import Files, hash_files
from odcheap.data.splits import hash_pixels
from odcheap.data.transforms import Normalization
from odcheap.layers.cheap_conv import DW
from odcheap.models.cifar import CifarResNet
from odcheap.runs.training_images import write_digests
from odcheap.utils.parts import build_part

CLASSES = SETTINGS["classes"]  # cat, dog, bird


def plant(folder, counts, seed=0):
    """Writes so many different images for each class."""
    random = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for k in range(count):
            pixels = random.integers(0, 256, (20, 17, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{k}.png")
    return folder


@pytest.fixture
def run(tmp_path):
    """A run whose student was never trained; its classifier is scaled so that it predicts different classes."""
    torch.manual_seed(0)
    network = CifarResNet(8, DW(), 3)
    for _ in range(20):
        network(torch.randn(64, 3, 16, 16))  # running means and variances
    network.eval()
    with torch.no_grad():
        logits = network(torch.randn(64, 3, 16, 16))
        network.fc.bias -= logits.mean(0)
    return write_run(tmp_path / "run", network)


def evaluate(capsys, *arguments, status=0):
    capsys.readouterr()
    found = cli.main(["evaluate", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert found == status, err
    return out, err


def read(folder):
    with open(folder / "confusion.csv", newline="") as file:
        rows = list(csv.reader(file))
    return json.loads((folder / "evaluation.json").read_text()), rows


def answers(run, files):
    """The student's class of each image, computed on another way: one image at a time."""
    from odcheap.models.build import load_student

    student = load_student(run / "student.safetensors")
    preprocess = {"shorter_side": 18, "size": [16, 16], "interpolation": "bilinear"}
    images = (torch.from_numpy(predict.preprocess_image(file, preprocess))[None] for file in files)
    return [int(student(image).argmax()) for image in images]


@pytest.mark.parametrize("below", ["", "test"])
def test_all_images_of_a_folder_are_evaluated_by_the_selected_student(run, tmp_path, capsys, below):
    base = plant(tmp_path / "other" / below, {"dog": 11, "cat": 7, "bird": 5})
    if below:
        plant(tmp_path / "other" / "train", {"dog": 1, "cat": 1})
    out, _ = evaluate(capsys, run, tmp_path / "other")
    content, rows = read(run / "evaluation" / "other")
    expected = np.zeros((3, 3), int)
    for label, name in enumerate(CLASSES):
        for answer in answers(run, sorted((base / name).iterdir())):
            expected[label, answer] += 1
    assert rows == [
        ["true \\ predicted", *CLASSES],
        *([n, *map(str, r)] for n, r in zip(CLASSES, expected, strict=True)),
    ]
    right = int(expected.trace())
    assert (content["images"], content["correct"], content["top1"]) == (23, right, right / 23)
    assert content["student"] == "student 1 of epoch 5, in PyTorch"
    assert content["largest_class"] == {"name": "dog", "images": 11, "share": 11 / 23}
    assert [content["classes"][name]["recall"] for name in CLASSES] == pytest.approx(
        [expected[k, k] / expected[k].sum() for k in range(3)]
    )
    assert f"{right} of 23 images" in out
    assert "always answering dog would give 47.83 %" in out
    with Image.open(run / "evaluation" / "other" / "confusion.png") as picture:
        assert picture.width > 500


@pytest.mark.parametrize(("correct", "images"), [(81, 263), (0, 10), (10, 10), (1, 1), (9_146, 10_000)])
def test_the_interval_is_wilson_s(correct, images):
    expected = binomtest(correct, images).proportion_ci(method="wilson")
    assert predict.compute_interval(correct, images) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_figures_of_a_student_that_says_one_class_to_everything():
    counts = np.array([[0, 0, 7], [0, 0, 5], [0, 0, 7]])
    figures = predict.summarize_confusion(counts, CLASSES)
    assert figures["top1"] == figures["largest_class"]["share"] == 7 / 19
    assert figures["balanced_accuracy"] == pytest.approx(1 / 3)
    lines = "\n".join(predict.describe_accuracy(figures))
    assert "would give 36.84 %, no other class more; the student is not better than that" in lines
    assert "every image was classified as bird" in lines
    assert "classes of which no image is classified correctly (2): cat, dog" in lines


def test_few_images_do_not_show_that_a_student_is_better():
    lines = "\n".join(predict.describe_accuracy(predict.summarize_confusion([[3, 0], [1, 1]], ["cat", "dog"])))
    assert "so few images do not show that the student is better" in lines
    lines = "\n".join(predict.describe_accuracy(predict.summarize_confusion([[300, 0], [1, 199]], ["cat", "dog"])))
    assert "better" not in lines


@pytest.mark.parametrize("kind", ["files", "pixels"])
def test_images_that_the_run_was_trained_on_are_counted_named_and_left_out_of_a_second_figure(
    run, tmp_path, capsys, kind
):
    base = plant(tmp_path / "mine", {"cat": 4, "dog": 4, "bird": 4})
    used = [base / "cat" / "0.png", base / "cat" / "1.png", base / "dog" / "3.png"]
    if kind == "files":
        names = np.array([os.fsencode(path) for path in used])
        digests = hash_files(Files("", names, np.zeros(3, int)), split_seed=7)
    else:
        preprocess = {"shorter_side": 18, "size": [16, 16], "interpolation": "bilinear"}
        images = np.stack([predict.preprocess_image(path, preprocess) for path in used])
        digests = hash_pixels(torch.from_numpy(np.rint(255 * images).astype(np.uint8)), split_seed=7)
    write_digests(run, ImageDigests(kind, 7, join_digests(digests[:2]), join_digests(digests[2:])))
    (base / "cat" / "1.png").rename(base / "cat" / "another name.png")
    out, _ = evaluate(capsys, run, base)
    content, _ = read(run / "evaluation" / "mine")
    assert content["trained_on"] == ["cat/0.png", "cat/another name.png"]
    assert content["selected_on"] == ["dog/3.png"]
    assert "warning: the run was trained on 2 of these images: cat/0.png, cat/another name.png" in out
    assert "on the other 9 images top-1 is" in out
    rest = [path for path in sorted(base.rglob("*.png")) if path.name not in ("another name.png",) and path not in used]
    right = sum(
        CLASSES.index(path.parent.name) == answer for path, answer in zip(rest, answers(run, rest), strict=True)
    )
    assert (content["unused"]["images"], content["unused"]["correct"]) == (9, right)


def test_the_test_images_of_a_data_set_are_evaluated_and_compared_with_the_training_images(tmp_path, capsys):
    names = [str(k) for k in reversed(range(10))]  # classes are matched by their names
    network = CifarResNet(8, DW(), 10).eval()
    settings = SETTINGS | {"classes": names, "image_size": [3, 8, 8], "shorter_side": 8}
    run = write_run(tmp_path / "run", network, settings)
    data = build_part("data", {"part": "digits", "seed": 0, "select": "val"})
    data.read()
    write_digests(run, data.digests)
    out, _ = evaluate(capsys, run, "digits")
    content, _ = read(run / "evaluation" / "digits")
    norm = Normalization(tuple(settings["mean"]), tuple(settings["std"]))
    with torch.inference_mode():
        answers = network(norm.apply(data.images.test)).argmax(1)
    assert content["images"] == 360
    assert content["correct"] == int((answers == 9 - data.images.test_target).sum())
    assert (content["trained_on"], content["selected_on"]) == ([], [])
    line = "none of these images has exactly the pixels of a training image or a held-out image of the run"
    assert f"{line}; re-saved or resized copies are not found" in out

    # The data set's own training images, as files, are recognized.
    for k, part in enumerate(("train", "val")):
        image, label = (tensor[0] for tensor in data.select_part(part))
        folder = tmp_path / "files" / str(int(label))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{k}.png")
    evaluate(capsys, run, tmp_path / "files")
    content, _ = read(run / "evaluation" / "files")
    assert [name.rpartition("/")[2] for name in content["trained_on"] + content["selected_on"]] == ["0.png", "1.png"]
    assert content["unused"] is None


def test_copies_that_were_saved_again_are_not_recognized_and_that_is_said(run, tmp_path, capsys):
    base = plant(tmp_path / "mine", {"cat": 2, "dog": 2})
    files = sorted(base.rglob("*.png"))
    digests = hash_files(Files("", np.array([os.fsencode(path) for path in files]), np.zeros(4, int)), split_seed=7)
    write_digests(run, ImageDigests("files", 7, join_digests(digests), b""))
    for path in files:
        with Image.open(path) as picture:
            picture.convert("RGB").save(path.with_suffix(".jpg"), quality=90)
        path.unlink()
    out, _ = evaluate(capsys, run, base)
    line = "none of these files is byte for byte a training image or a held-out image of the run"
    assert f"{line}; re-saved or resized copies are not found\n" in out
    assert read(run / "evaluation" / "mine")[0]["trained_on"] == []


def test_without_a_list_of_training_images_that_is_said(run, tmp_path, capsys):
    out, _ = evaluate(capsys, run, plant(tmp_path / "other", {"cat": 2, "dog": 2}))
    assert "it has no list of its training images" in out
    assert "classes that have no images here (1): bird" in out
    assert read(run / "evaluation" / "other")[0]["trained_on"] is None


def test_a_broken_image_is_named_and_counts_nowhere(run, tmp_path, capsys):
    base = plant(tmp_path / "other", {"cat": 3, "dog": 3})
    (base / "cat" / "x.png").write_bytes(b"?")
    (base / "cat" / "notes.txt").write_text("?")
    (base / "loose.png").write_bytes(b"?")
    out, err = evaluate(capsys, run, base, status=1)
    assert "x.png cannot be read as an image" in err
    assert "\n6 of 7 images could be read\n" in out
    assert "left out: files that are no image or are in no class's folder (2): loose.png, cat/notes.txt" in out
    assert read(run / "evaluation" / "other")[0]["images"] == 6


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        ({"cat": 1, "owl": 1}, "its folder owl is none of the 3 classes (cat, dog, bird); --known-only leaves"),
        (
            {"apple": 1, "owl": 1},
            "must have folders that are named like the classes (cat, dog, bird), and has apple, owl",
        ),
        ({"train/cat": 1, "val/cat": 1}, "name the folder of a part, such as "),
        ({}, "and has no folders"),
        ({"test/owl": 1}, "test: must have folders that are named like the classes"),
    ],
)
def test_folders_of_other_classes_are_one_line(run, tmp_path, capsys, counts, line):
    (tmp_path / "other").mkdir()
    out, err = evaluate(capsys, run, plant(tmp_path / "other", counts), status=1)
    assert line in err
    assert err.count("\n") == 1
    assert "top-1" not in out
    assert not (run / "evaluation").exists()


def test_folders_that_are_no_class_can_be_left_out(run, tmp_path, capsys):
    out, _ = evaluate(capsys, run, plant(tmp_path / "other", {"cat": 2, "owl": 3}), "--known-only")
    assert "left out: folders that are no class (1): owl/" in out
    assert read(run / "evaluation" / "other")[0]["images"] == 2


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["NOWHERE", "x"], "RUN_OR_EXPORT=NOWHERE: no such folder"),
        ([".", "x"], "RUN_OR_EXPORT=.: is neither the folder of a run nor that of an export"),
        (["RUN", "nowhere"], "folder of images for each class, or one of cifar10, cifar100, digits\n"),
        (["RUN", "digits"], "FOLDER_OR_DATASET=digits: its class 0 is none of the 3 classes (cat, dog, bird)"),
        (["RUN", "cifar10", "--data-dir", "nowhere"], "{train,test}/<class>/*; --data-dir says where it is\n"),
        (["RUN", "imagenet"], "is read from folders: give the folder of its test images instead"),
        (["RUN", "x", "--model", "student.onnx"], "--model=student.onnx: must not be given"),
    ],
)
def test_what_cannot_be_is_one_line(run, tmp_path, capsys, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    _, err = evaluate(capsys, *(argument.replace("RUN", "run") for argument in arguments), status=1)
    assert line in err
    assert (err[:7], err.count("\n")) == ("error: ", 1)


def test_only_the_result_of_the_same_evaluation_is_replaced(run, tmp_path, capsys):
    base = plant(tmp_path / "other", {"cat": 2, "dog": 2})
    for _ in range(2):
        evaluate(capsys, run, base)
    again = plant(tmp_path / "elsewhere" / "other", {"cat": 2, "dog": 2})
    before = (run / "evaluation" / "other" / "evaluation.json").read_bytes()
    assert "holds the evaluation of another model or other images" in evaluate(capsys, run, again, status=1)[1]
    assert (run / "evaluation" / "other" / "evaluation.json").read_bytes() == before
    for content in ("mine", "{}", "[1]"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "evaluation.json").write_text(content)
        line = evaluate(capsys, run, base, "--out", tmp_path / "out", status=1)[1]
        assert "holds a evaluation.json that no evaluation has written" in line
        assert (tmp_path / "out" / "evaluation.json").read_text() == content
    shutil.rmtree(run / "evaluation")
    (run / "evaluation").symlink_to(tmp_path / "out")
    assert "is a link to elsewhere" in evaluate(capsys, run, base, status=1)[1]


def test_an_export_answers_as_its_run_and_is_not_changed(run, tmp_path, capsys, monkeypatch):
    from odcheap.export import command, latency

    monkeypatch.setattr(latency, "torch_calls", lambda networks, size, batches: {})
    monkeypatch.setattr(command, "time_files", lambda *_: {})
    monkeypatch.setattr(command, "is_faster", lambda *_: False)
    monkeypatch.setattr(
        command.model_card, "write_card", lambda run, folder, *_: "\n".join(command.model_card.checksum_lines(folder))
    )
    monkeypatch.setattr(command.verify, "run_in_bare_process", lambda path, p, reference, dirs: reference.logits)
    (run / "config.yaml").write_text("data: {part: imagefolder, load: {data_dir: nowhere}}\n")
    assert cli.main(["export", str(run)]) == 0
    base = plant(tmp_path / "other", {"cat": 6, "dog": 6, "bird": 6})
    before = sorted(path.name for path in (run / "export").iterdir())
    evaluate(capsys, run, base)
    out, _ = evaluate(capsys, run / "export", base)
    assert "student.onnx in ONNX Runtime" in out
    assert predict.NO_TRAINING_LIST in out
    mine, theirs = read(run / "evaluation" / "other"), read(run / "export-evaluation" / "other")
    assert mine[1] == theirs[1]
    assert mine[0]["classes"] == theirs[0]["classes"]
    assert sorted(path.name for path in (run / "export").iterdir()) == before
    refused = evaluate(capsys, run / "export", base, "--student", "1", status=1)[1]
    assert "--student=1: must not be given" in refused
