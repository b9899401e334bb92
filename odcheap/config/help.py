"""The text of `odcheap train --help`: every option with its default value, its description, and its choices.

The descriptions come from the comments in `conf/`, and from the signatures and docstrings of the classes and functions
that get the options. Their source files are read, so that nothing has to be imported.
"""

import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from odcheap.config.options import RootOptions
from odcheap.config.signatures import inspect_signature, read_definition
from odcheap.utils.arguments import describe_allowed
from odcheap.utils.parts import CALL_KEYS, find_conf_dir, list_parts, read_part

USAGE = """usage: odcheap train [OPTION=VALUE ...] [-m] [--config-dir DIR] [--help]

Trains students with cheap convolutions. A group such as method chooses a part with options of its own:
method=kd method.temperature=2. --help with method=kd shows the options of kd.

  -m                a sweep over all combinations of values: odcheap train -m seed=0,1,2 method=od,alone
  --config-dir DIR  a folder with block types, methods and other parts of your own
  --cfg job         prints the options of the run, and does not train
  --hydra-help      the help of Hydra, which reads the command line
"""
GROUPS = ("block_type", "backbone", "method", "data", "augment", "optimizer", "scheduler", "trainer", "logger")
DEFAULTS = {"logger": "tensorboard"}
COLUMN, WIDTH = 38, 120  # where descriptions begin, and where lines end
LINE = re.compile(r"(?P<indent> *)(?P<name>\w+):(?: (?P<value>[^#]*?))?(?: +# ?(?P<comment>.*))?")
CHOICES = re.compile(r"Literal\[([^\]]*)\]")


def format_help(arguments: Sequence[str], config_dirs: Sequence[Path] = ()) -> str:
    """Returns the text that `odcheap train --help` prints.

    Args:
        arguments: The command-line arguments. If they choose a part, as `method=kd` does, the options of this part are
            shown, and otherwise the options of the default part of the group.
        config_dirs: The user's own `conf` directories.
    """
    chosen = dict(argument.partition("=")[::2] for argument in arguments if "=" in argument)
    root = find_conf_dir() / "config.yaml"
    hints = get_type_hints(RootOptions, include_extras=True)
    lines = [USAGE, "options of the run:"]
    for name, value, comment in read_options(root):
        if name in hints:
            allowed = describe_allowed(hints[name])
            is_said = hints[name] is Any or allowed.startswith("a string") or comment.startswith(allowed)
            lines.append(format_option(name, value, comment if is_said else f"{comment}; {allowed}".removeprefix("; ")))
    lines += ["", "recipes (experiment=NAME, or several: experiment=[cifar10_od,short]):"]
    lines += [format_option(name, None, describe_part("experiment", name)) for name in list_parts("experiment")]
    for group in GROUPS:
        defaults = {name: value for name, value, _ in read_options(root, group) if name == group} | DEFAULTS
        known = list_parts(group, config_dirs)
        part = chosen[group] if chosen.get(group) in known else defaults[group]
        heading = f"{group}={part}; the choices are {', '.join(known)}:"
        lines += ["", *textwrap.wrap(heading, WIDTH, subsequent_indent="    ", break_on_hyphens=False)]
        lines += [format_option(*option) for option in list_part(group, part, config_dirs)]
    return "\n".join(lines) + "\n"


def list_part(group: str, part: str, config_dirs: Sequence[Path]) -> Iterator[tuple[str, Any, str]]:
    """Yields the name, the default and the description of each option in a YAML file such as `conf/method/od.yaml`.

    Args:
        group: The config group, which is a folder in `conf`, such as "method".
        part: The name of the file in that folder, without `.yaml`, such as "od".
        config_dirs: The user's own `conf` directories.
    """
    node = read_part(group, part, config_dirs)
    yield from list_node(f"{group}", node, read_comments(group, part))


def list_node(path: str, node: dict[str, Any], comments: dict[str, str]) -> Iterator[tuple[str, Any, str]]:
    """Yields the name, the default and the description of each option in a dict from a YAML file, and in nested dicts.

    The description is the comment in the file. If an option has no comment, its description is taken from the docstring
    of the class or function that the entry `_target_` of the dict names.

    Args:
        path: The name of the dict on the command line, such as "method" or "data.load".
        node: The dict.
        comments: The comments in the file. The keys are the names of the options without `path`, such as "temperature".
    """
    target = node.get("_target_")
    known = describe_target(target) if isinstance(target, str) else {}
    for name, value in node.items():
        if isinstance(value, dict):
            yield from list_node(f"{path}.{name}", value, comments)
        elif name not in CALL_KEYS and (path, value) != ("logger", None) and not is_root_reference(value):
            choices = re.search(r"one of ([^;]+)$", known.get(name, ""))
            text = comments.get(name) or known.get(name, "")
            is_said = choices is None or all(choice in text for choice in choices[1].split(", "))
            yield f"{path}.{name}", value, text if is_said else f"{text}; {choices[0]}"


