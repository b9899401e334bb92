"""Classifies image files with an exported student: `python predict.py IMAGE_OR_FOLDER...`.

It needs Python 3.8, numpy 1.18, Pillow 9.0 and onnxruntime 1.14, or newer versions, and nothing else. An export folder
holds a copy of this file, which works there without odcheap and without PyTorch; `odcheap predict EXPORT_DIR
IMAGE_OR_FOLDER...` does the same from anywhere. Every image file is decoded, resized and cropped as in training.

`python predict.py --evaluate FOLDER` measures the accuracy on images of known classes, which lie in FOLDER/<class>/ or
FOLDER/test/<class>/.
"""

from __future__ import annotations

import argparse
import csv
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
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence

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
# Folders that file servers and archives leave beside images, such as thumbnails.
JUNK_FOLDERS = ("@eaDir", "__MACOSX", "#recycle", "@Recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information")
USAGE = "[-h] [--model FILE] [--json] [--bench] [EXPORT_DIR] IMAGE_OR_FOLDER..."
EVALUATION_USAGE = "--evaluate [--model FILE] [--json] [--csv FILE] [--known-only] [EXPORT_DIR] FOLDER"
PART_FOLDERS = ("test", "val", "train")  # of a data set; the images of `test` are evaluated
NOT_PREDICTED = -1  # instead of the predicted class of an image that cannot be read
NORMAL_95 = 1.959964  # standard deviations around the mean that hold 95 % of a normal distribution
NO_TRAINING_LIST = "an export does not know on which images its student was trained; odcheap evaluate RUN names them"
MAX_SHOWN_CLASSES, MAX_SHOWN_NAME = 20, 24  # of a confusion matrix that is printed
BATCH_SIZE = 32  # images that are in memory at the same time
TIMED_BATCH_SIZES = (1, 64)
TIMING_ROUNDS, FEWEST_ROUNDS = 15, 5
TIMING_PAUSE = 0.02  # seconds before each timing, in which the threads of the previous session become idle

Predictor = Callable[[np.ndarray], np.ndarray]  # images (n, 3, H, W) in [0, 1] -> logits (n, K)


class PredictError(ValueError):
    """An error that the user can correct; its text is one line."""


class ImageError(PredictError):
    """An error about one image: it cannot be decoded, or its logits are not finite numbers."""


class LabeledImages(NamedTuple):
    """Image files whose classes are known, as `list_labeled_images` finds them.

    Attributes:
        folder: The folder that contains the class folders.
        files: The image files.
        target: The label of each file: the position of its class in the list of all classes.
        left_out: Lines of text about files that are not images, and about folders that are not classes.
    """

    folder: Path
    files: list[Path]
    target: list[int]
    left_out: list[str]


class Export(NamedTuple):
    """A network that was exported to ONNX, as `load_export` loads it.

    Attributes:
        preprocess: The content of `preprocess.json`, which says how images are resized and cropped.
        classes: The names of the K classes, in the order of the logits.
        predictor: A function that maps any number of images (n, C, H, W) in [0, 1] to logits (n, K).
        batch_size: The number of images that the ONNX file takes at a time; None if it takes any number.
    """

    preprocess: dict[str, Any]
    classes: list[str]
    predictor: Predictor
    batch_size: int | None


class Timing(NamedTuple):
    """How long one call of a function takes, measured in several rounds of calls by `time_alternately`.

    Attributes:
        p50: The median time of a call, in seconds.
        p95: The 95th percentile of the times, in seconds.
        p25: The first quartile, in seconds; NaN if it is not known.
        p75: The third quartile, in seconds; NaN if it is not known.
        rounds: For each round, the median time of a call, in seconds.
        running: The fraction of the time in which the calling thread was running; NaN if it is not known. It is below 1
            if the thread waited for other threads of the process, or for a core that other programs used.
    """

    p50: float
    p95: float
    p25: float = float("nan")
    p75: float = float("nan")
    rounds: tuple[float, ...] = ()
    running: float = float("nan")


def open_regular(path: str | Path, max_bytes: int) -> io.BufferedReader:
    """Opens a regular file for reading bytes.

    Args:
        path: The file.
        max_bytes: The largest size that the file may have, in bytes.

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
    """Returns the content of a regular file.

    Args:
        path: The file.
        max_bytes: The largest size that the file may have, in bytes.

    Raises:
        OSError: There is no such file, it is a folder, pipe, device or socket, or it has more than `max_bytes`.
    """
    with open_regular(path, max_bytes) as file:
        # Python reserves memory for all bytes that are asked for, which takes long if these are `max_bytes`. Virtual
        # files have the size 0, whatever they contain.
        return file.read(min(os.fstat(file.fileno()).st_size or max_bytes, max_bytes))


def decode_image(
    path: str | Path, bit_depth: int | None = None, prepare: Callable[[Image.Image], None] | None = None
) -> Image.Image:
    """Decodes an image file as RGB, and rotates the image as its EXIF data say; all other metadata is ignored.

    Args:
        path: The file.
        bit_depth: How many bits of a channel are used if the image has 16 bits a channel (12 for most microscopes and
            X-rays). With None, such an image is an error, unless its file says its range, as PPM does.
        prepare: A function that is called with the opened image before it is decoded. The training uses it to decode
            large JPEGs at a reduced size. None to call nothing.

    Raises:
        ImageError: The file cannot be decoded completely, the range of its pixels is not known, or one side of the
            image is more than 100 times as long as the other side.
    """
    try:
        content = read_regular(path, MAX_IMAGE_BYTES)
    except (OSError, ValueError, MemoryError) as error:  # ValueError: a NUL in the path
        reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        raise ImageError(f"{path} cannot be read as an image ({reason})") from error
    return decode_content(content, path, bit_depth, prepare)


def decode_content(
    content: bytes,
    name: object,
    bit_depth: int | None = None,
    prepare: Callable[[Image.Image], None] | None = None,
) -> Image.Image:
    """Decodes the bytes of an image file as RGB, and rotates the image as its EXIF data say.

    Args:
        content: The bytes of the file.
        name: The name or path of the image, for error messages.
        bit_depth: How many bits of a channel are used if the image has 16 bits a channel. With None, such an image is
            an error.
        prepare: A function that is called with the opened image before it is decoded. None to call nothing.

    Raises:
        ImageError: The image cannot be decoded completely, the range of its pixels is not known, or one side of the
            image is more than 100 times as long as the other side.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd EXIF data and of very many pixels; only errors matter
            with Image.open(io.BytesIO(drop_metadata(content)), formats=IMAGE_FORMATS) as image:
                if prepare is not None:
                    prepare(image)
                rgb = convert_to_rgb(image, bit_depth)
                rotation = find_rotation(image)
                rgb = rgb if rotation is None else rgb.transpose(rotation)
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} cannot be read as an image ({describe_unknown(content)})") from error
    except (Exception, MemoryError) as error:  # Pillow's many readers raise errors of every kind on damaged files
        raise ImageError(f"{name} cannot be read as an image ({first_line(error)})") from error
    if max(rgb.size) > MAX_ASPECT_RATIO * min(rgb.size):
        raise ImageError(f"{name} has {rgb.width} x {rgb.height} pixels: too narrow to be resized to a square")
    return rgb


