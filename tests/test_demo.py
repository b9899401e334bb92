"""The demo page, as a browser shows it, and the server behind it."""

import http.client
import json
import socket
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from browser import CHROMIUM, Page
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from sklearn.datasets import load_sample_image

from odcheap import cli, demo, predict
from odcheap.export import model_card

COLORS = ["red", "green", "<b>blue</b>"]


def write_export(folder: Path, colors: list[str] = COLORS) -> Path:
    """Writes an export that classifies an image by its strongest color."""
    folder.mkdir()
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["means"]),
        helper.make_node("Mul", ["means", "factor"], ["logits"]),
    ]
    values = [("images", ("n", 3, 16, 16)), ("logits", ("n", 3))]
    inputs, outputs = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name, shape in values)
    factor = numpy_helper.from_array(np.array(5, np.float32), "factor")
    graph = helper.make_graph(nodes, "colors", inputs, outputs, [factor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "student.onnx")
    preprocess = {"shorter_side": 16, "size": [16, 16], "interpolation": "bilinear"}
    (folder / "preprocess.json").write_text(json.dumps(preprocess))
    (folder / "labels.json").write_text(json.dumps(colors))
    opening = [
        "# `colors, <i>16</i>`",
        "",
        "Test accuracy 75.00 % (95 % interval 30.06 to 95.44) on 4 images; more.",
        "",
    ]
    (folder / "README.md").write_text("\n".join([*opening, "```", *model_card.checksum_lines(folder), "```"]))
    return folder


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("demo") / "export")


