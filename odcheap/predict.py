"""Classifies image files with an exported student: `python predict.py IMAGE_OR_FOLDER...`.

It needs Python 3.8, numpy 1.18, Pillow 9.0 and onnxruntime 1.14, or newer versions, and nothing else. An export folder
holds a copy of this file, which works there without odcheap and without PyTorch; `odcheap predict EXPORT_DIR
IMAGE_OR_FOLDER...` does the same from anywhere. Every image file is decoded, resized and cropped as in training.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import io
import json
import os
import re
import stat
import statistics
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError

MIN_PILLOW, MIN_ONNXRUNTIME = (9, 0), (1, 14)
# Formats of pixels only. Pillow has readers of other kinds too: that of EPS starts Ghostscript, which runs programs.
IMAGE_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA")
_SUFFIX_FORMATS = Image.registered_extensions()  # loads all readers, so it stands before the next line
IMAGE_FORMATS = tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)
IMAGE_SUFFIXES = tuple(suffix for suffix, name in _SUFFIX_FORMATS.items() if name in IMAGE_FORMATS)
# The first bytes of the most frequent formats, by which a file without a suffix is known as an image.
IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF")
MAX_IMAGE_BYTES, MAX_MODEL_BYTES, MAX_TEXT_BYTES = 1 << 29, 1 << 31, 1 << 24
MAX_ASPECT_RATIO = 100  # longer side over shorter side
MAX_SIDE = 4096  # pixels of the network's input
MAX_PIXELS = 178_956_970  # of a resized image; Pillow refuses to decode larger ones
MAX_BATCH_PIXELS = 1 << 24  # of the images that are in memory at the same time, unless one alone has more
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
ORIENTATION = 0x0112  # the EXIF tag
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


def open_regular(path: str | Path, max_bytes: int) -> io.BufferedReader:
    """Opens a regular file for reading.

    Raises:
        OSError: There is no such file, it is a folder, pipe, device or socket, or it has more than `max_bytes`.
    """

    def check(status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if status.st_size > max_bytes:
            raise OSError(errno.EFBIG, f"has {status.st_size:,} bytes, more than {max_bytes:,}", str(path))

    check(os.stat(path))  # before the file is opened, since to open a device can act on it
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    file = os.fdopen(descriptor, "rb")
    try:
        check(os.fstat(descriptor))  # another file may have taken its place
    except OSError:
        file.close()
        raise
    return file


def read_regular(path: str | Path, max_bytes: int) -> bytes:
    """Returns the content of a regular file; see `open_regular`."""
    with open_regular(path, max_bytes) as file:
        return file.read(max_bytes)


def decode_image(path: str | Path, bit_depth: int | None = None) -> Image.Image:
    """Reads an image file as RGB, and rotates it as its EXIF data say. All other metadata is ignored.

    Args:
        path: The file.
        bit_depth: How many of its 16 bits a pixel uses (12 for most microscopes and X-rays), if it has 16.

    Raises:
        ImageError: The file cannot be decoded completely, its pixels' range is unknown, or one side is more than 100
            times the other.
    """
    try:
        content = read_regular(path, MAX_IMAGE_BYTES)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd EXIF data and of very many pixels; only errors matter
            with Image.open(io.BytesIO(drop_metadata(content)), formats=IMAGE_FORMATS) as image:
                rgb = convert_to_rgb(image, bit_depth)
                rotation = find_rotation(image)
                rgb = rgb if rotation is None else rgb.transpose(rotation)
    except UnidentifiedImageError as error:
        raise ImageError(f"{path} cannot be read as an image ({describe_unknown(content)})") from error
    except (Exception, MemoryError) as error:  # Pillow's many readers raise errors of every kind on damaged files
        reason = str(error).partition("\n")[0][:160] or type(error).__name__
        raise ImageError(f"{path} cannot be read as an image ({reason})") from error
    if max(rgb.size) > MAX_ASPECT_RATIO * min(rgb.size):
        raise ImageError(f"{path} has {rgb.width} x {rgb.height} pixels: too narrow to be resized to a square")
    return rgb


def drop_metadata(content: bytes) -> bytes:
    """Returns a PNG with only its EXIF data and what its pixels need; other formats are returned unchanged.

    Pillow refuses a PNG because of a very long text chunk or color profile, although its pixels are whole.
    """
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    kept, position = [content[:8]], 8
    while position < len(content):
        end = position + 12 + int.from_bytes(content[position : position + 4], "big")
        kind = content[position + 4 : position + 8]
        if kind[:1].isupper() or kind in (b"tRNS", b"eXIf"):  # the names of the chunks with pixels are in capitals
            kept.append(content[position:end])
        position = end
    return b"".join(kept)


def find_rotation(image: Image.Image) -> Any:
    """Returns the argument of `transpose` that turns an image as its EXIF data say; None if they say nothing."""
    names: Any = getattr(Image, "Transpose", Image)  # Pillow 9.1 moved them
    turns = {2: names.FLIP_LEFT_RIGHT, 3: names.ROTATE_180, 4: names.FLIP_TOP_BOTTOM, 5: names.TRANSPOSE}
    turns.update({6: names.ROTATE_270, 7: names.TRANSVERSE, 8: names.ROTATE_90})
    try:
        return turns.get(image.getexif().get(ORIENTATION))
    except Exception:  # damaged metadata; Pillow raises errors of every kind
        return None


def describe_unknown(content: bytes) -> str:
    """Returns why a file is no image that can be read, and what to do if its format is known."""
    if content[4:8] == b"ftyp" and content[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "HEIC: convert it to JPEG or PNG"
    if content[:2] == b"%!" or content[:4] == b"\xc5\xd0\xd3\xc6":
        return "PostScript, which is a program: convert it to PNG"
    return f"its content is none of {', '.join(IMAGE_FORMATS)}"


def count_channel_bits(image: Any) -> int:
    """Returns 8, 16 or 32: the bits of a channel of an image that was opened and is not decoded yet."""
    encoding = str([entry[-1] for entry in image.tile])
    if image.mode.startswith("I;16") or ";16" in encoding:
        return 16
    if image.mode == "I" and image.format == "PPM":
        return 16  # Pillow scales it by the largest value, which stands in the file
    return 32 if image.mode in ("I", "F") else 8


def convert_to_rgb(image: Image.Image, bit_depth: int | None = None) -> Image.Image:
    """Decodes an image and converts it to RGB with 8 bits; alpha is dropped.

    Args:
        image: The image, opened and not decoded yet.
        bit_depth: How many of its 16 bits a channel uses, if it has 16.

    Raises:
        ImageError: The range of the pixels is unknown, or a pixel is outside it.
    """
    bits = count_channel_bits(image)
    if bits == 32:
        raise ImageError(f"32-bit pixels of mode {image.mode}, whose range is unknown")
    depth = 16 if image.format == "PPM" or bits != 16 else bit_depth
    if depth is None:
        raise ImageError("16 bits a channel, and bit_depth does not say how many of them are used")
    if bits == 16 and image.mode[0] == "I":
        pixels = np.asarray(image).astype(np.int64)
        if pixels.max() >> depth:
            raise ImageError(f"a pixel of {pixels.max()}, too large for bit_depth={depth}")
        return Image.fromarray((pixels >> (depth - 8)).astype(np.uint8)).convert("RGB")
    if depth != 16:
        raise ImageError(f"16 bits in several channels: bit_depth={depth} is possible for gray images only")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def measure_16_bits(path: str | Path) -> int | None:
    """Returns the largest value of an image with 16 bits a channel, and None for other files.

    The value of an image with several channels is 0, because Pillow reads 8 of its bits only.
    """
    try:
        with warnings.catch_warnings(), open_regular(path, MAX_IMAGE_BYTES) as file:
            warnings.simplefilter("ignore")
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                if count_channel_bits(image) != 16 or image.format == "PPM":
                    return None
                return int(np.asarray(image).max()) if image.mode[0] == "I" else 0
    except (Exception, MemoryError):  # decoding will report the file
        return None


def preprocess_image(path: str | Path, preprocess: dict[str, Any]) -> np.ndarray:
    """Reads an image file as the network's input.

    Args:
        path: The image file.
        preprocess: The content of `preprocess.json`: the image is resized to `shorter_side`, and its center of `size`
            (height, width) is cut out.

    Returns:
        float32 of shape (3, height, width) in [0, 1].
    """
    image = decode_image(path, preprocess.get("bit_depth"))
    (height, width), shorter = preprocess["size"], preprocess["shorter_side"]
    smaller = min(image.size)
    scaled = [shorter if side == smaller else int(shorter * side / smaller) for side in image.size]
    if scaled[0] * scaled[1] > MAX_PIXELS:
        raise ImageError(f"{path} has {scaled[0]} x {scaled[1]} pixels when it is resized: too many")
    resampling = getattr(Image, "Resampling", Image)  # Pillow 9.1 moved the names
    image = image.resize((scaled[0], scaled[1]), getattr(resampling, preprocess["interpolation"].upper()))
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

        require_version("onnxruntime", onnxruntime.__version__, MIN_ONNXRUNTIME)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # errors are raised; it would print them too
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except PredictError:
        raise
    except Exception as error:  # its errors have no common base class
        raise PredictError(f"ONNX Runtime cannot load the model ({first_line(error)})") from error


def require_version(package: str, version: str, minimum: tuple[int, int]) -> None:
    """Raises `PredictError` if a package is older than the minimum."""
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < minimum:
        raise PredictError(f"{package} {version} is too old: {minimum[0]}.{minimum[1]} or newer is needed")


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, at most 160 characters, or its type's name if it has no text."""
    return str(error).strip().partition("\n")[0][:160] or type(error).__name__


