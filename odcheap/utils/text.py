"""Numbers and file names as text for tables, messages and model cards."""

from odcheap.predict import escape_control_chars as escape_control_chars  # also offered here

MISSING = "-"  # is written for a number that is not known


def format_seconds(seconds: float) -> str:
    """Returns a duration as seconds, minutes or hours.

    Example:
        >>> [format_seconds(s) for s in (7, 600, 36000)]
        ['7 s', '10 min', '10.0 h']
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def format_accuracy(value: float | None, sign: str = "") -> str:
    """Returns a fraction in [0, 1] with four digits, or `-` for None; `sign="+"` writes a plus sign too."""
    return MISSING if value is None else f"{value:{sign}.4f}"


def format_mean_deviation(mean: float | None, deviation: float | None, sign: str = "") -> str:
    """Returns a mean accuracy, with its deviation if there is one.

    Example:
        >>> format_mean_deviation(0.91, 0.002)
        '0.9100 ± 0.0020'
    """
    text = format_accuracy(mean, sign)
    return text if mean is None or deviation is None else f"{text} ± {format_accuracy(deviation)}"


def format_count(count: int | None) -> str:
    """Returns a whole number with commas between thousands, `-` for None."""
    return MISSING if count is None else f"{count:,}"


def format_millions(count: int | None) -> str:
    """Returns a count in millions: `20.47 M`, `-` for None."""
    return MISSING if count is None else f"{count / 1e6:.2f} M"
