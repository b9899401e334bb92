"""Sweeps: the plan of a sweep, and the outcomes of its runs, which are read from the folders of the runs.

A search for options by Optuna is a sweep, too. Each of its trials is a run. The trials are saved in `study.json`, so
that the search can be continued. A search is identified by the overrides with which it was started.
"""

import itertools
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import DictConfig, OmegaConf, read_write
from pydantic import BaseModel

from odcheap.runs import status
from odcheap.runs.folder import SUMMARY, TEST
from odcheap.runs.schemas import Search, Study, Summary, SweepPlan, SweepPlans, Test, Trial, validate
from odcheap.runs.settings import STORAGE_OPTIONS, name_run, override_key
from odcheap.utils.console import name_command
from odcheap.utils.errors import OptionError
from odcheap.utils.files import read_json, write_json
from odcheap.utils.signals import WorkerSignals
from odcheap.utils.text import format_accuracy

PLAN, STUDY = "sweep.json", "study.json"
STORAGE = "odcheap.runs.study_storage.StudyStorage"
MAX_PLANS = 20  # of sweeps in one folder, so that the file stays small
# How the folders of the runs are named: by their overrides, with those of the storage options that the sweep varies.
NAMED_OPTIONS: dict[str, tuple[str, ...]] = {"${run_name:}": (), "${run_name:data_dir}": ("data_dir",)}
# How the files of a sweep begin. Hydra writes `multirun.yaml`.
OWN_FILES = {"multirun.yaml": b"hydra:", PLAN: b'{ "count":', STUDY: b'{ "searches":'}
KILLED = "failed: ended without a reason (killed, or out of memory?)"


@dataclass(frozen=True)
class Outcome:
    """How one run of a sweep ended.

    Attributes:
        job_dir: The run's folder.
        text: `finished`, `was finished` (before this sweep began), `running`, `stopped: SIGNAL` or `failed: REASON`.
        summary: The content of `summary.json` or `test.json`; None if the run did not finish.
    """

    job_dir: str
    text: str
    summary: dict[str, Any] | None


class SweepFolder:
    """The folder of a sweep, from which the outcomes of its runs are read.

    Construct it when the sweep begins: it lists the files that exist then, to know later which ones the sweep has
    written.

    Args:
        path: The folder: the value of the option `hydra.sweep.dir`.
        search: The overrides that identify a search by Optuna, as `find_search` returns them; None for any other sweep.
        runs: The names of the runs' folders; empty if they are not known before the runs start.

    Attributes:
        count_others: The number of runs in the folder that belong to other sweeps; `read_outcomes` sets it.
        unwritten: The outcomes of runs whose own folder could not be written.
        signals: The handler of signals for a sweep whose runs are executed by processes of joblib.
    """

    def __init__(self, path: Path, search: Sequence[str] | None = None, runs: Sequence[str] = ()):
        self.path, self.search, self.runs, self.count_others = path, search, runs, 0
        self.signals = WorkerSignals()
        self.files_before = self.list_files()
        self.unwritten: list[Outcome] = []

    def list_files(self) -> dict[Path, tuple[int, int]]:
        """Returns the result and status files of all runs in the folder, with inode and modification time (ns)."""
        paths = [path for name in (SUMMARY, TEST, status.FILE_NAME) for path in self.path.rglob(name)]
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}

    def read_outcomes(self) -> list[Outcome]:
        """Reads how the runs of this sweep ended, and returns their outcomes, sorted by the names of their folders.

        Runs that failed before this sweep and were not started again are left out. If the names of the runs' folders
        are not known, all runs in the folder are included, even those of other sweeps.
        """
        files = self.list_files()
        changed = {path for path, version in files.items() if self.files_before.get(path) != version}
        folders = {path.parent for path in files}
        own = folders
        if self.runs:
            own = {self.path / name for name in self.runs} & folders
        elif self.search is not None:  # its earlier trials belong to it
            trials = read_search(self.path, self.search).trials
            own = {self.path / name_trial(trial) for trial in trials} | {path.parent for path in changed}
        self.count_others = len(folders - own)
        outcomes = [read_outcome(folder, changed) for folder in sorted(own)]
        return [outcome for outcome in outcomes if outcome is not None] + self.unwritten


