"""The export's command for pictures: no torch, any picture, no changed file."""

import ast
import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers.test_fuse import settled
from onnx import TensorProto, helper, numpy_helper
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


def test_a_picture_becomes_gray_before_it_is_resized(tmp_path):
    path = noise(tmp_path / "x.png", (20, 17))
    ours = predict.preprocess_image(path, PREPROCESS | {"channels": 1})
    theirs = evaluation_transform(16, 18)(Image.open(path).convert("L"))
    assert ours.shape == (1, 16, 16)
    assert np.array_equal(ours, theirs.numpy().astype(np.float32) / np.float32(255))


def test_a_folder_and_pictures_of_all_kinds_are_answered(export, tmp_path, capsys):
    paths = [noise(tmp_path / "in" / name, mode=mode) for name, mode in (("a.png", "LA"), ("b.jpg", "CMYK"))]
    paths.append(noise(tmp_path / "c.webp", (64, 200)))
    (tmp_path / "in" / "no picture.txt").write_text("?")
    for name in ("@eaDir", ".thumbnails"):  # folders that are no part of the training data either
        noise(tmp_path / "in" / name / "a.png")
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
    assert "do\\x1bg " in out
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
        (["EXPORT"], "no images are given; usage: "),
        ([], "no images are given; usage: "),
        ([], " [EXPORT_DIR] IMAGE_OR_FOLDER...\n"),
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


def test_what_cannot_be_looked_into_is_named_and_the_others_are_done(export, tmp_path, capsys, monkeypatch, soon):
    good = noise(tmp_path / "open" / "a.png")
    os.mkfifo(tmp_path / "open" / "pipe.png")
    (tmp_path / "open" / "locked").mkdir()
    scandir = os.scandir

    def refuse(folder):
        if folder.endswith("locked"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(predict.os, "scandir", refuse)
    assert predict.main([str(export), str(tmp_path / "open"), "x" * 5000, "--json"]) == 1
    out, err = capsys.readouterr()
    assert [entry["path"] for entry in json.loads(out)] == [str(good)]
    assert "open/locked cannot be read" in err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels.json", '["a"]', "must be a list of two names or more"),
        ("labels.json", "{}", "must be a list of two names or more"),
        ("labels.json", "3", "must be a list of two names or more"),
        ("labels.json", '["a", "b"]', "student.onnx: has 3 outputs, and labels.json 2 names"),
        ("labels.json", "[" * 200_000, "is not valid JSON"),
        ("preprocess.json", "[]", "must be an object, not a list"),
        ("preprocess.json", "{", "is not valid JSON"),
        *(
            ("preprocess.json", json.dumps(PREPROCESS | {name: value}), f"{name}={value}: must be")
            for name, value in (
                ("size", [20_000, 20_000]),
                ("size", [16]),
                ("size", 16),
                ("size", [16, 16.0]),
                ("shorter_side", 20_000),
                ("shorter_side", 0),
                ("interpolation", "none"),
                ("channels", 2),
                ("bit_depth", 64),
            )
        ),
        ("preprocess.json", json.dumps(PREPROCESS | {"size": [32, 32]}), "takes images of 3 x 16 x 16, and"),
    ],
)
def test_files_with_the_wrong_content_are_one_line(export, tmp_path, capsys, name, content, message):
    (export / name).write_text(content)
    sign(export)
    assert message in refusal(capsys, export, noise(tmp_path / "x.png"))
    if "outputs" not in message:
        assert message in refusal(capsys, export, "--bench")


def refusal(capsys, *arguments):
    """Returns the one line with which a prediction is refused."""
    capsys.readouterr()
    assert predict.main([str(argument) for argument in arguments]) == 1
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert not out
    return err


def sign(export):
    """Writes the card anew, as somebody does who makes up an export."""
    (export / "README.md").unlink()
    (export / "README.md").write_text("\n".join(model_card.checksum_lines(export)))


