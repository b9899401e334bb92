"""Classifies image files with an exported student: `python predict.py IMAGE_OR_FOLDER...`.

It needs numpy, Pillow and onnxruntime only. An export folder holds a copy of this file, which works there without
odcheap and without PyTorch; `odcheap predict EXPORT_DIR IMAGE_OR_FOLDER...` does the same from anywhere. Every image
file is decoded, resized and cropped as in training.
"""

import argparse
import hashlib
import json
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

MAX_ASPECT_RATIO = 100  # longer side over shorter side
IMAGE_SUFFIXES = tuple(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)
PREPROCESS_FILE, LABELS_FILE, CARD_FILE = "preprocess.json", "labels.json", "README.md"
CHECKSUM_LINE = re.compile(r"^([0-9a-f]{64})  (\S+)$", re.MULTILINE)  # in the model card: sha256 and file name
BATCH_SIZE = 32  # images that are in memory at the same time
TIMED_BATCH_SIZES, TIMING_ROUNDS = (1, 64), 5
TIMING_PAUSE = 0.02  # seconds before each timing, in which the threads of the previous session become idle

Predictor = Callable[[np.ndarray], np.ndarray]  # images (n, 3, H, W) in [0, 1] -> logits (n, K)


class PredictError(ValueError):
    """A failure that the user can act on. Its text is one line."""


class ImageError(PredictError):
    """An image file that is damaged, is not an image, or has pixels of an unknown range."""


class Timing(NamedTuple):
    """Seconds of one call: the median and the 95th percentile."""

    p50: float
    p95: float


def decode_image(path: str | Path) -> Image.Image:
    """Reads an image file as RGB, and rotates it as its EXIF data say.

    Raises:
        ImageError: The file cannot be decoded completely, or one side is more than 100 times the other.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd EXIF data and of very many pixels; only errors matter
            with Image.open(path) as image:
                ImageOps.exif_transpose(image, in_place=True)
                rgb = convert_to_rgb(image)
    except (Exception, MemoryError) as error:  # Pillow's many readers raise errors of every kind on damaged files
        reason = str(error).partition("\n")[0][:160] or type(error).__name__
        raise ImageError(f"{path} cannot be read as an image ({reason})") from error
    if max(rgb.size) > MAX_ASPECT_RATIO * min(rgb.size):
        raise ImageError(f"{path} has {rgb.width} x {rgb.height} pixels: too narrow to be resized to a square")
    return rgb


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Converts any Pillow mode to RGB; alpha is dropped, 16-bit gray is divided by 256 (Pillow itself would clip it).

    Raises:
        ImageError: The pixels have 32 bits, so their range is unknown.
    """
    if image.mode in ("I", "F"):
        raise ImageError(f"32-bit pixels of mode {image.mode}, whose range is unknown")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 256).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def preprocess_image(path: str | Path, preprocess: dict[str, Any]) -> np.ndarray:
    """Reads an image file as the network's input.

    Args:
        path: The image file.
        preprocess: The content of `preprocess.json`: the image is resized to `shorter_side`, and its center of `size`
            (height, width) is cut out.

    Returns:
        float32 of shape (3, height, width) in [0, 1].
    """
    image, (height, width), shorter = decode_image(path), preprocess["size"], preprocess["shorter_side"]
    smaller = min(image.size)
    scaled = [shorter if side == smaller else int(shorter * side / smaller) for side in image.size]
    image = image.resize((scaled[0], scaled[1]), Image.Resampling[preprocess["interpolation"].upper()])
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)) / np.float32(255)


def create_session(model: bytes, threads: int = 0) -> Any:
    """Creates an ONNX Runtime session on the CPU.

    Args:
        model: The content of an ONNX file.
        threads: Number of threads; 0 uses all cores.

    Raises:
        PredictError: The model cannot be loaded.
    """
    try:
        import onnxruntime  # here, because decoding images does not need it

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common base class
        raise PredictError(f"ONNX Runtime cannot load the model ({str(error)[:160]})") from error


def create_predictor(session: Any) -> Predictor:
    """Wraps an ONNX Runtime session as a function from images (n, 3, H, W) to logits (n, K)."""
    (images,) = session.get_inputs()
    batch_size = images.shape[0] if isinstance(images.shape[0], int) else None
    return pad_batches(lambda batch: session.run(None, {images.name: batch})[0], batch_size)