def create_predictor(session: Any) -> Predictor:
    """Wraps an ONNX Runtime session as a function from images (n, 3, H, W) to logits (n, K).

    The function raises `PredictError` if the model cannot be run, or returns no numbers (n, K).

    Raises:
        PredictError: The model does not take one float32 tensor of images.
    """
    batch_size = get_input_shape(session)[0]
    name = session.get_inputs()[0].name

    def run(batch: np.ndarray) -> np.ndarray:
        try:
            logits = session.run(None, {name: batch})[0]
        except Exception as error:  # its errors have no common base class
            raise PredictError(f"ONNX Runtime cannot run the model ({first_line(error)})") from error
        if getattr(logits, "ndim", 0) != 2 or len(logits) != len(batch) or logits.dtype.kind != "f":
            found = f"{getattr(logits, 'dtype', type(logits).__name__)} {getattr(logits, 'shape', '')}"
            raise PredictError(f"the model returns {found} for {len(batch)} images; it must return numbers (n, K)")
        return logits

    return pad_batches(run, batch_size)


def get_input_shape(session: Any) -> list[int | None]:
    """Returns the shape (n, 3, H, W) of the images that a model takes; None for a size that may vary.

    Raises:
        PredictError: The model does not take one float32 tensor of images, or takes very many at a time.
    """
    inputs = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4:
        found = ", ".join(f"{entry.type} {entry.shape}" for entry in inputs[:3]) or "no input"
        raise PredictError(f"the model takes {found[:160]}; it must take images, tensor(float) (n, 3, height, width)")
    shape = [size if isinstance(size, int) else None for size in inputs[0].shape]
    batch = shape[0] if shape[0] is not None else 1
    if not 1 <= batch * (shape[2] or 1) * (shape[3] or 1) <= 64 * MAX_BATCH_PIXELS:
        raise PredictError(f"the model takes images of shape {inputs[0].shape}, which is too large")
    return shape


