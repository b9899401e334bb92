"""The command `odcheap train`: checks its arguments, and lets Hydra start one run or a sweep (several runs).

PyTorch and Lightning are imported by `run_job` only. So `--help`, or the message about a wrong option, appears at once.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from odcheap.config import compose, options
from odcheap.config.command_line import check_arguments, check_choices, check_single_values, prepare_arguments
from odcheap.config.help import format_help
from odcheap.config.messages import describe_hydra_error
from odcheap.config.signatures import read_signature
from odcheap.distributed import cluster  # noqa: F401 - registers values of the config
from odcheap.runs.folder import make_folder
from odcheap.runs.settings import RunConfig
from odcheap.runs.sweep import (
    SweepFolder,
    check_runs,
    check_sweep_folder,
    describe_best,
    find_search,
    name_status_command,
    plan_sweep,
    started_sweeps,
    write_plan,
)
from odcheap.utils.console import console, keep_going_without_output, print_error, say
from odcheap.utils.errors import Failure, OptionError
from odcheap.utils.parts import find_conf_dir
from odcheap.utils.signals import exit_on_signals


def main(arguments: Sequence[str]) -> int:
    """Runs the command `odcheap train`: a training, or with `-m` a sweep of several trainings.

    Args:
        arguments: Options such as `num_stu=4`; `-m` for a sweep; `--config-dir DIR` for a directory with YAML files of
            the user's own block types, methods and other parts; `--help`.

    Returns:
        The exit status: 0; 1 if the run, or a run of the sweep, has failed; or 128 + the number of a signal that
        stopped it.
    """
    if {"-h", "--help"} & set(arguments):
        print(format_help(arguments, compose.find_config_dirs(arguments)), end="")
        return 0
    conf = find_conf_dir()
    try:
        check_arguments(arguments)
        sys.argv[1:] = prepare_arguments(arguments, conf)  # where Hydra reads them
        check_single_values(sys.argv[1:])
    except Failure as error:
        return print_error(str(error))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise its errors and not exit
    started_sweeps.clear()
    exit_status = 0
    with keep_going_without_output():
        try:
            check_choices(sys.argv[1:], compose.list_groups(compose.find_config_dirs(arguments)))
            hydra.main(version_base="1.3", config_path=str(conf), config_name="config")(run_job)()
        except OptionError as error:
            exit_status = print_error(str(error))
        except (HydraException, OmegaConfBaseException) as error:
            return print_error(describe_hydra_error(error))
        except KeyboardInterrupt:  # in a launcher that starts its runs in other processes
            exit_status = 130
        except SystemExit as stop:
            if not started_sweeps or not isinstance(stop.code, int) or stop.code <= 128:
                raise
            exit_status = stop.code  # a signal has stopped a run
        except Exception as error:  # from a launcher or a sweeper, since `run_job` handles the errors of runs
            if not started_sweeps:
                raise
            if not any(sweep.signals.received for sweep in started_sweeps):
                cause = f"{type(error).__name__}: {error}"
                exit_status = print_error(f"the sweep ended early; the same command continues it: {cause}")
        finally:
            for sweep in started_sweeps:
                sweep.signals.restore()
        for sweep in started_sweeps:
            exit_status = 128 + sweep.signals.received if sweep.signals.received else exit_status
        if exit_status > 128:
            return report_interruption(exit_status)
        return show_outcomes() or exit_status


def run_job(cfg: DictConfig) -> Any:
    """Checks the options of one run and carries it out. Hydra calls this function for each run of a sweep, or once.

    Args:
        cfg: The config of the run.

    Returns:
        The top-1 accuracy of the selected student on the held-out images, which sweepers such as Optuna maximize; None
        if there is none. If a signal has stopped the run in a process of joblib, an object of the class `Stopped`.
    """
    with exit_on_signals():
        config = RunConfig(cfg, compose.chosen_parts(), compose.given_overrides())
        if not compose.is_sweep():  # in a sweep, the run's folder must say why it failed
            try:
                options.check_added_options(config)
                with compose.unread_precision():
                    options.check_options(config, compose.given_config_dirs(), read_signature)
                    options.check_files(config.cfg)
                    if config.cfg.resume is None:
                        options.check_complete(config.cfg)
            except OptionError as error:
                sys.exit(print_error(str(error)))
            except OmegaConfBaseException as error:
                sys.exit(print_error(describe_hydra_error(error)))
        from odcheap.training import command  # only now, since it takes seconds
    return command.run_job(config)


def report_interruption(exit_status: int) -> int:
    """Prints how to continue a sweep that a signal has stopped, and returns `exit_status` unchanged."""
    if not started_sweeps:
        return print_error("interrupted") and exit_status
    for sweep in started_sweeps:
        say(f"the sweep was stopped; the same command continues it; {name_status_command(sweep.path)} lists its runs")
    return exit_status


def show_outcomes() -> int:
    """Prints a table of the runs of the sweep that has ended; returns the exit status, 1 if a run failed."""
    outcomes = [outcome for sweep in started_sweeps for outcome in sweep.read_outcomes()]
    searches = [(sweep.path, sweep.search) for sweep in started_sweeps if sweep.search is not None]
    if outcomes:
        from odcheap.report.tables import show_sweep

        show_sweep(console(), outcomes, is_search=bool(searches))
    for sweep in started_sweeps:
        if sweep.count_others:
            runs = f"{sweep.count_others} run{'s' if sweep.count_others > 1 else ''} of other sweeps"
            say(f"also in this folder: {runs} ({name_status_command(sweep.path)} lists them)")
    for folder, overrides in searches:
        say(describe_best(folder, overrides) or "no trial is complete")
    return int(any(outcome.summary is None for outcome in outcomes))


class SweepStart(Callback):
    """A callback of Hydra that prepares a sweep before its first run.

    It checks the options of all runs, writes a list of the runs (the plan) into the folder of the sweep, and prints
    the path of that folder.
    """

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
        started_sweeps.append(SweepFolder(folder, find_search(config), plan.runs))
        if "joblib" in str(config.hydra.launcher.get("_target_")) and config.hydra.launcher.get("n_jobs") != 1:
            started_sweeps[-1].signals.install()
        done = f" ({plan.done} are finished)" if plan.done else ""
        say(f"sweep of {plan.count} runs in {folder}{done}; its progress: {name_status_command(folder)}")