# The sweep that this process has started, if any. Hydra builds the callback itself and gives no access to it.
started_sweeps: list[SweepFolder] = []


def name_status_command(folder: Path) -> str:
    """Returns the command line that prints the state of each run of a sweep; `folder` is the folder of the sweep."""
    return f"{name_command('report')} --status {shlex.quote(str(folder))}"


def check_runs(config: DictConfig) -> None:
    """Checks, before a sweep begins, that Hydra can compose the configs of its runs.

    Each name of a config group is tried once, as in `block_type=DW,Shift`, and not each combination of values.

    Args:
        config: The config of the sweep, including Hydra's own options under `hydra`.

    Raises:
        HydraException: An override cannot be read, or names an option or a part that does not exist.
    """
    # Hydra composes the config of every run later. Other values than names need no check here, so that a sweep over
    # hundreds of seeds begins soon.
    groups = set(config.hydra.runtime.choices)
    values = [list_values(override, override.key_or_group in groups) for override in read_overrides(config)]
    for k in range(max(map(len, values), default=1)):
        run = [options[min(k, len(options) - 1)] for options in values if options]
        GlobalHydra.instance().config_loader().load_sweep_config(config, run)


def list_values(override: Override, is_group: bool) -> list[str]:
    """Splits an override with several values, such as `seed=0,1`, into texts with one value each.

    Args:
        override: The override; it may also have a single value.
        is_group: True for names in a config group, as in `block_type=DW,Shift`: all values are returned. If it is
            False, only the first value is returned.
    """
    if not override.is_sweep_override():
        return [f"{override.get_key_element()}={override.get_value_element_as_str()}"]
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        return [f"{override.get_key_element()}={sweep.start}"]
    values = override.sweep_string_iterator() if override.is_discrete_sweep() else ()
    return [f"{override.get_key_element()}={value}" for value in itertools.islice(values, None if is_group else 1)]


def read_overrides(config: DictConfig) -> list[Override]:
    """Returns the parsed overrides of a sweep: those in `hydra.sweeper.params`, and those of the command line.

    Args:
        config: The config of the sweep, including Hydra's own options under `hydra`.

    Raises:
        HydraException: The overrides cannot be parsed.
    """
    given = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    given += map(str, config.hydra.overrides.task)
    return OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(given)


def plan_sweep(config: DictConfig) -> SweepPlan:
    """Returns the number of runs of a sweep, the options that it varies, and the names of its runs' folders.

    If the sweep continues a search by Optuna, the number of trials in `config` is reduced to those that are left.

    Args:
        config: The config of the sweep, including Hydra's own options under `hydra`.

    Raises:
        HydraException: The overrides cannot be parsed.
        OptionError: The file `study.json` of an earlier search cannot be read.
    """
    sweeper = config.hydra.sweeper
    overrides = read_overrides(config)
    swept = [override.get_key_element() for override in overrides if override.is_sweep_override()]
    if "n_trials" in sweeper:
        search = find_search(config)
        done = 0 if search is None else continue_search(config, search)
        return SweepPlan(count=done + sweeper.n_trials, done=done, swept=swept)
    runs = list(itertools.chain.from_iterable(BasicSweeper.split_arguments(overrides, None)))
    subdir = str(cast(dict[str, Any], OmegaConf.to_container(config.hydra.sweep, resolve=False))["subdir"])
    is_named = subdir in NAMED_OPTIONS and "job_dir" not in {override.get_key_element() for override in overrides}
    names = [name_run(run, NAMED_OPTIONS[subdir]) for run in runs] if is_named else []
    return SweepPlan(count=len(runs), swept=swept, runs=names)


