"""Decoded images kept beside their source, so that 60,000 small files are decoded once."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from odcheap.utils.errors import OptionError
from odcheap.utils.files import read_safetensors, write_atomic

FORMAT = "1"  # to be raised when decoding changes


def key_of(paths: list[Path]) -> str:
    """Differs wherever a file was added, removed, renamed or written: names, lengths and times, not contents."""
    whole = hashlib.blake2b(FORMAT.encode(), digest_size=16)
    for path in paths:
        seen = os.stat(path)
        name = os.fsencode("/".join(path.parts[-3:]))  # part, class, file
        whole.update(name + f"\0{seen.st_size}\0{seen.st_mtime_ns}\n".encode())
    return whole.hexdigest()


def recalled(
    path: Path, key: str, make: Callable[[], tuple[dict[str, Tensor], list[str]]]
) -> tuple[dict[str, Tensor], list[str]]:
    """What `make()` gives, tensors and names: read from `path` where they were kept under this key, else made and kept.

    A damaged or outdated file is replaced. Where it cannot be written all goes on without it, and a line says so.
    """
    if path.is_file():
        try:
            tensors, about = read_safetensors(path)
            if about.get("key") == key:
                return tensors, json.loads(about["names"])
        except OptionError as error:
            print(f"decoding again: {error}", flush=True)
    tensors, names = make()
    content = save(tensors, metadata={"key": key, "names": json.dumps(names)})
    try:
        write_atomic(path, lambda file: file.write(content))
    except OSError as error:
        print(f"not kept for the next start: {path} cannot be written ({error.strerror})", flush=True)
    return tensors, names
