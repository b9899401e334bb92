"""A study's figures: plain rows in, Matplotlib figures out."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from odcheap.report.statistics import Row, Spread, mean_student

# Okabe and Ito's colours, told apart by the colour-blind; then shapes tell.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#999933", "#882255")
MARKERS = "osD^vPX<>*"


class Point(NamedTuple):
    """`cost` in the unit of its axis; `accuracy` a fraction."""

    method: str
    setting: str
    cost: float
    accuracy: Spread


def ranks(names: Sequence[str], values: str | Sequence[str]) -> dict[str, str]:
    """The same colour or marker for a name in every figure."""
    order = list(dict.fromkeys(names))
    return {name: values[k % len(values)] for k, name in enumerate(order)}


def trade_off(points: list[Point], unit: str) -> Figure:
    """Accuracy against a cost, with the front of those that nothing beats in both."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    colours, markers = (ranks([p[k] for p in points], v) for k, v in ((0, COLOURS), (1, MARKERS)))
    step = 0.01 * (max(p.cost for p in points) - min(p.cost for p in points))  # bars of one price side by side
    places = [p.cost + step * (k % len(colours) - (len(colours) - 1) / 2) for k, p in enumerate(points)]
    for aside, p in zip(places, points, strict=True):
        error = 100 * (p.accuracy.deviation or 0)
        axes.errorbar(aside, 100 * p.accuracy.mean, error, fmt=markers[p.setting], color=colours[p.method], lw=1)
    front = pareto([(p.cost, p.accuracy.mean) for p in points])
    axes.step([x for x, _ in front], [100 * y for _, y in front], where="post", color="#BBBBBB", zorder=0)
    axes.set_xlabel(unit)
    axes.set_ylabel("top-1 of the selected student, %\n(bars: deviation over seeds)")
    axes.set_title("Which student for which price (grey: nothing is both cheaper and better)", loc="left", fontsize=11)
    axes.margins(x=0.25, y=0.1)
    below_hundred(axes)
    named = [(f"{p.method} {p.setting}", colours[p.method]) for p in points]
    heights = [100 * p.accuracy.mean for p in points]
    label_beside(axes, [(x, y, *name) for x, y, name in zip(places, heights, named, strict=True)])
    return cleared(figure)


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of (cost, accuracy) that no cheaper or equally dear one reaches, by cost."""
    front: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or accuracy > front[-1][1]:
            front.append((cost, accuracy))
    return front


def label_beside(axes: Axes, labels: list[tuple[float, float, str, str]]) -> None:
    """Names to the right of their points, moved apart where they would cover each other."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    columns: list[list[tuple[float, float, str, str]]] = []
    for label in sorted(labels):
        if columns and label[0] - columns[-1][-1][0] < (right - left) / 10:
            columns[-1].append(label)
        else:
            columns.append([label])
    for column in columns:
        column.sort(key=lambda label: label[1])
        heights = spread_out([y for _, y, _, _ in column], (high - low) / 22)
        beside = max(x for x, _, _, _ in column) + (right - left) / 50
        for (x, y, name, colour), height in zip(column, heights, strict=True):
            line = {"arrowstyle": "-", "color": colour, "lw": 0.5, "shrinkA": 0}
            axes.annotate(name, (x, y), (beside, height), color=colour, fontsize=8, va="center", arrowprops=line)


