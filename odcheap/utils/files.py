"""Reads files from untrusted sources without running code from them, and writes files atomically.

Most functions that read have two arguments for error messages: `path`, the file, and `option`, the name of the option
with which the user has named this file.
"""

import csv
import hashlib
import io
import json
import math
import os
import re
import secrets
import stat
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import yaml
from safetensors import SafetensorError, safe_open

from odcheap.utils.errors import OptionError, WriteError, first_line
from odcheap.utils.text import escape_control_chars

if TYPE_CHECKING:
    import torch

CHECKSUM_PREFIX = b"odcheap-sha256:"
EMPTY_COMMENT = b"\0\0"  # the end of a zip archive without a comment: the comment's length, 0
ARCHIVE_START = b"PK\3\4"  # by which PyTorch's reader knows a zip archive
CHUNK = 1 << 20  # bytes that are read at once
# Bytes of a file of tensors, which is read into memory as a whole. A checkpoint of eight ViT-L with AdamW's state has
# 29 GB; larger files are refused.
MAX_TENSOR_BYTES = 1 << 35
MAX_BYTES = 64 << 20  # of a JSON file: 250,000 classes take 20 MB
MAX_YAML_BYTES = 1 << 20  # PyYAML reads about 0.5 MB a second
MAX_DEPTH = 30  # of nested lists and dicts
MAX_INT = 2**63