def drop_metadata(content: bytes) -> bytes:
    """Removes metadata from the bytes of a PNG file, except EXIF data and what the pixels need.

    The bytes of files in other formats are returned unchanged.
    """
    # Pillow refuses a PNG because of a very long text chunk or color profile, although its pixels are complete.
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
    """Returns the argument for Pillow's `Image.transpose` that rotates an image as its EXIF data say; None for no
    rotation.
    """
    names: Any = getattr(Image, "Transpose", Image)  # Pillow 9.1 moved them
    turns = {2: names.FLIP_LEFT_RIGHT, 3: names.ROTATE_180, 4: names.FLIP_TOP_BOTTOM, 5: names.TRANSPOSE}
    turns.update({6: names.ROTATE_270, 7: names.TRANSVERSE, 8: names.ROTATE_90})
    try:
        return turns.get(image.getexif().get(ORIENTATION))
    except Exception:  # damaged metadata; Pillow raises errors of every kind
        return None


def describe_unknown(content: bytes) -> str:
    """Returns the reason why bytes cannot be read as an image, for a message.

    If the format is known, such as HEIC, the text says how to convert the file.
    """
    if content[4:8] == b"ftyp" and content[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "HEIC: convert it to JPEG or PNG"
    if content[:2] == b"%!" or content[:4] == b"\xc5\xd0\xd3\xc6":
        return "PostScript, which is a program: convert it to PNG"
    return f"its content is none of {', '.join(IMAGE_FORMATS)}"


def count_channel_bits(image: Any) -> int:
    """Returns how many bits (8, 16 or 32) each channel of an image has; the image is opened but not decoded yet."""
    encoding = str([entry[-1] for entry in image.tile])
    if image.mode.startswith("I;16") or ";16" in encoding:
        return 16
    if image.mode == "I" and image.format == "PPM":
        return 16  # Pillow scales it by the largest value, which stands in the file
    return 32 if image.mode in ("I", "F") else 8


def convert_to_rgb(image: Image.Image, bit_depth: int | None = None) -> Image.Image:
    """Decodes an image and converts it to RGB with 8 bits a channel; an alpha channel is dropped.

    Args:
        image: The image, which is opened but not decoded yet.
        bit_depth: How many bits of a channel are used if the image has 16 bits a channel; None if that is not known.

    Raises:
        ImageError: The range of the pixels is not known, or a pixel is outside of it.
    """
    # A file does not say which range its pixels have if they have more than 8 bits.
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


def convert_channels(image: Image.Image, channels: int) -> Image.Image:
    """Converts a decoded image to gray (29.9 % red, 58.7 % green, 11.4 % blue) if `channels` is 1, otherwise to RGB."""
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def measure_16_bits(path: str | Path) -> int | None:
    """Returns the largest pixel of an image file with 16 bits a channel; None if the file is no such image.

    For an image with several channels the result is 0, since Pillow reads only 8 of the 16 bits.
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
    """Decodes an image file, then resizes and crops the image as the network needs it.

    Args:
        path: The image file.
        preprocess: The content of `preprocess.json`. The shorter side is resized to `shorter_side` pixels, and the
            center of `size` (height, width) is cropped.

    Returns:
        The image, (C, height, width), float32 in [0, 1]; C is 3 (RGB), or 1 (gray) if `channels` is 1.

    Raises:
        ImageError: The file cannot be decoded, or the resized image would be too large.
    """
    return resize_image(decode_image(path, preprocess.get("bit_depth")), preprocess, path)


def resize_image(image: Image.Image, preprocess: dict[str, Any], name: object) -> np.ndarray:
    """Resizes and crops a decoded image as the network needs it.

    Args:
        image: The image, RGB or gray.
        preprocess: The content of `preprocess.json`, see `preprocess_image`.
        name: The name or path of the image, for error messages.

    Returns:
        float32 of shape (C, height, width) in [0, 1].

    Raises:
        ImageError: The resized image would have too many pixels.
    """
    (height, width), shorter = preprocess["size"], preprocess["shorter_side"]
    image = convert_channels(image, preprocess.get("channels", 3))
    smaller = min(image.size)
    scaled = [shorter if side == smaller else int(shorter * side / smaller) for side in image.size]
    if scaled[0] * scaled[1] > MAX_PIXELS:
        raise ImageError(f"{name} has {scaled[0]} x {scaled[1]} pixels when it is resized: too many")
    resampling = getattr(Image, "Resampling", Image)  # Pillow 9.1 moved the names
    image = image.resize((scaled[0], scaled[1]), getattr(resampling, preprocess["interpolation"].upper()))
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32).reshape(height, width, -1)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)) / np.float32(255)


def create_session(model: bytes, threads: int = 0) -> Any:
    """Creates a session of ONNX Runtime, which runs a model on the CPU.

    Args:
        model: The content of an ONNX file.
        threads: The number of threads; 0 to use all cores.

    Raises:
        PredictError: The model cannot be loaded, or ONNX Runtime is missing or too old.
    """
    try:
        import onnxruntime  # here, because decoding images does not need it

        require_version("onnxruntime", onnxruntime.__version__, MIN_ONNXRUNTIME)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # errors are raised; it would print them too
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except PredictError:  # the installed version is too old
        raise
    except Exception as error:  # its errors have no common base class
        raise PredictError(f"ONNX Runtime cannot load the model ({first_line(error)})") from error


def require_version(package: str, version: str, minimum: tuple[int, int]) -> None:
    """Raises `PredictError` if the installed version of a package is too old.

    Args:
        package: The name of the package, for the message.
        version: The installed version, such as "1.14.1".
        minimum: The oldest version that is accepted, as (major, minor).
    """
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < minimum:
        raise PredictError(f"{package} {version} is too old: {minimum[0]}.{minimum[1]} or newer is needed")


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, cut to 160 characters; the name of its class if it has no text."""
    return str(error).strip().partition("\n")[0][:160] or type(error).__name__


def create_predictor(session: Any) -> Predictor:
    """Returns a function that classifies images with ONNX Runtime: images (n, C, H, W) -> logits (n, K).

    The function raises `PredictError` if the model cannot be run, or if its output is not an array (n, K) of floats.

    Args:
        session: The session of ONNX Runtime; `create_session` creates it.

    Raises:
        PredictError: The model takes something else than one float32 tensor of images.
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
    """Returns the shape [n, C, H, W] of the images that an ONNX model takes; None stands for a dimension that may vary.

    Args:
        session: The session of ONNX Runtime; `create_session` creates it.

    Raises:
        PredictError: The model takes something else than one float32 tensor of images, or too many images at a time.
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


def pad_batches(run: Predictor, batch_size: int | None) -> Predictor:
    """Returns a function that takes any number of images, although `run` takes exactly `batch_size` images.

    The images are divided into batches. Copies of the last image fill the last batch; their logits are dropped.

    Args:
        run: A function that maps images (batch_size, C, H, W) to logits (batch_size, K).
        batch_size: The number of images that `run` takes. If it takes any number, pass None; `run` itself is then
            returned.
    """
    if batch_size is None:
        return run

    def predict(images: np.ndarray) -> np.ndarray:
        padded = np.concatenate([images, np.repeat(images[-1:], -len(images) % batch_size, axis=0)])
        return np.concatenate([run(batch) for batch in np.split(padded, len(padded) // batch_size)])[: len(images)]

    return predict


def predict_files(
    predictor: Predictor, paths: Iterable[Path], preprocess: dict[str, Any]
) -> Iterator[tuple[Path, np.ndarray | ImageError]]:
    """Classifies image files. Yields the path of each file with its logits (K,), or with an `ImageError` if it is
    unreadable.

    Args:
        predictor: A function that maps images (n, C, H, W) to logits (n, K), as `create_predictor` returns it.
        paths: The image files.
        preprocess: The content of the export's `preprocess.json`, which says how images are resized and cropped.
    """
    return predict_images(predictor, ((path, try_preprocess(path, preprocess)) for path in paths), preprocess)


def try_preprocess(path: Path, preprocess: dict[str, Any]) -> np.ndarray | ImageError:
    """Does the same as `preprocess_image`, but returns the `ImageError` if there is one, and does not raise it.

    Args:
        path: The image file.
        preprocess: The content of the export's `preprocess.json`, which says how images are resized and cropped.
    """
    try:
        return preprocess_image(path, preprocess)
    except ImageError as error:
        return error


def predict_images(
    predictor: Predictor, images: Iterable[tuple[Any, np.ndarray | ImageError]], preprocess: dict[str, Any]
) -> Iterator[tuple[Any, np.ndarray | ImageError]]:
    """Classifies images in batches, and yields the name of each image with its logits (K,).

    Args:
        predictor: A function that maps images (n, C, H, W) to logits (n, K), as `create_predictor` returns it.
        images: Pairs of a name and an image (C, height, width), which `preprocess_image` has prepared. If the image
            could not be read, the pair contains an `ImageError` in its place, which is yielded in place of the logits.
        preprocess: The content of the export's `preprocess.json`. Its `size` limits how many images are in a batch.
    """
    # Large images are classified in smaller batches, so that they fit into memory.
    height, width = preprocess["size"]
    batch_size = max(1, min(BATCH_SIZE, MAX_BATCH_PIXELS // (height * width)))
    remaining = iter(images)
    while batch := list(islice(remaining, batch_size)):
        readable = [image for _, image in batch if isinstance(image, np.ndarray)]
        logits = iter(predictor(np.stack(readable)) if readable else ())
        for name, image in batch:
            yield name, next(logits) if isinstance(image, np.ndarray) else image


def check_logits(name: object, logits: np.ndarray | ImageError) -> np.ndarray | ImageError:
    """Returns the logits of an image unchanged, or an `ImageError` if they contain NaN or infinity.

    Args:
        name: The name of the image, for the message.
        logits: The logits (K,). An `ImageError` in their place, as `predict_images` yields it, is returned unchanged.
    """
    if isinstance(logits, ImageError) or np.isfinite(logits).all():
        return logits
    return ImageError(f"{name}: the model's outputs are not finite numbers")


def read_verified(folder: Path, name: str) -> bytes:
    """Reads a file of an export, and checks that it is unchanged: the model card lists the SHA-256 of each file.

    Args:
        folder: The folder of an export, which `odcheap export` has written.
        name: The name of the file.

    Returns:
        The content of the file.

    Raises:
        PredictError: The model card does not list the file, the file was changed after the export, or it cannot be
            read.
    """
    try:
        card = read_regular(folder / CARD_FILE, MAX_TEXT_BYTES).decode()
        content = read_regular(folder / name, MAX_MODEL_BYTES if name.endswith((".onnx", ".pte")) else MAX_TEXT_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise PredictError(f"{folder / name}: cannot be checked ({error})") from error
    checksums = {match[2]: match[1] for match in CHECKSUM_LINE.finditer(card)}
    if name not in checksums:
        files = ", ".join(checksums) or "no files"
        raise PredictError(f"{folder / name}: is not a file of this export, which has {files}")
    if hashlib.sha256(content).hexdigest() != checksums[name]:
        raise PredictError(f"{folder / name}: was changed after the export (its sha256 differs from {CARD_FILE})")
    return content


def is_export(folder: str | Path) -> bool:
    """Returns whether a folder contains `preprocess.json` and a model card, as each folder of `odcheap export` does."""
    return all(os.path.isfile(os.path.join(folder, name)) for name in (PREPROCESS_FILE, CARD_FILE))


def read_export(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Reads and checks `preprocess.json` and `labels.json` of an export.

    Args:
        folder: The folder that `odcheap export` has written.

    Returns:
        The content of `preprocess.json`, a dict that says how images are resized and cropped (see `preprocess_image`),
        and the names of the classes in the order of the logits.

    Raises:
        PredictError: A file was changed after the export, or a field of it is missing or wrong.
    """
    # The checksums show changes by accident, but a stranger may have computed them: the values are checked, too.
    preprocess, labels = (read_verified_json(folder, name) for name in (PREPROCESS_FILE, LABELS_FILE))
    if not isinstance(preprocess, dict):
        raise PredictError(f"{folder / PREPROCESS_FILE}: must be an object, not a {type(preprocess).__name__}")
    preprocess.setdefault("channels", 3)
    size, depth = preprocess.get("size"), preprocess.get("bit_depth")
    is_size = isinstance(size, list) and len(size) == 2 and all(map(is_side, size))
    checks = {
        "channels": (preprocess["channels"] in (1, 3), "1 or 3"),
        "size": (is_size, f"two whole numbers from 1 to {MAX_SIDE}"),
        "shorter_side": (is_side(preprocess.get("shorter_side")), f"a whole number from 1 to {MAX_SIDE}"),
        "interpolation": (preprocess.get("interpolation") in INTERPOLATIONS, f"one of {', '.join(INTERPOLATIONS)}"),
        "bit_depth": (depth is None or (type(depth) is int and 8 <= depth <= 16), "null, or 8 to 16"),
    }
    for name, (is_valid, allowed) in checks.items():
        if not is_valid:
            value = str(preprocess.get(name))[:80]
            raise PredictError(f"{folder / PREPROCESS_FILE}: {name}={value}: must be {allowed}")
    if not (isinstance(labels, list) and len(labels) > 1 and all(isinstance(label, str) for label in labels)):
        raise PredictError(f"{folder / LABELS_FILE}: must be a list of two names or more")
    return preprocess, labels


def read_verified_json(folder: Path, name: str) -> Any:
    """Returns the content of a JSON file of an export, after its SHA-256 is checked as in `read_verified`."""
    content = read_verified(folder, name)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise PredictError(f"{folder / name}: is not valid JSON ({first_line(error)})") from error


def is_side(value: Any) -> bool:
    """Returns whether a value in `preprocess.json` is a valid side of an image: a whole number from 1 to 4096."""
    return type(value) is int and 1 <= value <= MAX_SIDE


def load_export(folder: Path, model: str, threads: int = 0) -> Export:
    """Loads an ONNX file of an export with ONNX Runtime.

    Args:
        folder: The folder that `odcheap export` has written.
        model: The name of the ONNX file.
        threads: The number of threads; 0 to use all cores.

    Raises:
        PredictError: A file is missing, was changed after the export, or does not fit the other files.
    """
    preprocess, classes = read_export(folder)
    session = create_session(read_verified(folder, model), threads)
    batch_size, *given = get_input_shape(session)
    expected = [preprocess["channels"], *preprocess["size"]]
    if any(size not in (None, wanted) for size, wanted in zip(given, expected)):
        shapes = [" x ".join("any" if size is None else str(size) for size in shape) for shape in (given, expected)]
        raise PredictError(f"the model takes images of {shapes[0]}, and {PREPROCESS_FILE} makes them {shapes[1]}")
    run = create_predictor(session)

    def predict(images: np.ndarray) -> np.ndarray:
        logits = run(images)
        if logits.shape[1] != len(classes):
            names = f"{LABELS_FILE} {len(classes)} names"
            raise PredictError(f"{folder / model}: has {logits.shape[1]} outputs, and {names}")
        return logits

    return Export(preprocess, classes, predict, batch_size)


def is_image_file(folder: str, name: str) -> bool:
    """Returns whether a file looks like an image: by its suffix, or by its first bytes if it has no suffix.

    Args:
        folder: The folder of the file.
        name: The name of the file. A name that begins with a period (a hidden file) is never an image.
    """
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
    """Yields the path of each image file that is given, or is in a given folder or in a folder below it.

    A path that cannot be opened is yielded too, so that the caller reports an error when it reads the path.
    """
    for top in paths:
        failed: list[Path] = []  # among them `top`, if it is a file
        images, _ = list_images(top, lambda error, failed=failed: failed.append(Path(error.filename)))
        yield from sorted([*failed, *(Path(top, name) for name in images)])


def list_images(top: str, report: Callable[[OSError], object] | None = None) -> tuple[list[str], list[str]]:
    """Lists the files in a folder and in all folders below it, and separates images from other files.

    Hidden files, which begin with a period, are left out. Links to folders are not followed. A link that leads nowhere
    counts as an image if its name has the suffix of an image, so that the reader of the image reports it.

    Args:
        top: The folder.
        report: A function that is called with the error if a folder cannot be listed. None to raise the error.

    Returns:
        Two sorted lists of paths relative to `top`: the image files, and everything else. The second list contains
        other files, and, with "/" at the end, the folders of `JUNK_FOLDERS` (such as thumbnails).
    """
    images, others, folders = [], [], [""]
    while folders:
        below = folders.pop()
        try:
            entries = [entry for entry in os.scandir(os.path.join(top, below)) if entry.name[0] != "."]
        except OSError as error:
            if report is None:
                raise
            report(error)
            continue
        for entry in entries:
            name = os.path.join(below, entry.name)
            is_dead_link = entry.is_symlink() and not os.path.exists(entry.path)
            if entry.is_dir(follow_symlinks=False) and entry.name in JUNK_FOLDERS:
                others.append(f"{name}/")
            elif entry.is_dir(follow_symlinks=False):
                folders.append(name)
            elif (entry.is_file() or is_dead_link) and is_image_file(os.path.join(top, below), entry.name):
                images.append(name)
            else:  # also a pipe, a device or a socket
                others.append(name)
    return sorted(images), sorted(others)


def list_folders(folder: str | Path) -> list[str]:
    """Returns the sorted names of the folders in a folder, without hidden ones and those that file servers create."""
    names = (entry.name for entry in os.scandir(folder) if entry.is_dir())
    return sorted(name for name in names if name[0] != "." and name not in JUNK_FOLDERS)


def escape_control_chars(text: object) -> str:
    r"""Returns text that is safe to print: control characters and line ends are replaced by visible escapes.

    Example:
        >>> escape_control_chars("two\nlines")
        'two\\nlines'
    """
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(text))


def classify_images(export: Export, paths: list[str], as_json: bool) -> int:
    """Classifies images, and prints the most likely classes of each image with their probabilities.

    Args:
        export: The network; `load_export` loads it.
        paths: Image files, and folders with images.
        as_json: If true, JSON with the most likely class is printed; otherwise a table with the three most likely
            classes.

    Returns:
        The exit status: 1 if an image could not be classified, otherwise 0.
    """
    files = list(dict.fromkeys(find_images(paths)))
    if not files:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES)[:6])
        raise PredictError(f"{', '.join(paths)}: no images found ({suffixes}, ...)")

    # An image that cannot be read is named, and the others are classified.
    rows = []
    for path, logits in predict_files(export.predictor, files, export.preprocess):
        logits = check_logits(path, logits)
        if isinstance(logits, ImageError):
            print(f"error: {escape_control_chars(logits)}", file=sys.stderr)
        else:
            rows.append((path, rank_classes(logits, export.classes, 3)))
    if as_json:
        results = [{"path": str(path), "label": top[0][0], "probability": top[0][1]} for path, top in rows]
        print(json.dumps(results, indent=1))
    else:
        cells = [(str(path), *(f"{label} {probability:.3f}" for label, probability in top)) for path, top in rows]
        print_table([tuple(map(escape_control_chars, row)) for row in cells])
    return int(len(rows) < len(files))


def rank_classes(logits: np.ndarray, classes: Sequence[str], count: int) -> list[tuple[str, float]]:
    """Returns the most likely classes with their probabilities (softmax of the logits), the most likely one first.

    Args:
        logits: The logits of an image, (K,); they must be finite.
        classes: The names of the K classes.
        count: The largest number of classes to return.

    Example:
        >>> rank_classes(np.array([-90.0, 90.0]), ["cat", "dog"], 1)
        [('dog', 1.0)]
    """
    probabilities = np.exp(logits.astype(np.float64) - logits.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")[:count]
    return [(classes[k], float(probabilities[k])) for k in order]


def list_labeled_images(top: str | Path, classes: Sequence[str], known_only: bool = False) -> LabeledImages:
    """Lists images of known classes: `top` contains a folder for each class, with the name of the class.

    If `top` contains no such folder but a folder `test`, the class folders are looked for in `test`.

    Args:
        top: The folder.
        classes: The names of all classes, in the order of the labels.
        known_only: If true, a folder that does not have the name of a class is left out; otherwise it is an error.

    Raises:
        PredictError: There are no class folders or no images in them, or a folder does not have the name of a class.
    """
    folder = Path(top)
    files: list[Path] = []
    target: list[int] = []
    try:
        names = list_folders(folder)
        if "test" in names and not set(names).intersection(classes):
            folder = folder / "test"
            names = list_folders(folder)
        known = [name for name in names if name in classes]
        unknown = [name for name in names if name not in classes]
        others = [name for name in sorted(os.listdir(folder)) if is_image_file(str(folder), name)]
        for name in known:
            images, rest = list_images(str(folder / name))
            files += [folder / name / image for image in images]
            target += [classes.index(name)] * len(images)
            others += [f"{name}/{other}" for other in rest if not other.endswith("/")]
    except OSError as error:
        raise PredictError(f"{error.filename or folder}: cannot be read ({error.strerror})") from error
    if not known:
        parts = [name for name in PART_FOLDERS if name in names]
        hint = f"; name the folder of a part, such as {folder / parts[0]}" if parts else ""
        raise PredictError(
            f"{folder}: must have folders that are named like the classes ({list_names(classes)}), and has "
            f"{list_names(names) or 'no folders'}{hint}"
        )
    if unknown and not known_only:
        raise PredictError(
            f"{folder}: its folder {unknown[0]} is none of the {len(classes)} classes ({list_names(classes)}); "
            "--known-only leaves such folders out"
        )
    if not files:
        raise PredictError(f"{folder}: no images found in the folders of its classes")
    kinds = (
        ([f"{name}/" for name in unknown], "folders that are no class"),
        (others, "files that are no image or are in no class's folder"),
    )
    left_out = [f"left out: {what} ({len(names):,}): {list_names(names)}" for names, what in kinds if names]
    return LabeledImages(folder, files, target, left_out)


def list_names(names: Sequence[str]) -> str:
    """Returns the first three names of a list as one text for messages, followed by "..." if there are more names."""
    return ", ".join([name[:40] for name in names[:3]] + ["..."] * (len(names) > 3))


def collect_predictions(results: Iterable[tuple[Any, np.ndarray | ImageError]]) -> tuple[list[int], list[str]]:
    """Returns the predicted label of each image.

    Args:
        results: Pairs of an image's name and its logits (K,), or an `ImageError` in place of the logits; see
            `predict_files`.

    Returns:
        Two lists: the predicted label of each image, which is -1 if it could not be classified, and a line of text
        about each image that could not be classified.
    """
    predicted, failures = [], []
    for name, logits in results:
        logits = check_logits(name, logits)
        if isinstance(logits, ImageError):
            failures.append(str(logits))
            predicted.append(NOT_PREDICTED)
        else:
            predicted.append(int(logits.argmax()))
    return predicted, failures


def count_confusion(target: Sequence[int], predicted: Sequence[int], classes: int) -> np.ndarray:
    """Returns the confusion matrix (K, K): the number of images by true class (rows) and predicted class (columns).

    Args:
        target: The true label of each image, from 0 to K - 1.
        predicted: The predicted label of each image; an image with -1 is not counted.
        classes: The number of classes, K.

    Example:
        >>> count_confusion([0, 0, 1, 1], [0, 1, 1, -1], classes=2).tolist()
        [[1, 1], [0, 1]]
    """
    counts = np.zeros((classes, classes), np.int64)
    true, answers = np.array(target, np.int64), np.array(predicted, np.int64)
    np.add.at(counts, (true[answers != NOT_PREDICTED], answers[answers != NOT_PREDICTED]), 1)
    return counts


def compute_interval(correct: int, images: int) -> tuple[float, float]:
    """Returns the limits of the 95 % confidence interval of an accuracy, as fractions.

    It is Wilson's score interval, which also suits few images. Source: E. B. Wilson, "Probable inference, the law of
    succession, and statistical inference", 1927.

    Args:
        correct: The number of images that are classified correctly.
        images: The number of all images, 1 or more.

    Example:
        >>> [round(limit, 3) for limit in compute_interval(9, 10)]
        [0.596, 0.982]
    """
    share, z2 = correct / images, NORMAL_95**2
    center = (share + z2 / (2 * images)) / (1 + z2 / images)
    half = NORMAL_95 / (1 + z2 / images) * (share * (1 - share) / images + z2 / (4 * images**2)) ** 0.5
    # At the ends the formula is exact, and only rounding leaves [0, 1].
    return 0.0 if correct == 0 else center - half, 1.0 if correct == images else center + half


def summarize_confusion(counts: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Computes accuracies from a confusion matrix.

    Args:
        counts: The number of images, (K, K), by true class (rows) and predicted class (columns); 1 or more in all.
        classes: The names of the K classes.

    Returns:
        A dict with these keys. Accuracies are fractions; intervals are lists of two limits, at 95 %.

        - `images` and `correct`: the number of all images, and of those that are classified correctly.
        - `top1` and `top1_interval`: the accuracy.
        - `balanced_accuracy`: the mean recall of the classes that have images.
        - `largest_class`: a dict with the `name` of the class with the most images, its number of `images`, and its
          `share` of all images, which is the accuracy of always predicting this class.
        - `classes`: for each class, by its name, a dict with `images`, `correct`, `recall`, `recall_interval` (None for
          a class without images) and `predicted`, the number of images of any class that are classified as this class.
    """
    counts = np.asarray(counts)
    figures = summarize_counts(counts.sum(1).tolist(), counts.diagonal().tolist(), classes)
    for name, predicted in zip(classes, counts.sum(0).tolist()):
        figures["classes"][name]["predicted"] = predicted
    return figures


def summarize_counts(of_class: Sequence[int], correct: Sequence[int], classes: Sequence[str]) -> dict[str, Any]:
    """Computes accuracies from the number of images and of correct predictions of each class.

    Args:
        of_class: The number of images of each class; 1 or more in all.
        correct: The number of correctly classified images of each class.
        classes: The names of the classes.

    Returns:
        The same dict as `summarize_confusion`, but without `predicted` in the entries of `classes`.
    """
    images, right, most = sum(of_class), sum(correct), max(of_class)
    by_class: dict[str, Any] = {}
    for name, there, hits in zip(classes, of_class, correct):
        recall, interval = (hits / there, list(compute_interval(hits, there))) if there else (None, None)
        by_class[name] = {"images": there, "correct": hits, "recall": recall, "recall_interval": interval}
    return {
        "images": images,
        "correct": right,
        "top1": right / images,
        "top1_interval": list(compute_interval(right, images)),
        "balanced_accuracy": statistics.mean(hits / there for there, hits in zip(of_class, correct) if there),
        "largest_class": {"name": classes[of_class.index(most)], "images": most, "share": most / images},
        "classes": by_class,
    }


def percent(fraction: float) -> str:
    """Returns a fraction in percent as text with two decimals, without a percent sign."""
    return f"{100 * fraction:.2f}"


def describe_guessing(figures: dict[str, Any]) -> str:
    """Returns a line of text that compares a network's accuracy with that of always predicting the largest class.

    Args:
        figures: The accuracies, as `summarize_counts` returns them.
    """
    low, name, share = figures["top1_interval"][0], figures["largest_class"]["name"], figures["largest_class"]["share"]
    verdict = ""
    if figures["top1"] <= share:
        verdict = "; the student is not better than that"
    elif low <= share:
        verdict = "; so few images do not show that the student is better"
    return f"always answering {name} would give {percent(share)} %, no other class more{verdict}"


def describe_accuracy(figures: dict[str, Any]) -> list[str]:
    """Returns lines of text that describe how accurate a network is.

    They state the accuracies, the accuracy of always predicting the largest class, and the classes that are never
    classified correctly.

    Args:
        figures: The accuracies, as `summarize_confusion` returns them.
    """
    low, high = figures["top1_interval"]
    entries = figures["classes"].items()
    lines = [
        f"top-1 {percent(figures['top1'])} % (95 % interval {percent(low)} to {percent(high)}): "
        f"{figures['correct']:,} of {figures['images']:,} images; "
        f"balanced accuracy {percent(figures['balanced_accuracy'])} %",
        describe_guessing(figures),
    ]
    answers = [name for name, entry in entries if entry["predicted"]]
    if len(answers) == 1:
        lines.append(f"every image was classified as {answers[0]}")
    never = [name for name, entry in entries if entry["images"] and not entry["correct"]]
    absent = [name for name, entry in entries if not entry["images"]]
    kinds = ((never, "classes of which no image is classified correctly"), (absent, "classes that have no images here"))
    return lines + [f"{what} ({len(names)}): {list_names(names)}" for names, what in kinds if names]


def tabulate_classes(counts: np.ndarray, figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """Returns a table of the classes: recall with its interval, and the other class that is predicted most often.

    Args:
        counts: The confusion matrix, (K, K); see `count_confusion`.
        figures: The accuracies of this matrix, as `summarize_confusion` returns them.

    Returns:
        The rows as tuples of texts: first the names of the columns, then a row for each class.
    """
    names = list(figures["classes"])
    header = ("class", "images", "correct", "recall, %", "95 % interval", "predicted", "most often taken for")
    rows: list[tuple[str, ...]] = [header]
    for k, (name, entry) in enumerate(figures["classes"].items()):
        wrong = np.array(counts[k])
        wrong[k] = 0
        other = f"{names[int(wrong.argmax())]} ({wrong.max()})" if wrong.any() else ""
        recall = percent(entry["recall"]) if entry["images"] else "-"
        interval = " to ".join(map(percent, entry["recall_interval"])) if entry["images"] else "-"
        numbers = str(entry["images"]), str(entry["correct"]), recall, interval, str(entry["predicted"])
        rows.append((name, *numbers, other))
    return rows


def tabulate_confusion(counts: np.ndarray, classes: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns a confusion matrix as the rows of a CSV file.

    Args:
        counts: The confusion matrix, (K, K); see `count_confusion`.
        classes: The names of the K classes.

    Returns:
        The rows as tuples of texts: first the names of the predicted classes, then for each true class its name and its
        row.
    """
    rows = [(name, *map(str, row)) for name, row in zip(classes, np.asarray(counts).tolist())]
    return [("true \\ predicted", *classes), *rows]


def print_evaluation(counts: np.ndarray, figures: dict[str, Any]) -> None:
    """Prints the accuracy, a table of the classes and, if there are 20 classes or fewer, the confusion matrix.

    Args:
        counts: The confusion matrix, (K, K); see `count_confusion`.
        figures: The accuracies of this matrix, as `summarize_confusion` returns them.
    """
    for line in describe_accuracy(figures):
        print(escape_control_chars(line))
    tables = [tabulate_classes(counts, figures)]
    if len(counts) <= MAX_SHOWN_CLASSES:
        tables.append(tabulate_confusion(counts, list(figures["classes"])))
    for table in tables:
        print()
        print_table([tuple(escape_control_chars(cell)[:MAX_SHOWN_NAME] for cell in row) for row in table])


def describe_read(images: int, failures: int) -> str:
    """Returns a text that says how many images could be read.

    Args:
        images: The number of all images.
        failures: How many of them could not be read.

    Example:
        >>> describe_read(97, 2)
        '95 of 97 images could be read'
    """
    return f"{images - failures:,} of {images:,} images could be read"


def evaluate_folder(export: Export, paths: list[str], as_json: bool, csv_file: str | None, known_only: bool) -> int:
    """Classifies images of known classes, and prints the accuracy.

    Args:
        export: The network; `load_export` loads it.
        paths: A list with one entry, the folder of the images; see `list_labeled_images`.
        as_json: If true, JSON is printed; otherwise text.
        csv_file: A new file, to which the confusion matrix is written; None to write no file.
        known_only: If true, folders that do not have the name of a class are left out; otherwise they are an error.

    Returns:
        The exit status: 1 if an image could not be classified, otherwise 0.

    Raises:
        PredictError: The folder has no images of known classes, none of them can be classified, or `csv_file` exists.
    """
    if len(paths) != 1:
        raise PredictError(f"--evaluate: needs one folder with a folder of images for each class, not {len(paths)}")
    if csv_file is not None and os.path.lexists(csv_file):
        raise PredictError(f"--csv={csv_file}: exists, name another file")
    images, classes = list_labeled_images(paths[0], export.classes, known_only), export.classes
    predicted, failures = collect_predictions(predict_files(export.predictor, images.files, export.preprocess))
    for line in failures:
        print(f"error: {escape_control_chars(line)}", file=sys.stderr)
    if len(failures) == len(images.files):
        raise PredictError(f"{images.folder}: none of its {len(images.files):,} images can be classified")
    if failures:
        print(describe_read(len(images.files), len(failures)), file=sys.stderr)
    counts = count_confusion(images.target, predicted, len(classes))
    figures = summarize_confusion(counts, classes)
    if as_json:
        print(json.dumps({**figures, "confusion": counts.tolist()}, indent=1))
    else:
        for line in images.left_out:
            print(escape_control_chars(line))
        print_evaluation(counts, figures)
        print(f"\n{NO_TRAINING_LIST}")
    if csv_file is not None:
        with open(csv_file, "x", encoding="utf-8", errors="surrogateescape", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(tabulate_confusion(counts, classes))
    return int(bool(failures))


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Prints rows of text as a table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip())


def random_images(batch: int, size: tuple[int, int, int]) -> np.ndarray:
    """Returns an array of random images, float32 in [0, 1). Each call with the same arguments returns the same images.

    Args:
        batch: The number of images.
        size: (C, H, W) of an image.

    Returns:
        (batch, C, H, W).
    """
    return np.random.default_rng(0).random((batch, *size), dtype=np.float32)


def time_alternately(functions: dict[Any, Callable[[], object]], seconds: float) -> dict[Any, Timing]:
    """Times functions in turn, in many short rounds, so that a slow phase of the machine affects all functions alike.

    Args:
        functions: The functions to time, by name. They are called without arguments.
        seconds: The time for each function, all rounds together. If the calls take long, there are fewer rounds.

    Returns:
        The timing of each function, by name. The first call of each round is not included.
    """
    rounds: dict[Any, list[list[float]]] = {name: [] for name in functions}
    whole, running = dict.fromkeys(functions, 0.0), dict.fromkeys(functions, 0.0)
    latest = time.perf_counter() + 2 * seconds * len(functions)
    for k in range(TIMING_ROUNDS):
        if k >= FEWEST_ROUNDS and time.perf_counter() > latest:
            break
        for name, function in functions.items():
            time.sleep(TIMING_PAUSE)
            function()
            begin, begin_running = time.perf_counter(), time.thread_time()
            times: list[float] = []
            while time.perf_counter() < begin + seconds / TIMING_ROUNDS or not times:
                start = time.perf_counter()
                function()
                times.append(time.perf_counter() - start)
            whole[name] += time.perf_counter() - begin
            running[name] += time.thread_time() - begin_running
            rounds[name].append(times)
    return {name: summarize_rounds(times, running[name] / whole[name]) for name, times in rounds.items()}


def summarize_rounds(rounds: Sequence[Sequence[float]], running: float = float("nan")) -> Timing:
    """Summarizes the times of many calls of one function.

    Args:
        rounds: For each round of calls the time of each call, in seconds.
        running: The fraction of the time in which the calling thread ran; NaN if it is not known.

    Example:
        >>> timing = summarize_rounds([[1.0, 3.0, 2.0], [4.0]])
        >>> timing.p50, timing.rounds
        (2.5, (2.0, 4.0))
    """
    percentiles = np.percentile([seconds for one in rounds for seconds in one], (50, 95, 25, 75)).tolist()
    return Timing(*percentiles, rounds=tuple(statistics.median(one) for one in rounds), running=running)


def benchmark_models(folder: Path, seconds: float = 2.0) -> int:
    """Times every ONNX file of an export, with one thread and with all threads, and prints a table of the times.

    Args:
        folder: The folder of an export, which `odcheap export` has written.
        seconds: The time for each measurement.

    Returns:
        The exit status, which is always 0.
    """
    functions: dict[Any, Callable[[], object]] = {}
    for path, threads in [(path, threads) for path in sorted(folder.glob("*.onnx")) for threads in (1, 0)]:
        export = load_export(folder, path.name, threads)
        channels, (height, width) = export.preprocess["channels"], export.preprocess["size"]
        for batch in TIMED_BATCH_SIZES if export.batch_size is None else (export.batch_size,):
            if batch == 1 or batch * height * width <= MAX_BATCH_PIXELS:
                images = random_images(batch, (channels, height, width))
                functions[path.name, batch, threads] = partial(export.predictor, images)
    print(f"{len(functions)} timings of {seconds:g} s each", file=sys.stderr)
    rows: list[tuple[str, ...]] = [("file", "images", "threads", "median ms", "95 % below", "rounds' medians")]
    for (name, batch, threads), timing in time_alternately(functions, seconds).items():
        times = (f"{1000 * time:.3f}" for time in (timing.p50, timing.p95))
        rounds = f"{1000 * min(timing.rounds):.3f} to {1000 * max(timing.rounds):.3f}"
        rows.append((name, str(batch), str(threads or "all"), *times, rounds))
    print_table(rows)
    return 0


def main(arguments: list[str], prog: str | None = None) -> int:
    """Runs the command `python predict.py`: classifies image files, or evaluates or times an exported network.

    Args:
        arguments: The command-line arguments, such as `sys.argv[1:]`.
        prog: The name of the command in its help; None for the name of this file.

    Returns:
        The exit status: 0, or 1 after an error, which includes an image that could not be read.
    """
    usage = f"%(prog)s {USAGE}\n       %(prog)s {EVALUATION_USAGE}"
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog, usage=usage, description=__doc__, formatter_class=style)
    add = parser.add_argument
    paths = "EXPORT_DIR (if this file is not in an export itself), then image files and folders with images"
    add("paths", nargs="*", metavar="[EXPORT_DIR] IMAGE_OR_FOLDER", help=paths)
    add("--model", metavar="FILE", default="student.onnx", help="another ONNX file (default: %(default)s)")
    add("--json", action="store_true", help="print a list of {path, label, probability}, or the figures of --evaluate")
    add("--evaluate", action="store_true", help="measure the accuracy on FOLDER/<class>/* or FOLDER/test/<class>/*")
    add("--csv", metavar="FILE", help="with --evaluate: write the confusion matrix to a new file")
    add("--known-only", action="store_true", help="with --evaluate: leave out folders that are no class")
    add("--bench", action="store_true", help="time every ONNX file of the export on this machine")
    options = parser.parse_intermixed_args(arguments)  # EXPORT_DIR --evaluate FOLDER
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")  # a terminal may know ASCII only

    # The export is the first path if that is an export, otherwise the folder of this file.
    folder, paths = Path(__file__).parent, options.paths
    if paths and is_export(paths[0]):
        folder, paths = Path(paths[0]), paths[1:]
    try:
        if not paths and not options.bench and not options.evaluate:
            raise PredictError(f"no images are given; usage: {parser.prog} {USAGE}")
        require_version("Pillow", PIL.__version__, MIN_PILLOW)
        if not (folder / PREPROCESS_FILE).is_file():
            given = (paths or [""])[0]
            known = os.path.join(given, "export")
            advice = f"{known} is one" if is_export(known) else "`odcheap export JOB_DIR` writes one"
            raise PredictError(f"EXPORT_DIR={given}: is not an export; {advice}")
        if not options.evaluate and (options.csv is not None or options.known_only):
            raise PredictError("--csv and --known-only: need --evaluate")
        if options.bench:
            return benchmark_models(folder)
        export = load_export(folder, options.model)
        if options.evaluate:
            return evaluate_folder(export, paths, options.json, options.csv, options.known_only)
        return classify_images(export, paths, options.json)
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
