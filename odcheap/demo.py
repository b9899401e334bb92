"""Shows a local web page on which images are classified with an export.

An image is dropped on the page or chosen there, and the page shows its most likely classes with their probabilities,
the same as `odcheap predict` prints. The page is reachable from this machine only, and no image leaves it. Ctrl-C ends
the command.
"""

import argparse
import errno
import json
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np

from odcheap import predict
from odcheap.utils.console import keep_going_without_output, print_error, say
from odcheap.utils.errors import OptionError

# Images are decoded, resized and classified by this server with `predict.py`, since a browser's own decoding and
# resizing differ from those of the training.
ADDRESS = "127.0.0.1"  # reachable from this machine only
MAX_PORT = 65535
LOCAL_NAMES = ("127.0.0.1", "localhost", "::1")
MAX_BYTES = 1 << 26  # of an image
CHUNK = 1 << 20  # bytes that are read at once
SHOWN_CLASSES = 5
SECONDS_WITHOUT_DATA = 30  # after which a connection is closed
PAGE_FOLDER = Path(__file__).with_name("demo_page")
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
    """Classifies images with an export, for the demo page.

    Args:
        folder: The folder of the export.
        file: The name of the ONNX file in this folder that classifies the images, such as "student.onnx".

    Attributes:
        export: The network, as `predict.load_export` returns it.
        description: What the page says about the network: a dict with `title` (the network's name), `accuracy` (a line
            of text, which may be empty), `file` (the name of the ONNX file) and `classes` (their names).

    Raises:
        predict.PredictError: The files of the export are damaged or do not fit together.
    """

    def __init__(self, folder: Path, file: str):
        self.export = predict.load_export(folder, file)
        title, accuracy = read_card(folder)
        self.description = {"title": title, "accuracy": accuracy, "file": file, "classes": self.export.classes}
        channels, (height, width) = self.export.preprocess["channels"], self.export.preprocess["size"]
        self.export.predictor(np.zeros((1, channels, height, width), np.float32))  # shows now if it cannot be run

    def classify(self, content: bytes, name: str) -> list[tuple[str, float]]:
        """Returns the most likely classes of an image with their probabilities.

        Args:
            content: The bytes of the image file.
            name: The name of the file, for error messages.

        Returns:
            Five pairs of a class's name and its probability, the most likely class first; fewer if the network has
            fewer classes.

        Raises:
            predict.PredictError: The image cannot be read, or the network cannot be run on it.
        """
        preprocess, classes, predictor, _ = self.export
        image = predict.decode_content(content, name, preprocess.get("bit_depth"))
        (logits,) = predictor(predict.resize_image(image, preprocess, name)[None])
        logits = predict.check_logits(name, logits)
        if isinstance(logits, predict.ImageError):
            raise logits
        return predict.rank_classes(logits, classes, SHOWN_CLASSES)


def read_card(folder: Path) -> tuple[str, str]:
    """Reads the title and the test accuracy from the model card of an export.

    Args:
        folder: The folder of the export.

    Returns:
        Two lines of plain text: the title, or the name of the folder if the card has no title; and the sentence about
        the test accuracy, which is empty if the card has no such sentence.
    """
    lines = predict.read_regular(folder / predict.CARD_FILE, predict.MAX_TEXT_BYTES).decode().splitlines()
    title = next((line[2:] for line in lines if line.startswith("# ")), folder.name)
    accuracy = next((line for line in lines if line.startswith("Test accuracy ")), "")
    return title.strip("`"), accuracy.partition(";")[0].rstrip(".")