def read_torch(path: str | Path, option: str = "path") -> dict[str, Any]:
    """Reads a dict of tensors and plain values from a file that `torch.save` wrote; the tensors are on the CPU.

    Args:
        path: The file.
        option: The name of the option with which the user gave the file, for error messages.

    Raises:
        OptionError: The file is missing or damaged, or contains something else than such a dict.
    """
    import torch  # imported here, since commands that read no checkpoint start faster without it

    require_file(path, option, MAX_TENSOR_BYTES)
    check_archive(path, option)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickled objects, which are refused anyway
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged files PyTorch's reader raises errors of every kind
        raise OptionError(option, path, f"not a complete checkpoint of plain tensors ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise OptionError(option, path, f"not a checkpoint: it holds a {type(content).__name__}, not a dict")
    return content


def write_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Writes a dict to a file like `torch.save`, but atomically and with a checksum (SHA-256).

    The checksum is the comment of the zip archive, so that `torch.load` can read the file. `verify_checksum` checks it.

    Args:
        path: The file to write.
        content: A dict of tensors and plain values.
    """
    import torch  # see `read_torch`

    # The archive is made in memory first, since PyTorch's writer can end the process if the disk is full.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    archive = buffer.getbuffer()
    comment = checksum_comment(hashlib.sha256(archive))

    def write(file: BinaryIO) -> None:
        file.write(archive[: -len(EMPTY_COMMENT)])
        file.write(comment)

    write_atomic(path, write)


def checksum_comment(sha256: "hashlib._Hash") -> bytes:
    """Returns the last bytes of a zip archive whose comment is a checksum: the length of the comment, and the comment.

    Args:
        sha256: A hash object that has been updated with the content of the archive.
    """
    comment = CHECKSUM_PREFIX + sha256.hexdigest().encode()
    return struct.pack("<H", len(comment)) + comment


def verify_checksum(path: str | Path, option: str) -> None:
    """Raises `OptionError` if a checkpoint has changed since `write_checkpoint` wrote it, or has no checksum.

    Args:
        path: The file.
        option: The name of the option with which the user gave the file, for error messages.
    """
    # PyTorch's own reader does not notice most changed bits. The checksum is that of the archive without a comment.
    require_file(path, option, MAX_TENSOR_BYTES)
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        remaining = max(0, os.fstat(file.fileno()).st_size - len(checksum_comment(sha256)))
        while remaining and (chunk := file.read(min(remaining, CHUNK))):
            sha256.update(chunk)
            remaining -= len(chunk)
        comment = file.read()
    sha256.update(EMPTY_COMMENT)
    if comment != checksum_comment(sha256):
        allowed = "not a complete checkpoint of an odcheap run: its checksum is missing or does not match"
        raise OptionError(option, path, f"{allowed} (weights= takes weights from other files)")


def read_safetensors(path: str | Path, option: str = "path") -> tuple[dict[str, "torch.Tensor"], dict[str, str]]:
    """Reads a safetensors file.

    Args:
        path: The file.
        option: The name of the option with which the user gave the file, for error messages.

    Returns:
        A dict of the tensors by name, and a dict of the metadata (texts by name), which is empty if there are none.

    Raises:
        OptionError: The file is missing, damaged or of another format.
    """
    require_file(path, option, MAX_TENSOR_BYTES)
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise OptionError(option, path, f"not a complete safetensors file ({first_line(error)})") from error


def check_archive(path: str | Path, option: str) -> None:
    """Raises `OptionError` if a file is a damaged zip archive, or one whose unpacked content is larger than the file.

    Args:
        path: The file. If it is no zip archive, nothing is checked.
        option: The name of the option with which the user gave the file, for error messages.
    """
    # `torch.save` does not compress; a compressed file of a few bytes could fill the memory.
    with open(path, "rb") as file:
        if file.read(len(ARCHIVE_START)) != ARCHIVE_START:
            return  # the format before PyTorch 1.6, or another one
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except Exception as error:  # damaged archives raise errors of several kinds
        raise OptionError(option, path, f"not a complete checkpoint of plain tensors ({first_line(error)})") from error
    size = os.path.getsize(path)
    if unpacked > size:
        raise OptionError(option, path, f"not a checkpoint: it has {size:,} bytes and unpacks to {unpacked:,}")


def require_file(path: str | Path, option: str, max_bytes: int | None = None) -> None:
    """Raises `OptionError` unless `path` is a regular file of an allowed size: no folder, and no pipe, which blocks
    readers.

    Args:
        path: The file.
        option: The name of the option with which the user gave the file, for error messages.
        max_bytes: The largest size that is allowed, in bytes; None for any size.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise OptionError(option, path, "no such file") from error
    if not stat.S_ISREG(status.st_mode):
        is_folder = stat.S_ISDIR(status.st_mode)
        raise OptionError(option, path, "no such file: it is a folder" if is_folder else "not a regular file")
    if max_bytes is not None and status.st_size > max_bytes:
        raise OptionError(option, path, f"has {status.st_size:,} bytes, more than {max_bytes:,}")


def write_atomic(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file atomically: after a crash there is either the old file or the complete new file.

    If `path` is a symbolic link, the link is replaced by the file, and the file to which it leads does not change.

    Args:
        path: The file to write.
        write: A function that writes the content; it is called with a file that is open for writing bytes.
    """
    # Write a temporary file in the same folder, flush it to the disk, and rename it.
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "wb", opener=open_new) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except FileNotFoundError as error:
        raise WriteError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # a rename reaches the disk only when the folder is flushed too
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def open_new(path: str, flags: int) -> int:
    """An `opener` for Python's `open` that creates a file, and fails if a file or a link of this name exists."""
    return os.open(path, flags | os.O_EXCL, 0o666)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file in UTF-8 atomically; file names in the text that are not valid UTF-8 keep their bytes."""
    write_atomic(path, lambda file: file.write(text.encode(errors="surrogateescape")))


def write_json(path: str | Path, content: Any) -> None:
    """Writes an object to a file as indented JSON, atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_csv(path: str | Path, rows: Iterable[Sequence[Any]]) -> None:
    """Writes rows to a CSV file, atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())


class PlainLoader(yaml.SafeLoader):
    """A loader for PyYAML that reads values like OmegaConf: `1e-4` becomes a float, and a date stays a text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own class attribute
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*[eE][-+]?[0-9]+|[0-9][0-9_]*\.[0-9_]*|\.[0-9_]+(?:[eE][-+]?[0-9]+)?)$"),
    list("-+0123456789."),
)


