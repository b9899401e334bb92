"""Methods side by side: means, deviations, and each method's gain over `alone`, paired by seed."""

import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

BASELINE = "alone"
SEED, METHOD = "seed", "method._target_"


class Finished(NamedTuple):
    """A run: its options (flat, `method._target_` among them) and its summary."""

    options: dict[str, Any]
    summary: dict[str, Any]


class Spread(NamedTuple):
    """Mean and sample deviation (None with one value) of `n` values."""

    n: int
    mean: float
    deviation: float | None


class Row(NamedTuple):
    """A method in one setting: test top-1 of the mean student at the last epoch and of the selected one, and gains.

    Without a run of `alone` of the same seed there is no gain.
    """

    setting: str
    method: str
    mean_student: Spread
    mean_gain: Spread | None
    selected: Spread
    selected_gain: Spread | None


def spread(values: list[float]) -> Spread:
    return Spread(len(values), statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)


def rows(runs: Iterable[Finished]) -> list[Row]:
    """A row for each setting and method, the baseline first within its setting."""
    runs = list(runs)
    told = {key for key in varying([run.options for run in runs]) if not key.startswith("method.")} - {SEED}
    if "data.name" in told:  # says enough
        told = {key for key in told if not key.startswith("data.")} | {"data.name"}
    by_setting: dict[str, dict[str, dict[Any, Finished]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        own = varying([r.options for r in runs if r.options[METHOD] == run.options[METHOD]])
        method = labelled(run.options, own & {key for key in run.options if key.startswith("method.")} | {METHOD})
        by_setting[labelled(run.options, told)][method][run.options[SEED]] = run
    found = []
    for setting, methods in by_setting.items():
        baseline = methods.get(BASELINE, {})
        for method in sorted(methods, key=lambda name: name != BASELINE):
            found.append(row(setting, method, methods[method], {} if method == BASELINE else baseline))
    return found


def row(setting: str, method: str, by_seed: dict[Any, Finished], baseline: dict[Any, Finished]) -> Row:
    def of(figure: Any) -> tuple[Spread, Spread | None]:
        found = {seed: figure(run.summary) for seed, run in by_seed.items()}
        gains = [value - figure(baseline[seed].summary) for seed, value in found.items() if seed in baseline]
        return spread(list(found.values())), spread(gains) if gains else None

    return Row(setting, method, *of(mean_student), *of(selected_student))


def mean_student(summary: dict[str, Any]) -> float:
    """Nothing is picked: test top-1 of all students after the last epoch, averaged."""
    return statistics.mean(student["test_top1"] for student in summary["last"]["students"])


def selected_student(summary: dict[str, Any]) -> float:
    """Test top-1 of the one chosen on held-out images: of `alone` the best of S independent students."""
    return summary["selected"]["test_top1"]


def varying(options: list[dict[str, Any]]) -> set[str]:
    """The options that are not the same in all runs that have them: what only one block type has says nothing more."""
    seen: dict[str, set[str]] = defaultdict(set)
    for own in options:
        for key, value in own.items():
            seen[key].add(repr(value))
    return {key for key, values in seen.items() if len(values) > 1}


def name_of(target: str) -> str:
    """`DW` of `odcheap.convs.DW`; `dml` of `odcheap.methods.dml.DeepMutualLearning`."""
    parts = target.split(".")
    return parts[-2] if "methods" in parts else parts[-1]


def labelled(options: dict[str, Any], told: set[str]) -> str:
    """These options in a few words, choices of parts by their names alone."""
    keys = sorted(told & options.keys(), key=lambda key: (not key.endswith("_target_"), key))
    short = {key: key.removeprefix("method.") for key in keys}
    return " ".join(name_of(options[k]) if k.endswith("_target_") else f"{short[k]}={options[k]}" for k in keys)
