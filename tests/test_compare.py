import statistics

import pytest

from odcheap.compare import Finished, Spread, rows


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
    assert (alone.mean_gain, alone.selected_gain) == (None, None)
    assert alone.mean_student == Spread(2, pytest.approx(0.75), pytest.approx(statistics.stdev([0.7, 0.8])))
    assert od.mean_student.n == 3
    assert od.mean_gain == Spread(2, pytest.approx((0.05 + 0.1) / 2), pytest.approx(statistics.stdev([0.05, 0.1])))
    assert od.selected_gain == Spread(2, pytest.approx(0.1), pytest.approx(statistics.stdev([0.05, 0.15])))


def test_one_seed_has_no_deviation():
    alone, dml = rows([run("alone", 0, (0.5,), 0.5), run("dml", 0, (0.6,), 0.7)])
    assert alone.selected.deviation is None
    assert dml.mean_gain == Spread(1, pytest.approx(0.1), None)


def test_settings_are_compared_within_themselves():
    options = [{"block_type._target_": f"odcheap.convs.{name}", "trainer.max_epochs": 5} for name in ("DW", "Shift")]
    options[1]["block_type.only_here"] = 4
    runs = [run("alone", 0, (0.1 * (k + 1),), 0.5, **given) for k, given in enumerate(options)]
    runs += [run("od", 0, (0.3 * (k + 1),), 0.5, **given) for k, given in enumerate(options)]
    found = rows(runs)
    assert [(row.setting, row.method) for row in found] == [
        ("DW", "alone"), ("DW", "od"), ("Shift", "alone"), ("Shift", "od"),
    ]  # fmt: skip
    assert [row.mean_gain and row.mean_gain.mean for row in found] == [
        None,
        pytest.approx(0.2),
        None,
        pytest.approx(0.4),
    ]


def test_a_method_s_own_options_tell_its_runs_apart():
    given = [{"method.temperature": t, "method.kl_reduction": "mean"} for t in (1, 4)]
    found = rows([run("od", 0, (0.5,), 0.5, **options) for options in given] + [run("alone", 0, (0.4,), 0.4)])
    assert sorted(row.method for row in found) == ["alone", "od temperature=1", "od temperature=4"]
    assert all(row.setting == "" for row in found)


def test_a_data_set_is_named_by_its_name_alone():
    runs = [run("alone", 0, (0.5,), 0.5, **{"data.name": n, "data.flip": n == "a"}) for n in "ab"]
    assert [row.setting for row in rows(runs)] == ["data.name=a", "data.name=b"]


def test_nothing_gives_nothing():
    assert rows([]) == []