class BoundedLoader(PlainLoader):
    """A loader for PyYAML that refuses aliases (`*name`), by which a small file can become gigabytes in memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed")
        return super().compose_node(parent, index)


def read_json(path: str | Path, option: str, max_bytes: int = MAX_BYTES) -> Any:
    """Reads a JSON file.

    Args:
        path: The file.
        option: The name of the option with which the user gave the file, for error messages.
        max_bytes: The largest size that is read; a larger file raises `OptionError`.

    Raises:
        OptionError: The file is missing, too large, not JSON, nested too deeply, or has a number that is not finite.
    """
    return parse(json.loads, read_text(path, option, max_bytes), path, option)


def read_yaml(path: str | Path, option: str) -> Any:
    """Reads a YAML file, in which aliases (`*name`) are not allowed.

    Args:
        path: The file.
        option: The name of the option with which the user gave the file, for error messages.

    Raises:
        OptionError: The file is missing, larger than 1 MiB or not YAML, or has values that are not plain (a date, NaN).
    """
    text = read_text(path, option, MAX_YAML_BYTES)
    return parse(lambda text: yaml.load(text, BoundedLoader), text, path, option)


def parse_json(text: str, path: str | Path, option: str) -> Any:
    """Parses a text in JSON that was found in a file, such as the metadata of safetensors.

    Args:
        text: The text.
        path: The file in which the text was found, for messages.
        option: The name of the option with which the user gave the file, for error messages.

    Raises:
        OptionError: The text is too long or not JSON, is nested too deeply, or has a number that is not finite.
    """
    if len(text) > MAX_BYTES:
        raise OptionError(option, path, f"has more than {MAX_BYTES:,} characters of metadata")
    return parse(json.loads, text, path, option)


def parse(load: Callable[[str], Any], text: str, path: str | Path, option: str) -> Any:
    """Parses a text with a function such as `json.loads`, and checks that the result consists of plain values.

    Args:
        load: The function.
        text: The text.
        path: The file in which the text was found, for messages.
        option: The name of the option with which the user gave the file, for error messages.

    Raises:
        OptionError: The text cannot be parsed, or the values are not plain; see `check_plain_tree`.
    """
    try:
        value = load(text)
        check_plain_tree(value)
    # KeyError, AttributeError, TypeError: PyYAML raises them for tags whose text does not fit.
    except (ValueError, RecursionError, yaml.YAMLError, KeyError, AttributeError, TypeError) as error:
        reason = "is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())[:160]
        raise OptionError(option, path, f"cannot be read ({escape_control_chars(reason)})") from error
    return value


def read_text(path: str | Path, option: str, max_bytes: int) -> str:
    """Reads a text file in UTF-8.

    Args:
        path: The file.
        option: The name of the option with which the user gave the file, for error messages.
        max_bytes: The largest size that the file may have, in bytes.

    Raises:
        OptionError: The file is missing, larger than `max_bytes`, not a regular file, or not in UTF-8.
    """
    require_file(path, option)
    try:
        with open(path, "rb") as file:
            content = file.read(max_bytes + 1)
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(option, path, f"cannot be read ({first_line(error)})") from error
    if len(content) > max_bytes:
        raise OptionError(option, path, f"is larger than {max_bytes:,} bytes")
    return text


def check_plain_tree(value: Any) -> None:
    """Raises `ValueError` unless a value consists of plain values, nested in at most 30 levels.

    Plain values are None, bools, texts, finite numbers, lists, and dicts whose keys are texts.
    """
    # One level after the other, without recursion, so that no nesting is too deep for this function.
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"is nested in more than {MAX_DEPTH} levels")
        below: list[Any] = []
        for entry in level:
            if isinstance(entry, dict):
                if not all(isinstance(key, str) for key in entry):
                    raise ValueError("has a key that is not a text")
                below += entry.values()
            elif isinstance(entry, list):
                below += entry
            elif isinstance(entry, float) and not math.isfinite(entry):
                raise ValueError(f"has the number {entry}, which is not finite")
            elif isinstance(entry, int) and abs(entry) > MAX_INT:
                raise ValueError("has a whole number above 2^63")
            elif entry is not None and not isinstance(entry, str | int | float):
                raise ValueError(f"has a value of the type {type(entry).__name__}")
        level, depth = below, depth + 1