def spread_out(values: list[float], gap: float) -> list[float]:
    """Sorted values, moved as little as may be (in least squares) so that neighbours are `gap` apart."""
    blocks: list[list[float]] = []  # sum and count of those that move together, as if they lay on one spot
    for k, value in enumerate(values):
        blocks.append([value - k * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + count]
    spots = [total / count for total, count in blocks for _ in range(int(count))]
    return [spot + k * gap for k, spot in enumerate(spots)]


def below_hundred(axes: Axes) -> None:
    """No more of the axis above 100 per cent than a marker needs."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, min(high, 100 + (100 - low) / 40))


def gains(rows: list[Row]) -> Figure:
    """Each method's gain over its baseline, with two standard errors; hollow where zero is among them."""
    found = [(row, row.gain(mean_student)) for row in rows if row.baseline]
    found = [(row, gain) for row, gain in found if gain is not None]
    figure = Figure(figsize=(8, 1.4 + 0.34 * max(1, len(found))), layout="constrained")
    axes = figure.subplots()
    colours = ranks([row.method for row in rows], COLOURS)
    for place, (row, gain) in enumerate(reversed(found)):
        error = None if gain.deviation is None else 200 * gain.deviation / math.sqrt(gain.n)
        fill = colours[row.method] if gain.resolved else "white"
        axes.errorbar(100 * gain.mean, place, xerr=error, marker="o", color=colours[row.method], markerfacecolor=fill)
    axes.axvline(0, color="#BBBBBB", zorder=0)
    axes.margins(y=0.5 / max(1, len(found)))
    axes.set_yticks(range(len(found)), [row.name for row, _ in reversed(found)])
    over = found[0][0].over
    axes.set_xlabel(f"gain of the mean student over {over}, same seed,\npercentage points (bars: two standard errors)")
    seeds = " or ".join(map(str, sorted({gain.n for _, gain in found})))
    axes.set_title(f"What the methods bring (n = {seeds}; hollow: not resolved)", loc="left", fontsize=11)
    return cleared(figure)


def curves(rows: list[Row], stage: str) -> Figure:
    """Top-1 by epoch on the images of that stage: mean student in full, teacher dashed, means over seeds."""
    settings = list(dict.fromkeys(row.setting for row in rows))
    figure = Figure(figsize=(max(6, 4.4 * len(settings)), 4), layout="constrained")
    panels = figure.subplots(1, len(settings), sharey=True, squeeze=False)[0]
    colours = ranks([row.method for row in rows], COLOURS)
    ends, later = {setting: [] for setting in settings}, []
    for row in rows:
        axes = panels[settings.index(row.setting)]
        for who, style in ((students_at, "-"), (teacher_at, "--")):
            line = [100 * y for y in mean_curve(row, lambda r, who=who: who(r, stage))]
            axes.plot(range(1, len(line) + 1), line, style, color=colours[row.method])
            later += line[len(line) // 5 :]
            if line and style == "-":
                ends[row.setting].append((len(line), line[-1], row.method, colours[row.method]))
    panels[0].set_ylim(bottom=min(later, default=0) - 1)  # the climb of the first epochs would flatten the rest
    below_hundred(panels[0])
    panels[0].set_ylabel(f"{stage} top-1, %")
    for axes, setting in zip(panels, settings, strict=True):
        axes.set_title(setting or "all runs", loc="left", fontsize=10)
        axes.set_xlabel("epoch")
        axes.margins(x=0.02)
        label_beside(axes, ends[setting])
    figure.suptitle("Mean student (full) and teacher (dashed)", x=0.01, ha="left", fontsize=11)
    return cleared(figure)


def students_at(record: dict[str, float], stage: str) -> float | None:
    names = [k for k in record if k.startswith(f"{stage}/student_") and k.endswith("/top1")]
    return sum(record[k] for k in names) / len(names) if names else None


def teacher_at(record: dict[str, float], stage: str) -> float | None:
    return record.get(f"{stage}/teacher/top1")


def mean_curve(row: Row, value: Callable[[dict[str, float]], float | None]) -> list[float]:
    """The mean over seeds, epoch by epoch, as far as all runs go."""
    lines = [[value(record) for record in run.history] for run in row.by_seed.values()]
    together = zip(*lines, strict=False)
    return [sum(values) / len(values) for values in together if None not in values]


def cleared(figure: Figure) -> Figure:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="both", color="#EEEEEE", zorder=-1)
    return figure


def save(figure: Figure, folder: Path, name: str) -> None:
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"{name}.{suffix}", dpi=150)
