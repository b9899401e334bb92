"""Names the settings and methods of runs, and computes means over seeds and gains over a baseline.

A setting is the combination of the options that differ between the runs and do not belong to the method, such as the
block type. A gain is the accuracy of a run minus that of the baseline's run with the same seed.
"""

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import pandas as pd
import scipy.stats

from odcheap.report.load_runs import FinishedRun
from odcheap.utils.errors import Failure
from odcheap.utils.text import escape_control_chars

BASELINE = "alone"
METHOD, BLOCK_TYPE, SEED = "method.part", "block_type.part", "seed"
TEACHER_KINDS = ("head", "gated", "mean", "ema", "frozen")
TOLERANCE = 1e-9  # equal accuracies may differ by rounding
ACCURACIES = ("mean student", "selected", "ensemble", *(f"teacher ({kind})" for kind in TEACHER_KINDS))
COSTS = ("params", "macs", "epochs", "training macs", "training seconds")
GAINS = {"gain": "mean student", "selected gain": "selected"}  # the differences to the baseline's run of the same seed


class Spread(NamedTuple):
    """The mean and the spread of some values.

    Attributes:
        n: The number of values.
        mean: Their mean.
        deviation: Their sample standard deviation; None for one value.
    """

    n: int
    mean: float
    deviation: float | None

    @property
    def margin(self) -> float | None:
        """Half the width of the mean's 95 % confidence interval by Student's t-distribution; None for one value."""
        if self.deviation is None:
            return None
        return float(scipy.stats.t.ppf(0.975, self.n - 1)) * self.deviation / math.sqrt(self.n)

    @property
    def low(self) -> float | None:
        """The lower end of the mean's 95 % confidence interval; None for one value."""
        return None if self.margin is None else self.mean - self.margin

    @property
    def high(self) -> float | None:
        """The upper end of the mean's 95 % confidence interval; None for one value."""
        return None if self.margin is None else self.mean + self.margin

    @property
    def is_resolved(self) -> bool:
        """Whether the mean's 95 % confidence interval does not contain zero; false for one value."""
        return self.margin is not None and abs(self.mean) - self.margin > TOLERANCE


class Latency(NamedTuple):
    """The inference time of one image in milliseconds, or another cost of one image.

    Attributes:
        median: The median of all timed calls, or the value of another cost, such as a number of multiply-accumulates.
        low: The lower quartile of all timed calls; NaN for another cost.
        high: The upper quartile of all timed calls; NaN for another cost.
    """

    median: float
    low: float = math.nan
    high: float = math.nan

    @property
    def bars(self) -> list[list[float]] | None:
        """The distances of the quartiles from the median, as matplotlib's error bars; None if they are NaN."""
        return None if math.isnan(self.low) else [[self.median - self.low], [self.high - self.median]]


class Latencies(NamedTuple):
    """The latency of a student, and that of the same network with standard convolutions."""

    student: Latency
    standard: Latency


def compute_spread(values: pd.Series) -> Spread | None:
    """Returns the spread of the values that are not missing; None if all are missing."""
    known = values.dropna()
    if known.empty:
        return None
    return Spread(len(known), known.mean(), known.std() if len(known) > 1 else None)


def read_figures(summary: dict[str, Any], images: str = "test") -> dict[str, float | None]:
    """Returns the accuracies and costs of a run, by the names in `ACCURACIES` and `COSTS`.

    Args:
        summary: The content of `summary.json`; that of an earlier version may have fewer entries.
        images: "test" or "val" (held out), for the images on which the accuracies were measured.

    Returns:
        A dict. Top-1 accuracies, as fractions in [0, 1], are `mean student` (the mean of all students after the last
        epoch), `selected` (the selected student), `ensemble`, and one for each kind of teacher, such as
        `teacher (head)`. Costs are `params` and `macs` (multiply-accumulates) of one student, `epochs`, `training macs`
        and `training seconds`. A value that is not known is None or NaN.
    """
    top1 = f"{images}_top1"
    selected, last, cost = (summary.get(key) or {} for key in ("selected", "last", "cost"))
    students = pd.Series([student.get(top1) for student in last.get("students") or []], dtype=float)
    teacher = last.get("teacher") or {}
    # The costs of the training include those of kd's teacher, and are unknown if the teacher's are unknown.
    macs = cost.get("training_macs_with_teacher")
    teacher_seconds = (cost.get("teacher") or {}).get("train_seconds", 0)
    seconds = pd.Series([summary.get("train_seconds"), teacher_seconds], dtype=float)
    return {
        "mean student": students.mean(),  # after the last epoch: nothing is selected
        "selected": selected.get(top1),  # for `alone` the best of several independent students
        "ensemble": (last.get("ensemble") or {}).get(top1),
        **{f"teacher ({kind})": teacher.get(top1) if teacher.get("kind") == kind else None for kind in TEACHER_KINDS},
        "params": cost.get("params"),
        "macs": cost.get("macs"),
        "epochs": summary.get("epochs"),
        "training macs": macs,
        "training seconds": seconds.sum(skipna=False),
    }