def is_root_reference(value: Any) -> bool:
    """Returns whether a value in a YAML file only refers to an option without a group, as `${seed}` does."""
    return isinstance(value, str) and value.startswith("${") and "." not in value


def read_options(path: Path, group: str | None = None) -> Iterator[tuple[str, str, str]]:
    """Yields the name, the value and the comment of each option at the top level of a YAML file, as texts.

    Args:
        path: The file.
        group: None in most cases. If the caller looks for the line of a config group, such as `- method: od` in a
            `defaults:` list, this is the name of the group. Then the lines of all levels and lists are yielded,
            not only those with this name.
    """
    for line in path.read_text(encoding="utf-8").splitlines():
        match = LINE.fullmatch(line.replace("- ", "", 1) if group else line)
        if match and match["value"] and (group is not None or not match["indent"]):
            yield match["name"], match["value"].strip(), match["comment"] or ""


def read_comments(group: str, part: str) -> dict[str, str]:
    """Returns the comment of each option in a YAML file such as `conf/method/od.yaml`, by the name of the option.

    The comments in the files of its `defaults:` list are included.

    Args:
        group: The config group, which is a folder in `conf`, such as "method".
        part: The name of the file in that folder, without `.yaml`, such as "od".
    """
    path = find_conf_dir() / group / f"{part}.yaml"
    if not path.is_file():
        return {}
    comments: dict[str, str] = {}
    text = path.read_text(encoding="utf-8")
    for base in re.findall(r"^ +- (\w+)$|defaults: \[(\w+)", text, re.MULTILINE):
        comments |= read_comments(group, next(filter(None, base))) if "_self_" not in base else {}
    for line in text.splitlines():
        match = LINE.fullmatch(line)
        if match and match["comment"]:
            comments[match["name"]] = match["comment"]
    return comments


def describe_part(group: str, part: str) -> str:
    """Returns the first sentence of the comment at the beginning of a YAML file, such as `conf/method/od.yaml`."""
    text = (find_conf_dir() / group / f"{part}.yaml").read_text(encoding="utf-8")
    head = [line[2:] for line in text.splitlines() if line.startswith("# ") and "@package" not in line]
    return re.split(r"(?<=\.)\s", " ".join(head) + " ")[0] if head else ""


def describe_target(target: str) -> dict[str, str]:
    """Returns a description of each argument of one of odcheap's classes or functions, from its docstring.

    If an argument allows only certain values (`Literal`), the description lists them.

    Args:
        target: The Python path of the class or function, such as `odcheap.methods.od.OnlineDistillation`.

    Returns:
        A dict from the names of arguments to their descriptions; it is empty for classes of other packages.
    """
    if not target.startswith("odcheap."):
        return {}
    definition = read_definition(target)
    described: dict[str, str] = {}
    for part in reversed(inspect.getmro(definition) if inspect.isclass(definition) else [definition]):
        described |= parse_arguments(part.__doc__ or "")
    for name, hint in inspect_signature(definition).annotations.items():
        if choices := CHOICES.search(repr(hint)):
            listed = choices[1].replace("'", "")
            described[name] = "; ".join(filter(None, [described.get(name), f"one of {listed}"]))
    return described


def parse_arguments(docstring: str) -> dict[str, str]:
    """Returns the first sentence about each argument in the section `Args:` of a docstring, by the argument's name."""
    section = re.search(r"^Args:\n((?: +.*\n|\n)*)", docstring + "\n", re.MULTILINE)
    if section is None:
        return {}
    entries = re.split(r"^ {4}(?=\S)", section[1], flags=re.MULTILINE)[1:]
    texts = (" ".join(entry.split()).partition(": ") for entry in entries)
    return {name: re.split(r"(?<=[.])\s", text + " ")[0].rstrip(".") for name, _, text in texts}


def format_option(name: str, value: Any, text: str) -> str:
    """Returns one option with its default value and its description, wrapped to the width of the help text.

    Args:
        name: The name of the option on the command line, such as "method.temperature".
        value: The default value. None is shown as `null`, or not at all for an option without a group.
        text: The description.
    """
    as_written = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    is_bare = (value is None and "." not in name) or as_written.startswith("${")
    start = f"  {name}" if is_bare else f"  {name}={as_written}".replace("'", "")
    indent = " " * COLUMN
    body = textwrap.wrap(text, WIDTH - COLUMN) or [""]
    if len(start) >= COLUMN:
        return "\n".join([start, *(indent + line for line in body if line)])
    return "\n".join([start.ljust(COLUMN) + body[0], *(indent + line for line in body[1:])]).rstrip()
