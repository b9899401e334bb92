"""The option `students`: the backbone and the block type of each student of a run, if they are not all the same.

PyTorch is not imported here, so that a wrong option is refused within a second.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from odcheap.utils.errors import OptionError
from odcheap.utils.parts import list_parts, part_settings, read_part

Shape = dict[str, dict[str, Any]]  # the settings of "backbone" and "block_type", each with the key "part"

GROUPS = ("backbone", "block_type")
EXAMPLES = "such as students=[DW,Shift], [resnet20,resnet32] or [{block_type:DW,backbone:resnet20},Shift]"
MAX_STUDENTS = 100


def read_shapes(students: Any, own: Mapping[str, Mapping[str, Any]], config_dirs: Sequence[Path] = ()) -> list[Shape]:
    """Returns the backbone and the block type (kind of cheap convolution) of each student of a run.

    Args:
        students: The value of the option `students`: a list with an entry for each student. An entry is a name from
            `conf/block_type` or `conf/backbone`, such as "DW", or a dict with one or both of the keys "block_type" and
            "backbone". The values of this dict are names, or dicts of options with the name under "part".
        own: The backbone and the block type of a student whose entry does not name them: a dict with the keys
            "backbone" and "block_type". Its values are dicts of options with the name under "part".
        config_dirs: Further `conf` directories, with backbones and block types of your own.

    Returns:
        A list with a dict for each student. Each dict has the same form as `own`, with all options.

    Raises:
        OptionError: An entry names an unknown backbone, block type or option, or has another form.

    Example:
        >>> own = {"backbone": {"part": "resnet18", "name": "x"}, "block_type": {"part": "DW"}}
        >>> [shape["block_type"]["part"] for shape in read_shapes(["DW", {"block_type": "Shift"}], own)]
        ['DW', 'Shift']
    """
    if not isinstance(students, list | tuple) or not 1 <= len(students) <= MAX_STUDENTS:
        raise OptionError("students", students, f"must be a list of 1 to {MAX_STUDENTS} entries, {EXAMPLES}")
    return [read_shape(f"students.{k}", entry, own, config_dirs) for k, entry in enumerate(students)]


def read_shape(option: str, entry: Any, own: Mapping[str, Mapping[str, Any]], config_dirs: Sequence[Path]) -> Shape:
    """Returns the backbone and the block type of one student, with all options, in a dict of the same form as `own`.

    Args:
        option: The name of the entry for error messages, such as "students.0".
        entry: The student's entry in the option `students`, such as "DW" or {"block_type": "Shift"}.
        own: What applies if the entry does not name it: a dict with the keys "backbone" and "block_type", whose values
            are dicts of options with the name under "part".
        config_dirs: Further `conf` directories, with backbones and block types of your own.

    Raises:
        OptionError: The entry is wrong; the message says what is allowed.
    """
    known = {group: list_parts(group, config_dirs) for group in GROUPS}
    if isinstance(entry, str):
        group = next((group for group in ("block_type", "backbone") if entry in known[group]), None)
        if group is None:
            names = f"the name of a block type ({', '.join(known['block_type'])}) or of a backbone"
            raise OptionError(option, entry, f"must be {names} ({', '.join(known['backbone'])})")
        entry = {group: entry}
    if not isinstance(entry, Mapping) or not entry or not set(entry) <= set(GROUPS):
        raise OptionError(option, entry, f"is no student: an entry has a block_type, a backbone or both, {EXAMPLES}")
    shape: Shape = {group: dict(own[group]) for group in GROUPS}
    for group, part in entry.items():
        settings = {"part": part} if isinstance(part, str) else part
        if not isinstance(settings, Mapping):
            raise OptionError(f"{option}.{group}", part, "must be a name, or options by name")
        name = settings.get("part", own[group]["part"])
        if name != own[group]["part"]:
            shape[group] = part_settings(read_part(group, name, config_dirs), name)
        unknown = next((key for key in settings if key not in shape[group]), None)
        if unknown is not None:
            raise OptionError(f"{option}.{group}.{unknown}", settings[unknown], f"is not an option of {name}")
        if settings.get("pretrained", shape[group].get("pretrained")) != shape[group].get("pretrained"):
            allowed = "must be set by backbone.pretrained, for all students"
            raise OptionError(f"{option}.{group}.pretrained", settings["pretrained"], allowed)
        shape[group] |= settings
    return shape


def name_shape(shape: Mapping[str, Mapping[str, Any]], others: Sequence[Mapping[str, Mapping[str, Any]]] = ()) -> str:
    """Returns a short name of a student, such as "DW resnet20", with the options in which it differs from others.

    Args:
        shape: The backbone and the block type of the student, a dict that `read_shapes` returned.
        others: The same for all students of the run; an empty list to name no options.

    Example:
        >>> wide = {"block_type": {"part": "DW"}, "backbone": {"part": "resnet20", "width": 24}}
        >>> plain = {"block_type": {"part": "DW"}, "backbone": {"part": "resnet20", "width": 16}}
        >>> name_shape(wide, [wide, plain])
        'DW resnet20 width=24'
    """
    names = [str(shape["block_type"]["part"]), str(shape["backbone"].get("name", shape["backbone"]["part"]))]
    for group in GROUPS:
        own = shape[group]
        same = [other[group] for other in others if other[group]["part"] == own["part"]]
        keys = [key for key in own if key != "part" and any(other.get(key) != own[key] for other in same)]
        names += [f"{key}={own[key]}" for key in keys if key != "name"]
    return " ".join(names)
