"""Figures of a report. A method has the same color everywhere, a setting (such as a block type) the same marker."""

from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from odcheap.report.statistics import Spread
from odcheap.utils.text import escape_control_chars

# The colors of Okabe and Ito, which color-blind readers can distinguish.
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#999933", "#882255")
MARKERS = "osD^vPX<>*"
MAX_LABEL = 60  # characters; longer labels leave no space for the figure, and very long ones take minutes to draw


def assign_styles(names: Iterable[str], styles: Sequence[str]) -> dict[str, str]:
    """Gives each name a color or a marker, by the order of first appearance."""
    return dict(zip(dict.fromkeys(names), cycle(styles), strict=False))


def shorten_label(name: Any) -> str:
    """Returns a name for a figure: one line of at most 60 characters, the rest replaced by an ellipsis."""
    text = escape_control_chars(str(name)[: MAX_LABEL + 1])
    return text if len(text) <= MAX_LABEL else f"{text[: MAX_LABEL - 1]}…"


def label_width(names: Iterable[Any]) -> float:
    """Returns the inches that a figure needs for these labels in addition to its usual width."""
    return 0.1 * max((len(shorten_label(name)) - 20 for name in names if len(shorten_label(name)) > 20), default=0)


def plot_tradeoff(rows: pd.DataFrame, costs: pd.Series, label: str) -> Figure:
    """Draws accuracy against a cost, with the Pareto front.

    Args:
        rows: The rows of `summarize_runs`.
        costs: The cost by the row's index; rows without a cost or an accuracy are left out.
        label: What the cost is, with its unit.
    """
    figure, (axes,) = create_figure(8 + label_width([*rows["method"], *rows["setting"]]), 5)
    colors, markers = assign_styles(rows["method"], COLORS), assign_styles(rows["setting"], MARKERS)
    shown = rows.assign(cost=costs)[costs.notna() & rows["selected"].notna()]
    for row in shown.to_dict("records"):
        accuracy: Spread = row["selected"]
        error, marker = 100 * (accuracy.deviation or 0), markers[row["setting"]]
        axes.errorbar(row["cost"], 100 * accuracy.mean, error, fmt=marker, color=colors[row["method"]], lw=1, capsize=2)
    front = pareto_front([(row.cost, 100 * row.selected.mean) for row in shown.itertuples()])
    axes.step(*zip(*front, strict=True), where="post", color="#BBBBBB", zorder=1)
    axes.set_xlabel(label)
    axes.set_ylabel("top-1 of the selected student, %\n(bars: standard deviation over seeds)")
    axes.set_title("Accuracy against cost (gray: Pareto front)", loc="left", fontsize=11)
    axes.margins(0.1)
    limit_to_hundred(axes)
    handles = [
        Line2D([], [], color=color, marker="o", ls="", label=shorten_label(name)) for name, color in colors.items()
    ]
    settings = {name: marker for name, marker in markers.items() if name}
    handles += [
        Line2D([], [], color="#888888", marker=m, ls="", label=shorten_label(name)) for name, m in settings.items()
    ]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the points (cost, accuracy) for which no other point is as cheap and as accurate, sorted by cost."""
    front: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or accuracy > front[-1][1]:
            front.append((cost, accuracy))
    return front


def plot_gains(rows: pd.DataFrame, baseline: str) -> Figure:
    """Draws each row's gain over the baseline, with its 95 % interval; the marker is hollow if it is not resolved."""
    shown = rows[rows["gain"].notna()][::-1]
    figure, (axes,) = create_figure(8 + label_width([*shown["name"], baseline]), 1.4 + 0.34 * len(shown))
    colors, markers = assign_styles(rows["method"], COLORS), assign_styles(rows["setting"], MARKERS)
    for place, row in enumerate(shown.to_dict("records")):
        gain: Spread = row["gain"]
        error = None if gain.interval is None else 100 * (gain.interval[1] - gain.mean)
        color, marker = colors[row["method"]], markers[row["setting"]]
        fill = color if gain.is_resolved else "white"
        axes.errorbar(100 * gain.mean, place, xerr=error, marker=marker, color=color, markerfacecolor=fill)
    axes.axvline(0, color="#BBBBBB", zorder=0)
    axes.margins(y=0.5 / len(shown))
    axes.set_yticks(range(len(shown)), [shorten_label(name) for name in shown["name"]])
    baseline = shorten_label(baseline)
    label = f"gain of the mean student over {baseline}, same seed,\npercentage points (bars: 95 % confidence intervals)"
    axes.set_xlabel(label)
    counts = " or ".join(map(str, sorted({gain.n for gain in shown["gain"]})))
    axes.set_title(f"Gains over {baseline} (n = {counts}; hollow: not resolved)", loc="left", fontsize=11)
    return figure


def plot_curves(table: pd.DataFrame, stage: str) -> Figure:
    """Draws top-1 by epoch, mean over seeds: the mean student solid, the teacher dashed, a panel for each setting.

    Args:
        table: The runs of `tabulate_runs`.
        stage: The images that the accuracy is of: `val` or `train`.
    """
    settings = list(dict.fromkeys(table["setting"]))
    panel_width = 3.2 + label_width(settings)
    width = max(6, panel_width * len(settings)) + 1 + label_width(table["method"])
    figure, panels = create_figure(width, 4, len(settings))
    colors, later = assign_styles(table["method"], COLORS), []
    for _, runs in table.groupby(["setting", "method"], sort=False):
        setting, method = runs["setting"].iloc[0], runs["method"].iloc[0]
        histories = [run.history for run in runs["run"]]
        for pattern, style in ((rf"^{stage}/student_\d+/top1$", "-"), (rf"^{stage}/teacher/top1$", "--")):
            curve = 100 * average_curves(histories, pattern)
            panels[settings.index(setting)].plot(curve.index + 1, curve, style, color=colors[method])
            later += list(curve[len(curve) // 5 :])

    # With the first epochs inside the axis, the differences between the later ones would be hard to see.
    panels[0].set_ylim(bottom=min(later, default=0) - 1)
    limit_to_hundred(panels[0])
    panels[0].set_ylabel(f"{stage} top-1, %")
    for axes, setting in zip(panels, settings, strict=True):
        axes.set_title(shorten_label(setting or "all runs"), loc="left", fontsize=10)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.margins(x=0.02)
    handles = [Line2D([], [], color=color, label=shorten_label(method)) for method, color in colors.items()]
    handles += [Line2D([], [], color="#888888", ls=ls, label=n) for n, ls in (("mean student", "-"), ("teacher", "--"))]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def average_curves(histories: list[pd.DataFrame], pattern: str) -> pd.Series:
    """Averages the columns that match a pattern over runs, by epoch, for the epochs that all runs have."""
    if not all("epoch" in history for history in histories):
        return pd.Series(dtype=float)
    curves = [history.set_index("epoch").filter(regex=pattern).mean(axis=1) for history in histories]
    return pd.concat(curves, axis=1).dropna().mean(axis=1)


def create_figure(width: float, height: float, count: int = 1) -> tuple[Figure, Sequence[Axes]]:
    """Returns a figure with so many panels in a row, without a frame at the top and the right."""
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#EEEEEE")
        axes.set_axisbelow(True)
    return figure, panels


def limit_to_hundred(axes: Axes) -> None:
    """Cuts the axis above 100 %, with space for a marker."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, min(high, 100 + (100 - low) / 40))
