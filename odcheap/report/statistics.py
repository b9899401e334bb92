"""Methods side by side: means, deviations, and each method's gain over `alone`, paired by seed."""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from odcheap.utils.errors import Failure
from odcheap.utils.text import escape_control_chars

BASELINE = "alone"
ROUNDING = 1e-9  # equal accuracies may differ by so much
SEED, METHOD = "seed", "method._target_"

Summary = dict[str, Any]
Figure = Callable[[Summary], float | None]


class Finished(NamedTuple):
    """A run: its options (flat, `method._target_` among them), its summary and its rows of `metrics.csv`."""

    options: dict[str, Any]
    summary: Summary
    history: tuple[dict[str, float], ...] = ()


class Spread(NamedTuple):
    """Mean and sample deviation (None with one value) of `n` values."""

    n: int
    mean: float
    deviation: float | None

    @property
    def resolved(self) -> bool:
        """Whether the mean is at least two standard errors from zero; one value says nothing."""
        return self.deviation is not None and abs(self.mean) >= 2 * self.deviation / math.sqrt(self.n) + ROUNDING


def spread(values: list[float]) -> Spread | None:
    """None without values."""
    if not values:
        return None
    return Spread(len(values), statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Row:
    """A method in one setting: its runs by seed, and those of its baseline (none where it is that itself)."""

    setting: str
    method: str
    by_seed: dict[Any, Finished]
    baseline: dict[Any, Finished]
    over: str = BASELINE  # the baseline's name

    def of(self, figure: Figure) -> Spread | None:
        found = (figure(run.summary) for run in self.by_seed.values())
        return spread([value for value in found if value is not None])

    def differences(self, figure: Figure) -> dict[Any, float]:
        """By seed, where both runs have the figure."""
        pairs = {seed: (figure(run.summary), self.of_baseline(seed, figure)) for seed, run in self.by_seed.items()}
        return {seed: own - other for seed, (own, other) in pairs.items() if own is not None and other is not None}

    def of_baseline(self, seed: Any, figure: Figure) -> float | None:
        return figure(self.baseline[seed].summary) if seed in self.baseline else None

    def gain(self, figure: Figure) -> Spread | None:
        return spread(list(self.differences(figure).values()))

    @property
    def name(self) -> str:
        return f"{self.method}, {self.setting}" if self.setting else self.method


def rows(runs: Iterable[Finished]) -> list[Row]:
    """A row for each setting and method, the baseline first within its setting; of equal runs the first counts."""
    runs = list(runs)
    told = {key for key in varying([run.options for run in runs]) if not key.startswith("method.")} - {SEED}
    if "data.name" in told:  # says enough
        told = {key for key in told if not key.startswith("data.")} | {"data.name"}
    by_setting: dict[str, dict[str, dict[Any, Finished]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        alike = [r.options for r in runs if r.options.get(METHOD) == run.options.get(METHOD)]
        own = {key for key in varying(alike) if key.startswith("method.")} - usual(run.options, alike) | {METHOD}
        setting = labelled(run.options, told - usual(run.options, [r.options for r in runs]))
        by_setting[setting][labelled(run.options, own)].setdefault(run.options.get(SEED), run)
    found = []
    for setting, methods in by_setting.items():
        baseline = methods.get(BASELINE, {})
        for method in sorted(methods, key=lambda name: name != BASELINE):
            found.append(Row(setting, method, methods[method], {} if method == BASELINE else baseline))
    return found


def against(found: list[Row], name: str) -> list[Row]:
    """The same rows with the one so named as the baseline of all, whatever their settings; `Failure` without it."""
    named = {row.name: row.by_seed for row in found}
    if name not in named:
        raise Failure(f"--against={name}: must be one of {'; '.join(sorted(named))}")
    if not any(row.by_seed.keys() & named[name].keys() for row in found if row.name != name):
        raise Failure(f"--against={name}: no other row has a run with one of its seeds, {sorted(named[name])}")
    return [replace(row, baseline={} if row.name == name else named[name], over=name) for row in found]


def mean_student(summary: Summary) -> float | None:
    """Nothing is picked: test top-1 of all students after the last epoch, averaged."""
    students = (summary.get("last") or {}).get("students")
    return statistics.mean(student["test_top1"] for student in students) if students else None


def selected_student(summary: Summary) -> float | None:
    """Test top-1 of the one chosen on held-out images: of `alone` the best of S independent students."""
    return (summary.get("selected") or {}).get("test_top1")


def ensemble(summary: Summary) -> float | None:
    """Test top-1 of the students' mean prediction, after the last epoch."""
    return ((summary.get("last") or {}).get("ensemble") or {}).get("test_top1")


def teacher_of(kind: str) -> Figure:
    """Test top-1 after the last epoch of a teacher of this kind; others are no match for it."""

    def figure(summary: Summary) -> float | None:
        teacher = (summary.get("last") or {}).get("teacher") or {}
        return teacher.get("test_top1") if teacher.get("kind") == kind else None

    return figure


def cost_of(name: str) -> Figure:
    return lambda summary: (summary.get("cost") or {}).get(name)


def epochs(summary: Summary) -> float | None:
    return summary.get("epochs")


def training_macs(summary: Summary) -> float | None:
    """Multiply-accumulates of the whole training, kd's teacher's included; None where nobody knows that one's."""
    cost = summary.get("cost") or {}
    return cost.get("training_macs_with_teacher")


def hours(summary: Summary) -> float | None:
    """Of training, kd's teacher's included."""
    taught = (summary.get("cost") or {}).get("teacher") or {}
    seconds = (summary.get("train_seconds"), taught.get("train_seconds", 0))
    return None if None in seconds else sum(seconds) / 3600


def held_out(summary: Any) -> Any:
    """The same summary with the held-out images' figures in place of the test's, for decisions."""
    if isinstance(summary, list):
        return [held_out(value) for value in summary]
    if not isinstance(summary, dict):
        return summary
    found = {key: held_out(value) for key, value in summary.items()}
    return found | {key: found.get(f"val_{key[5:]}") for key in found if key.startswith("test_")}


def varying(options: list[dict[str, Any]]) -> set[str]:
    """The options that are not the same in all runs that have them: what only one block type has says nothing more."""
    seen: dict[str, set[str]] = defaultdict(set)
    for own in options:
        for key, value in own.items():
            seen[key].add(repr(value))
    return {key for key, values in seen.items() if len(values) > 1}


def usual(own: dict[str, Any], options: list[dict[str, Any]]) -> set[str]:
    """Those of a run's options, choices of parts aside, that more than two thirds of the runs share and need not be
    named: a study of one factor at a time then names the factor.
    """
    counts = Counter((key, repr(value)) for others in options for key, value in others.items())
    having = Counter(key for others in options for key in others)
    named = {key for key in own if not key.endswith("_target_")}
    return {key for key in named if 3 * counts[key, repr(own[key])] > 2 * having[key]}


def name_of(target: str) -> str:
    """`DW` of `odcheap.layers.cheap_conv.DW`; `dml` of `odcheap.methods.dml.DeepMutualLearning`."""
    parts = target.split(".")
    return parts[-2] if "methods" in parts else parts[-1]


def labelled(options: dict[str, Any], told: set[str]) -> str:
    """These options in a few words, choices of parts by their names alone."""
    keys = sorted(told & options.keys(), key=lambda key: (not key.endswith("_target_"), key))
    short = {key: key.removeprefix("method.") for key in keys}
    named = (name_of(str(options[k])) if k.endswith("_target_") else f"{short[k]}={options[k]}" for k in keys)
    return escape_control_chars(" ".join(named))
