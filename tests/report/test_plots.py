import io
import statistics
import time

import pandas as pd
import pytest
from matplotlib import rc_context
from matplotlib.lines import Line2D
from matplotlib.text import Text

from odcheap.report import plots
from odcheap.report.load_runs import FinishedRun
from odcheap.report.plots import average_curves, pareto_front, plot_tradeoff
from odcheap.report.statistics import Latency, summarize_runs, tabulate_runs


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
                summary |= {"data": "cifar10", "epochs": 2}
                yield FinishedRun(options, summary, history((0.1, 0.3), (0.5, 0.7)))


def test_a_curve_is_the_mean_of_students_and_seeds_as_far_as_all_go():
    students = r"^val/student_\d+/top1$"
    whole = history((0.1, 0.3), (0.5, 0.7))
    assert average_curves([whole, whole], students)["mean"].tolist() == pytest.approx([0.2, 0.6])
    both = average_curves([whole, history((0.4, 0.4))], students)
    assert both["mean"].tolist() == pytest.approx([0.3])
    assert both["deviation"].tolist() == pytest.approx([statistics.stdev([0.2, 0.4])])
    assert average_curves([whole], students)["deviation"].isna().all()
    assert average_curves([whole, pd.DataFrame()], students).empty


def costs(*medians):
    return [None if median is None else Latency(median) for median in medians]


def legend(figure):
    return [text.get_text() for legend in figure.legends for text in legend.texts]


def points(axes):
    """Place, color and marker of the lines that are single points, and no ends of error bars."""
    lines = [line for line in axes.lines if len(line.get_xdata()) == 1 and line.get_marker() not in ("|", "_")]
    return [(line.get_xdata()[0], line.get_ydata()[0], line.get_color(), line.get_marker()) for line in lines]


def test_figures_are_drawn_with_names_and_units():
    table = tabulate_runs(runs())
    rows = summarize_runs(table)
    figures = {
        "macs": plot_tradeoff(rows, costs(1, 2, 3, 4), "MACs, million", "CIFAR-10, 2 epochs"),
        "gains": plots.plot_gains(rows, "alone", "CIFAR-10, 2 epochs"),
        "curves": plots.plot_curves(table, "val", "CIFAR-10, 2 epochs"),
    }
    for figure in figures.values():
        assert all(axes.get_xlabel() for axes in figure.axes)
        assert figure.get_suptitle().startswith("CIFAR-10, 2 epochs")
        assert figure.get_figwidth() == 3.3
        assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 7
    assert legend(figures["macs"]) == ["alone", "od", "DW", "Shift", "Pareto front"]
    assert legend(figures["curves"]) == ["alone", "od", "mean student", "teacher", "± deviation over seeds"]
    labels = [label.get_text() for label in figures["gains"].axes[0].get_yticklabels()]
    assert labels == ["od, Shift", "od, DW"]


def test_titles_name_data_sets_and_epochs():
    assert plots.describe_data(list(runs())) == "CIFAR-10, 2 epochs"
    other = [FinishedRun({}, {"data": "digits", "epochs": n}) for n in (1, 9)]
    assert plots.describe_data(other[:1]) == "digits, 1 epoch"
    assert plots.describe_data(other) == "digits, 1 to 9 epochs"
    assert plots.describe_data([FinishedRun({}, {})]) == ""


def test_points_are_where_their_numbers_are():
    rows = summarize_runs(tabulate_runs(runs()))
    axes = plot_tradeoff(rows, costs(1, 1, 3, None), "cost", "CIFAR-10").axes[0]
    means = [100 * spread.mean for spread in rows["selected"]]
    assert [point[:2] for point in points(axes)] == [(1.0, means[0]), (1.0, means[1]), (3.0, means[2])]


def test_a_method_and_a_block_type_look_the_same_in_every_report():
    looks = {}
    for chosen in (lambda m, b: True, lambda m, b: m == "od", lambda m, b: b == "Shift"):
        own = [r for r in runs() if chosen(r.options["method.part"], r.options["block_type.part"])]
        rows = summarize_runs(tabulate_runs(own))
        axes = plot_tradeoff(rows, costs(*range(1, len(rows) + 1)), "cost", "CIFAR-10").axes[0]
        for row, (*_, color, marker) in zip(rows.to_dict("records"), points(axes), strict=True):
            looks.setdefault(("color", row["method part"]), set()).add(color)
            looks.setdefault(("marker", row["block type"]), set()).add(marker)
    assert {name: len(found) for name, found in looks.items()} == dict.fromkeys(looks, 1)
    assert len(set(map(tuple, looks.values()))) == len(looks) == 4


