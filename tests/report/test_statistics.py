import statistics

import pandas as pd
import pytest

from odcheap.report.load_runs import FinishedRun
from odcheap.report.statistics import Spread, compute_spread, summarize_runs, tabulate_runs
from odcheap.utils.errors import Failure


def run(method, seed, students, selected, **options):
    summary = {"last": {"students": [{"test_top1": s} for s in students]}, "selected": {"test_top1": selected}}
    return FinishedRun({"method.part": method, "seed": seed, **options}, summary)


def compare(runs, against=None):
    """The rows by their names."""
    rows = summarize_runs(tabulate_runs(runs, against))
    return {row["name"]: row for row in rows.to_dict("records")}


def test_gains_are_paired_by_seed_and_of_the_mean_student():
    runs = tabulate_runs(
        [
            run("od", 0, (0.8, 0.9), 0.9),
            run("alone", 1, (0.6, 0.8), 0.8),
            run("od", 1, (0.7, 0.9), 0.95),
            run("alone", 0, (0.8, 0.8), 0.85),
            run("od", 2, (0.1, 0.1), 0.1),  # no baseline of this seed
        ]
    )
    rows = summarize_runs(runs)
    assert list(zip(rows["setting"], rows["method"], strict=True)) == [("", "alone"), ("", "od")]
    alone, od = rows.to_dict("records")
    assert (alone["gain"], alone["selected gain"]) == (None, None)
    assert alone["mean student"] == (2, pytest.approx(0.75), pytest.approx(statistics.stdev([0.7, 0.8])))
    assert (od["mean student"].n, od["n"]) == (3, 3)
    gains = runs[runs["method"] == "od"].set_index("seed")["gain"].dropna()
    assert gains.to_dict() == pytest.approx({0: 0.05, 1: 0.1})
    assert od["gain"] == (2, pytest.approx((0.05 + 0.1) / 2), pytest.approx(statistics.stdev([0.05, 0.1])))
    assert od["selected gain"] == (2, pytest.approx(0.1), pytest.approx(statistics.stdev([0.05, 0.15])))


def test_one_seed_has_no_deviation():
    rows = compare([run("alone", 0, (0.5,), 0.5), run("dml", 0, (0.6,), 0.7)])
    assert rows["alone"]["selected"].deviation is None
    assert rows["dml"]["gain"] == Spread(1, pytest.approx(0.1), None)


def test_settings_are_compared_within_themselves():
    options = [{"block_type.part": name, "trainer.max_epochs": 5} for name in ("DW", "Shift")]
    options[1]["block_type.only_here"] = 4
    runs = [run("alone", 0, (0.1 * (k + 1),), 0.5, **given) for k, given in enumerate(options)]
    runs += [run("od", 0, (0.3 * (k + 1),), 0.5, **given) for k, given in enumerate(options)]
    rows = summarize_runs(tabulate_runs(runs)).to_dict("records")
    assert [(row["setting"], row["method"]) for row in rows] == [
        ("DW", "alone"), ("DW", "od"), ("Shift", "alone"), ("Shift", "od"),
    ]  # fmt: skip
    assert [rows[k]["gain"].mean for k in (1, 3)] == pytest.approx([0.2, 0.4])
    assert rows[0]["gain"] is rows[2]["gain"] is None


def test_gains_over_a_named_row_are_paired_by_seed_across_settings():
    runs = [run("od", seed, (0.5 + 0.1 * seed,), 0.5, num_stu=4) for seed in (0, 1)]
    runs += [run("od", seed, (0.6 + 0.2 * seed,), 0.5, num_stu=8) for seed in (0, 1)]
    runs += [run("od", 0, (0.4,), 0.5, num_stu=2), run("alone", 0, (0.45,), 0.5, num_stu=4)]
    gains = {name: row["gain"] for name, row in compare(runs, "od, num_stu=4").items()}
    assert gains["od, num_stu=4"] is None
    assert gains["od, num_stu=8"] == (2, pytest.approx(0.15), pytest.approx(statistics.stdev([0.1, 0.2])))
    assert gains["od, num_stu=2"].mean == pytest.approx(-0.1)
    assert gains["alone, num_stu=4"].mean == pytest.approx(-0.05)
    with pytest.raises(
        Failure, match="--against=dml: must be a method or a row, one of alone; od; alone, num_stu=4; od, num_stu=2"
    ):
        tabulate_runs(runs, "dml")
    with pytest.raises(
        Failure, match=r"--against=od: no other row in the same setting has a run with one of its seeds, \[5\]"
    ):
        tabulate_runs([run("od", 5, (0.5,), 0.5), run("alone", 4, (0.5,), 0.5)], "od")


