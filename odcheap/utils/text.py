"""Formats numbers and file names as text for tables, messages and model cards."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from odcheap.predict import escape_control_chars as escape_control_chars  # also offered here

PREFIXES = ("", "k", "M", "G", "T", "P", "E")  # of units: thousand, million, ...
MISSING = "-"  # is written for a number that is not known
# An absolute path or one that begins with ~, . or .., not the path of a web address. Group 1 is its last name.
# The `/` in `<class>/*` begins no path.
PATH = re.compile(r"(?<![\w.:/~>-])(?:file://|~[\w.-]*|\.\.?)?/+(?:[^\s/:;,'\"()]+/+)*([^\s/:;,'\"()]+)/*")


def escape_markdown(text: object) -> str:
    """Escapes text from untrusted sources for Markdown, so that Markdown shows exactly this text, also in a table.

    Underscores within a word are not escaped, since Markdown takes them for emphasis only at the ends of a word.

    Example:
        >>> escape_markdown("_a_ *b* max_epochs")
        '\\\\_a\\\\_ \\\\*b\\\\* max_epochs'
    """
    escaped = re.sub(r"([\\`*~\[\]<>|&$@])", r"\\\1", escape_control_chars(text))
    escaped = re.sub(r"(?<!\w)_+|_+(?!\w)", lambda match: match[0].replace("_", r"\_"), escaped)
    # Addresses would become links by themselves.
    return re.sub(r"(?i)\b(https?|ftp|mailto)(?=:)|\bwww(?=\.)", r"\g<0>\\", escaped)


def count_things(number: int, thing: str) -> str:
    """Returns a number with the name of what is counted, in the singular or the plural.

    Example:
        >>> count_things(1, "finished run"), count_things(2, "epoch")
        ('1 finished run', '2 epochs')
    """
    return f"{number} {thing}{'' if number == 1 else 's'}"


def format_code(text: object) -> str:
    """Returns text from untrusted sources as inline code for Markdown, in one line, with paths cut to file names."""
    return f"`{escape_control_chars(hide_folders(text)).replace('`', chr(39))}`"


def hide_folders(text: object, known: Iterable[str | Path] = ()) -> str:
    """Shortens each absolute path in a text to its last name, so that the text does not show the folders of a user.

    Args:
        text: The text.
        known: Paths that may be in the text and may contain spaces. Any other path is assumed to end at a space.

    Example:
        >>> hide_folders("data_dir=/home/me/images: no such folder")
        'data_dir=images: no such folder'
        >>> hide_folders("must hold <class>/* or train/<class>/*")
        'must hold <class>/* or train/<class>/*'
    """
    text = str(text)
    if text.startswith(("/", "~", "../")) and ": " not in text:  # a path as a whole, which may have spaces
        return os.path.basename(os.path.normpath(text)) or text
    paths = {form for path in known for form in (str(path), os.path.abspath(path), os.path.realpath(path))}
    for path in sorted(filter(os.path.isabs, paths), key=len, reverse=True):
        text = text.replace(path, os.path.basename(os.path.normpath(path)) or path)
    return PATH.sub(r"\1", text)


def format_seconds(seconds: float) -> str:
    """Returns a duration as text, in seconds, minutes or hours, depending on its length.

    Example:
        >>> [format_seconds(s) for s in (7, 600, 36000)]
        ['7 s', '10 min', '10.0 h']
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def format_accuracy(value: float | None, sign: str = "") -> str:
    """Converts an accuracy from a fraction to percent, as text with two decimals and no percent sign; None becomes `-`.

    It is used for the screen, Markdown and figures; JSON and CSV files contain fractions.

    Args:
        value: The accuracy, or a difference of two accuracies, as a fraction.
        sign: "+" to write a plus sign before numbers that are not negative.

    Example:
        >>> format_accuracy(0.91234)
        '91.23'
    """
    return MISSING if value is None else f"{100 * value:{sign}.2f}"


def format_mean_deviation(mean: float | None, deviation: float | None) -> str:
    """Converts a mean accuracy and its standard deviation from fractions to percent, as text.

    Args:
        mean: The mean accuracy, a fraction. If it is None, the text is `-`.
        deviation: The standard deviation, a fraction. If it is None, the text contains the mean only.

    Example:
        >>> format_mean_deviation(0.91, 0.002)
        '91.00 ± 0.20'
    """
    text = format_accuracy(mean)
    return text if mean is None or deviation is None else f"{text} ± {format_accuracy(deviation)}"


def format_count(count: int | None) -> str:
    """Returns a whole number as text with commas between thousands; `-` for None."""
    return MISSING if count is None else f"{count:,}"


def format_macs(count: float | None) -> str:
    """Returns a number of multiply-accumulates (MACs) as text with three digits and a prefix such as M; `-` for None.

    Example:
        >>> [format_macs(count) for count in (20_472_448, 1.81e9, 3.2154e13, 999_999)]
        ['20.5 M', '1.81 G', '32.2 T', '1.00 M']
    """
    if count is None:
        return MISSING
    power = 0
    while power < len(PREFIXES) - 1 and abs(count) >= 999.5:  # 999.5 has four digits if it is rounded to ones
        count, power = count / 1000, power + 1
    digits = 0 if power == 0 or count >= 99.95 else 1 if count >= 9.995 else 2
    return f"{count:.{digits}f} {PREFIXES[power]}".rstrip()
