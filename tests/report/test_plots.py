from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from odcheap.report import plots
from odcheap.report.plots import (
    Point,
    label_beside,
    mean_curve,
    pareto,
    ranks,
    save,
    spread_out,
    students_at,
    trade_off,
)
from odcheap.report.statistics import Finished, Spread, rows


def test_the_front_is_what_nothing_beats():
    points = [(3, 0.7), (1, 0.5), (2, 0.4), (3, 0.9), (2, 0.6), (4, 0.9)]
    assert pareto(points) == [(1, 0.5), (2, 0.6), (3, 0.9)]


def history(*students, teacher=0.9):
    of_teacher = {"val/teacher/top1": teacher}
    return tuple({f"val/student_{k}/top1": s for k, s in enumerate(epoch)} | of_teacher for epoch in students)


def runs():
    for seed in (0, 1):
        for method in ("alone", "od"):
            for block in ("DW", "Shift"):
                options = {"method._target_": f"odcheap.methods.{method}.C", "seed": seed}
                options["block_type._target_"] = f"odcheap.layers.cheap_conv.{block}"
                value = 0.5 + 0.1 * seed + 0.05 * (method == "od")
                summary = {"last": {"students": [{"test_top1": value}]}, "selected": {"test_top1": value}}
                yield Finished(options, summary, history((0.1, 0.3), (0.5, 0.7)))


def test_a_curve_is_the_mean_of_students_and_seeds_as_far_as_all_go():
    found = rows(runs())
    line = mean_curve(found[0], lambda record: students_at(record, "val"))
    assert line == pytest.approx([0.2, 0.6])
    short = Finished(found[0].by_seed[0].options, {}, history((0.4, 0.4)))
    found[0].by_seed[0] = short
    assert mean_curve(found[0], lambda record: students_at(record, "val")) == pytest.approx([0.3])


def test_figures_are_drawn_with_names_and_units(tmp_path):
    compared = rows(runs())
    points = [Point(row.method, row.setting, 1.0 + k, Spread(2, 0.5, 0.1)) for k, row in enumerate(compared)]
    made = {
        "macs": trade_off(points, "million multiply-accumulates"),
        "gains": plots.gains(compared),
        "curves": plots.curves(compared, "val"),
    }
    for name, figure in made.items():
        save(figure, tmp_path, name)
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        assert (tmp_path / f"{name}.svg").read_text().startswith("<?xml")
        assert all(axes.get_xlabel() for axes in figure.axes)
    texts = {text.get_text() for text in made["macs"].axes[0].texts}
    assert texts == {"alone DW", "od DW", "alone Shift", "od Shift"}
    labels = [label.get_text() for label in made["gains"].axes[0].get_yticklabels()]
    assert labels == ["od, Shift", "od, DW"]


def test_one_seed_is_drawn_without_bars():
    compared = rows(run for run in runs() if run.options["seed"] == 0)
    assert plots.gains(compared).axes[0].get_yticks().tolist() == [0, 1]


def test_labels_of_one_place_do_not_cover_each_other_and_lie_as_their_points_do():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    axes.set(xlim=(0, 2), ylim=(0, 1))
    label_beside(axes, [(1.05, 0.5, "b", "black"), (1.0, 0.5, "a", "black"), (1.02, 0.1, "low", "black")])
    places = {text.get_text(): text.xyann for text in axes.texts}
    assert len({x for x, _ in places.values()}) == 1
    assert places["low"][1] == 0.1
    assert abs(places["a"][1] - places["b"][1]) == pytest.approx(1 / 22)
    assert places["a"][1] + places["b"][1] == pytest.approx(1)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=8).map(sorted))
def test_what_is_spread_out_moves_as_little_as_may_be(values):
    found = spread_out(values, 1.0)
    assert all(b - a >= 1 - 1e-9 for a, b in pairwise(found))
    if all(b - a >= 1 for a, b in pairwise(values)):
        assert found == pytest.approx(values)
    far = sum((a - b) ** 2 for a, b in zip(found, values, strict=True))
    for k, nudge in ((k, nudge) for k in range(len(values)) for nudge in (-0.01, 0.01)):
        other = [*found[:k], found[k] + nudge, *found[k + 1 :]]
        if all(b - a >= 1 for a, b in pairwise(other)):
            assert sum((a - b) ** 2 for a, b in zip(other, values, strict=True)) >= far - 1e-6


def test_a_name_has_its_colour_everywhere():
    assert ranks(["b", "a", "b", "c"], "xy") == {"b": "x", "a": "y", "c": "x"}
