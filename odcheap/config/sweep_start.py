"""A callback of Hydra for the beginning of a sweep."""

import sys
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from odcheap.config.messages import describe_hydra_error
from odcheap.runs import study
from odcheap.runs.folder import make_folder
from odcheap.runs.sweep import (
    SweepFolder,
    check_runs,
    check_sweep_folder,
    name_status_command,
    plan_sweep,
    started_sweeps,
    write_plan,
)
from odcheap.utils.console import print_error, say
from odcheap.utils.errors import OptionError


class SweepStart(Callback):
    """A Hydra callback that creates the `SweepFolder` before the first run, and prints the path of the folder."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        # Hydra reduces an exception of a callback to a warning, but lets SystemExit pass.
        try:
            # The checks come first: a mistyped sweep must not write its plan into the folder.
            check_runs(config)
            check_sweep_folder(folder)
            plan = plan_sweep(config)
            make_folder(folder, "hydra.sweep.dir")
            write_plan(folder, plan)
        except OptionError as error:
            sys.exit(print_error(str(error)))
        except (HydraException, OmegaConfBaseException) as error:
            sys.exit(print_error(describe_hydra_error(error)))
        search = study.list_overrides(config) if study.is_kept(config) else None
        started_sweeps.append(SweepFolder(folder, search, plan.runs))
        if "joblib" in str(config.hydra.launcher.get("_target_")) and config.hydra.launcher.get("n_jobs") != 1:
            started_sweeps[-1].signals.install()
        done = f" ({plan.done} are finished)" if plan.done else ""
        say(f"sweep of {plan.count} runs in {folder}{done}; its progress: {name_status_command(folder)}")