def make_model(nodes, shape=("n", 3, 16, 16), kind=TensorProto.FLOAT, constants=()):
    """An ONNX file with these nodes, from `images` to `logits`."""
    images = helper.make_tensor_value_info("images", kind, shape)
    logits = helper.make_tensor_value_info("logits", kind, None)
    tensors = [numpy_helper.from_array(np.array(value), name) for name, value in constants]
    graph = helper.make_graph(nodes, "x", [images], [logits], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


def make_terabytes():
    """A model that fills a tensor of 3 TB on its way; how large it is depends on the input, so nothing is known."""
    nodes = [
        helper.make_node("Shape", ["images"], ["shape"]),
        helper.make_node("Mul", ["shape", "factor"], ["large"]),
        helper.make_node("ConstantOfShape", ["large"], ["filled"]),
        helper.make_node("ReduceMean", ["filled"], ["logits"], axes=[2, 3], keepdims=0),
    ]
    return make_model(nodes, constants=[("factor", [1, 1, 1 << 16, 1 << 14])])


def make_mean(offset=0.0, **options):
    """A model of three logits, the means of the channels."""
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("Add", ["mean", "offset"], ["logits"]),
    ]
    kind = np.float16 if options.get("kind") == TensorProto.FLOAT16 else np.float32
    return make_model(nodes, constants=[("offset", np.array(offset, kind))], **options)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (make_terabytes(), "ONNX Runtime cannot run the model"),
        (make_mean(kind=TensorProto.FLOAT16), "the model takes tensor(float16) ['n', 3, 16, 16]; it must take images"),
        (make_mean(shape=("n", 3, 20, 16)), "takes images of 3 x 20 x 16, and preprocess.json makes them 3 x 16 x 16"),
        (make_mean(shape=("n", 1, 16, 16)), "takes images of 1 x 16 x 16, and preprocess.json makes them 3 x 16 x 16"),
        (make_mean(shape=(10**9, 3, 16, 16)), "which is too large"),
        (make_mean(shape=(0, 3, 16, 16)), "which is too large"),
        (make_model([helper.make_node("Identity", ["images"], ["logits"])]), "it must return numbers (n, K)"),
        (make_model([]), "cannot load the model"),
        (b"", "cannot load the model"),
    ],
    ids=["terabytes", "float16", "size", "channels", "batch", "no batch", "rank", "no nodes", "empty"],
)
def test_a_model_of_another_kind_is_one_line(export, tmp_path, capfd, model, message):
    (export / "student.onnx").write_bytes(model)
    sign(export)
    assert message in refusal(capfd, export, noise(tmp_path / "x.png"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_outputs_that_are_not_finite_are_said_and_not_printed(export, tmp_path, capsys, value):
    (export / "student.onnx").write_bytes(make_mean([0, value, 0]))
    sign(export)
    assert "x.png: the model's outputs are not finite numbers" in refusal(capsys, export, noise(tmp_path / "x.png"))


def test_a_model_whose_images_may_have_any_size_is_used(export, tmp_path, capsys):
    (export / "student.onnx").write_bytes(make_mean(shape=("n", 3, "height", "width")))
    sign(export)
    assert predict.main([str(export), str(noise(tmp_path / "x.png"))]) == 0


@pytest.mark.parametrize("name", ["student.onnx", "labels.json", "README.md"])
def test_a_pipe_in_an_export_is_not_waited_for(export, tmp_path, capsys, soon, name):
    (export / name).unlink()
    os.mkfifo(export / name)
    assert predict.main([str(export), str(noise(tmp_path / "x.png"))]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["student.onnx", "labels.json", "README.md"])
@pytest.mark.parametrize("kind", ["/dev/zero", "socket"])
def test_a_device_or_a_socket_in_an_export_is_not_read(export, tmp_path, capsys, monkeypatch, soon, name, kind):
    (export / name).unlink()
    if kind == "socket":
        monkeypatch.chdir(export)  # the path of a socket must be short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(name)
    else:
        (export / name).symlink_to(kind)
    reason = "is not an export" if name == "README.md" else "not a regular file"
    assert reason in refusal(capsys, export, noise(tmp_path / "x.png"))


@pytest.mark.parametrize(
    ("name", "size"), [("student.onnx", 1 << 31), ("labels.json", 1 << 24), ("README.md", 1 << 24)]
)
def test_a_file_of_an_export_has_a_largest_size(export, tmp_path, capsys, name, size):
    os.truncate(export / name, size + 1)  # without using the disk
    assert f"has {size + 1:,} bytes, more than {size:,}" in refusal(capsys, export, noise(tmp_path / "x.png"))


def test_sixteen_bits_are_read_as_the_export_says(export, tmp_path, capsys):
    Image.fromarray(np.full((20, 20), 4095, np.uint16)).save(tmp_path / "x.png")
    assert "bit_depth does not say" in refusal(capsys, export, tmp_path / "x.png")
    pixels = predict.preprocess_image(tmp_path / "x.png", PREPROCESS | {"bit_depth": 12})
    assert pixels.min() == 1


def test_no_syntax_is_newer_than_the_oldest_python():
    """The long form is a run with Python 3.8, Pillow 9.0 and ONNX Runtime 1.14, by hand."""
    with open(predict.__file__, encoding="utf-8") as file:
        tree = ast.parse(file.read(), feature_version=(3, 8))
    # What is evaluated when the file runs must be known to Python 3.8 too; annotations are not evaluated.
    newer = {
        "removeprefix",
        "removesuffix",
        "bit_count",
        "exif_transpose",
        "strict",
        "slots",
        "kw_only",
        "Resampling",
        "Transpose",
    }
    annotated = [node.annotation for node in ast.walk(tree) if getattr(node, "annotation", None)]
    annotated += [node.returns for node in ast.walk(tree) if getattr(node, "returns", None)]
    skipped = {id(node) for annotation in annotated for node in ast.walk(annotation)}
    for node in (node for node in ast.walk(tree) if id(node) not in skipped):
        names = [getattr(node, "attr", None), *(keyword.arg for keyword in getattr(node, "keywords", []))]
        assert not newer.intersection(names)
        assert not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr) and is_type(node.right)), node.lineno
        assert not (isinstance(node, ast.Subscript) and is_type(node.value)), node.lineno
    assert any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)
    assert "Python 3.8, numpy 1.18, Pillow 9.0 and onnxruntime 1.14" in ast.get_docstring(tree)


