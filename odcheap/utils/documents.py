"""Reads JSON and YAML files from untrusted sources: with limits, and as plain values only."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from odcheap.utils.errors import OptionError, first_line
from odcheap.utils.files import require_file
from odcheap.utils.text import escape_control_chars

MAX_BYTES = 64 << 20  # of a JSON file: 250,000 classes take 20 MB
MAX_YAML_BYTES = 1 << 20  # PyYAML reads about 0.5 MB a second
MAX_DEPTH = 30  # of nested lists and dicts
MAX_INT = 2**63


class PlainLoader(yaml.SafeLoader):
    """Reads values as OmegaConf does: `1e-4` is a float, and a date is a string."""

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
    """A loader without aliases, by which a file of a few hundred bytes can unfold to gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed")
        return super().compose_node(parent, index)


def read_json(path: str | Path, option: str, max_bytes: int = MAX_BYTES) -> Any:
    """Reads a JSON file.

    Args:
        path: The file.
        option: The option that named the file, for messages.
        max_bytes: The largest size that is read.

    Raises:
        OptionError: The file is missing, too large or no JSON; or it is nested too deeply, or a number is not finite.
    """
    return parse(json.loads, read_text(path, option, max_bytes), path, option)


def read_yaml(path: str | Path, option: str) -> Any:
    """Reads a YAML file without aliases; see `read_json`."""
    text = read_text(path, option, MAX_YAML_BYTES)
    return parse(lambda text: yaml.load(text, BoundedLoader), text, path, option)


def parse_json(text: str, path: str | Path, option: str) -> Any:
    """Reads JSON from a text of the file, such as the metadata of its tensors; see `read_json`."""
    if len(text) > MAX_BYTES:
        raise OptionError(option, path, f"has more than {MAX_BYTES:,} characters of metadata")
    return parse(json.loads, text, path, option)


def parse(load: Callable[[str], Any], text: str, path: str | Path, option: str) -> Any:
    """Returns what `load` reads from the text; raises `OptionError` unless it consists of plain values."""
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

    Raises:
        OptionError: The file is missing, no regular file, or larger than `max_bytes`; or it is not in UTF-8.
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
    """Raises `ValueError` unless the value consists of texts, finite numbers, lists, and dicts with texts as keys."""
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
