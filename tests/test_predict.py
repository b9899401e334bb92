"""The export's command for pictures: no torch, any picture, no changed file."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers.test_fuse import settled
from PIL import Image

from odcheap import predict
from odcheap.data.image_folder import evaluation_transform
from odcheap.export import model_card, onnx
from odcheap.layers.cheap_conv import DW
from odcheap.models.build import NormalizedNetwork
from odcheap.models.cifar import CifarResNet

PREPROCESS = {"shorter_side": 18, "size": [16, 16], "interpolation": "bilinear"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An export of a student that was never trained, for two pictures at a time."""
    folder = tmp_path_factory.mktemp("export")
    network = NormalizedNetwork(settled(CifarResNet(8, DW(), 3)), [0.5] * 3, [0.2] * 3).float().eval()
    (folder / "student.onnx").write_bytes(onnx.to_onnx(onnx.export_program(network, (3, 16, 16), batch=2)))
    (folder / "preprocess.json").write_text(json.dumps(PREPROCESS))
    (folder / "labels.json").write_text(json.dumps(["cat", "do\x1bg", "größe"]))
    shutil.copyfile(predict.__file__, folder / "predict.py")
    (folder / "README.md").write_text("\n".join(["# card", "```", *model_card.checksum_lines(folder), "```"]))
    return folder


@pytest.fixture
def export(made, tmp_path):
    return shutil.copytree(made, tmp_path / "export")


def noise(path, size=(20, 17), mode="RGB"):
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@given(width=st.integers(1, 300), height=st.integers(1, 300), shorter=st.integers(8, 40))
@settings(max_examples=60, deadline=None)
def test_a_picture_is_prepared_as_in_training(tmp_path_factory, width, height, shorter):
    path = noise(tmp_path_factory.mktemp("x") / "x.png", (width, height))
    if max(width, height) > predict.MAX_ASPECT_RATIO * min(width, height):
        return
    ours = predict.preprocess_image(path, {"shorter_side": shorter, "size": [8, 8], "interpolation": "bilinear"})
    theirs = evaluation_transform(8, shorter)(predict.decode_image(path))
    assert np.array_equal(ours, theirs.numpy().astype(np.float32) / np.float32(255))


def test_a_folder_and_pictures_of_all_kinds_are_answered(export, tmp_path, capsys):
    paths = [noise(tmp_path / "in" / name, mode=mode) for name, mode in (("a.png", "LA"), ("b.jpg", "CMYK"))]
    paths.append(noise(tmp_path / "c.webp", (64, 200)))
    (tmp_path / "in" / "no picture.txt").write_text("?")
    assert predict.main([str(export), str(tmp_path / "in"), str(paths[2]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["path"] for entry in found] == [str(path) for path in paths]
    ask = predict.create_predictor(predict.create_session((export / "student.onnx").read_bytes()))
    for path, entry in zip(paths, found, strict=True):
        powers = np.exp(ask(predict.preprocess_image(path, PREPROCESS)[None])[0].astype(float))
        assert entry["probability"] == pytest.approx(powers.max() / powers.sum())
        assert entry["label"] == ["cat", "do\x1bg", "größe"][powers.argmax()]


def test_a_table_shows_control_signs_harmlessly(export, tmp_path, capsys):
    assert predict.main([str(export), str(noise(tmp_path / "a\x1b[31m\nb.png"))]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "a\\x1b[31m\\nb.png" in out
    assert "do\\x1bg 0." in out
    assert "\x1b" not in out


def test_a_corrupt_picture_among_good_ones_is_named_and_the_others_are_done(export, tmp_path, capsys):
    good = [noise(tmp_path / f"{k}.png") for k in range(3)]
    good[1].write_bytes(good[1].read_bytes()[:40])
    assert predict.main([str(export), *map(str, good), str(tmp_path / "none.png"), "--json"]) == 1
    out, err = capsys.readouterr()
    assert [entry["path"] for entry in json.loads(out)] == [str(good[0]), str(good[2])]
    assert err.count("error: ") == 2
    assert "1.png cannot be read as an image" in err
    assert "none.png" in err


@pytest.mark.parametrize("name", ["student.onnx", "labels.json", "preprocess.json"])
def test_a_file_that_was_changed_after_the_export_is_refused(export, tmp_path, capsys, name):
    with open(export / name, "ab") as file:
        file.write(b" ")
    assert predict.main([str(export), str(noise(tmp_path / "x.png"))]) == 1
    assert f"{name}: was changed after the export" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["NOWHERE", "x.png"], "EXPORT_DIR=NOWHERE: is not an export"),
        (["EXPORT", "EXPORT/predict.py"], "cannot be read as an image"),
        (["EXPORT"], "IMAGE_OR_FOLDER: no images found"),
        (["EXPORT", "x.png", "--model", "other.onnx"], "other.onnx: cannot be checked"),
        (["EXPORT", "x.png", "--model", "README.md"], "is not a file of this export"),
    ],
)
def test_what_cannot_be_is_one_line(export, capsys, arguments, line):
    assert predict.main([a.replace("EXPORT", str(export)) for a in arguments]) == 1
    out, err = capsys.readouterr()
    assert line in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not out