def is_type(node):
    return isinstance(node, ast.Name) and node.id in ("int", "str", "float", "dict", "list", "set", "tuple", "Path")


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("PIL", "error: Pillow 1.9.9 is too old: 9.0 or newer is needed\n"),
        ("onnxruntime", "error: onnxruntime 1.9.9 is too old: 1.14 or newer is needed\n"),
    ],
)
def test_an_old_package_is_one_line(export, tmp_path, capsys, monkeypatch, package, line):
    monkeypatch.setattr(sys.modules[package], "__version__", "1.9.9")
    path = noise(tmp_path / "x.png")
    assert refusal(capsys, export, path) == line


def test_a_terminal_that_knows_ascii_only_and_accents_in_paths(export, tmp_path):
    folder = tmp_path / "josé's #1 [x] & ~"
    folder.mkdir()
    paths = [noise(folder / "größe.png"), folder / "fehlt.png"]
    export = export.rename(folder / "exporté")
    command = [sys.executable, str(export / "predict.py"), *map(str, paths)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, env=environment, cwd=tmp_path)
    assert done.returncode == 1
    assert b"jos\\xe9's #1 [x] & ~/gr\\xf6\\xdfe.png  " in done.stdout
    assert done.stderr.count(b"\n") == 1


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


def plant(folder):
    """Seven images of three classes, for the export of `make_mean`, which knows red, green and blue."""
    colors = {"red": (250, 9, 9), "green": (9, 250, 9), "blue": (9, 9, 250)}
    for name, answers in {"red": ("red", "red", "blue"), "green": ("red",), "blue": ("blue", "blue", "blue")}.items():
        (folder / name).mkdir(parents=True)
        for k, answer in enumerate(answers):
            Image.new("RGB", (20, 20), colors[answer]).save(folder / name / f"{k}.png")
    return folder


