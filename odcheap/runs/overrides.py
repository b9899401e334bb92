"""Overrides: options as a user writes them on the command line, such as `num_stu=4`."""

import hashlib
import os
import re
from collections.abc import Sequence

# Options that determine where and how a run is stored, but not its results. They are not part of a run's name.
STORAGE_OPTIONS = (
    "job_dir",
    "data_dir",
    "resume",
    "overwrite",
    "test_only",
    "checkpoint_every",
    "checkpoint_keep",
    "logger",
)
PLAIN_PATH = re.compile(r"[A-Za-z0-9_/.+@:%*?|-]*")  # what Hydra takes without quotes
MAX_NAME_BYTES = 200  # file systems allow 255


def override_key(override: str) -> str:
    """Returns the name of the option that an override sets.

    Example:
        >>> override_key("+trainer.profiler=simple")
        'trainer.profiler'
    """
    return override.split("=")[0].lstrip("+~")


def find_override(overrides: Sequence[str], name: str) -> tuple[str, str] | None:
    """Returns the key and the value of the override that sets an entry of the config; None if there is none.

    Args:
        overrides: The overrides.
        name: The dotted name of the entry.

    Example:
        >>> find_override(["seed=1", "block_type=Shift"], "block_type.part")
        ('block_type', 'Shift')
    """
    for override in overrides:
        key = override_key(override)
        if name == key or name.startswith(f"{key}."):
            return key, override.partition("=")[2]
    return None


def quote_override(override: str) -> str:
    """Returns an override that sets a path, with the path in quotes if Hydra could not read it otherwise.

    A value that is in quotes already, a list, or an interpolation (`${...}`) is not changed. `~` at the beginning of a
    path is replaced by the home directory.

    Example:
        >>> quote_override("resume=runs/a=b,c=d")
        'resume="runs/a=b,c=d"'
        >>> print(quote_override("data_dir=/data/Tom's #1"))
        data_dir="/data/Tom's #1"
    """
    key, equals, value = override.partition("=")
    quote = value[:1] if value[:1] in ("'", '"') else ""
    if value[len(quote) :].startswith("~"):
        value = quote + os.path.expanduser(value[len(quote) :])
    is_grammar = quote or "${" in value or (value[:1] in ("[", "{") and not os.path.exists(value))
    if not equals or is_grammar or PLAIN_PATH.fullmatch(value):
        return f"{key}{equals}{value}"
    # In Hydra's quoted text a backslash is one, except before a quotation mark.
    escaped = re.sub(r'(\\*)("|$)', lambda match: 2 * match[1] + (f"\\{match[2]}" if match[2] else ""), value)
    return f'{key}="{escaped}"'


def name_run(overrides: Sequence[str], also: Sequence[str] = ()) -> str:
    """Returns the name of a run's folder: the overrides that determine its results, or "default" if there are none.

    Names that are too long are cut, and end with a hash.

    Args:
        overrides: The overrides.
        also: Options in `STORAGE_OPTIONS` that the name contains nevertheless, since a sweep varies them.

    Example:
        >>> name_run(["num_stu=4", "block_type=DW", "resume=auto"])
        'block_type=DW,num_stu=4'
    """
    # Sorted, so that the order on the command line does not matter; other characters than these could be special.
    named = [o for o in overrides if override_key(o) not in STORAGE_OPTIONS]
    named += [o.replace("'", "").replace('"', "") for o in overrides if override_key(o) in also]
    named = sorted(o for o in named if not override_key(o).startswith("hydra"))
    name = re.sub(r"[^\w=,.+\[\]@-]", "-", ",".join(named)) or "default"
    in_bytes = name.encode()
    if len(in_bytes) <= MAX_NAME_BYTES:
        return name
    digest = hashlib.blake2b(in_bytes, digest_size=6).hexdigest()
    return f"{in_bytes[: MAX_NAME_BYTES - 20].decode(errors='ignore')}-{digest}"