def tabulate_runs(runs: Iterable[FinishedRun], against: str | None = None, images: str = "test") -> pd.DataFrame:
    """Returns a table with a row for each run, with its names, accuracies, costs, and gains over the baseline.

    Runs that differ only in the seed get the same `setting` and `method`. If several runs have the same options and the
    same seed, only the first one is in the table. In each setting the baseline comes first, or `alone` if the baseline
    is a row.

    Args:
        runs: The runs to compare.
        against: The name of the baseline. It may be a method, with which the other methods are compared in the same
            setting; or the `name` of a row (method and setting), with which all other rows are compared. None stands
            for the method `alone`.
        images: "test" or "val" (held out), for the images on which the accuracies were measured.

    Returns:
        A table with these columns:

        - `setting`, `method` and `name` (both together): texts for people;
        - `method part` and `block type`: the names in `conf/`;
        - `seed`, `run` (the run itself), and `baseline` (whether it is the baseline);
        - all of `ACCURACIES` and `COSTS`;
        - all of `GAINS`, which are NaN if there is no run of the baseline with the same seed.

    Raises:
        Failure: No method and no row has the name `against`, or no other run has a seed of the baseline's runs.
    """
    runs = list(runs)
    table = label_runs(runs)
    table["seed"] = [run.options.get(SEED) for run in runs]
    table["run"] = runs
    for column, option in {"method part": METHOD, "block type": BLOCK_TYPE}.items():
        table[column] = [str(run.options.get(option, "")) for run in runs]
    figures = [read_figures(run.summary, images) for run in runs]
    table[[*ACCURACIES, *COSTS]] = pd.DataFrame(figures, columns=[*ACCURACIES, *COSTS], dtype=float)
    table = table.drop_duplicates(["setting", "method", "seed"])
    # Settings and methods keep the order in which they first appear, except for the baseline.
    first = against if against in set(table["method"]) else BASELINE
    table = table.sort_values(
        ["setting", "method"],
        key=lambda names: pd.Series(pd.factorize(names)[0], names.index).mask(names == first, -1),
        ignore_index=True,
    )
    return add_gains(table, against)


def add_gains(table: pd.DataFrame, against: str | None) -> pd.DataFrame:
    """Adds the columns `baseline`, `gain` and `selected gain` to a table, in place, and returns the table.

    Args:
        table: The table of `tabulate_runs` without these columns.
        against: The name of the baseline, a method or a row; None for the method `alone`.

    Raises:
        Failure: No method and no row has the name `against`, or no other run has a seed of the baseline's runs.
    """
    # A method is compared in the same setting, a row with the rows of all settings; always with the same seed.
    if against is None or against in set(table["method"]):
        table["baseline"], keys = table["method"] == (against or BASELINE), ["setting", "seed"]
    else:
        table["baseline"], keys = table["name"] == against, ["seed"]
        if not table["baseline"].any():
            known = [*dict.fromkeys([*sorted(table["method"]), *sorted(table["name"])])]
            raise Failure(f"--against={against}: must be a method or a row, one of {'; '.join(known)}")
    baseline = table.loc[table["baseline"], [*keys, *GAINS.values()]]
    paired = table[keys].merge(baseline, how="left", on=keys, indicator="found")
    is_paired = (paired["found"] == "both").to_numpy() & ~table["baseline"]
    if against is not None and not is_paired.any():
        seeds = sorted(set(table.loc[table["baseline"], "seed"]), key=str)
        where = "in the same setting " if "setting" in keys else ""
        raise Failure(f"--against={against}: no other row {where}has a run with one of its seeds, {seeds}")
    for gain, figure in GAINS.items():
        table[gain] = (table[figure] - paired[figure].to_numpy()).mask(table["baseline"])
    return table


def summarize_runs(table: pd.DataFrame) -> pd.DataFrame:
    """Returns a table in which runs that differ only in the seed are one row, in the order of the given table.

    Args:
        table: The table of `tabulate_runs`, with a row for each run.

    Returns:
        A table with the columns `setting`, `method`, `name`, `method part`, `block type` and `baseline` of the given
        table; `n`, the number of seeds; `standard macs`, the multiply-accumulates of the same network with standard
        convolutions, or None; and for each of `ACCURACIES`, `COSTS` and `GAINS` a `Spread` over the seeds, or None.
    """
    rows = []
    for _, runs in table.groupby(["setting", "method"], sort=False):
        first = runs.iloc[0]
        row = first[["setting", "method", "name", "method part", "block type", "baseline"]].to_dict() | {"n": len(runs)}
        row["standard macs"] = ((first["run"].summary.get("cost") or {}).get("standard") or {}).get("macs")
        rows.append(row | {figure: compute_spread(runs[figure]) for figure in (*ACCURACIES, *COSTS, *GAINS)})
    return pd.DataFrame(rows, dtype=object)


