"""Builds the figures and two tables of docs/results.md from the runs in this folder.

python results/build.py docs/assets writes the figures to a folder, and prints the tables.
"""

import csv
import json
import sys
from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from odcheap.report.load_runs import load_runs
from odcheap.report.plots import BLOCK_MARKERS, GRAY, METHOD_COLORS, STYLE
from odcheap.report.statistics import tabulate_runs
from odcheap.utils.text import format_mean_deviation

HERE = Path(__file__).parent
LABELS = {"alone": "labels alone", "kd": "with a teacher"}
ONE_CYCLE = "scheduler=one_cycle method.label_smoothing=0.1"
NEIGHBORS = {
    "Shift-resnet20": "ShiftResNet-20, 0.03 M: 85.8",
    "DW-resnet20": "depth-wise WRN-16-1, 0.030 M: 86.8, with KD 88.9",
    "Shift-resnet56": "ShiftResNet-56, 0.10 M: 89.7",
    "DW-resnet56": "depth-wise WRN-40-1, 0.088 M: 89.3, with attention transfer and KD 91.5",
}
RECIPES = {  # the runs' folders, without the seed, and their options
    "2019": "method=od",
    "one_cycle": f"method=od {ONE_CYCLE}",
    "mixup": f"method=od {ONE_CYCLE} augment.mixup=0.2",
    "trivial": f"method=od {ONE_CYCLE} augment=trivial",
    "adamw": f"method=od {ONE_CYCLE} optimizer=adamw optimizer.lr=3e-3",
    "alone": f"method=alone {ONE_CYCLE}",
    "kd": "method=kd scheduler=one_cycle method.teacher_weights=FOLDER",
    "kd_attention": "method=kd scheduler=one_cycle method.teacher_weights=FOLDER method.feature=attention",
}


def read_table(*folders: str) -> pd.DataFrame:
    """Returns a table with a row for each run in some folders, as `tabulate_runs` does, with accuracies in percent."""
    entries = load_runs([HERE / folder for folder in folders])
    table = tabulate_runs([entry.run for entry in entries if entry.run is not None])
    return table.assign(**{name: 100 * table[name].astype(float) for name in ("mean student", "selected")})


def format_spread(values: pd.Series) -> str:
    """Returns the mean of fractions in percent, as text, and its standard deviation if there are several values."""
    if values.empty:
        return "not run"
    return format_mean_deviation(values.mean(), values.std() if len(values) > 1 else None)


def format_recipes() -> list[str]:
    """Returns a table in Markdown of the recipes, decided on the held-out images: a row for each recipe."""
    lines = [
        "| recipe | mean student, held out | over `alone` | selected, held out | selected, test |",
        "|---|---|---|---|---|",
    ]
    runs = {name: read_runs("cifar10_recipes", f"{name}-seed*") for name in RECIPES}
    for name, options in RECIPES.items():
        gain = runs[name]["mean student"] - runs["alone"]["mean student"]
        cells = [runs[name]["mean student"], gain, runs[name]["selected"], runs[name]["selected, test"]]
        texts = [format_spread(values) for values in cells]
        texts[1] = "" if name == "alone" else f"{'+' if gain.mean() > 0 else ''}{texts[1]}"
        lines.append(f"| `{options}` | {' | '.join(texts)} |")
    return lines


