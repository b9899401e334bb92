"""Reads files without running code from them, and writes files so that no half-written file is ever left.

Several functions have the arguments `path`, a file, and `option`, the name of the option with which the user named that
file: error messages contain both.
"""

import csv
import hashlib
import io
import json
import os
import secrets
import stat
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from safetensors import SafetensorError, safe_open

from odcheap.utils.errors import OptionError, WriteError, first_line

if TYPE_CHECKING:
    import torch

CHECKSUM_PREFIX = b"odcheap-sha256:"
EMPTY_COMMENT = b"\0\0"  # the end of a zip archive without a comment: the comment's length, 0
ARCHIVE_START = b"PK\3\4"  # by which PyTorch's reader knows a zip archive
CHUNK = 1 << 20  # bytes that are read at once
# Bytes of a file of tensors, which is read into memory as a whole. A checkpoint of eight ViT-L with AdamW's state has
# 29 GB; larger files are refused.
MAX_TENSOR_BYTES = 1 << 35


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
    """Writes a dict atomically as `torch.save` does, with a checksum (SHA-256) as the comment of the zip archive.

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
    """Returns the last bytes of a zip archive whose comment is a checksum: the comment's length, then the comment.

    Args:
        sha256: The hash object, updated with the content of the archive.
    """
    comment = CHECKSUM_PREFIX + sha256.hexdigest().encode()
    return struct.pack("<H", len(comment)) + comment


def verify_checksum(path: str | Path, option: str) -> None:
    """Raises `OptionError` if a file is not exactly as `write_checkpoint` wrote it.

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
    """Returns the tensors of a safetensors file by name, and its metadata (texts by name).

    Args:
        path: The file.
        option: The name of the option with which the user gave the file, for error messages.

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
    """Raises `OptionError` if a file is a zip archive that is damaged, or whose content is larger than the file itself.

    Args:
        path: The file; files of other formats are accepted.
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
    """Raises `OptionError` if a path is not that of a regular file; a pipe or a device would block the reader for ever.

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
    """Opens a new file; it is an `opener` for `open` that fails if a file or a link with this name exists."""
    return os.open(path, flags | os.O_EXCL, 0o666)


def write_text(path: str | Path, text: str) -> None:
    """Writes text as UTF-8, atomically; file names in it that are not valid UTF-8 keep their bytes."""
    write_atomic(path, lambda file: file.write(text.encode(errors="surrogateescape")))


def write_json(path: str | Path, content: Any) -> None:
    """Writes indented JSON, atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_csv(path: str | Path, rows: Iterable[Sequence[Any]]) -> None:
    """Writes rows as a CSV file, atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())
