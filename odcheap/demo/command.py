"""Shows a local web page on which images are classified with an export.

An image is dropped on the page or chosen there, and the page shows its most likely classes with their probabilities,
the same as `odcheap predict` prints. The page is reachable from this machine only, and no image leaves it. Ctrl-C ends
the command.
"""

import argparse
import errno
from collections.abc import Sequence
from pathlib import Path

from odcheap import predict
from odcheap.demo.server import Classifier, DemoServer
from odcheap.utils.console import keep_going_without_output, print_error, say
from odcheap.utils.errors import OptionError

MAX_PORT = 65535


def main(arguments: Sequence[str] | None = None, prog: str = "odcheap demo") -> int:
    """Runs the command.

    Args:
        arguments: The command-line arguments; None for those of this process.
        prog: The name of the command in its help.

    Returns:
        The exit status: 0 after Ctrl-C, or 1 after an error.
    """
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    """Returns the server of the demo page, to which browsers can connect already.

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
    if not all((folder / name).is_file() for name in (predict.PREPROCESS_FILE, predict.CARD_FILE)):
        raise OptionError("EXPORT_DIR", folder, "is not an export; odcheap export JOB_DIR writes one")
    classifier = Classifier(folder, file)
    try:
        return DemoServer(classifier, port)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        reason = "is in use" if error.errno == errno.EADDRINUSE else "is not allowed"
        raise OptionError("--port", port, f"{reason}: name another one, or 0 for a free one") from error