def check_input_size(session: Any, preprocess: dict[str, Any]) -> None:
    """Raises `PredictError` if a model takes images of another size than `preprocess.json` says."""
    expected = [3, *preprocess["size"]]
    given = get_input_shape(session)[1:]
    if any(size not in (None, wanted) for size, wanted in zip(given, expected)):
        shapes = [" x ".join("any" if size is None else str(size) for size in shape) for shape in (given, expected)]
        raise PredictError(f"the model takes images of {shapes[0]}, and {PREPROCESS_FILE} makes them {shapes[1]}")


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
    height, width = preprocess["size"]
    batch_size = max(1, min(BATCH_SIZE, MAX_BATCH_PIXELS // (height * width)))
    for k in range(0, len(paths), batch_size):
        results: dict[Path, np.ndarray | ImageError] = {}
        for path in paths[k : k + batch_size]:
            try:
                results[path] = preprocess_image(path, preprocess)
            except ImageError as error:
                results[path] = error
        images = {path: image for path, image in results.items() if isinstance(image, np.ndarray)}
        if images:
            results.update(zip(images, predictor(np.stack(list(images.values())))))
        yield from results.items()


def read_verified(folder: Path, name: str) -> bytes:
    """Reads a file of an export and compares its sha256 with the one in the model card.

    Raises:
        PredictError: The file is not listed in the card, or was changed after the export.
    """
    try:
        card = read_regular(folder / CARD_FILE, MAX_TEXT_BYTES).decode()
        content = read_regular(folder / name, MAX_MODEL_BYTES if name.endswith(".onnx") else MAX_TEXT_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise PredictError(f"{folder / name}: cannot be checked ({error})") from error
    checksums = {match[2]: match[1] for match in CHECKSUM_LINE.finditer(card)}
    if name not in checksums:
        files = ", ".join(checksums) or "no files"
        raise PredictError(f"{folder / name}: is not a file of this export, which has {files}")
    if hashlib.sha256(content).hexdigest() != checksums[name]:
        raise PredictError(f"{folder / name}: was changed after the export (its sha256 differs from {CARD_FILE})")
    return content


def read_export(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Reads `preprocess.json` and `labels.json`.

    Raises:
        PredictError: A file was changed, or has a field that is missing or wrong.
    """
    contents: list[Any] = []
    for name in (PREPROCESS_FILE, LABELS_FILE):
        try:
            contents.append(json.loads(read_verified(folder, name)))
        except (ValueError, RecursionError) as error:
            if isinstance(error, PredictError):
                raise
            raise PredictError(f"{folder / name}: is not valid JSON ({first_line(error)})") from error
    preprocess, labels = contents
    if not isinstance(preprocess, dict):
        raise PredictError(f"{folder / PREPROCESS_FILE}: must be an object, not a {type(preprocess).__name__}")
    size, depth = preprocess.get("size"), preprocess.get("bit_depth")
    checks = {
        "size": (
            isinstance(size, list) and len(size) == 2 and all(map(is_side, size)),
            f"two whole numbers from 1 to {MAX_SIDE}",
        ),
        "shorter_side": (is_side(preprocess.get("shorter_side")), f"a whole number from 1 to {MAX_SIDE}"),
        "interpolation": (
            preprocess.get("interpolation") in INTERPOLATIONS,
            f"one of {', '.join(INTERPOLATIONS)}",
        ),
        "bit_depth": (depth is None or (type(depth) is int and 8 <= depth <= 16), "null, or 8 to 16"),
    }
    for name, (is_valid, allowed) in checks.items():
        if not is_valid:
            value = str(preprocess.get(name))[:80]
            raise PredictError(f"{folder / PREPROCESS_FILE}: {name}={value}: must be {allowed}")
    if not (isinstance(labels, list) and len(labels) > 1 and all(isinstance(label, str) for label in labels)):
        raise PredictError(f"{folder / LABELS_FILE}: must be a list of two names or more")
    return preprocess, labels


def is_side(value: Any) -> bool:
    """Returns whether a value of `preprocess.json` is a number of pixels that is allowed."""
    return type(value) is int and 1 <= value <= MAX_SIDE


def is_image_file(folder: str, name: str) -> bool:
    """Whether a file has the name of an image, or no suffix and the first bytes of one; hidden files do not count."""
    if name.startswith("."):
        return False
    if "." in name:
        return name.lower().endswith(IMAGE_SUFFIXES)
    try:
        with open_regular(os.path.join(folder, name), MAX_IMAGE_BYTES) as file:
            return file.read(8).startswith(IMAGE_STARTS)
    except OSError:
        return False


def find_images(paths: list[str]) -> Iterator[Path]:
    """Yields the given files, and all image files below the given folders.

    A path or folder that cannot be opened is yielded too, so that reading it gives an error message.
    """
    for top in paths:
        files: list[Path] = []
        for parent, _, names in os.walk(top, onerror=lambda error, files=files: files.append(Path(error.filename))):
            images = (Path(parent, name) for name in names if is_image_file(parent, name))
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
    preprocess, labels = read_export(folder)
    session = create_session(read_verified(folder, model))
    check_input_size(session, preprocess)
    predictor = create_predictor(session)
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
        if len(logits) != len(labels):
            raise PredictError(f"{folder / model}: has {len(logits)} outputs, and {LABELS_FILE} {len(labels)} names")
        if not np.isfinite(logits).all():
            print(f"error: {escape_control_chars(path)}: the model's outputs are not finite numbers", file=sys.stderr)
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
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip())


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
    preprocess, _ = read_export(folder)
    height, width = preprocess["size"]
    size = (3, height, width)
    functions: dict[Any, Callable[[], object]] = {}
    for path, threads in [(path, threads) for path in sorted(folder.glob("*.onnx")) for threads in (1, 0)]:
        session = create_session(read_verified(folder, path.name), threads)
        check_input_size(session, preprocess)
        fixed = get_input_shape(session)[0]
        for batch in TIMED_BATCH_SIZES if fixed is None else (fixed,):
            if batch * height * width > MAX_BATCH_PIXELS and batch > 1:
                continue
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
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")  # a terminal may know ASCII only

    # The export is the first path if that is an export, otherwise the folder of this file.
    folder, paths = Path(__file__).parent, options.paths
    if paths and all(os.path.isfile(os.path.join(paths[0], name)) for name in (PREPROCESS_FILE, CARD_FILE)):
        folder, paths = Path(paths[0]), paths[1:]
    try:
        require_version("Pillow", PIL.__version__, MIN_PILLOW)
        if not (folder / PREPROCESS_FILE).is_file():
            raise PredictError(
                f"EXPORT_DIR={(paths or [''])[0]}: is not an export; `odcheap export JOB_DIR` writes one"
            )
        if options.bench:
            return benchmark_models(folder)
        return classify_images(folder, options.model, paths, options.json)
    except (PredictError, OSError) as error:
        line = str(error)
    except MemoryError:
        line = "not enough memory"
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        line = f"{folder}: its files do not fit together ({error!r})"
    print(f"error: {escape_control_chars(line)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