@pytest.fixture(scope="module")
def server(export):
    with demo.create_server(export, "student.onnx", 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A real photograph, of a flower."""
    path = tmp_path_factory.mktemp("photos") / "flower <1>.jpg"
    Image.fromarray(load_sample_image("flower.jpg")).save(path)
    return path


def expect(export, path):
    """The classes with their probabilities as the page must show them, from `predict.py`."""
    preprocess, classes, predictor, _ = predict.load_export(export, "student.onnx")
    ((_, logits),) = predict.predict_files(predictor, [path], preprocess)
    return [[name, f"{100 * p:.1f} %"] for name, p in predict.rank_classes(logits, classes, 5)]


def ask(server, method, path, body=None, **headers):
    """Returns the status and the content of the server's answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content) if answer.headers["Content-Type"] == "application/json" else content


ROWS = "[...document.querySelectorAll('tbody tr')].map(row => [row.cells[0].innerText, row.cells[2].innerText])"
WIDTH = "document.getElementById('preview').naturalWidth"
STATUS = "document.getElementById('status').innerText"


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (apt-get install chromium)")
def test_a_browser_shows_the_classes_of_an_image_that_is_dropped_or_chosen(server, export, photo, tmp_path):
    dark, text = tmp_path / "dark.png", tmp_path / "notes.txt"
    Image.new("RGB", (40, 30), (0, 0, 90)).save(dark)
    text.write_text("no image")
    with Page(server.address, tmp_path / "profile") as page:
        page.wait_for("document.title.startsWith('colors, <i>16</i>')")
        assert page.evaluate("document.getElementById('accuracy').innerText").endswith("on 4 images · student.onnx")
        page.drop(photo, 200, 300)
        assert page.wait_for(f"{ROWS}.length && {ROWS}") == expect(export, photo)
        assert page.evaluate("document.getElementById('name').innerText") == photo.name
        assert page.wait_for(WIDTH) == 640
        page.choose("#choose", dark)
        page.wait_for(f"{ROWS}.length && {WIDTH} == 40")
        assert page.evaluate(ROWS) == expect(export, dark)
        assert page.evaluate(f"{ROWS}[0][0]") == COLORS[2]  # a name is no markup
        page.choose("#choose", text)
        assert page.wait_for(f"document.querySelector('.error') && {STATUS}").startswith(
            "notes.txt cannot be read as an"
        )
        assert page.evaluate(ROWS) == []
        assert {address for address in page.requested() if not address.startswith(("blob:", server.address))} == set()
        assert [problem for problem in page.problems() if "400 (Bad Request)" not in problem] == []


def test_the_server_answers_with_the_classes_of_an_image(server, export, photo):
    status, answer = ask(server, "POST", "/classify", photo.read_bytes())
    assert status == 200
    shown = [[entry["label"], f"{100 * entry['probability']:.1f} %"] for entry in answer["classes"]]
    assert shown == expect(export, photo)


def test_the_server_describes_the_export(server):
    accuracy = "Test accuracy 75.00 % (95 % interval 30.06 to 95.44) on 4 images"
    expected = {"title": "colors, <i>16</i>", "accuracy": accuracy, "file": "student.onnx", "classes": COLORS}
    assert ask(server, "GET", "/export.json") == (200, expected)


@pytest.mark.parametrize(
    ("body", "headers", "status", "line"),
    [
        (b"no image", {"X_File_Name": "a%20b.png"}, 400, "a b.png cannot be read as an image (its content is none of"),
        (b"", {}, 400, "the image cannot be read as an image"),
        (b"x" * 2000, {}, 413, "the image has 2,000 bytes; at most 1,000 are allowed"),
        (b"", {"Content_Length": "-1"}, 411, "the length of the image is missing"),
        (b"x", {"Host": "attacker.example"}, 403, "requests of other pages are not answered"),
        (b"x", {"Origin": "http://attacker.example"}, 403, "requests of other pages are not answered"),
    ],
    ids=["text", "empty", "large", "length", "host", "origin"],
)
def test_what_cannot_be_classified_is_answered_in_one_line(server, monkeypatch, body, headers, status, line):
    monkeypatch.setattr(demo, "MAX_BYTES", 1000)
    answered, content = ask(server, "POST", "/classify", body, **headers)
    assert answered == status
    assert content["error"].startswith(line)
    assert "\n" not in content["error"]


@pytest.mark.parametrize("path", ["/../demo.py", "/demo.py", "/student.onnx", "//page.js/..", "/classify"])
def test_the_server_sends_the_files_of_the_page_and_no_others(server, path):
    assert ask(server, "GET", path)[0] == 404


def test_the_page_is_not_shown_to_another_name_of_this_machine(server):
    assert ask(server, "GET", "/", Host="attacker.example")[0] == 403
    assert ask(server, "GET", "/", Host=f"localhost:{server.server_port}")[0] == 200


def test_the_server_is_reachable_from_this_machine_only(server):
    assert server.server_address[0] == "127.0.0.1"


def test_what_cannot_be_shown_is_one_line(export, tmp_path, capsys):
    two = write_export(tmp_path / "two", COLORS[:2])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        cases = {
            (str(tmp_path),): f"EXPORT_DIR={tmp_path}: is not an export; odcheap export JOB_DIR writes one",
            (str(export), "--port", str(port)): f"--port={port}: is in use: name another one, or 0 for a free one",
            (str(export), "--port", "70000"): "--port=70000: must be 0 to 65535",
            (str(export), "--model", "x.onnx"): f"{export / 'x.onnx'}: cannot be checked",
            (str(two),): f"{two / 'student.onnx'}: has 3 outputs, and labels.json 2 names",
        }
        for arguments, line in cases.items():
            assert cli.main(["demo", *arguments]) == 1
            out, err = capsys.readouterr()
            assert out == ""
            assert err.startswith(f"error: {line}")
            assert err.count("\n") == 1


def test_ctrl_c_ends_the_command_without_an_error(export, monkeypatch, capsys):
    def interrupt(server):
        assert capsys.readouterr().out == f"open {server.address} in a browser; Ctrl-C ends the server\n"
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.DemoServer, "serve_forever", interrupt)
    assert cli.main(["demo", str(export), "--port", "0"]) == 0
    assert capsys.readouterr().err == ""
