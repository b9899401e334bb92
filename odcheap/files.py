"""Files: what strangers wrote is read without running anything in it; what we write is whole or not there."""

import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from odcheap.errors import OptionError, first_line


def read_torch(path: str | Path, option: str = "path") -> dict[str, Any]:
    """A dict of tensors and plain containers written by `torch.save`; `OptionError` for anything else."""
    require_file(path, option)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # its guess about a strange pickle, which is then refused
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(option, path, f"not a whole, plain checkpoint ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise OptionError(option, path, f"not a checkpoint: it holds a {type(content).__name__}, not a dict")
    return content


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
