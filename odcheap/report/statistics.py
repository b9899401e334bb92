"""Compares runs: a name for each setting and method, means over seeds, and gains over a baseline, paired by seed."""

import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pandas as pd

from odcheap.report.load_runs import FinishedRun
from odcheap.utils.errors import Failure
from odcheap.utils.text import escape_control_chars

BASELINE = "alone"
METHOD, SEED = "method.part", "seed"
TEACHER_KINDS = ("head", "gated", "mean", "ema", "frozen")
TOLERANCE = 1e-9  # equal accuracies may differ by rounding

Summary = dict[str, Any]


class Spread(NamedTuple):
    """Mean and sample standard deviation (None for one value) of `n` values."""

    n: int
    mean: float
    deviation: float | None

    @property
    def standard_error(self) -> float | None:
        """The standard error of the mean; None for one value."""
        return None if self.deviation is None else self.deviation / math.sqrt(self.n)

    @property
    def is_resolved(self) -> bool:
        """Whether the mean is at least two standard errors away from zero; never with one value."""
        return self.standard_error is not None and abs(self.mean) >= 2 * self.standard_error + TOLERANCE


def compute_spread(values: pd.Series) -> Spread | None:
    """Returns the spread of the values that are not missing, None if all are."""
    known = values.dropna()
    if known.empty:
        return None
    return Spread(len(known), known.mean(), known.std() if len(known) > 1 else None)


def mean_student(summary: Summary) -> float | None:
    """Test top-1 after the last epoch, the mean of all students: nothing is selected."""
    students = (summary.get("last") or {}).get("students")
    return statistics.mean(student["test_top1"] for student in students) if students else None


def selected_student(summary: Summary) -> float | None:
    """Test top-1 of the student selected on held-out images; for `alone` the best of S independent students."""
    return (summary.get("selected") or {}).get("test_top1")


def ensemble(summary: Summary) -> float | None:
    """Test top-1 of the students' mean prediction after the last epoch."""
    return ((summary.get("last") or {}).get("ensemble") or {}).get("test_top1")


def teacher_of_kind(kind: str) -> Callable[[Summary], float | None]:
    """Returns a function that reads the teacher's test top-1 after the last epoch if it is of this kind."""

    def read(summary: Summary) -> float | None:
        teacher = (summary.get("last") or {}).get("teacher") or {}
        return teacher.get("test_top1") if teacher.get("kind") == kind else None

    return read


def training_petamacs(summary: Summary) -> float | None:
    """10^15 multiply-accumulates of the training, including kd's teacher; None if that one's are unknown."""
    macs = (summary.get("cost") or {}).get("training_macs_with_teacher")
    return None if macs is None else macs / 1e15


def training_hours(summary: Summary) -> float | None:
    """Hours of the training, including kd's teacher; None if that one's are unknown."""
    teacher = (summary.get("cost") or {}).get("teacher") or {}
    own, teachers = summary.get("train_seconds"), teacher.get("train_seconds", 0)
    return None if own is None or teachers is None else (own + teachers) / 3600


ACCURACIES: dict[str, Callable[[Summary], float | None]] = {
    "mean student": mean_student,
    "selected": selected_student,
    "ensemble": ensemble,
    **{f"teacher ({kind})": teacher_of_kind(kind) for kind in TEACHER_KINDS},
}
COSTS: dict[str, Callable[[Summary], float | None]] = {
    "params": lambda summary: (summary.get("cost") or {}).get("params"),
    "macs": lambda summary: (summary.get("cost") or {}).get("macs"),
    "epochs": lambda summary: summary.get("epochs"),
    "training PMACs": training_petamacs,
    "hours": training_hours,
}
GAINS = {"gain": "mean student", "selected gain": "selected"}  # the differences to the baseline's run of the same seed


def tabulate_runs(runs: Iterable[FinishedRun], against: str | None = None) -> pd.DataFrame:
    """Returns one row for each run, with its names, figures and gains.

    Runs that differ in the seed only get the same `setting` and `method`. Of runs with the same options and seed the
    first counts. Within a setting the baseline comes first.

    Args:
        runs: The runs to compare.
        against: The `name` of the row that all others are compared with; None is `alone` in the same setting.

    Returns:
        The columns `setting`, `method`, `name`, `seed`, `baseline` (whether it is the baseline), `run`, all of
        `ACCURACIES` and `COSTS`, and all of `GAINS` (NaN without a baseline run of that seed).

    Raises:
        Failure: No row is called `against`, or none has a seed in common with it.
    """
    runs = list(runs)
    table = label_runs(runs)
    table["seed"] = [run.options.get(SEED) for run in runs]
    table["run"] = runs
    for name, figure in (ACCURACIES | COSTS).items():
        table[name] = pd.Series([figure(run.summary) for run in runs], dtype=float)
    table = table.drop_duplicates(["setting", "method", "seed"])
    ranks = [pd.factorize(table["setting"])[0], table["method"] != BASELINE, pd.factorize(table["method"])[0]]
    order = pd.DataFrame(dict(enumerate(ranks)), index=table.index).sort_values([0, 1, 2], kind="stable").index
    return add_gains(table.loc[order].reset_index(drop=True), against)