def test_a_method_s_own_options_tell_its_runs_apart():
    options = [{"method.temperature": t, "method.kl_reduction": "mean"} for t in (1, 4)]
    runs = [run("od", 0, (0.5,), 0.5, **given) for given in options] + [run("alone", 0, (0.4,), 0.4)]
    rows = summarize_runs(tabulate_runs(runs))
    assert sorted(rows["method"]) == ["alone", "od temperature=1", "od temperature=4"]
    assert set(rows["setting"]) == {""}


def test_runs_with_a_teacher_of_each_seed_are_one_row():
    runs = [run("kd", k, (0.5,), 0.5, **{"method.teacher_weights": f"runs/teacher-seed{k}"}) for k in range(2)]
    runs += [run("kd", k, (0.6,), 0.6, **{"method.teacher_weights": "runs/teacher-seed12"}) for k in range(2)]
    rows = compare(runs)
    assert {name: row["n"] for name, row in rows.items()} == {
        "kd teacher_weights=runs/teacher-seed${seed}": 2,
        "kd teacher_weights=runs/teacher-seed12": 2,
    }


def test_of_one_factor_at_a_time_the_factor_is_named_and_nothing_is_mixed_up():
    usual = {"num_stu": 4, "method.temperature": 4.0, "lr": 0.1, "a": 0}
    changed = [{}, {"num_stu": 1}, {"num_stu": 8}, {"method.temperature": 1.0}, {"lr": 0.2}, {"lr": 0.3}, {"a": 1}]
    rows = compare([run("od", seed, (0.5,), 0.5, **(usual | own)) for own in changed for seed in (0, 1)])
    names = ["od", "od, num_stu=1", "od, num_stu=8", "od temperature=1.0", "od, lr=0.2", "od, lr=0.3", "od, a=1"]
    assert sorted(rows) == sorted(names)
    assert all(row["n"] == 2 for row in rows.values())


def test_an_option_that_goes_with_a_part_is_not_named():
    """A schedule's own options differ from another schedule's; its name says so already."""
    options = [("steps", "milestones"), ("steps", "milestones"), ("cosine", "T_max")]
    runs = [
        run("od", seed, [0.5], 0.5, **{"scheduler.part": part, "scheduler.fractions": fractions})
        for seed, (part, fractions) in enumerate(options)
    ]
    assert set(tabulate_runs(runs)["setting"]) == {"steps", "cosine"}


def test_a_data_set_is_named_by_its_name_alone():
    runs = [run("alone", 0, (0.5,), 0.5, **{"data.name": n, "data.flip": n == "a"}) for n in "ab"]
    assert list(tabulate_runs(runs)["setting"]) == ["data.name=a", "data.name=b"]


def test_nothing_gives_nothing():
    assert tabulate_runs([]).empty
    assert summarize_runs(tabulate_runs([])).empty


@pytest.mark.parametrize(
    ("values", "resolved"),
    [
        ([0.1], False),
        ([0.1, 0.1], True),
        ([0.1, -0.1], False),
        ([1e-17, 1e-17], False),
        ([0.01, 0.02, 0.03], False),  # two standard errors from zero are not enough: t(0.975, 2) is 4.3
        ([0.015, 0.02, 0.025], True),
    ],
)
def test_a_gain_is_resolved_if_its_interval_leaves_zero_out(values, resolved):
    spread = compute_spread(pd.Series([*values, None]))
    assert spread.is_resolved == resolved


def test_the_interval_is_student_s():
    spread = compute_spread(pd.Series([1.05, 1.38]))
    assert (spread.low, spread.high) == (pytest.approx(1.215 - 12.7062 * 0.165), pytest.approx(1.215 + 12.7062 * 0.165))


def test_a_method_as_the_baseline_is_compared_within_each_setting():
    runs = [run(m, 0, (a + w,), 0.5, width=w) for w in (0.1, 0.2) for m, a in (("alone", 0.3), ("od", 0.4))]
    gains = {name: row["gain"] for name, row in compare(runs, "od").items()}
    assert gains["od, width=0.1"] is gains["od, width=0.2"] is None
    assert [gains[f"alone, width={w}"].mean for w in (0.1, 0.2)] == pytest.approx([-0.1, -0.1])


def test_teachers_of_different_kinds_are_told_apart():
    summary = {"last": {"teacher": {"kind": "head", "test_top1": 0.7}}}
    (row,) = compare([FinishedRun({"method.part": "od", "seed": 0}, summary)]).values()
    assert row["teacher (head)"].mean == 0.7
    assert row["teacher (gated)"] is None