@pytest.mark.parametrize("count", [2, 9])
def test_variants_of_a_method_and_settings_of_a_block_type_can_be_told_apart(count):
    def variants():
        for k in range(count):
            summary = {"selected": {"test_top1": 0.5}}
            options = {"method.part": "od", "seed": 0, "block_type.part": "DW"}
            yield FinishedRun(options | {"method.temperature": k}, summary)
            yield FinishedRun(options | {"num_stu": k}, summary)

    rows = summarize_runs(tabulate_runs(variants()))
    colors, markers = plots.assign_colors(rows), plots.assign_markers(rows)
    assert len(set(colors.values())) == len(colors) > 1
    assert len({tuple(marker.values()) for marker in markers.values()}) == len(markers) > 1
    assert {marker["marker"] for marker in list(markers.values())[:6]} == {"o"}


def test_the_standard_network_is_a_point_on_the_axis_unless_it_was_trained():
    rows = summarize_runs(tabulate_runs(runs()))
    standard = [Latency(4.0, 3.9, 4.2)]
    figure = plot_tradeoff(rows, costs(2, 2, 3, 3), "ms", "CIFAR-10", standard=standard)
    axes = figure.axes[0]
    assert (4.0, axes.get_ylim()[0], plots.GRAY, plots.STANDARD_MARKER) in points(axes)
    assert "standard network (cost only)" in legend(figure)
    assert "standard network (cost only)" not in legend(plot_tradeoff(rows, costs(2, 2, 3, 3), "ms", "CIFAR-10"))


def test_a_standard_network_that_would_stretch_the_axis_is_only_a_number():
    rows = summarize_runs(tabulate_runs(runs()))
    standard = [Latency(40.84)]
    figure = plot_tradeoff(rows, costs(2, 2, 3, 3), "MACs", "CIFAR-10", standard=standard)
    axes = figure.axes[0]
    assert axes.get_xlim()[1] < 4
    assert "standard network, not drawn: 40.8" in axes.get_xlabel()
    assert plots.STANDARD_MARKER not in [point[3] for point in points(axes)]
    assert "standard network (cost only)" not in legend(figure)


def test_points_of_equal_cost_are_side_by_side_if_they_would_cover_each_other():
    rows = summarize_runs(tabulate_runs(runs()))
    note = "points of about equal cost are side by side"
    figure = plot_tradeoff(rows, costs(1, 1.001, 3, 4), "cost", "CIFAR-10")
    figure.draw_without_rendering()
    axes = figure.axes[0]
    lines = [line for line in axes.lines if len(line.get_xdata()) == 1 and line.get_marker() not in ("|", "_")]
    moved = [line.get_transform().transform(line.get_xydata())[0, 0] for line in lines]
    true = [axes.transData.transform(line.get_xydata())[0, 0] for line in lines]
    step = plots.STEP * figure.dpi / 72
    assert [m - t for m, t in zip(moved, true, strict=True)] == pytest.approx([-step / 2, step / 2, 0, 0], abs=0.01)
    bars = axes.containers[0].lines[2][0]
    assert bars.get_transform().transform((1, 50))[0] == pytest.approx(moved[0])
    assert note in axes.get_xlabel()

    # Points of equal cost that do not cover each other stay.
    far = summarize_runs(tabulate_runs(runs(seeds=[0])))
    figures = [plot_tradeoff(far.iloc[:2], costs(1, 1), "c", "x"), plot_tradeoff(rows, costs(1, 2, 3, 4), "c", "x")]
    assert not any(note in figure.axes[0].get_xlabel() for figure in figures)


def test_an_axis_of_costs_begins_at_zero_or_is_logarithmic():
    rows = summarize_runs(tabulate_runs(runs()))
    near = plot_tradeoff(rows, costs(2, 2, 3, 3), "ms", "CIFAR-10").axes[0]
    assert (near.get_xscale(), near.get_xlim()[0]) == ("linear", 0)
    far = plot_tradeoff(rows, costs(2, 2, 300, 300), "ms", "CIFAR-10").axes[0]
    assert far.get_xscale() == "log"
    assert far.get_xlim()[0] < 2 < 300 < far.get_xlim()[1]


