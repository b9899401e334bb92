"""Searches for options by Optuna, whose trials are saved in `study.json`, so that a search can be continued.

A trial is a run with certain values of the options. A search is identified by the overrides with which it was started.
"""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from odcheap.runs.overrides import name_run
from odcheap.runs.schemas import Search, Study, Trial, validate
from odcheap.utils.documents import read_json
from odcheap.utils.files import write_json
from odcheap.utils.text import format_accuracy

FILE_NAME = "study.json"
STORAGE = "odcheap.runs.study_storage.StudyStorage"


def is_kept(config: DictConfig) -> bool:
    """Returns whether a sweep is a search whose trials are saved in `study.json`, not in the user's own storage.

    Args:
        config: The config of the sweep, with the options of Hydra under `hydra`.
    """
    storage = config.hydra.sweeper.get("storage")
    return OmegaConf.is_dict(storage) and storage.get("_target_") == STORAGE


def list_overrides(config: DictConfig) -> list[str]:
    """Returns the overrides that identify a search; with other overrides in the same folder, a new search begins.

    Args:
        config: The config of the search, with the options of Hydra under `hydra`.
    """
    storage = config.hydra.sweeper.storage
    return describe_search(storage.overrides, storage.params)


def describe_search(overrides: Sequence[str], params: dict[str, str] | None) -> list[str]:
    """Returns the overrides that identify a search, as texts, sorted.

    Args:
        overrides: The overrides of the command line.
        params: Further overrides from the config of the sweeper, by the names of the options.
    """
    return sorted([*map(str, overrides), *(f"{key}={value}" for key, value in (params or {}).items())])


def read_study(folder: Path) -> Study:
    """Returns the content of `study.json` in the folder of a sweep; it has no searches if there is no such file.

    Raises:
        OptionError: The file is damaged, or another program has written it.
    """
    path = folder / FILE_NAME
    return validate(Study, read_json(path, "hydra.sweep.dir"), path, "hydra.sweep.dir") if path.exists() else Study()


def read_search(folder: Path, overrides: Sequence[str]) -> Search:
    """Returns the search in a folder that these overrides identify; it has no trials if it is new.

    Args:
        folder: The folder of the sweep.
        overrides: The overrides as `describe_search` returns them.

    Raises:
        OptionError: The file `study.json` in the folder is damaged, or another program has written it.
    """
    known = (search for search in read_study(folder).searches if search.overrides == list(overrides))
    return next(known, Search(overrides=list(overrides), trials=[]))


def write_search(folder: Path, search: Search) -> None:
    """Writes a search into `study.json`; other searches in the file are not changed."""
    others = [other for other in read_study(folder).searches if other.overrides != search.overrides]
    write_json(folder / FILE_NAME, Study(searches=[*others, search]).model_dump())


def describe_best(folder: Path, overrides: Sequence[str]) -> str | None:
    """Returns a line of text about the trial with the highest accuracy; None if no trial is complete.

    Args:
        folder: The folder of the sweep.
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
    """Returns the name of a trial's folder."""
    return name_run([f"{name}={value}" for name, value in (trial.params | trial.user_attrs).items()])
