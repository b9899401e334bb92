"""Files: reading that runs no code from the file, and writing that leaves the old file or the whole new one."""

import hashlib
import io
import os
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from odcheap.utils.errors import OptionError, first_line

CHECKSUM_PREFIX = b"odcheap-sha256:"
EMPTY_COMMENT = b"\0\0"  # a zip archive without a comment ends with the comment's length, 0
CHUNK = 1 << 20  # bytes


def read_torch(path: str | Path, option: str = "path") -> dict[str, Any]:
    """Reads a dict of tensors and plain containers that `torch.save` wrote.

    Args:
        path: The file.
        option: The option that named the file, for messages.

    Raises:
        OptionError: The file is missing, damaged, holds other objects (nothing in it is run) or is no dict.
    """
    require_file(path, option)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickles that are refused anyway
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged files PyTorch's reader raises errors of every kind
        raise OptionError(option, path, f"not a whole, plain checkpoint ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise OptionError(option, path, f"not a checkpoint: it holds a {type(content).__name__}, not a dict")
    return content


def write_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Writes with `torch.save`, atomically, with the file's sha256 as the comment of the zip archive.

    The archive is made in memory first: PyTorch's writer can end the process where the disk is full.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    archive = buffer.getbuffer()
    comment = checksum_comment(hashlib.sha256(archive))

    def write(file: BinaryIO) -> None:
        file.write(archive[: -len(EMPTY_COMMENT)])
        file.write(comment)

    write_atomic(path, write)


def checksum_comment(sha256: "hashlib._Hash") -> bytes:
    """Returns the end of a zip archive that holds this checksum: the comment's length, then the comment."""
    comment = CHECKSUM_PREFIX + sha256.hexdigest().encode()
    return struct.pack("<H", len(comment)) + comment


def verify_checksum(path: str | Path, option: str) -> None:
    """Raises `OptionError` unless every bit of the file is as `write_checkpoint` wrote it.

    PyTorch's reader does not notice most changed bits.
    """
    require_file(path, option)
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        remaining = max(0, os.fstat(file.fileno()).st_size - len(checksum_comment(sha256)))
        while remaining and (chunk := file.read(min(remaining, CHUNK))):
            sha256.update(chunk)
            remaining -= len(chunk)
        comment = file.read()
    sha256.update(EMPTY_COMMENT)
    if comment != checksum_comment(sha256):
        allowed = "not a whole checkpoint of an odcheap run: its checksum is missing or does not match"
        raise OptionError(option, path, f"{allowed} (weights= takes weights from other files)")


def read_safetensors(path: str | Path, option: str = "path") -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads the tensors and the metadata of a safetensors file.

    Raises:
        OptionError: The file is missing, damaged or of another format.
    """
    require_file(path, option)
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise OptionError(option, path, f"not a whole safetensors file ({first_line(error)})") from error


def require_file(path: str | Path, option: str) -> None:
    """Raises `OptionError` where there is no such file."""
    if not Path(path).is_file():
        raise OptionError(option, path, "no such file")


def write_atomic(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a temporary file, flushes it to the disk and renames it: a crash leaves the old file or the new one.

    Args:
        path: The file to write.
        write: Is called with the open temporary file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself is on the disk only when the folder is
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: str | Path, text: str) -> None:
    """Writes text in UTF-8, atomically; file names in it that are no UTF-8 are written with their own bytes."""
    write_atomic(path, lambda file: file.write(text.encode(errors="surrogateescape")))