def test_quartiles_are_drawn_as_horizontal_bars():
    rows = summarize_runs(tabulate_runs(runs(seeds=[0])))
    own = [Latency(2, 1.5, 2.5)] * 2 + [Latency(3, 1.5, 4)] * 2
    axes = plot_tradeoff(rows, own, "ms", "CIFAR-10").axes[0]
    segments = [bars.lines[2][0].get_segments()[0][:, 0].tolist() for bars in axes.containers]
    assert segments == [[1.5, 2.5], [1.5, 2.5], [1.5, 4.0], [1.5, 4.0]]


def test_epochs_are_whole_numbers():
    axes = plots.plot_curves(tabulate_runs(runs()), "val", "CIFAR-10").axes[0]
    axes.figure.canvas.draw()
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_one_seed_is_drawn_without_bars():
    table = tabulate_runs(runs(seeds=[0]))
    assert len(plots.plot_gains(summarize_runs(table), "alone", "CIFAR-10").axes[0].get_yticks()) == 2
    assert "± deviation over seeds" not in legend(plots.plot_curves(table, "val", "CIFAR-10"))


def test_a_long_name_is_shortened_and_drawn_quickly():
    table = tabulate_runs(runs())
    long = {"method": {"od": "o" * 100_000}, "setting": {"DW": "D" * 100_000, "Shift": "two\nlines " + "S" * 100_000}}
    for column, names in long.items():
        table[column] = table[column].replace(names)
    table["name"] = table["method"] + ", " + table["setting"]
    rows = summarize_runs(table)
    begun = time.monotonic()
    figures = [plot_tradeoff(rows, costs(1, 2, 3, 4), "cost", "x"), plots.plot_curves(table, "val", "x")]
    figures.append(plots.plot_gains(rows, "alone, " + "D" * 100_000, "x"))
    texts = [text.get_text() for figure in figures for text in figure.findobj(Text)]
    for figure in figures:
        figure.savefig(io.BytesIO(), format="png")
    assert time.monotonic() - begun < 20
    assert max(len(line) for text in texts for line in text.split("\n")) <= 60  # with the words around a name
    assert "o" * 43 + "…" in texts
    assert "two\\nlines " + "S" * 32 + "…" in texts


def test_long_names_of_rows_are_whole_and_do_not_touch_each_other():
    table = tabulate_runs(runs())
    long = {"DW": "DW trainer.max_epochs=3", "Shift": "Shift scheduler.warmup_of_all_epochs=25 data.limit=30000"}
    table["setting"] = table["setting"].replace(long)
    table["name"] = table["method"] + ", " + table["setting"]
    gains = plots.plot_gains(summarize_runs(table), "alone", "CIFAR-10")
    curves = plots.plot_curves(table, "val", "CIFAR-10")
    for figure in (gains, curves):
        figure.draw_without_rendering()
    labels = gains.axes[0].get_yticklabels()
    assert {label.get_text().replace("\n", " ") for label in labels} == {
        "od, DW trainer.max_epochs=3",
        "od, Shift scheduler.warmup_of_ all_epochs=25 data.limit=30000",
    }
    lower, upper = (label.get_window_extent() for label in labels)
    assert lower.y1 <= upper.y0
    assert gains.axes[0].xaxis.label.get_window_extent().x1 <= gains.bbox.width
    titles = [axes.get_title(loc="left").replace("\n", " ") for axes in curves.axes]
    assert titles[0] == "DW trainer.max_epochs=3"
    assert titles[1].endswith("data.limit=30000")


@pytest.mark.parametrize("labels", [["a"] * 9, ["od", "alone", "a longer name of a method", "b"], ["x" * 44] * 3])
@rc_context(plots.STYLE)
def test_a_legend_is_not_wider_than_the_figure(labels):
    figure, _ = plots.create_figure("title", 2)
    plots.add_legend(figure, [Line2D([], [], label=label) for label in labels])
    plots.render(figure, "png")
    (legend,) = figure.legends
    assert legend.get_window_extent().width <= figure.bbox.width
