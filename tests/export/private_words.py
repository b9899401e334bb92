"""Finds words in all files of a folder, also in binary files and in archives."""

import io
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

ENCODINGS = ("utf-8", "utf-16-le", "utf-16-be")


def read_contents(name: str, content: bytes) -> Iterator[tuple[str, bytes]]:
    """Yields a file with its content; if it is a zip archive, also the files in it, which may be compressed."""
    yield name, content
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for member in archive.namelist():
                yield from read_contents(f"{name}/{member}", archive.read(member))


def find_words(folder: Path, words: Iterable[str]) -> list[tuple[str, str]]:
    """Returns each file below a folder that contains one of the words, with that word; file names count too."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    assert paths
    contents = [
        entry for path in paths for entry in read_contents(path.relative_to(folder).as_posix(), path.read_bytes())
    ]
    forms = [(word, {word.encode(encoding) for encoding in ENCODINGS}) for word in words]
    return [
        (name, word)
        for name, content in contents
        for word, encoded in forms
        if word in name or any(form in content for form in encoded)
    ]
