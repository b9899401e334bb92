"""Draws the figures of a report, which are as wide as a column of a paper.

A method has the same color in every report, and a block type has the same marker. A setting is the combination of the
options that differ between the runs and do not belong to the method, such as the block type.
"""

import io
import math
import textwrap
import zlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise, product
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter
from matplotlib.transforms import ScaledTranslation

from odcheap.report.load_runs import FinishedRun
from odcheap.report.statistics import Latency, Spread
from odcheap.utils.text import escape_control_chars

WIDTH = 3.3  # inches: a column of most journals and conferences
STYLE: dict[Any, Any] = {
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.0,
    "lines.markersize": 5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "pdf.fonttype": 42,  # TrueType: many journals refuse matplotlib's Type 3 fonts
    "text.parse_math": False,  # a $ in an option's value starts no formula
}
GRAY = "#888888"
# Colors of Okabe and Ito, which color-blind readers can distinguish, and three of Tol's.
METHOD_COLORS = {
    "alone": "#000000",
    "od": "#0072B2",
    "kd": "#D55E00",
    "dml": "#009E73",
    "one": "#CC79A7",
    "okddip": "#56B4E9",
    "kdcl": "#E69F00",
    "ffl": "#999933",
    "pcl": "#882255",
    "lmcl": "#332288",
}
OTHER_COLORS = ("#44AA99", "#AA4499", "#661100", "#DDCC77")  # for methods of the user's own
BLOCK_MARKERS = {"DW": "o", "Shift": "s", "Group": "D", "Standard": "^"}
OTHER_MARKERS = ("v", "P", "X", "<", ">", "p", "h")  # for block types of the user's own
FILLS = ("full", "none", "left", "right", "top", "bottom")
STANDARD_MARKER = "*"
DATA_NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet": "ImageNet"}
STAGES = {"val": "held-out", "train": "training", "test": "test"}
MAX_LABEL = 44  # characters that fit beside a legend's marker
MAX_NOTE = 55  # characters that fit below an axis
MAX_TITLE_NAME = 20  # characters of a name within a title
STEP = 5.5  # points: between points of about equal cost, a bit more than the size of a marker
MAX_STRETCH = 1.5  # largest cost of a standard network that is drawn, in units of the largest cost of a student
LOG_FROM = 4  # ratio of the largest and the smallest cost from which a cost axis is logarithmic


def pick(name: str, known: Mapping[str, str], others: Sequence[str]) -> str:
    """Returns the color or marker of a name.

    Args:
        name: The name of a method or a block type. If it is empty, the first color or marker in `known` is returned.
        known: The color or marker of each known name, such as `METHOD_COLORS`.
        others: The colors or markers for names that are not in `known`. The same name always gets the same one.
    """
    if not name:
        return next(iter(known.values()))
    return known.get(name) or others[zlib.crc32(name.encode()) % len(others)]


def assign_colors(rows: pd.DataFrame) -> dict[str, str]:
    """Returns a color for each method in a table; the same method with other options gets lighter shades of its color.

    Args:
        rows: The table of `tabulate_runs` or of `summarize_runs`; its columns `method` and `method part` are used.

    Returns:
        A dict from each entry of the column `method`, such as "od temperature=2", to a color such as "#0072b2".
    """
    colors = {}
    for part, names in rows.groupby("method part", sort=False)["method"]:
        labels = sorted(set(names), key=lambda label: (label != part, label))
        rgb = to_rgb(pick(str(part), METHOD_COLORS, OTHER_COLORS))
        for k, label in enumerate(labels):
            share = 0.7 * k / max(1, len(labels) - 1)  # of white
            red, green, blue = (value + share * (1 - value) for value in rgb)
            colors[label] = to_hex((red, green, blue))
    return {label: colors[label] for label in rows["method"]}