@pytest.fixture
def colors(export):
    """An export that classifies an image by its strongest channel."""
    (export / "student.onnx").write_bytes(make_mean())
    (export / "labels.json").write_text(json.dumps(["red", "green", "blue"]))
    sign(export)
    return export


@pytest.mark.parametrize("below", ["", "test"])
def test_an_export_is_evaluated_on_labeled_images_without_torch(colors, tmp_path, below):
    """In a process that could not import them, called as a user would in the export's folder."""
    plant(tmp_path / "images" / below)
    block = "import sys; sys.modules.update(dict.fromkeys(['torch', 'odcheap', 'torchvision', 'matplotlib', 'scipy']))"
    arguments = ["predict.py", "--evaluate", str(tmp_path / "images"), "--csv", "table.csv"]
    run = f"{block}; import runpy; sys.argv = {arguments!r}; runpy.run_path('predict.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", run], cwd=colors, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "top-1 71.43 % (95 % interval 35.89 to 91.78): 5 of 7 images; balanced accuracy 55.56 %" in done.stdout
    assert "always answering red would give 42.86 %, no other class more" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["red", "3", "2", "66.67", "20.77", "to", "93.85", "3", "blue", "(1)"] in rows
    assert ["green", "1", "0", "0.00", "0.00", "to", "79.35", "0", "red", "(1)"] in rows
    assert ["red", "2", "0", "1"] in rows  # of the confusion matrix
    assert predict.NO_TRAINING_LIST in done.stdout
    expected = "true \\ predicted,red,green,blue\nred,2,0,1\ngreen,1,0,0\nblue,0,0,3\n"
    assert (colors / "table.csv").read_text() == expected


def test_an_evaluation_as_json(colors, tmp_path, capsys):
    assert predict.main([str(colors), "--evaluate", str(plant(tmp_path / "images")), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["confusion"] == [[2, 0, 1], [1, 0, 0], [0, 0, 3]]
    assert (found["images"], found["correct"], found["classes"]["red"]["recall"]) == (7, 5, 2 / 3)


def test_a_broken_image_is_named_and_the_others_are_evaluated(colors, tmp_path, capsys):
    (plant(tmp_path / "images") / "red" / "x.png").write_bytes(b"?")
    assert predict.main([str(colors), "--evaluate", str(tmp_path / "images")]) == 1
    out, err = capsys.readouterr()
    assert "5 of 7 images" in out
    assert "x.png cannot be read as an image" in err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--evaluate"], "--evaluate: needs one folder with a folder of images for each class, not 0"),
        (["--evaluate", "IMAGES", "IMAGES"], "for each class, not 2"),
        (["--evaluate", "IMAGES/red"], "must have folders that are named like the classes (red, green, blue)"),
        (["--evaluate", "nowhere"], "nowhere: cannot be read (No such file or directory)"),
        (["--evaluate", "IMAGES", "--csv", "IMAGES/red/0.png"], "0.png: exists, name another file"),
        (["IMAGES", "--csv", "x.csv"], "--csv and --known-only: need --evaluate"),
    ],
)
def test_an_evaluation_that_is_not_possible_is_one_line(colors, tmp_path, capsys, arguments, line):
    images = str(plant(tmp_path / "images"))
    assert line in refusal(capsys, colors, *(argument.replace("IMAGES", images) for argument in arguments))
