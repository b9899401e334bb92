"""Draws a confusion matrix as a figure that is readable in one column of a paper, even with 100 classes and more."""

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from odcheap.utils.text import escape_control_chars

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 3.5  # inches of a column in the usual two-column styles
AXES_SHARE = 0.62  # of the width is left for the matrix beside the names and the color bar
MIN_POINTS, MAX_POINTS = 5.0, 8.0  # font sizes; smaller text cannot be read in print
LINE_POINTS = 1.25  # height of a line of text, in font sizes
MAX_NAME = 18  # characters of a class's name
MAX_NAMED = 25  # names of classes on an axis


def plot_confusion(counts: Any, classes: Sequence[str], title: str = "") -> "Figure":
    """Draws a confusion matrix, in which the color of a cell is its share of the images of the row's true class.

    The number of images is written into each cell if there is space for it. If the names of all classes do not fit,
    only every second (third, ...) class is named, and the label of the axis says so.

    Args:
        counts: The number of images, (K, K): a row for each true class, a column for each predicted class.
        classes: The names of the K classes.
        title: A text above the matrix; it is shortened if it is too long.

    Returns:
        A matplotlib figure with a width of 3.5 inches; no window is opened for it.

    Example:
        >>> figure = plot_confusion([[3, 1], [0, 2]], ["cat", "dog"])
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['3', '1', '0', '2']
    """
    from matplotlib.colors import PowerNorm  # imported here, since few commands draw a figure
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    # The fractions: NaN in the rows of classes without images.
    counts = np.asarray(counts)
    size = len(counts)
    if counts.shape != (size, size) or len(classes) != size:
        raise ValueError(f"counts must be K x K for K classes, not {counts.shape} for {len(classes)}")
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(counts, totals, out=np.full((size, size), np.nan), where=totals > 0)

    figure = Figure(figsize=(WIDTH, 0.95 * WIDTH), layout="constrained")
    axes = figure.subplots()
    # The color depends on the square root of the fraction, so that rare confusions can be seen, too.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    axes.set_facecolor("#DDDDDD")  # rows of classes without images
    cell = 72 * WIDTH * AXES_SHARE / size  # points
    write_counts(axes, counts, shares, cell)

    # The names of the classes, as many as fit.
    step = int(np.ceil(max(MIN_POINTS * LINE_POINTS / cell, size / MAX_NAMED)))
    places = range(0, size, step)
    names = [shorten_name(classes[k], MAX_NAME) for k in places]
    points = min(MAX_POINTS - 1, max(MIN_POINTS, step * cell / LINE_POINTS))
    short = all(len(name) * 0.6 * points < step * cell for name in names)
    axes.set_xticks(places, names, rotation=0 if short else 90, fontsize=points)
    axes.set_yticks(places, names, fontsize=points)
    axes.tick_params(length=2 if step == 1 else 3, pad=2)
    some = "" if step == 1 else f" (every {step}{ordinal_suffix(step)} class is named)"
    axes.set_xlabel("predicted class", fontsize=MAX_POINTS)
    axes.set_ylabel(f"true class{some}", fontsize=MAX_POINTS if not some else MAX_POINTS - 1)
    if title:
        axes.set_title(shorten_name(title, 52), fontsize=MAX_POINTS, loc="left")
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, ticks=[0, 0.1, 0.5, 1])
    bar.set_label("share of the true class", fontsize=MAX_POINTS - 1)
    bar.ax.tick_params(labelsize=MAX_POINTS - 1, length=2, pad=2)
    bar.outline.set_linewidth(0.5)
    axes.spines[:].set_linewidth(0.5)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a $ in the name of a class starts no formula
    return figure


def write_counts(axes: Any, counts: np.ndarray, shares: np.ndarray, cell: float) -> None:
    """Writes the number of images into each cell of a confusion matrix, unless the numbers would be too small to read.

    A number of 0 is gray.

    Args:
        axes: The axes in which the matrix is drawn.
        counts: The numbers of images, (K, K).
        shares: The fractions (K, K) that the colors of the cells show.
        cell: The side of a cell in points.
    """
    # The font size with which the largest number fits into a cell; a digit is about 0.6 times as wide as high.
    digits = len(str(counts.max())) if counts.size else 1
    points = min(MAX_POINTS, 0.9 * cell / (0.6 * digits), 0.8 * cell)
    if points < MIN_POINTS:
        return
    for (row, column), count in np.ndenumerate(counts):
        color = "#AAAAAA" if not count else "white" if shares[row, column] > 0.4 else "black"
        axes.text(column, row, str(count), ha="center", va="center", fontsize=points, color=color)


def shorten_name(name: object, length: int) -> str:
    """Returns text as one line of at most `length` characters; if it is longer, it is cut and ends with an ellipsis.

    Example:
        >>> shorten_name("golden retriever", 10)
        'golden re…'
    """
    text = escape_control_chars(str(name)[: length + 1])
    return text if len(text) <= length else f"{text[: length - 1]}…"


def ordinal_suffix(number: int) -> str:
    """Returns the letters that make a number an ordinal number, such as `nd` for 2 and 22, and `th` for 12."""
    return "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")


def render_png(figure: "Figure", dpi: int = 200) -> bytes:
    """Returns a figure as the content of a PNG file, without warnings about letters that the font does not have."""
    image = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of missing letters
        figure.savefig(image, format="png", dpi=dpi)
    return image.getvalue()