class RequestHandler(BaseHTTPRequestHandler):
    """Answers the HTTP requests of the demo page: GET for the page's own files, POST for an image to classify."""

    server: "DemoServer"  # ty: ignore[incompatible-mutable-override] - no other server uses this class
    server_version, sys_version = "odcheap", ""
    timeout = SECONDS_WITHOUT_DATA

    def parse_request(self) -> bool:
        """Reads a request; returns False if it cannot be read or comes from another page, after an error was sent."""
        return super().parse_request() and self.check_origin()

    def do_GET(self) -> None:
        """Sends a file of the page, or for `/export.json` the description of the network (`Classifier.description`)."""
        path = urlsplit(self.path).path
        if path == "/export.json":
            self.answer(HTTPStatus.OK, self.server.classifier.description)
        elif path in PAGE_FILES:
            name, kind = PAGE_FILES[path]
            self.send(HTTPStatus.OK, (PAGE_FOLDER / name).read_bytes(), kind)
        else:
            self.answer(HTTPStatus.NOT_FOUND, {"error": "there is no such page"})

    def do_POST(self) -> None:
        """Classifies the image that is sent to `/classify`, and answers in JSON.

        The answer has the key `classes`, a list of dicts with `label` and `probability`. After an error, it has the key
        `error` with one line of text.
        """
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
        """Returns whether a request comes from the demo page. If it comes from another page, an error is sent first.

        The headers `Host` and `Origin` must name this server, since any web page that the user visits could send
        requests to it.
        """
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if urlsplit(f"//{host}").hostname in LOCAL_NAMES and origin in (None, f"http://{host}"):
            return True
        self.answer(HTTPStatus.FORBIDDEN, {"error": "requests of other pages are not answered"})
        return False

    def discard(self, length: int) -> None:
        """Reads the body of a request, and does not keep it.

        Args:
            length: The number of bytes to read. Reading ends earlier if the connection ends.
        """
        while length > 0 and (chunk := self.rfile.read(min(length, CHUNK))):
            length -= len(chunk)

    def answer(self, status: HTTPStatus, content: Any) -> None:
        """Sends an answer with a JSON body.

        Args:
            status: The HTTP status.
            content: The object that is written as JSON.
        """
        self.send(status, json.dumps(content).encode(), "application/json")

    def send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        """Sends an answer, with the security headers that all answers of this server have.

        Args:
            status: The HTTP status.
            content: The body of the answer.
            kind: The media type of the body, such as "text/css".
        """
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Prints nothing; otherwise the base class would print each request. Errors are shown by the page itself."""


class DemoServer(ThreadingHTTPServer):
    """The HTTP server of the demo page. Only programs on this machine can reach it.

    Args:
        classifier: The classifier of the images.
        port: The port; 0 for a free one.
    """

    daemon_threads = True
    allow_reuse_address = True  # of a port whose last connections have just ended

    def __init__(self, classifier: Classifier, port: int):
        self.classifier = classifier
        super().__init__((ADDRESS, port), RequestHandler)

    @property
    def address(self) -> str:
        """The address of the page for a browser, such as "http://127.0.0.1:8000/"."""
        return f"http://{ADDRESS}:{self.server_port}/"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command `odcheap demo`, which serves the demo page until Ctrl-C.

    Args:
        arguments: The command-line arguments; None to take `sys.argv[1:]`.

    Returns:
        The exit status: 0 after Ctrl-C, or 1 after an error.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("odcheap demo", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("export_dir", type=Path, metavar="EXPORT_DIR", help="the folder that odcheap export has written")
    add("--model", metavar="FILE", default="student.onnx", help="another ONNX file of it (default: %(default)s)")
    add("--port", type=int, default=8000, metavar="N", help="of the page; 0 for a free one (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        with keep_going_without_output(), create_server(options.export_dir, options.model, options.port) as server:
            say(f"open {server.address} in a browser; Ctrl-C ends the server")
            server.serve_forever()
    except (predict.PredictError, OptionError, OSError) as error:
        return print_error(str(error))
    except KeyboardInterrupt:
        pass
    return 0


def create_server(folder: Path, file: str, port: int) -> DemoServer:
    """Creates the server of the demo page. It listens on its port, but answers only when `serve_forever` is called.

    Args:
        folder: The folder of an export.
        file: The name of the ONNX file in this folder that classifies the images, such as "student.onnx".
        port: The port of the server, 0 to 65535; 0 for a free one.

    Raises:
        OptionError: The folder is not an export, or the port cannot be used.
        predict.PredictError: The files of the export are damaged or do not fit together.
    """
    if not 0 <= port <= MAX_PORT:
        raise OptionError("--port", port, f"must be 0 to {MAX_PORT}")
    if not predict.is_export(folder):
        raise OptionError("EXPORT_DIR", folder, "is not an export; odcheap export JOB_DIR writes one")
    classifier = Classifier(folder, file)
    try:
        return DemoServer(classifier, port)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        reason = "is in use" if error.errno == errno.EADDRINUSE else "is not allowed"
        raise OptionError("--port", port, f"{reason}: name another one, or 0 for a free one") from error


if __name__ == "__main__":
    raise SystemExit(main())