def continue_search(config: DictConfig, search: list[str]) -> int:
    """Reduces the number of trials in `config` to those that are left; returns the number of complete trials.

    Args:
        config: The config of the sweep. A seed of the sampler is changed too, so that other values are drawn.
        search: The overrides that identify the search in `study.json`, as `find_search` returns them.
    """
    sweeper = config.hydra.sweeper
    trials = read_search(Path(config.hydra.sweep.dir), search).trials
    done = sum(trial.state == "COMPLETE" for trial in trials)
    with read_write(config):
        sweeper.n_trials = max(0, sweeper.n_trials - done)
        # With the same seed, a random sampler would draw the values of the first trials again.
        if (sweeper.get("sampler") or {}).get("seed") is not None:
            sweeper.sampler.seed += len(trials)
    return done


def write_plan(folder: Path, plan: SweepPlan) -> None:
    """Writes the plan of a sweep to `sweep.json`, which keeps plans of other sweeps that have unfinished runs."""
    others = [other for other in read_plans(folder) if other.runs != plan.runs and has_runs_left(folder, other)]
    content = SweepPlans(**plan.model_dump(), others=others[: MAX_PLANS - 1])
    write_json(folder / PLAN, content.model_dump())


def has_runs_left(folder: Path, plan: SweepPlan) -> bool:
    """Returns whether a run that the plan of a sweep names has no results yet; `folder` is the folder of the sweep."""
    return any(not (folder / name / SUMMARY).is_file() and not (folder / name / TEST).is_file() for name in plan.runs)


def read_plans(folder: Path) -> list[SweepPlan]:
    """Returns the plans in a folder's `sweep.json`, that of the last sweep first; none if it cannot be read."""
    try:
        plans = validate(SweepPlans, read_json(folder / PLAN, "DIR"), folder / PLAN, "DIR")
    except OptionError:
        return []
    return [plans, *plans.others]


def name_position(folder: Path, number: int, overrides: Sequence[str]) -> tuple[str, str]:
    """Returns a short name of a run, such as `seed=1`, and a text such as "run 3 of 8", for messages.

    Args:
        folder: The folder of the sweep, whose `sweep.json` is read.
        number: The number of the run in Hydra, from 0.
        overrides: The overrides of the run; the name contains those that the sweep varies.
    """
    # Another sweep in this folder may have been started since. A plan without names may be that of any sweep.
    names = {name_run(overrides, also) for also in NAMED_OPTIONS.values()}
    plans = [plan for plan in read_plans(folder) if not plan.runs or names & set(plan.runs)]
    plan = plans[0] if plans else SweepPlan(count=0)
    varied = [override for override in overrides if override_key(override) in {*map(override_key, plan.swept)}]
    number += plan.done + 1
    also = [option for option in plan.swept if option in STORAGE_OPTIONS]
    return name_run(varied or overrides, also), f"run {number} of {plan.count}" if plan.count else f"run {number}"


def check_sweep_folder(folder: Path) -> None:
    """Raises `OptionError` if a sweep in this folder would overwrite a user's file, or would write through a link."""
    for name, start in OWN_FILES.items():
        path = folder / name
        if not os.path.lexists(path):
            continue
        is_own = path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1
        if is_own:
            with open(path, "rb") as file:
                is_own = file.read(100).split()[: len(start.split())] == start.split()
        if not is_own:
            allowed = f"holds a {name} that no sweep has written: name another folder"
            raise OptionError("hydra.sweep.dir", folder, allowed)


def read_outcome(folder: Path, changed: set[Path]) -> Outcome | None:
    """Reads how a run ended; returns None if its folder has no results and this sweep has written nothing there.

    Args:
        folder: The run's folder.
        changed: The paths of all files that were written since the sweep began.
    """
    # A result counts if it was there before; a status counts only if it was written in this sweep.
    try:
        if folder / TEST in changed:
            return Outcome(str(folder), "finished", read_checked(folder / TEST, Test))
        if (folder / SUMMARY).is_file():
            text = "finished" if folder / SUMMARY in changed else "was finished"
            return Outcome(str(folder), text, read_checked(folder / SUMMARY, Summary))
        last = status.read_status(folder) if folder / status.FILE_NAME in changed else {}
    except OptionError as error:
        return Outcome(str(folder), f"failed: {error}", None)
    if not last:
        return None
    if last["state"] == "running":
        return Outcome(str(folder), "running" if status.is_alive(last) else KILLED, None)
    return Outcome(str(folder), f"{last['state']}: {last['reason']}", None)