def label_runs(runs: list[FinishedRun]) -> pd.DataFrame:
    """Returns names for the runs, made of the options that distinguish a run from the others.

    A value that more than two thirds of the runs have is in no name. In a study that changes one option at a time, each
    run is therefore named by the option that it changes. If a text contains the run's own seed, as in
    `method.teacher_weights=runs/teacher-seed0`, it does not distinguish the run from those with other seeds.

    Returns:
        A table with a row for each run and three columns of text: `setting` (the options that differ and do not belong
        to the method), `method` (its name, and those of its options that differ), and `name` (both together).
    """
    runs = [
        run._replace(options={k: without_seed(v, run.options.get(SEED)) for k, v in run.options.items()})
        for run in runs
    ]
    options = pd.DataFrame([{key: repr(value) for key, value in run.options.items()} for run in runs])
    own = [key for key in options if key.startswith("method.")]
    outside = options.drop(columns=[*own, SEED], errors="ignore")

    # The setting: the name of a data set stands for its other options, except for a limit on its images.
    is_named = find_distinctive(outside)
    if "data.name" in outside and outside["data.name"].nunique() > 1:
        own_names = ("data.name", "data.limit")
        is_named[[key for key in outside if key.startswith("data.") and key not in own_names]] = False
    setting = [join_labels(run, is_named.loc[k]) for k, run in enumerate(runs)]

    # The method: its options are compared only among the runs with this method.
    method = pd.Series("", index=options.index)
    if METHOD in options:
        for _, alike in options[own].groupby(METHOD):
            is_named = find_distinctive(alike).assign(**{METHOD: True})
            method.update(pd.Series({k: join_labels(runs[k], is_named.loc[k]) for k in alike.index}, dtype=object))

    table = pd.DataFrame({"setting": setting, "method": method}, dtype=object)
    table["name"] = [f"{m}, {s}" if s else m for s, m in zip(table["setting"], table["method"], strict=True)]
    return table


def without_seed(value: Any, seed: Any) -> Any:
    """Replaces the seed of a run by `${seed}` in a text, if the seed stands after the word "seed".

    Args:
        value: The value of an option. If it is not a text, or does not contain the seed, it is returned unchanged.
        seed: The seed of the run.

    Example:
        >>> without_seed("runs/teacher-seed1", 1), without_seed("runs/seed=12", 1)
        ('runs/teacher-seed${seed}', 'runs/seed=12')
    """
    return (
        re.sub(rf"(?<=seed)([=_-]?){re.escape(str(seed))}(?!\d)", r"\1${seed}", value)
        if isinstance(value, str)
        else value
    )


def find_distinctive(options: pd.DataFrame) -> pd.DataFrame:
    """Returns, for each option of each run, whether its value is a part of the run's name.

    A value is a part of the name if the option differs between the runs and at most two thirds of the runs have this
    value. For the name of a part, such as `block_type.part`, the second condition is not needed. An option of a part,
    such as `scheduler.fractions` of `scheduler.part`, must differ between runs with the same part.

    Args:
        options: A table with a row for each run and a column for each option.

    Returns:
        A table of booleans with the same rows and columns.
    """

    def varies(key: str) -> bool:
        part = f"{key.partition('.')[0]}.part"
        if key == part or part not in options:
            return options[key].nunique() > 1
        return bool(options.groupby(part, dropna=False)[key].nunique().max() > 1)

    is_rare = options.apply(lambda column: column.map(column.value_counts(normalize=True)).astype(float) <= 2 / 3)
    is_named = is_rare | [key.endswith(".part") for key in options]
    return is_named & options.notna() & [varies(key) for key in options]


def join_labels(run: FinishedRun, is_named: pd.Series) -> str:
    """Returns the name of a run, with names of parts, such as `DW`, before other options as `option=value`.

    Args:
        run: The run.
        is_named: Whether the value of each option is a part of the name; a row of `find_distinctive`.
    """
    keys = sorted((str(k) for k, named in is_named.items() if named), key=lambda key: (not key.endswith(".part"), key))
    options = {key.removeprefix("method."): run.options[key] for key in keys}
    labels = (str(value) if key.endswith("part") else f"{key}={value}" for key, value in options.items())
    return escape_control_chars(" ".join(labels))
