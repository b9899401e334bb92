"""The command line: `odcheap train | evaluate | export | predict | demo | push | report | bench`."""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from odcheap.utils.signals import exit_on_signals
from odcheap.utils.threads import shorten_waiting

if TYPE_CHECKING:
    from omegaconf import DictConfig

HELP = """usage: odcheap COMMAND [ARGUMENTS]

commands (odcheap COMMAND --help shows the arguments):
  train    train students and teacher, or a sweep with -m: odcheap train block_type=DW num_stu=4
  evaluate accuracy of a run's student, or of an export, on other images: odcheap evaluate JOB_DIR FOLDER
  export   write a run's student as files for a device: odcheap export JOB_DIR
  predict  classify images with an export: odcheap predict EXPORT IMAGE...
  demo     show a local web page that classifies images with an export: odcheap demo EXPORT
  push     upload an export to the Hugging Face Hub: odcheap push EXPORT user/name
  report   compare runs, in a table and figures: odcheap report DIR...
  bench    measure the speed of training and inference on this machine
"""
COMMANDS = {
    "evaluate": "odcheap.evaluate.command",
    "export": "odcheap.export.command",
    "predict": "odcheap.predict",
    "demo": "odcheap.demo",
    "push": "odcheap.push",
    "report": "odcheap.report.command",
    "bench": "odcheap.bench.command",
}

SLOW_COMMANDS = ("evaluate", "export", "bench")  # their arguments are checked before PyTorch is imported


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command of odcheap.

    Args:
        arguments: The name of the command and its arguments; None for those of this process.

    Returns:
        The exit status: 0, 1 after an error, or 128 + the number of a signal.
    """
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(HELP, end="")
        return 0
    shorten_waiting()
    if name == "train":
        return train(rest)
    if name not in COMMANDS:
        known = ", ".join(["train", *COMMANDS])
        print(f"error: {name!r}: unknown command; must be one of {known}", file=sys.stderr)
        return 1
    try:
        with exit_on_signals():  # imported here, so that each command starts without the packages of the others
            if name in SLOW_COMMANDS:
                importlib.import_module(f"odcheap.{name}.arguments").parse_arguments(rest)
            command = importlib.import_module(COMMANDS[name])
        return command.main(rest)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130


def train(arguments: Sequence[str]) -> int:
    """Runs `odcheap train`.

    Args:
        arguments: Options such as `num_stu=4`; `-m` for a sweep; `--config-dir DIR` for a directory with YAML files of
            the user's own block types, methods and other parts; `--help`.

    Returns:
        The exit status: 1 if the run, or one of a sweep's runs, failed.
    """
    # PyTorch and Lightning are imported by `run_job`, so that `--help` and a refused option are answered without them.
    with exit_on_signals():
        import hydra
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException

        from odcheap.config import options
        from odcheap.config.command_line import (
            check_arguments,
            check_single_values,
            find_config_dirs,
            prepare_arguments,
        )
        from odcheap.config.messages import describe_hydra_error, list_groups
        from odcheap.runs.sweep import started_sweeps
        from odcheap.utils.console import keep_going_without_output, print_error
        from odcheap.utils.errors import Failure, OptionError
        from odcheap.utils.parts import find_conf_dir

    if {"-h", "--help"} & set(arguments):
        from odcheap.config.help import format_help

        print(format_help(arguments, find_config_dirs(arguments)), end="")
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
            options.check_choices(sys.argv[1:], list_groups(find_config_dirs(arguments)))
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


def run_job(cfg: "DictConfig") -> Any:
    """Carries out one run; Hydra calls this function for each run.

    Args:
        cfg: The config of the run.

    Returns:
        The top-1 accuracy of the selected student on the held-out images, which sweepers such as Optuna maximize; None
        if there is none. `Stopped` if a signal has stopped the run in a process of joblib.
    """
    # Options are checked before PyTorch and Lightning are imported, which takes seconds.
    with exit_on_signals():
        from omegaconf.errors import OmegaConfBaseException

        from odcheap.config import options, resolvers
        from odcheap.config.messages import describe_hydra_error
        from odcheap.config.signatures import read_signature
        from odcheap.distributed import cluster  # noqa: F401 - registers values of the config
        from odcheap.runs.settings import RunConfig
        from odcheap.utils.console import print_error
        from odcheap.utils.errors import OptionError

        config = RunConfig(cfg, resolvers.chosen_parts(), resolvers.given_overrides())
        if not resolvers.is_sweep():  # in a sweep, the run's folder must say why it failed
            try:
                options.check_added_options(config)
                with resolvers.unread_precision():
                    options.check_options(config, resolvers.given_config_dirs(), read_signature)
                    options.check_files(config.cfg)
                    if config.cfg.resume is None:
                        options.check_complete(config.cfg)
            except OptionError as error:
                sys.exit(print_error(str(error)))
            except OmegaConfBaseException as error:
                sys.exit(print_error(describe_hydra_error(error)))
        from odcheap.training import command
    return command.run_job(config)


def report_interruption(exit_status: int) -> int:
    """Prints how to continue a sweep that a signal has stopped; returns the exit status that it is given."""
    from odcheap.runs.sweep import name_status_command, started_sweeps
    from odcheap.utils.console import print_error, say

    if not started_sweeps:
        return print_error("interrupted") and exit_status
    for sweep in started_sweeps:
        say(f"the sweep was stopped; the same command continues it; {name_status_command(sweep.path)} lists its runs")
    return exit_status


def show_outcomes() -> int:
    """Prints a table of the runs of a sweep that has ended; returns the exit status: 1 if a run failed, otherwise 0."""
    from odcheap.runs import study
    from odcheap.runs.sweep import name_status_command, started_sweeps
    from odcheap.utils.console import console, say

    outcomes = [outcome for sweep in started_sweeps for outcome in sweep.read_outcomes()]
    searches = [(sweep.path, sweep.search) for sweep in started_sweeps if sweep.search is not None]
    if outcomes:
        from odcheap.report.console_tables import show_sweep

        show_sweep(console(), outcomes, is_search=bool(searches))
    for sweep in started_sweeps:
        if sweep.count_others:
            runs = f"{sweep.count_others} run{'s' if sweep.count_others > 1 else ''} of other sweeps"
            say(f"also in this folder: {runs} ({name_status_command(sweep.path)} lists them)")
    for folder, overrides in searches:
        say(study.describe_best(folder, overrides) or "no trial is complete")
    return int(any(outcome.summary is None for outcome in outcomes))
