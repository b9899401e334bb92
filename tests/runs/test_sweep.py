"""Several sweeps may be in one folder: each has its own plan in `sweep.json`."""

from odcheap.runs.schemas import SweepPlan
from odcheap.runs.sweep import name_position, read_plans, write_plan

SEEDS = SweepPlan(count=3, swept=["seed"], runs=["seed=0", "seed=1", "seed=2"])
METHODS = SweepPlan(count=2, swept=["method"], runs=["method=od", "method=alone"])


def list_runs(folder):
    return [plan.runs for plan in read_plans(folder)]


def finish(folder, names):
    for name in names:
        (folder / name).mkdir()
        (folder / name / "summary.json").touch()


def test_a_second_sweep_in_a_folder_keeps_the_plan_of_the_first(tmp_path):
    write_plan(tmp_path, SEEDS)
    write_plan(tmp_path, METHODS)
    assert list_runs(tmp_path) == [METHODS.runs, SEEDS.runs]
    write_plan(tmp_path, SEEDS)  # the first one is continued
    assert list_runs(tmp_path) == [SEEDS.runs, METHODS.runs]


def test_the_plan_of_a_finished_sweep_is_left_out(tmp_path):
    write_plan(tmp_path, SEEDS)
    finish(tmp_path, SEEDS.runs[:2])
    write_plan(tmp_path, METHODS)
    assert list_runs(tmp_path) == [METHODS.runs, SEEDS.runs]
    finish(tmp_path, SEEDS.runs[2:])
    write_plan(tmp_path, METHODS)
    assert list_runs(tmp_path) == [METHODS.runs]


def test_a_run_is_counted_in_its_own_sweep(tmp_path):
    write_plan(tmp_path, SEEDS)
    write_plan(tmp_path, METHODS)
    assert name_position(tmp_path, 2, ["seed=2"]) == ("seed=2", "run 3 of 3")
    assert name_position(tmp_path, 1, ["method=alone"]) == ("method=alone", "run 2 of 2")
    assert name_position(tmp_path, 4, ["num_stu=2"]) == ("num_stu=2", "run 5")


def test_only_so_many_plans_are_kept(tmp_path):
    for k in range(30):
        write_plan(tmp_path, SweepPlan(count=1, runs=[f"seed={k}"]))
    assert list_runs(tmp_path) == [[f"seed={k}"] for k in range(29, 9, -1)]
