import statistics

import pytest

from odcheap.report.statistics import Finished, Spread, against, mean_student, rows, selected_student, teacher_of
from odcheap.utils.errors import Failure


def run(method, seed, students, selected, **options):
    target = f"odcheap.methods.{method}.Class"
    summary = {"last": {"students": [{"test_top1": s} for s in students]}, "selected": {"test_top1": selected}}
    return Finished({"method._target_": target, "seed": seed, **options}, summary)


def test_gains_are_paired_by_seed_and_of_the_mean_student():
    found = rows(
        [
            run("od", 0, (0.8, 0.9), 0.9),
            run("alone", 1, (0.6, 0.8), 0.8),
            run("od", 1, (0.7, 0.9), 0.95),
            run("alone", 0, (0.8, 0.8), 0.85),
            run("od", 2, (0.1, 0.1), 0.1),  # no baseline of this seed
        ]
    )
    assert [(row.setting, row.method) for row in found] == [("", "alone"), ("", "od")]
    alone, od = found
    assert (alone.gain(mean_student), alone.gain(selected_student)) == (None, None)
    assert alone.of(mean_student) == Spread(2, pytest.approx(0.75), pytest.approx(statistics.stdev([0.7, 0.8])))
    assert od.of(mean_student).n == 3
    assert od.differences(mean_student) == pytest.approx({0: 0.05, 1: 0.1})
    assert od.gain(mean_student) == Spread(
        2, pytest.approx((0.05 + 0.1) / 2), pytest.approx(statistics.stdev([0.05, 0.1]))
    )
    assert od.gain(selected_student) == Spread(2, pytest.approx(0.1), pytest.approx(statistics.stdev([0.05, 0.15])))


def test_one_seed_has_no_deviation():
    alone, dml = rows([run("alone", 0, (0.5,), 0.5), run("dml", 0, (0.6,), 0.7)])
    assert alone.of(selected_student).deviation is None
    assert dml.gain(mean_student) == Spread(1, pytest.approx(0.1), None)


def test_settings_are_compared_within_themselves():
    options = [
        {"block_type._target_": f"odcheap.layers.cheap_conv.{name}", "trainer.max_epochs": 5}
        for name in ("DW", "Shift")
    ]
    options[1]["block_type.only_here"] = 4
    runs = [run("alone", 0, (0.1 * (k + 1),), 0.5, **given) for k, given in enumerate(options)]
    runs += [run("od", 0, (0.3 * (k + 1),), 0.5, **given) for k, given in enumerate(options)]
    found = rows(runs)
    assert [(row.setting, row.method) for row in found] == [
        ("DW", "alone"), ("DW", "od"), ("Shift", "alone"), ("Shift", "od"),
    ]  # fmt: skip
    assert [found[k].gain(mean_student).mean for k in (1, 3)] == pytest.approx([0.2, 0.4])
    assert found[0].gain(mean_student) is found[2].gain(mean_student) is None


def test_gains_over_a_named_row_are_paired_by_seed_across_settings():
    runs = [run("od", seed, (0.5 + 0.1 * seed,), 0.5, num_stu=4) for seed in (0, 1)]
    runs += [run("od", seed, (0.6 + 0.2 * seed,), 0.5, num_stu=8) for seed in (0, 1)]
    found = rows([*runs, run("od", 0, (0.4,), 0.5, num_stu=2), run("alone", 0, (0.45,), 0.5, num_stu=4)])
    gains = {row.name: row.gain(mean_student) for row in against(found, "od, num_stu=4")}
    assert gains["od, num_stu=4"] is None
    assert gains["od, num_stu=8"] == Spread(2, pytest.approx(0.15), pytest.approx(statistics.stdev([0.1, 0.2])))
    assert gains["od, num_stu=2"].mean == pytest.approx(-0.1)
    assert gains["alone, num_stu=4"].mean == pytest.approx(-0.05)
    with pytest.raises(Failure, match="--against=dml: must be one of alone, num_stu=4; od, num_stu=2; od"):
        against(found, "dml")
    with pytest.raises(Failure, match=r"--against=od: no other row has a run with one of its seeds, \[5\]"):
        against(rows([run("od", 5, (0.5,), 0.5), run("alone", 4, (0.5,), 0.5)]), "od")


def test_a_method_s_own_options_tell_its_runs_apart():
    given = [{"method.temperature": t, "method.kl_reduction": "mean"} for t in (1, 4)]
    found = rows([run("od", 0, (0.5,), 0.5, **options) for options in given] + [run("alone", 0, (0.4,), 0.4)])
    assert sorted(row.method for row in found) == ["alone", "od temperature=1", "od temperature=4"]
    assert all(row.setting == "" for row in found)


def test_of_one_factor_at_a_time_the_factor_is_named_and_nothing_is_mixed_up():
    usual = {"num_stu": 4, "method.temperature": 4.0, "lr": 0.1, "a": 0}
    changed = [{}, {"num_stu": 1}, {"num_stu": 8}, {"method.temperature": 1.0}, {"lr": 0.2}, {"lr": 0.3}, {"a": 1}]
    found = rows([run("od", seed, (0.5,), 0.5, **(usual | own)) for own in changed for seed in (0, 1)])
    names = ["od", "od, num_stu=1", "od, num_stu=8", "od temperature=1.0", "od, lr=0.2", "od, lr=0.3", "od, a=1"]
    assert sorted(row.name for row in found) == sorted(names)
    assert all(len(row.by_seed) == 2 for row in found)


def test_a_data_set_is_named_by_its_name_alone():
    runs = [run("alone", 0, (0.5,), 0.5, **{"data.name": n, "data.flip": n == "a"}) for n in "ab"]
    assert [row.setting for row in rows(runs)] == ["data.name=a", "data.name=b"]


def test_nothing_gives_nothing():
    assert rows([]) == []


@pytest.mark.parametrize(
    ("values", "resolved"),
    [([0.1], False), ([0.1, 0.1], True), ([0.1, -0.1], False), ([1e-17, 1e-17], False), ([0.01, 0.02, 0.03], True)],
)
def test_a_gain_is_resolved_from_two_standard_errors_on(values, resolved):
    deviation = statistics.stdev(values) if len(values) > 1 else None
    assert Spread(len(values), statistics.mean(values), deviation).resolved == resolved


def test_what_an_older_run_lacks_is_a_gap():
    old = Finished({"method._target_": "odcheap.methods.od.Class", "seed": 0}, {"finished": True})
    (row,) = rows([old])
    for figure in (mean_student, selected_student, teacher_of("head")):
        assert row.of(figure) is None
    assert row.gain(mean_student) is None


def test_teachers_of_different_kinds_are_told_apart():
    summary = {"last": {"teacher": {"kind": "head", "test_top1": 0.7}}}
    assert teacher_of("head")(summary) == 0.7
    assert teacher_of("gated")(summary) is None
