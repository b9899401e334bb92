import io
import time

import pandas as pd
import pytest
from matplotlib.text import Text

from odcheap.report import plots
from odcheap.report.load_runs import FinishedRun
from odcheap.report.plots import assign_styles, average_curves, pareto_front, plot_tradeoff
from odcheap.report.statistics import summarize_runs, tabulate_runs


def test_the_front_is_what_nothing_beats():
    points = [(3, 0.7), (1, 0.5), (2, 0.4), (3, 0.9), (2, 0.6), (4, 0.9)]
    assert pareto_front(points) == [(1, 0.5), (2, 0.6), (3, 0.9)]


def history(*epochs, teacher=0.9):
    students = pd.DataFrame(epochs).add_prefix("val/student_").add_suffix("/top1")
    return students.assign(**{"epoch": range(len(epochs)), "val/teacher/top1": teacher})


def runs(seeds=(0, 1)):
    for seed in seeds:
        for method in ("alone", "od"):
            for block in ("DW", "Shift"):
                options = {"method.part": method, "seed": seed, "block_type.part": block}
                value = 0.5 + 0.1 * seed + 0.05 * (method == "od")
                summary = {"last": {"students": [{"test_top1": value}]}, "selected": {"test_top1": value}}
                yield FinishedRun(options, summary, history((0.1, 0.3), (0.5, 0.7)))


def test_a_curve_is_the_mean_of_students_and_seeds_as_far_as_all_go():
    students = r"^val/student_\d+/top1$"
    whole = history((0.1, 0.3), (0.5, 0.7))
    assert average_curves([whole, whole], students).tolist() == pytest.approx([0.2, 0.6])
    assert average_curves([whole, history((0.4, 0.4))], students).tolist() == pytest.approx([0.3])
    assert average_curves([whole, pd.DataFrame()], students).empty


def test_figures_are_drawn_with_names_and_units():
    table = tabulate_runs(runs())
    rows = summarize_runs(table)
    figures = {
        "macs": plot_tradeoff(rows, pd.Series([1.0, 2.0, 3.0, 4.0]), "million multiply-accumulates"),
        "gains": plots.plot_gains(rows, "alone"),
        "curves": plots.plot_curves(table, "val"),
    }
    for figure in figures.values():
        assert all(axes.get_xlabel() for axes in figure.axes)
    legends = {name: [text.get_text() for legend in f.legends for text in legend.texts] for name, f in figures.items()}
    assert legends["macs"] == ["alone", "od", "DW", "Shift"]
    assert legends["curves"] == ["alone", "od", "mean student", "teacher"]
    labels = [label.get_text() for label in figures["gains"].axes[0].get_yticklabels()]
    assert labels == ["od, Shift", "od, DW"]


def test_points_are_where_their_numbers_are():
    rows = summarize_runs(tabulate_runs(runs()))
    axes = plot_tradeoff(rows, pd.Series([1.0, 1.0, 3.0, None]), "cost").axes[0]
    points = [tuple(float(value[0]) for value in bars.lines[0].get_data()) for bars in axes.containers]
    means = [100 * spread.mean for spread in rows["selected"]]
    assert points == [(1.0, means[0]), (1.0, means[1]), (3.0, means[2])]


def test_one_seed_is_drawn_without_bars():
    rows = summarize_runs(tabulate_runs(runs(seeds=[0])))
    assert plots.plot_gains(rows, "alone").axes[0].get_yticks().tolist() == [0, 1]


def test_a_long_name_is_shortened_and_drawn_quickly():
    table = tabulate_runs(runs())
    long = {"method": {"od": "o" * 100_000}, "setting": {"DW": "D" * 100_000, "Shift": "two\nlines " + "S" * 100_000}}
    for column, names in long.items():
        table[column] = table[column].replace(names)
    table["name"] = table["method"] + ", " + table["setting"]
    rows = summarize_runs(table)
    begun = time.monotonic()
    figures = [plot_tradeoff(rows, pd.Series([1.0, 2.0, 3.0, 4.0]), "cost"), plots.plot_curves(table, "val")]
    figures.append(plots.plot_gains(rows, "alone, " + "D" * 100_000))
    texts = [text.get_text() for figure in figures for text in figure.findobj(Text)]
    for figure in figures:
        figure.savefig(io.BytesIO(), format="png")
    assert time.monotonic() - begun < 20
    assert max(len(line) for text in texts for line in text.split("\n")) <= 110  # with the words around a name
    assert "o" * 59 + "…" in texts
    assert "two\\nlines " + "S" * 48 + "…" in texts


def test_a_name_has_its_color_everywhere():
    assert assign_styles(["b", "a", "b", "c"], "xy") == {"b": "x", "a": "y", "c": "x"}