def add_gains(table: pd.DataFrame, against: str | None) -> pd.DataFrame:
    """Adds `baseline` and the columns of `GAINS`; see `tabulate_runs`."""
    if against is None:
        table["baseline"], keys = table["method"] == BASELINE, ["setting", "seed"]
    else:
        table["baseline"], keys = table["name"] == against, ["seed"]
        if not table["baseline"].any():
            raise Failure(f"--against={against}: must be one of {'; '.join(sorted(set(table['name'])))}")
        seeds = set(table.loc[table["baseline"], "seed"])
        if not table.loc[~table["baseline"], "seed"].isin(seeds).any():
            raise Failure(f"--against={against}: no other row has a run with one of its seeds, {sorted(seeds)}")
    baseline = table.loc[table["baseline"], [*keys, *GAINS.values()]]
    paired = table[keys].merge(baseline, how="left", on=keys)
    for gain, figure in GAINS.items():
        table[gain] = (table[figure] - paired[figure].to_numpy()).mask(table["baseline"])
    return table


def summarize_runs(table: pd.DataFrame) -> pd.DataFrame:
    """Returns one row for each setting and method of `tabulate_runs`, in the same order.

    The columns are `setting`, `method`, `name`, `baseline`, `n` (seeds), and a `Spread` or None for each figure.
    """
    figures = [*ACCURACIES, *COSTS, *GAINS]
    rows = []
    for _, runs in table.groupby(["setting", "method"], sort=False):
        spreads = {figure: compute_spread(runs[figure]) for figure in figures}
        names = {name: runs[name].iloc[0] for name in ("setting", "method", "name", "baseline")}
        rows.append(names | {"n": len(runs)} | spreads)
    return pd.DataFrame(rows, dtype=object)


def label_runs(runs: list[FinishedRun]) -> pd.DataFrame:
    """Names each run by what distinguishes it.

    Returns:
        The columns `setting` (options outside the method that vary), `method` (its name and those of its own options
        that vary), and `name` (both). Options that more than two thirds of the runs share are left out, so that in a
        study of one factor at a time the factor is named.
    """
    options = pd.DataFrame([{key: repr(value) for key, value in run.options.items()} for run in runs])
    own = [key for key in options if key.startswith("method.")]
    outside = options.drop(columns=[*own, SEED], errors="ignore")
    varying = find_distinctive(outside)
    if "data.name" in outside and outside["data.name"].nunique() > 1:  # it says enough
        varying[[key for key in outside if key.startswith("data.") and key != "data.name"]] = False
    setting = [join_labels(run, varying.loc[k]) for k, run in enumerate(runs)]
    method = pd.Series("", index=options.index)
    if METHOD in options:
        for _, alike in options[own].groupby(METHOD):
            is_named = find_distinctive(alike).assign(**{METHOD: True})
            method.update(pd.Series({k: join_labels(runs[k], is_named.loc[k]) for k in alike.index}, dtype=object))
    table = pd.DataFrame({"setting": setting, "method": method}, dtype=object)
    table["name"] = [f"{m}, {s}" if s else m for s, m in zip(table["setting"], table["method"], strict=True)]
    return table


def find_distinctive(options: pd.DataFrame) -> pd.DataFrame:
    """Marks the values worth naming: options that vary, without values that more than two thirds of the runs share.

    The choice of a part (`block_type.part`) is named wherever it varies, and an option of a part only where it varies
    among runs with the same choice: `scheduler.fractions` says nothing that the schedule's name does not.
    """
    shares = options.apply(lambda column: column.map(column.value_counts(normalize=True)).astype(float))
    is_part = pd.Series({key: key.endswith(".part") for key in options}, dtype=bool)
    varies = pd.Series({key: _varies(options, key) for key in options}, dtype=bool)
    return options.notna() & varies & (is_part | ~(shares > 2 / 3))


def _varies(options: pd.DataFrame, key: str) -> bool:
    part = f"{key.partition('.')[0]}.part"
    if key == part or part not in options:
        return options[key].nunique() > 1
    return bool(options.groupby(part, dropna=False)[key].nunique().max() > 1)


def join_labels(run: FinishedRun, is_named: pd.Series) -> str:
    """Joins the marked options to a label: parts by their names alone, the others as `option=value`."""
    keys = sorted((str(k) for k, named in is_named.items() if named), key=lambda key: (not key.endswith(".part"), key))
    options = {key.removeprefix("method."): run.options[key] for key in keys}
    labels = (str(value) if key.endswith("part") else f"{key}={value}" for key, value in options.items())
    return escape_control_chars(" ".join(labels))


def use_held_out(summary: Any) -> Any:
    """Returns a summary in which the figures of the held-out images stand in place of the test images' figures."""
    if isinstance(summary, list):
        return [use_held_out(value) for value in summary]
    if not isinstance(summary, dict):
        return summary
    found = {key: use_held_out(value) for key, value in summary.items()}
    return found | {key: found.get(f"val_{key[5:]}") for key in found if key.startswith("test_")}
