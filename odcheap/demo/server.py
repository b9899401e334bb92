"""The server of the demo page: it sends the page to the browser, and classifies the images that the page sends back.

The images are decoded, resized and classified here with `predict.py`, so that the page shows the same probabilities as
`odcheap predict`. A browser's own resizing and decoding differ from those of the training.
"""

import json
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np

from odcheap import predict

ADDRESS = "127.0.0.1"  # reachable from this machine only
LOCAL_NAMES = ("127.0.0.1", "localhost", "::1")
MAX_BYTES = 1 << 26  # of an image
CHUNK = 1 << 20  # bytes that are read at once
SHOWN_CLASSES = 5
SECONDS_WITHOUT_DATA = 30  # after which a connection is closed
PAGE_FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
# The page may load its own script and style and show the user's image; nothing from elsewhere.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Classifier:
    """Classifies the content of image files with an export.

    Args:
        folder: The folder of the export.
        file: The name of its ONNX file.

    Attributes:
        description: What the page says about the network: its name, the file, the classes, and a line about accuracy.

    Raises:
        predict.PredictError: The files of the export are damaged or do not fit together.
    """

    def __init__(self, folder: Path, file: str):
        self.preprocess, self.classes = predict.read_export(folder)
        session = predict.create_session(predict.read_verified(folder, file))
        predict.check_input_size(session, self.preprocess)
        self.predictor = predict.create_predictor(session)
        title, accuracy = read_card(folder)
        self.description = {"title": title, "accuracy": accuracy, "file": file, "classes": self.classes}
        channels, (height, width) = predict.count_channels(self.preprocess), self.preprocess["size"]
        outputs = self.predictor(np.zeros((1, channels, height, width), np.float32)).shape[1]
        if outputs != len(self.classes):
            names = f"{predict.LABELS_FILE} {len(self.classes)} names"
            raise predict.PredictError(f"{folder / file}: has {outputs} outputs, and {names}")

    def classify(self, content: bytes, name: str) -> list[tuple[str, float]]:
        """Returns the five most likely classes of an image with their probabilities.

        Args:
            content: The content of the image file.
            name: The name of the file, for error messages.

        Raises:
            predict.PredictError: The image cannot be read, or the network cannot be run on it.
        """
        image = predict.decode_content(content, name, self.preprocess.get("bit_depth"))
        (logits,) = self.predictor(predict.resize_image(image, self.preprocess, name)[None])
        if not np.isfinite(logits).all():
            raise predict.PredictError(f"{name}: the model's outputs are not finite numbers")
        return predict.rank_classes(logits, self.classes, SHOWN_CLASSES)


def read_card(folder: Path) -> tuple[str, str]:
    """Returns two lines of an export's model card without their markup: the title, and the line about accuracy."""
    lines = predict.read_regular(folder / predict.CARD_FILE, predict.MAX_TEXT_BYTES).decode().splitlines()
    title = next((line[2:] for line in lines if line.startswith("# ")), folder.name)
    accuracy = next((line for line in lines if line.startswith("Test accuracy ")), "")
    return title.strip("`"), accuracy.partition(";")[0].rstrip(".")


class RequestHandler(BaseHTTPRequestHandler):
    """Answers a request of the page."""

    server: "DemoServer"  # ty: ignore[incompatible-mutable-override] - no other server uses this class
    server_version, sys_version = "odcheap", ""
    timeout = SECONDS_WITHOUT_DATA

    def do_GET(self) -> None:
        if not self.check_origin():
            return
        path = urlsplit(self.path).path
        if path == "/export.json":
            self.answer(HTTPStatus.OK, self.server.classifier.description)
        elif path in PAGE_FILES:
            name, kind = PAGE_FILES[path]
            self.send(HTTPStatus.OK, Path(__file__).with_name(name).read_bytes(), kind)
        else:
            self.answer(HTTPStatus.NOT_FOUND, {"error": "there is no such page"})

    def do_POST(self) -> None:
        if not self.check_origin():
            return
        length = self.headers.get("Content-Length", "")
        if urlsplit(self.path).path != "/classify":
            self.answer(HTTPStatus.NOT_FOUND, {"error": "there is no such page"})
        elif not length.isdecimal():
            self.answer(HTTPStatus.LENGTH_REQUIRED, {"error": "the length of the image is missing"})
        elif int(length) > MAX_BYTES:
            self.discard(int(length))  # a browser shows no answer that comes before it has sent everything
            line = f"the image has {int(length):,} bytes; at most {MAX_BYTES:,} are allowed"
            self.answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"error": line})
        else:
            name = unquote(self.headers.get("X-File-Name", "")) or "the image"
            try:
                ranked = self.server.classifier.classify(self.rfile.read(int(length)), name)
            except predict.PredictError as error:
                self.answer(HTTPStatus.BAD_REQUEST, {"error": str(error)})
            except MemoryError:
                self.answer(HTTPStatus.BAD_REQUEST, {"error": f"{name}: not enough memory"})
            else:
                self.answer(HTTPStatus.OK, {"classes": [{"label": name, "probability": p} for name, p in ranked]})

    def check_origin(self) -> bool:
        """Returns whether the request is from the page itself; answers it with an error if it is from another page.

        Another web page that the user visits can send requests to this server, too, and can give it another name.
        """
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if urlsplit(f"//{host}").hostname in LOCAL_NAMES and origin in (None, f"http://{host}"):
            return True
        self.answer(HTTPStatus.FORBIDDEN, {"error": "requests of other pages are not answered"})
        return False

    def discard(self, length: int) -> None:
        """Reads this number of bytes, or as many as there are, and does nothing with them."""
        while length > 0 and (chunk := self.rfile.read(min(length, CHUNK))):
            length -= len(chunk)

    def answer(self, status: HTTPStatus, content: Any) -> None:
        """Sends JSON."""
        self.send(status, json.dumps(content).encode(), "application/json")

    def send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        """Sends an answer.

        Args:
            status: The status.
            content: The content.
            kind: The media type of the content.
        """
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Prints nothing: the page itself shows errors."""


class DemoServer(ThreadingHTTPServer):
    """The server of the page; it takes connections from this machine only.

    Args:
        classifier: The network that classifies the images.
        port: The port; 0 for a free one.
    """

    daemon_threads = True
    allow_reuse_address = True  # of a port whose last connections have just ended

    def __init__(self, classifier: Classifier, port: int):
        self.classifier = classifier
        super().__init__((ADDRESS, port), RequestHandler)

    @property
    def address(self) -> str:
        """The address of the page."""
        return f"http://{ADDRESS}:{self.server_port}/"