def pad_batches(run: Predictor, batch_size: int | None) -> Predictor:
    """Wraps a function that takes exactly `batch_size` images so that it takes any number of images.

    The last batch is filled up with copies of the last image. With `batch_size=None` the function already takes any
    number and is returned unchanged.
    """
    if batch_size is None:
        return run

    def predict(images: np.ndarray) -> np.ndarray:
        padded = np.concatenate([images, np.repeat(images[-1:], -len(images) % batch_size, axis=0)])
        return np.concatenate([run(batch) for batch in np.split(padded, len(padded) // batch_size)])[: len(images)]

    return predict


def predict_files(
    predictor: Predictor, paths: list[Path], preprocess: dict[str, Any]
) -> Iterator[tuple[Path, np.ndarray | ImageError]]:
    """Yields each file with its logits (K,), or with the error that says why it has none."""
    for k in range(0, len(paths), BATCH_SIZE):
        results: dict[Path, np.ndarray | ImageError] = {}
        for path in paths[k : k + BATCH_SIZE]:
            try:
                results[path] = preprocess_image(path, preprocess)
            except ImageError as error:
                results[path] = error
        images = {path: image for path, image in results.items() if isinstance(image, np.ndarray)}
        if images:
            results |= zip(images, predictor(np.stack(list(images.values()))), strict=True)
        yield from results.items()


def read_verified(folder: Path, name: str) -> bytes:
    """Reads a file of an export and compares its sha256 with the one in the model card.

    Raises:
        PredictError: The file is not listed in the card, or was changed after the export.
    """
    try:
        card, content = (folder / CARD_FILE).read_text(encoding="utf-8"), (folder / name).read_bytes()
    except (OSError, UnicodeDecodeError) as error:
        raise PredictError(f"{folder / name}: cannot be checked ({error})") from error
    checksums = {match[2]: match[1] for match in CHECKSUM_LINE.finditer(card)}
    if name not in checksums:
        files = ", ".join(checksums) or "no files"
        raise PredictError(f"{folder / name}: is not a file of this export, which has {files}")
    if hashlib.sha256(content).hexdigest() != checksums[name]:
        raise PredictError(f"{folder / name}: was changed after the export (its sha256 differs from {CARD_FILE})")
    return content


def find_images(paths: list[str]) -> Iterator[Path]:
    """Yields the given files, and all image files below the given folders.

    A path or folder that cannot be opened is yielded too, so that reading it gives an error message.
    """
    for top in paths:
        files: list[Path] = []
        for parent, _, names in os.walk(top, onerror=lambda error, files=files: files.append(Path(error.filename))):
            images = (Path(parent, n) for n in names if n.lower().endswith(IMAGE_SUFFIXES) and not n.startswith("."))
            files += filter(os.path.isfile, images)
        yield from sorted(files)


def escape_control_chars(text: object) -> str:
    r"""Makes text safe to print: control characters and line ends become visible escapes.

    Example:
        >>> escape_control_chars("two\nlines")
        'two\\nlines'
    """
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(text))


def classify_images(folder: Path, model: str, paths: list[str], as_json: bool) -> int:
    """Prints the three most likely classes of each image; returns 1 if an image could not be read, else 0."""
    preprocess, labels = (json.loads(read_verified(folder, name)) for name in (PREPROCESS_FILE, LABELS_FILE))
    predictor = create_predictor(create_session(read_verified(folder, model)))
    files = list(dict.fromkeys(find_images(paths)))
    if not files:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES)[:6])
        raise PredictError(f"{', '.join(paths) or 'IMAGE_OR_FOLDER'}: no images found ({suffixes}, ...)")

    # An image that cannot be read is named, and the others are classified.
    rows = []
    for path, logits in predict_files(predictor, files, preprocess):
        if isinstance(logits, ImageError):
            print(f"error: {escape_control_chars(logits)}", file=sys.stderr)
            continue
        probabilities = np.exp(logits.astype(np.float64) - logits.max())
        probabilities /= probabilities.sum()
        top3 = np.argsort(-probabilities, kind="stable")[:3]
        rows.append((path, [(labels[k], float(probabilities[k])) for k in top3]))
    if as_json:
        results = [{"path": str(path), "label": top[0][0], "probability": top[0][1]} for path, top in rows]
        print(json.dumps(results, indent=1))
    else:
        cells = [(str(path), *(f"{label} {probability:.3f}" for label, probability in top)) for path, top in rows]
        print_table([tuple(map(escape_control_chars, row)) for row in cells])
    return int(len(rows) < len(files))


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Prints rows of text with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def random_images(batch: int, size: tuple[int, int, int]) -> np.ndarray:
    """Returns the same random images each time, float32 (batch, *size) in [0, 1)."""
    return np.random.default_rng(0).random((batch, *size), dtype=np.float32)