def read_checked(path: Path, schema: type[BaseModel]) -> dict[str, Any]:
    """Reads a JSON file of a run, and checks its content with a schema.

    Args:
        path: The file.
        schema: A class of `runs.schemas`, such as `Summary`.

    Raises:
        OptionError: The file cannot be read, or its content does not fit the schema.
    """
    content = read_json(path, "job_dir")
    validate(schema, content, path, "job_dir")
    return content


def find_search(config: DictConfig) -> list[str] | None:
    """Returns the overrides in the config of a sweep that identify a search by Optuna.

    No file is read: the overrides are taken from `config` only. `read_search` reads the trials of this search from
    `study.json`. A sweep with other overrides in the same folder is another search.

    Args:
        config: The config of the sweep, including Hydra's own options under `hydra`.

    Returns:
        The overrides, sorted; None if the sweep is no search, or if the user has chosen another storage than
        `study.json`.
    """
    storage = config.hydra.sweeper.get("storage")
    is_kept = OmegaConf.is_dict(storage) and storage.get("_target_") == STORAGE
    return describe_search(storage.overrides, storage.params) if is_kept else None


def describe_search(overrides: Sequence[str], params: dict[str, str] | None) -> list[str]:
    """Joins all overrides of a search by Optuna to one sorted list, which identifies the search in `study.json`.

    Args:
        overrides: The overrides of the command line.
        params: Further overrides, from `hydra.sweeper.params`: a dict from the names of options to their values.
    """
    return sorted([*map(str, overrides), *(f"{key}={value}" for key, value in (params or {}).items())])


def read_study(folder: Path) -> Study:
    """Returns the content of `study.json` in the folder of a sweep; it has no searches if there is no such file.

    Raises:
        OptionError: The file is damaged, or another program has written it.
    """
    path = folder / STUDY
    return validate(Study, read_json(path, "hydra.sweep.dir"), path, "hydra.sweep.dir") if path.exists() else Study()


def read_search(folder: Path, overrides: Sequence[str]) -> Search:
    """Reads a search by Optuna from `study.json`; it has no trials if the file does not contain it, or does not exist.

    Args:
        folder: The folder of the sweep.
        overrides: The overrides that identify the search, as `describe_search` returns them.

    Raises:
        OptionError: The file is damaged, or another program has written it.
    """
    known = (search for search in read_study(folder).searches if search.overrides == list(overrides))
    return next(known, Search(overrides=list(overrides), trials=[]))


def write_search(folder: Path, search: Search) -> None:
    """Writes a search by Optuna into `study.json` in the sweep's folder; other searches in the file are not changed."""
    others = [other for other in read_study(folder).searches if other.overrides != search.overrides]
    write_json(folder / STUDY, Study(searches=[*others, search]).model_dump())


def describe_best(folder: Path, overrides: Sequence[str]) -> str | None:
    """Returns a line of text about the best trial of a search by Optuna; None if no trial is complete.

    Args:
        folder: The folder of the sweep, whose `study.json` is read.
        overrides: The overrides that identify the search, as `describe_search` returns them.
    """
    trials = read_search(folder, overrides).trials
    complete = [trial for trial in trials if trial.state == "COMPLETE" and trial.value is not None]
    if not complete:
        return None
    best = max(complete, key=lambda trial: trial.value or 0.0)
    values = ", ".join(f"{name}={value}" for name, value in best.params.items())
    run = folder / name_trial(best)
    return f"best of {len(complete)} trials: {values}, {format_accuracy(best.value)} % on held-out images ({run})"


def name_trial(trial: Trial) -> str:
    """Returns the name of the folder in which a trial of a search by Optuna runs."""
    return name_run([f"{name}={value}" for name, value in (trial.params | trial.user_attrs).items()])
