"""Reads JSON and YAML files from untrusted sources: their size is limited, and they may contain plain values only.

Several functions have the arguments `path`, a file, and `option`, the name of the option with which the user named that
file: error messages contain both.
"""

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
    """A YAML loader that reads values as OmegaConf does: `1e-4` is a float, and a date is a string."""

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
    """A YAML loader that refuses aliases: with them a file of a few hundred bytes can become gigabytes in memory."""

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
    """Reads a YAML file, in which aliases are not allowed.

    Args:
        path: The file.
        option: The name of the option with which the user gave the file, for error messages.

    Raises:
        OptionError: The file is missing, larger than 1 MiB, not YAML, or has values that are not plain; see
            `check_plain_tree`.
    """
    text = read_text(path, option, MAX_YAML_BYTES)
    return parse(lambda text: yaml.load(text, BoundedLoader), text, path, option)


def parse_json(text: str, path: str | Path, option: str) -> Any:
    """Returns the values in a text in JSON, such as the metadata of a file.

    Args:
        text: The text.
        path: The file from which the text comes, for messages.
        option: The name of the option with which the user gave the file, for error messages.

    Raises:
        OptionError: The text is too long or not JSON, or the values are not plain; see `check_plain_tree`.
    """
    if len(text) > MAX_BYTES:
        raise OptionError(option, path, f"has more than {MAX_BYTES:,} characters of metadata")
    return parse(json.loads, text, path, option)


def parse(load: Callable[[str], Any], text: str, path: str | Path, option: str) -> Any:
    """Returns the values that a function reads from a text.

    Args:
        load: The function, such as `json.loads`.
        text: The text.
        path: The file from which the text comes, for messages.
        option: The name of the option with which the user gave the file, for error messages.

    Raises:
        OptionError: The text cannot be read, or the values are not plain; see `check_plain_tree`.
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
    """Raises `ValueError` unless a value consists of texts, finite numbers, lists, and dicts with texts as keys."""
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
