"""Files: what strangers wrote is read without running anything in it; what we write is whole or not there."""

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

SEAL, NO_COMMENT = b"odcheap-sha256:", b"\0\0"  # an archive without a comment ends with its length, 0
CHUNK = 1 << 20  # bytes


def read_torch(path: str | Path, option: str = "path") -> dict[str, Any]:
    """A dict of tensors and plain containers written by `torch.save`; `OptionError` for anything else."""
    require_file(path, option)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # its guess about a strange pickle, which is then refused
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged files PyTorch's reader raises errors of every kind
        raise OptionError(option, path, f"not a whole, plain checkpoint ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise OptionError(option, path, f"not a checkpoint: it holds a {type(content).__name__}, not a dict")
    return content


def write_sealed(path: str | Path, content: dict[str, Any]) -> None:
    """`torch.save`, whole or not at all, with the file's sha256 as the zip archive's comment.

    It is made in memory first: PyTorch's writer may end the process where the disk fails it.
    """
    made = io.BytesIO()
    torch.save(content, made)
    whole = made.getbuffer()
    sealed = seal(hashlib.sha256(whole))

    def write(file: BinaryIO) -> None:
        file.write(whole[: -len(NO_COMMENT)])
        file.write(sealed)

    write_atomic(path, write)


def seal(sha256: "hashlib._Hash") -> bytes:
    comment = SEAL + sha256.hexdigest().encode()
    return struct.pack("<H", len(comment)) + comment


def refuse_broken_seal(path: str | Path, option: str) -> None:
    """`OptionError` unless the file is to the bit what `write_sealed` wrote; PyTorch itself notices few changes."""
    require_file(path, option)
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        left = max(0, os.fstat(file.fileno()).st_size - len(seal(sha256)))
        while left and (chunk := file.read(min(left, CHUNK))):
            sha256.update(chunk)
            left -= len(chunk)
        found = file.read()
    sha256.update(NO_COMMENT)
    if found != seal(sha256):
        allowed = "not a whole checkpoint of an odcheap run: its checksum is missing or another"
        raise OptionError(option, path, f"{allowed} (weights= takes weights from other files)")


def read_safetensors(path: str | Path, option: str = "path") -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; `OptionError` where it is damaged or something else."""
    require_file(path, option)
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise OptionError(option, path, f"not a whole safetensors file ({first_line(error)})") from error


def require_file(path: str | Path, option: str) -> None:
    if not Path(path).is_file():
        raise OptionError(option, path, "no such file")


def write_atomic(path: str | Path, write: Callable[[BinaryIO], None]) -> None:
    """Writes beside the target, flushes to the disk, renames: a crash leaves the old file or the new one, whole."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: str | Path, text: str) -> None:
    """UTF-8; names of files that are not are written as they are on the disk."""
    write_atomic(path, lambda file: file.write(text.encode(errors="surrogateescape")))