def format_best() -> list[str]:
    """Returns a table in Markdown of the single networks beside published ones: a row for each network."""
    lines = [
        "| network | parameters | epochs | n | `alone` | with a teacher | published neighbor |",
        "|---|---|---|---|---|---|---|",
    ]
    for network, neighbor in NEIGHBORS.items():
        alone, taught = (read_runs("cifar10_best", f"{network}-{method}-seed*") for method in ("alone", "kd"))
        count, epochs = int(alone["params"].iloc[0]), int(alone["epochs"].iloc[0])
        n = f"{len(alone)}, {len(taught)}"
        cells = [network.replace("-resnet", " ResNet-"), f"{count:,}", epochs, n]
        cells += [format_spread(alone["selected, test"]), format_spread(taught["selected, test"]), neighbor]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def read_runs(folder: str, pattern: str) -> pd.DataFrame:
    """Returns accuracies (fractions) and costs of the runs whose folders match a pattern, a row for each seed."""
    rows = {}
    for path in sorted((HERE / folder).glob(f"{pattern}/summary.json")):
        summary = json.loads(path.read_text())
        last = [student["val_top1"] for student in summary["last"]["students"]]
        rows[path.parent.name.rpartition("seed")[2]] = {
            "mean student": sum(last) / len(last),
            "selected": summary["selected"]["val_top1"],
            "selected, test": summary["selected"]["test_top1"],
            "params": summary["cost"]["params"],
            "epochs": summary["epochs"],
        }
    columns = ["mean student", "selected", "selected, test", "params", "epochs"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def draw_seeds() -> Figure:
    """Draws the accuracy of the mean student by `alone` and by `od`, with a line for each seed, for DW and Shift."""
    table = read_table("cifar10_short")
    table = table[(table["epochs"] == 15) & table["method part"].isin(["alone", "od"])]
    figure = Figure(figsize=(5, 2.6), layout="constrained")
    for axes, block_type in zip(figure.subplots(1, 2), ("DW", "Shift"), strict=True):
        rows = table[table["block type"] == block_type].pivot(
            index="seed", columns="method part", values="mean student"
        )
        for _, row in rows.iterrows():
            axes.plot([0, 1], row[["alone", "od"]], color=GRAY, lw=0.8, zorder=1)
        for place, method in enumerate(("alone", "od")):
            axes.plot([place] * len(rows), rows[method], BLOCK_MARKERS[block_type], color=METHOD_COLORS[method])
        axes.set(title=f"{block_type}, {len(rows)} seeds", xticks=[0, 1], xticklabels=["alone", "od"], xlim=(-0.4, 1.4))
        axes.grid(axis="y", color="#dddddd", lw=0.5)
    figure.axes[0].set_ylabel("test top-1 of the mean student, %")
    return figure


def draw_parameters() -> Figure:
    """Draws the accuracy of single networks against their parameters, with those that others have published."""
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    table = read_table("cifar10_best", "cifar10_teachers")
    for (block_type, method, count), rows in table.groupby(["block type", "method part", "params"]):
        mean, spread = rows["selected"].mean(), [rows["selected"].std()] if len(rows) > 1 else None
        color, marker = METHOD_COLORS[method], BLOCK_MARKERS[block_type]
        axes.errorbar([count], [mean], yerr=spread, fmt=marker, color=color, capsize=2, lw=0.8)
    with open(HERE / "published.csv", newline="") as file:
        for row in csv.DictReader(file):
            count, top1 = int(row["parameters"]), float(row["top1"])
            color = METHOD_COLORS["alone" if row["learns from"] == "labels" else "kd"]
            axes.plot([count], [top1], "x", color=color)
            axes.annotate(
                row["name"], (count, top1), (-5, -2), textcoords="offset points", fontsize=6, color=GRAY, ha="right"
            )
    axes.set(xscale="log", xlabel="parameters", ylabel="test top-1 on CIFAR-10, %", xlim=(8e3, 2e6))
    axes.set_xticks([1e4, 3e4, 1e5, 3e5, 1e6], ["0.01 M", "0.03 M", "0.1 M", "0.3 M", "1 M"])
    axes.minorticks_off()
    axes.grid(color="#dddddd", lw=0.5)
    lines = [
        Line2D([], [], ls="", marker=m, color=GRAY, label=f"{b}, ours")
        for b, m in BLOCK_MARKERS.items()
        if b != "Group"
    ]
    lines += [Line2D([], [], ls="", marker="x", color=GRAY, label="published by others")]
    lines += [Line2D([], [], lw=3, color=METHOD_COLORS[method], label=label) for method, label in LABELS.items()]
    axes.legend(handles=lines, loc="lower right")
    return figure


FIGURES = {"results_seeds.png": draw_seeds, "results_parameters.png": draw_parameters}


def main(folder: Path) -> None:
    """Writes all figures to a folder."""
    with rc_context(STYLE):
        for name, draw in FIGURES.items():
            draw().savefig(folder / name, dpi=200, metadata={"Software": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    print("\n".join([*format_recipes(), "", *format_best()]))