def time_alternately(functions: dict[Any, Callable[[], object]], seconds: float) -> dict[Any, Timing]:
    """Times functions one after another, in several rounds, so that a slow phase of the machine affects all alike.

    Args:
        functions: The functions by name.
        seconds: Time spent on each function in all rounds together.

    Returns:
        The median and the 95th percentile of one call in seconds, by name. Each round begins with an untimed call.
    """
    times: dict[Any, list[float]] = {name: [] for name in functions}
    for completed in range(TIMING_ROUNDS):
        for name, function in functions.items():
            time.sleep(TIMING_PAUSE)
            function()
            end = time.perf_counter() + seconds / TIMING_ROUNDS
            while time.perf_counter() < end or len(times[name]) <= completed:
                start = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - start)
    return {name: Timing(statistics.median(t), sorted(t)[int(0.95 * (len(t) - 1))]) for name, t in times.items()}


def benchmark_models(folder: Path, seconds: float = 2.0) -> int:
    """Times every ONNX file of the export, with one thread and with all; returns 0."""
    size: tuple[int, int, int] = (3, *json.loads(read_verified(folder, PREPROCESS_FILE))["size"])
    functions: dict[Any, Callable[[], object]] = {}
    for path, threads in [(path, threads) for path in sorted(folder.glob("*.onnx")) for threads in (1, 0)]:
        session = create_session(read_verified(folder, path.name), threads)
        fixed = session.get_inputs()[0].shape[0]
        for batch in (fixed,) if isinstance(fixed, int) else TIMED_BATCH_SIZES:
            images, predictor = random_images(batch, size), create_predictor(session)
            functions[path.name, batch, threads] = partial(predictor, images)
    print(f"{len(functions)} timings of {seconds:g} s each", file=sys.stderr)
    rows: list[tuple[str, ...]] = [("file", "images", "threads", "median ms", "95 % below")]
    for (name, batch, threads), timing in time_alternately(functions, seconds).items():
        rows.append((name, str(batch), str(threads or "all"), *(f"{1000 * time:.3f}" for time in timing)))
    print_table(rows)
    return 0


def main(arguments: list[str], prog: str | None = None) -> int:
    """Runs the command and returns the exit status: 1 if an image could not be read."""
    parser = argparse.ArgumentParser(
        prog,
        usage="%(prog)s [-h] [--model FILE] [--json] [--bench] [EXPORT_DIR] IMAGE_OR_FOLDER...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="[EXPORT_DIR] IMAGE_OR_FOLDER",
        help="EXPORT_DIR (if this file is not in an export itself), then image files and folders with images",
    )
    parser.add_argument(
        "--model", metavar="FILE", default="student.onnx", help="another ONNX file of the export (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print a list of {path, label, probability}")
    parser.add_argument("--bench", action="store_true", help="time every ONNX file of the export on this machine")
    options = parser.parse_args(arguments)

    # The export is the first path if that is an export, otherwise the folder of this file.
    folder, paths = Path(__file__).parent, options.paths
    if paths and all(os.path.isfile(os.path.join(paths[0], name)) for name in (PREPROCESS_FILE, CARD_FILE)):
        folder, paths = Path(paths[0]), paths[1:]
    try:
        if not (folder / PREPROCESS_FILE).is_file():
            raise PredictError(
                f"EXPORT_DIR={(paths or [''])[0]}: is not an export; `odcheap export JOB_DIR` writes one"
            )
        if options.bench:
            return benchmark_models(folder)
        return classify_images(folder, options.model, paths, options.json)
    except (PredictError, OSError) as error:
        line = str(error)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        line = f"{folder}: its files do not fit together ({error!r})"
    print(f"error: {escape_control_chars(line)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