def assign_markers(rows: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Returns the marker and the fill style of each setting in a table, as arguments of matplotlib.

    A setting is the combination of the options that differ between the runs, except those of the training method. The
    marker of a setting depends on its block type (the kind of cheap convolution). Settings with the same block type
    have different fill styles.

    Args:
        rows: The table of `tabulate_runs` or of `summarize_runs`; its columns `setting` and `block type` are used.

    Returns:
        A dict from each entry of the column `setting` to a dict with the keys `marker` and `fillstyle`.
    """
    markers: dict[str, dict[str, Any]] = {}
    for block_type, settings in rows.groupby("block type", sort=False)["setting"]:
        first = pick(str(block_type), BLOCK_MARKERS, OTHER_MARKERS)
        looks = product([first, *(marker for marker in OTHER_MARKERS if marker != first)], FILLS)
        for setting in settings.unique():
            marker, fill = next(looks, (first, "full"))
            markers[setting] = {"marker": marker, "fillstyle": fill}
    return {setting: markers[setting] for setting in rows["setting"]}


def shorten_label(name: Any, limit: int = MAX_LABEL) -> str:
    """Returns a name as one line of at most `limit` characters; a longer name is cut and ends with an ellipsis."""
    text = escape_control_chars(str(name)[: limit + 1])
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def describe_data(runs: Iterable[FinishedRun]) -> str:
    """Returns a text such as `CIFAR-10, 15 epochs`, with the data set and the number of epochs of the runs."""
    summaries = [run.summary for run in runs]
    names = sorted({str(summary["data"]) for summary in summaries if summary.get("data")})
    epochs = sorted({summary["epochs"] for summary in summaries if summary.get("epochs")})
    parts = [shorten_label(", ".join(DATA_NAMES.get(name, name) for name in names), MAX_TITLE_NAME)] if names else []
    if epochs:
        count = str(epochs[0]) if len(epochs) == 1 else f"{epochs[0]} to {epochs[-1]}"
        parts.append(f"{count} epoch{'' if count == '1' else 's'}")
    return ", ".join(parts)


@rc_context(STYLE)
def plot_tradeoff(
    rows: pd.DataFrame,
    costs: Sequence[Latency | None],
    label: str,
    data: str,
    images: str = "test",
    standard: Sequence[Latency] = (),
) -> Figure:
    """Draws the accuracy of the selected student against a cost, with the Pareto front.

    Points of about equal cost that would cover each other are drawn side by side, and the label of the axis says so.

    Args:
        rows: The table of `summarize_runs`, with a row for each combination of setting and method.
        costs: The cost of each row, or None. Rows without a cost or an accuracy are left out.
        label: The name of the cost and its unit.
        data: The text of `describe_data`, for the title.
        images: "test" or "val" (held out), for the images on which the accuracy was measured.
        standard: The costs of standard networks (the same backbones with standard convolutions) that are in no row.
            They have no accuracy, and are drawn on the horizontal axis. If a cost is much larger than those of the
            rows, it is not drawn, but written in the label of the axis.
    """
    # The points with their error bars.
    colors, markers = assign_colors(rows), assign_markers(rows)
    is_shown = [c is not None and s is not None for c, s in zip(costs, rows["selected"], strict=True)]
    shown = rows[is_shown]
    points = [cost for cost, is_drawn in zip(costs, is_shown, strict=True) if cost is not None and is_drawn]
    medians = [cost.median for cost in points]
    figure, (axes,) = create_figure(f"{data}: selected student", 2.4)
    artists: list[list[Artist]] = []
    for row, cost in zip(shown.to_dict("records"), points, strict=True):
        accuracy: Spread = row["selected"]
        color, place = colors[row["method"]], (cost.median, 100 * accuracy.mean)
        error = None if accuracy.deviation is None else 100 * accuracy.deviation
        bars = axes.errorbar(*place, error, cost.bars, fmt="none", ecolor=color, elinewidth=0.8, capsize=1.5, zorder=2)
        look = markers[row["setting"]]
        edge = "white" if look["fillstyle"] == "full" else color  # tells points apart that are close to each other
        lines = axes.plot(*place, color=color, **look, markeredgecolor=edge, markeredgewidth=0.6, zorder=3)
        artists.append([*bars.get_children(), *lines])

    # The axes, the Pareto front, the standard networks, and the legend.
    drawn = [network for network in standard if network.median <= MAX_STRETCH * max(medians)]
    set_cost_axis(axes, [*medians, *(network.median for network in drawn)])
    axes.margins(y=0.12)
    limit_to_hundred(axes)
    notes = [label]
    if spread_sideways(axes, artists, medians, shown["selected"]):
        notes.append("(points of about equal cost are side by side)")
    if len(drawn) < len(standard):
        beyond = ", ".join(f"{network.median:.3g}" for network in standard if network not in drawn)
        notes.append(shorten_label(f"(standard network, not drawn: {beyond})", MAX_NOTE))
    handles = legend_of_methods(shown, colors, markers)
    front = pareto_front([(c, 100 * s.mean) for c, s in zip(medians, shown["selected"], strict=True)])
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), ls=":", color=GRAY, zorder=1)
        handles.append(Line2D([], [], ls=":", color=GRAY, label="Pareto front"))
    if drawn:
        draw_standard_networks(axes, drawn)
        name = "standard network (cost only)"
        handles.append(Line2D([], [], color=GRAY, marker=STANDARD_MARKER, ls="", markersize=6, label=name))
    axes.set_xlabel("\n".join(notes), loc="right")  # in the center, a long line would be cut off at the right
    axes.set_ylabel(f"{STAGES[images]} top-1, %")
    add_legend(figure, handles)
    return figure


def set_cost_axis(axes: Axes, costs: Sequence[float]) -> None:
    """Lets the horizontal axis begin at zero, or makes it logarithmic if costs differ by more than a factor of 4.

    Args:
        axes: The axes, whose horizontal axis shows the costs.
        costs: All costs that are drawn.
    """
    low, high = min(costs), max(costs)
    if low > 0 and high / low > LOG_FROM:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.5, high * 1.5)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(0, 1.1 * high or 1)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))


def spread_sideways(
    axes: Axes, artists: Sequence[Sequence[Artist]], costs: Iterable[float], accuracies: Iterable[Spread]
) -> bool:
    """Moves points sideways if they have about equal costs and would cover each other; returns whether it moved any.

    Moved points have a fixed distance in the figure, whatever the limits of the axes are. Only the drawing is moved,
    and the artists keep their data.

    Args:
        axes: The axes, with limits; the horizontal axis gets longer if points would leave it at the right.
        artists: The marker and the error bars of each point.
        costs: The cost of each point.
        accuracies: The accuracy of each point; its error bar is one standard deviation on each side.
    """
    # The horizontal places in points, on an axis that takes about 85 % of the width.
    to_axes = axes.transScale + axes.transLimits
    width = 72 * 0.85 * WIDTH
    places = [width * to_axes.transform((cost, 1))[0] for cost in costs]
    marker = 0.03 * (axes.get_ylim()[1] - axes.get_ylim()[0])  # half of its height
    bars = []
    for accuracy in accuracies:
        half = max(marker, 100 * (accuracy.deviation or 0))
        bars.append((100 * accuracy.mean - half, 100 * accuracy.mean + half))
    groups: list[list[int]] = []
    for k in sorted(range(len(places)), key=lambda k: places[k]):
        if groups and places[k] - places[groups[-1][-1]] < STEP:
            groups[-1].append(k)
        else:
            groups.append([k])
    is_moved, stretch = False, 1.0
    for group in groups:
        sorted_bars = sorted(bars[k] for k in group)
        if all(low > high for (_, high), (low, _) in pairwise(sorted_bars)):
            continue
        is_moved = True
        for position, k in enumerate(group):
            shift = STEP * (position - (len(group) - 1) / 2)
            stretch = max(stretch, places[k] / max(width / 2, width - shift - STEP))
            for artist in artists[k]:
                artist.set_transform(axes.transData + ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans))
    if axes.get_xscale() == "linear":  # the points at the right must be inside
        axes.set_xlim(right=stretch * axes.get_xlim()[1])
    return is_moved


def draw_standard_networks(axes: Axes, networks: Sequence[Latency]) -> None:
    """Draws the costs of standard networks as stars on the horizontal axis, with their quartiles if there are any.

    Args:
        axes: The axes, with limits.
        networks: The cost of each network, such as a time with its median and quartiles. A number of
            multiply-accumulates has no quartiles; they are NaN then.
    """
    bottom = axes.get_ylim()[0]
    for network in networks:
        look: dict[str, Any] = {"color": GRAY, "marker": STANDARD_MARKER, "markersize": 6}
        bars = axes.errorbar(network.median, bottom, xerr=network.bars, **look, elinewidth=0.8, capsize=1.5, zorder=4)
        for artist in bars.get_children():
            artist.set_clip_on(False)
    axes.set_ylim(bottom=bottom)


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the points of the Pareto front, sorted by cost. Each is cheaper or more accurate than any other point.

    Args:
        points: The points (cost, accuracy).
    """
    front: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or accuracy > front[-1][1]:
            front.append((cost, accuracy))
    return front


@rc_context(STYLE)
def plot_gains(rows: pd.DataFrame, baseline: str, data: str) -> Figure:
    """Draws the gain of each setting (such as the block type) and method over the baseline.

    A gain is the mean accuracy of all students of a run, minus that of the baseline's run with the same seed. Error
    bars are 95 % confidence intervals. The marker is hollow if the interval contains zero or there is only one seed.

    Args:
        rows: The table of `summarize_runs`, with a row for each combination of setting and method.
        baseline: The name of the baseline, for the title. It is a method, or the `name` of a row (method and setting).
        data: The text of `describe_data`, for the title.
    """
    shown = rows[rows["gain"].notna()][::-1]
    # A row is as high as its label, so that labels of several lines do not touch each other.
    labels = [wrap_label(name, 20, 6) for name in shown["name"]]
    heights = [0.09 + 0.12 * len(lines) for lines in labels]  # inches
    places = [sum(heights[:k]) + height / 2 for k, height in enumerate(heights)]
    colors, markers = assign_colors(rows), assign_markers(rows)
    title = f"{data}: gain over {shorten_label(baseline, MAX_TITLE_NAME)}"
    figure, (axes,) = create_figure(title, 0.75 + sum(heights))
    for place, row in zip(places, shown.to_dict("records"), strict=True):
        gain: Spread = row["gain"]
        error = None if gain.margin is None else 100 * gain.margin
        color, marker = colors[row["method"]], markers[row["setting"]]["marker"]
        face = color if gain.is_resolved else "white"
        look: dict[str, Any] = {"color": color, "marker": marker, "markerfacecolor": face}
        axes.errorbar(100 * gain.mean, place, xerr=error, **look, capsize=1.5, elinewidth=0.8)
    axes.axvline(0, color="#444444", lw=0.8, zorder=1)
    axes.margins(x=0.08)
    axes.set_ylim(0, sum(heights))
    axes.set_yticks(places, ["\n".join(lines) for lines in labels])
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    counts = " or ".join(map(str, sorted({gain.n for gain in shown["gain"]})))
    bars = f"95 % intervals, n = {counts}; hollow: not resolved"
    if counts == "1":
        bars = "one seed: no intervals, not resolved"
    # Centered below the axis, it would be cut off at the right if the labels of the rows are long.
    axes.set_xlabel(f"gain of the mean student, percentage points\n({bars})", loc="right")
    return figure


def wrap_label(name: Any, width: int, max_lines: int) -> list[str]:
    """Returns a name as at most `max_lines` lines of at most `width` characters.

    Lines end at spaces. A word that is longer than a line is divided, after ".", "_" or "=" if it has one of these.
    """
    lines = []
    words = shorten_label(name, width * max_lines)
    for line in textwrap.wrap(words, width, break_long_words=False, break_on_hyphens=False):
        while len(line) > width:
            end = max(line.rfind(sign, 0, width) + 1 for sign in "._=") or width
            lines.append(line[:end])
            line = line[end:]
        lines.append(line)
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], f"{lines[max_lines - 1][: width - 1]}…"]
    return lines


