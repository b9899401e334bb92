"""Searches by Optuna. `study.json` in the sweep's folder holds their trials, so that a search can be continued."""

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
    """Returns whether the sweep is a search that `study.json` keeps, and not one in a storage of the user's own."""
    storage = config.hydra.sweeper.get("storage")
    return OmegaConf.is_dict(storage) and storage.get("_target_") == STORAGE


def list_overrides(config: DictConfig) -> list[str]:
    """Returns the overrides by which a search is known: with others in the same folder, another search begins."""
    storage = config.hydra.sweeper.storage
    return describe_search(storage.overrides, storage.params)


def describe_search(overrides: Sequence[str], params: dict[str, str] | None) -> list[str]:
    """Returns the overrides of a search as texts, sorted; see `list_overrides`."""
    return sorted([*map(str, overrides), *(f"{key}={value}" for key, value in (params or {}).items())])


def read_study(folder: Path) -> Study:
    """Returns the content of `study.json`.

    Raises:
        OptionError: The file is not one that odcheap writes.
    """
    path = folder / FILE_NAME
    return validate(Study, read_json(path, "hydra.sweep.dir"), path, "hydra.sweep.dir") if path.exists() else Study()


def read_search(folder: Path, overrides: Sequence[str]) -> Search:
    """Returns the search with these overrides, without trials if it is new; raises the errors of `read_study`."""
    known = (search for search in read_study(folder).searches if search.overrides == list(overrides))
    return next(known, Search(overrides=list(overrides), trials=[]))


def write_search(folder: Path, search: Search) -> None:
    """Writes a search into `study.json`, and leaves the other searches in it as they are."""
    others = [other for other in read_study(folder).searches if other.overrides != search.overrides]
    write_json(folder / FILE_NAME, Study(searches=[*others, search]).model_dump())


def describe_best(folder: Path, overrides: Sequence[str]) -> str | None:
    """Returns a line about the trial with the highest value, None if no trial is complete.

    Args:
        folder: The folder of the sweep.
        overrides: The overrides of the search.
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
