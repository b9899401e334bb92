"""A confusion matrix as a figure that is legible in one column of a paper, for 2 to 100 classes and more."""

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
    """Draws a confusion matrix. The color of a cell is the share of the true class's images in it.

    Cells have numbers if there is space for them. If there are too many classes to name each of them, every n-th one
    is named, and the axes say so.

    Args:
        counts: Numbers of images (K, K), true classes by predicted ones.
        classes: Names of the K classes.
        title: Text above the matrix; it is shortened if it is too long.

    Returns:
        A figure of 3.5 inches in width, which belongs to no window.

    Example:
        >>> figure = plot_confusion([[3, 1], [0, 2]], ["cat", "dog"])
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['3', '1', '0', '2']
    """
    from matplotlib.colors import PowerNorm  # imported here, since few commands draw a figure
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    counts = np.asarray(counts)
    size = len(counts)
    if counts.shape != (size, size) or len(classes) != size:
        raise ValueError(f"counts must be K x K for K classes, not {counts.shape} for {len(classes)}")
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(counts, totals, out=np.full((size, size), np.nan), where=totals > 0)

    figure = Figure(figsize=(WIDTH, 0.95 * WIDTH), layout="constrained")
    axes = figure.subplots()
    # The square root of a share is its color, so that rare confusions are visible too.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    axes.set_facecolor("#DDDDDD")  # rows of classes without images
    cell = 72 * WIDTH * AXES_SHARE / size  # points
    write_counts(axes, counts, shares, cell)

    # Class names, at most as many as fit.
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
    """Writes the number of images into each cell, if the largest one can be read there; 0 is gray.

    Args:
        axes: Where the matrix is drawn.
        counts: The numbers (K, K).
        shares: The shares (K, K) that the cells' colors stand for.
        cell: Side of a cell in points.
    """
    digits = len(str(counts.max())) if counts.size else 1
    points = min(MAX_POINTS, 0.9 * cell / (0.6 * digits), 0.8 * cell)
    if points < MIN_POINTS:
        return
    for (row, column), count in np.ndenumerate(counts):
        color = "#AAAAAA" if not count else "white" if shares[row, column] > 0.4 else "black"
        axes.text(column, row, str(count), ha="center", va="center", fontsize=points, color=color)


def shorten_name(name: object, length: int) -> str:
    """Returns text as one line of so many characters at most; the rest is replaced by an ellipsis.

    Example:
        >>> shorten_name("golden retriever", 10)
        'golden re…'
    """
    text = escape_control_chars(str(name)[: length + 1])
    return text if len(text) <= length else f"{text[: length - 1]}…"


def ordinal_suffix(number: int) -> str:
    """Returns what makes a number an ordinal number: `nd` for 2 and 22, `th` for 12."""
    return "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")


def render_png(figure: "Figure", dpi: int = 200) -> bytes:
    """Returns a figure as the content of a PNG file. Letters that the font does not have are drawn as boxes."""
    image = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of missing letters
        figure.savefig(image, format="png", dpi=dpi)
    return image.getvalue()