@rc_context(STYLE)
def plot_curves(table: pd.DataFrame, stage: str, data: str) -> Figure:
    """Draws the top-1 accuracy by epoch, in a panel for each setting (options that differ, such as the block type).

    Solid lines are the mean of the students, and dashed lines are the teacher. All lines are means over the seeds, and
    bands are one sample standard deviation on each side.

    Args:
        table: The table of `tabulate_runs`, with a row for each run.
        stage: "val" (held out) or "train", for the images on which the accuracy was measured.
        data: The text of `describe_data`, for the title.
    """
    settings = list(dict.fromkeys(table["setting"]))
    colors, later, has_band = assign_colors(table), [], False
    columns = min(2, len(settings))
    lines_of = {r"^{}/student_\d+/top1$": "-", r"^{}/teacher/top1$": "--"}
    titles = [wrap_label(setting, MAX_LABEL // columns, 4) for setting in settings]
    figure, panels = create_figure(data, 1.8 + 0.12 * (max(map(len, titles)) - 1), len(settings), columns)
    drawn, last_epoch = set(), 1.0
    for _, runs in table.groupby(["setting", "method"], sort=False):
        setting, method = runs["setting"].iloc[0], runs["method"].iloc[0]
        for pattern, style in lines_of.items():
            curve = 100 * average_curves([run.history for run in runs["run"]], pattern.format(stage))
            if curve.empty:
                continue
            drawn.add(style)
            axes, epochs = panels[settings.index(setting)], curve.index + 1
            marker: dict[str, Any] = {"marker": ".", "markersize": 3} if len(curve) <= 3 else {}
            axes.plot(epochs, curve["mean"], style, color=colors[method], **marker)
            low, high = (curve["mean"] + sign * curve["deviation"] for sign in (-1, 1))
            axes.fill_between(epochs, low, high, color=colors[method], alpha=0.2, lw=0)
            has_band |= bool(curve["deviation"].notna().any())
            last_epoch = max(last_epoch, float(epochs[-1]))
            later += list(low.fillna(curve["mean"])[len(curve) // 5 :])
    # With the first epochs inside the axis, the differences between the later ones would be hard to see.
    panels[0].set_ylim(bottom=max(0, min(later, default=0) - 1))
    limit_to_hundred(panels[0])
    for k, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        axes.set_title("\n".join(title), loc="left", fontsize=7.5)
        if k + columns >= len(settings):
            axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axes.set_xlim(max(0.5, 1 - 0.03 * last_epoch), 1.03 * last_epoch)  # there is no epoch 0
    figure.supylabel(f"{STAGES[stage]} top-1, %", fontsize=STYLE["axes.labelsize"])
    handles = [Line2D([], [], color=color, label=shorten_label(method)) for method, color in colors.items()]
    names = {"-": "mean student", "--": "teacher"}
    handles += [Line2D([], [], color=GRAY, ls=style, label=names[style]) for style in names if style in drawn]
    if has_band:
        handles.append(Line2D([], [], color=GRAY, alpha=0.3, lw=5, label="± deviation over seeds"))
    add_legend(figure, handles)
    return figure


def average_curves(histories: list[pd.DataFrame], pattern: str) -> pd.DataFrame:
    """Averages the columns whose names match a pattern, first in each run and then over the runs.

    Args:
        histories: The content of `metrics.csv` of each run.
        pattern: A regular expression for names of columns, such as `^val/teacher/top1$`.

    Returns:
        A table with a row for each epoch that all runs have, and the columns `mean` and `deviation` (the sample
        standard deviation over the runs, NaN for one run).
    """
    if not all("epoch" in history for history in histories):
        return pd.DataFrame(columns=["mean", "deviation"], dtype=float)
    curves = [history.set_index("epoch").filter(regex=pattern).mean(axis=1) for history in histories]
    together = pd.concat(curves, axis=1).dropna()
    return pd.DataFrame({"mean": together.mean(axis=1), "deviation": together.std(axis=1)})


def create_figure(title: str, height: float, count: int = 1, columns: int = 1) -> tuple[Figure, Sequence[Axes]]:
    """Returns a figure as wide as a column of a paper, and its panels, which share their axes.

    Args:
        title: The text at the top on the left.
        height: The height of a panel in inches.
        count: The number of panels.
        columns: The number of panels in a row.
    """
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    figure.suptitle(title, x=0.02, ha="left", fontsize=STYLE["axes.titlesize"])
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes in panels[count:]:
        axes.remove()
    for k, axes in enumerate(panels[:count]):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#EEEEEE", lw=0.6)
        axes.set_axisbelow(True)
        if k + columns >= count:  # nothing is below
            axes.tick_params(labelbottom=True)
    return figure, panels[:count]


@rc_context(STYLE)
def render(figure: Figure, suffix: str) -> bytes:
    """Returns a figure as the content of an image file, in a format such as `png` or `svg`."""
    image = io.BytesIO()
    figure.savefig(image, format=suffix, dpi=300)
    return image.getvalue()


def legend_of_methods(
    rows: pd.DataFrame, colors: Mapping[str, str], markers: Mapping[str, dict[str, Any]]
) -> list[Line2D]:
    """Returns the entries of a legend, which are a colored line for each method and a gray marker for each setting.

    Args:
        rows: The rows that are drawn, of the table of `summarize_runs`.
        colors: The color of each method, from `assign_colors`.
        markers: The marker of each setting, from `assign_markers`.
    """
    methods = dict.fromkeys(rows["method"])
    handles = [Line2D([], [], color=colors[name], lw=3, label=shorten_label(name)) for name in methods]
    # The setting is an empty text if no option differs between the runs; the block type is shown then.
    labels = {s: s or b for s, b in zip(rows["setting"], rows["block type"], strict=True) if s or b}
    for setting, label in labels.items():
        handles.append(Line2D([], [], color=GRAY, ls="", **markers[setting], label=shorten_label(label)))
    return handles


def add_legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Adds a legend below the panels, in as many columns as fit, and increases the height of the figure for it."""
    labels = [str(handle.get_label()) for handle in handles]
    columns = next((count for count in (4, 3, 2) if legend_width(labels, count) < WIDTH), 1)
    rows = math.ceil(len(handles) / columns)
    figure.set_figheight(figure.get_figheight() + 0.15 * rows + 0.1)
    figure.legend(
        handles=handles, loc="outside lower left", ncols=columns, frameon=False, columnspacing=1.2, handlelength=1.6
    )


def legend_width(labels: Sequence[str], columns: int) -> float:
    """Returns the approximate width, in inches, of a legend with these labels in this number of columns.

    Matplotlib fills one column after the other.
    """
    rows, longer = divmod(len(labels), columns)
    sizes = [rows + (k < longer) for k in range(columns)]
    starts = [sum(sizes[:k]) for k in range(columns)]
    longest = [max(map(len, labels[s : s + size]), default=0) for s, size in zip(starts, sizes, strict=True)]
    return sum(0.38 + 0.055 * length for length in longest)


def limit_to_hundred(axes: Axes) -> None:
    """Lets the vertical axis, which is in percent, end at most slightly above 100, so that a marker at 100 fits."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, min(high, 100 + (100 - low) / 40))