def test_without_its_card_nothing_is_believed(export, tmp_path, capsys):
    (export / "README.md").unlink()
    assert predict.main([str(export), str(noise(tmp_path / "x.png"))]) == 1
    assert "is not an export" in capsys.readouterr().err


def test_what_cannot_be_looked_into_is_named_and_the_others_are_done(export, tmp_path, capsys, monkeypatch):
    good = noise(tmp_path / "open" / "a.png")
    os.mkfifo(tmp_path / "open" / "pipe.png")
    walk = os.walk

    def locked(top, onerror):
        yield from walk(top, onerror=onerror)
        onerror(PermissionError(13, "Permission denied", f"{top}/locked"))

    monkeypatch.setattr(predict.os, "walk", locked)
    assert predict.main([str(export), str(tmp_path / "open"), "x" * 5000, "--json"]) == 1
    out, err = capsys.readouterr()
    assert [entry["path"] for entry in json.loads(out)] == [str(good)]
    assert "open/locked cannot be read" in err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.json", '["a"]'),
        ("labels.json", "{}"),
        ("preprocess.json", "[]"),
        ("labels.json", "3"),
    ],
)
def test_files_that_do_not_fit_together_are_one_line(export, tmp_path, capsys, name, content):
    (export / name).write_text(content)
    (export / "README.md").unlink()
    (export / "README.md").write_text("\n".join(model_card.checksum_lines(export)))
    pictures_ = [str(noise(tmp_path / f"{'x' * k}.png")) for k in range(1, 9)]
    assert predict.main([str(export), *pictures_]) == 1
    assert "its files do not fit together" in capsys.readouterr().err


def test_the_copy_works_where_neither_torch_nor_odcheap_is(export, tmp_path):
    """In a process that could not import them; the long form is a fresh environment, by hand."""
    picture = noise(tmp_path / "x.png")
    block = "import sys; sys.modules.update(dict.fromkeys(['torch', 'odcheap', 'torchvision']))"
    run = f"{block}; import runpy; sys.argv = ['predict.py', {str(picture)!r}, '--json']; "
    run += f"runpy.run_path({str(export / 'predict.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", run], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["path"] == str(picture)


def test_every_artefact_is_timed(export, capsys, monkeypatch):
    monkeypatch.setattr(predict.benchmark_models, "__defaults__", (0.01,))
    assert predict.main([str(export), "--bench"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[:3] for row in rows[1:]] == [["student.onnx", "2", "1"], ["student.onnx", "2", "all"]]
    assert all(0 < float(row.split()[3]) < 1000 for row in rows[1:])
