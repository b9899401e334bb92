"""A storage for Optuna that keeps the trials of a search in the file `study.json`.

Optuna 2 has a storage in SQLite files, but it does not work with SQLAlchemy 2.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.exceptions import ExperimentalWarning
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from odcheap.runs import sweep
from odcheap.runs.schemas import Search, Trial
from odcheap.utils.errors import OptionError, first_line


class StudyStorage(InMemoryStorage):
    """A storage of Optuna that keeps the trials of a search in `study.json`, so that the search can be continued.

    When the search starts, earlier trials are read from the file. Every change of a trial is written to it. A trial
    that was interrupted is tried again with the same values, so that its run continues.

    Args:
        folder: The folder of the sweep, which contains `study.json`.
        overrides: The overrides of the command line. Together with `params` they identify the search in the file.
        params: Further overrides from the config of Hydra's sweeper: a dict from the names of options to their values.
    """

    def __init__(self, folder: str, overrides: Sequence[str], params: dict[str, str] | None = None):
        super().__init__()
        self.folder, self.overrides = Path(folder), sweep.describe_search(overrides, params)
        self.is_loaded = False

    def set_study_directions(self, study_id: int, directions: Sequence[StudyDirection]) -> None:
        super().set_study_directions(study_id, directions)
        if not self.is_loaded:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)  # `create_trial` may change in later versions
                for trial in sweep.read_search(self.folder, self.overrides).trials:
                    try:
                        self.create_new_trial(study_id, template_trial=restore_trial(trial))
                    except (ValueError, TypeError, KeyError, AttributeError) as error:  # as Optuna raises them
                        allowed = f"has a trial that Optuna does not take ({first_line(error)})"
                        raise OptionError("hydra.sweep.dir", self.folder / sweep.STUDY, allowed) from error
            self.is_loaded = True

    def set_trial_state(self, trial_id: int, state: TrialState) -> bool:
        is_set = super().set_trial_state(trial_id, state)
        self.save(trial_id)
        return is_set

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        super().set_trial_param(trial_id, param_name, param_value_internal, distribution)
        self.save(trial_id)

    def save(self, trial_id: int) -> None:
        """Writes all trials of the search to `study.json`; `trial_id` is Optuna's number of any of them."""
        trials = self.get_all_trials(self.get_study_id_from_trial_id(trial_id), deepcopy=False)
        sweep.write_search(self.folder, Search(overrides=self.overrides, trials=[*map(describe_trial, trials)]))


def describe_trial(trial: FrozenTrial) -> Trial:
    """Converts a trial of Optuna to the form in which `study.json` contains it."""
    return Trial(
        state=trial.state.name,
        value=trial.values[0] if trial.values else None,
        params=trial.params,
        distributions={name: distribution_to_json(value) for name, value in trial.distributions.items()},
        user_attrs=trial.user_attrs,
        system_attrs=trial.system_attrs,
    )


def restore_trial(trial: Trial) -> FrozenTrial:
    """Converts a trial from `study.json` to a trial of Optuna; an interrupted trial is WAITING, to be tried again."""
    if trial.state in ("RUNNING", "WAITING"):
        fixed: dict[str, Any] = {"fixed_params": trial.params or trial.system_attrs.get("fixed_params", {})}
        return create_trial(state=TrialState.WAITING, system_attrs=fixed)
    return create_trial(
        state=TrialState[trial.state],
        value=trial.value,
        params=trial.params,
        distributions={name: json_to_distribution(text) for name, text in trial.distributions.items()},
        user_attrs=trial.user_attrs,
        system_attrs=trial.system_attrs,
    )
