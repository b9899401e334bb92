"""The command `odcheap train`: one run, or a sweep with `-m`."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from multiprocessing import current_process
from pathlib import Path

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from odcheap.config import options, resolvers
from odcheap.config.messages import (
    EXPLAINED_ERRORS,
    describe_error,
    describe_hydra_error,
    hide_library_warnings,
    list_groups,
)
from odcheap.distributed import launch, slurm
from odcheap.distributed.signals import SignalListener, report_stop
from odcheap.runs import status
from odcheap.runs.folder import SUMMARY, TEST, check_usable, make_folder, read_summary
from odcheap.runs.overrides import quote_override
from odcheap.runs.resume import Start, claim_folder, plan_start
from odcheap.runs.settings import RunConfig
from odcheap.runs.sweep import Outcome, started_sweeps
from odcheap.training.experiment import Experiment, check_finished
from odcheap.training.optim import build_optimizer, build_scheduler
from odcheap.utils.console import print_error, say
from odcheap.utils.documents import read_json
from odcheap.utils.errors import OptionError, describe_external_failure, first_line
from odcheap.utils.parts import find_conf_dir
from odcheap.utils.signals import find_parent, stop_with_parent

# The functions that build the parts of these groups, whose arguments are options of every part.
BUILDERS = {"optimizer": build_optimizer, "scheduler": build_scheduler}


def main(arguments: Sequence[str], show_sweep: Callable[[list[Outcome]], None]) -> int:
    """Runs the command.

    Args:
        arguments: Options, `-m` for a sweep, `--config-dir DIR` for parts of the user's own, and `--help`.
        show_sweep: A function that prints the tables at the end of a sweep.

    Returns:
        The exit status: 1 if the run, or one of a sweep's runs, failed.
    """
    conf = find_conf_dir()
    sys.argv[1:] = prepare_arguments(arguments, conf)  # where Hydra reads them
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise its errors and not exit
    started_sweeps.clear()
    exit_status = 0
    try:
        options.check_choices(sys.argv[1:], list_groups(find_config_dirs(arguments)))
        hydra.main(version_base="1.3", config_path=str(conf), config_name="config")(run_job)()
    except OptionError as error:
        exit_status = print_error(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        return print_error(describe_hydra_error(error))
    except Exception as error:  # from a launcher or a sweeper, since `run_job` handles the errors of runs
        if not started_sweeps:
            raise
        cause = f"{type(error).__name__}: {error}"
        exit_status = print_error(f"the sweep ended early; the same command continues it: {cause}")
    outcomes = [outcome for sweep in started_sweeps for outcome in sweep.read_outcomes()]
    if outcomes:
        show_sweep(outcomes)
    return exit_status or int(any(outcome.summary is None for outcome in outcomes))


def find_config_dirs(arguments: Sequence[str]) -> list[Path]:
    """Returns a list with the folder given by `--config-dir`, or an empty list."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config-dir", "-cd", type=Path)
    folder = parser.parse_known_args(list(arguments))[0].config_dir
    return [folder] if folder else []


def prepare_arguments(arguments: Sequence[str], conf: Path) -> list[str]:
    """Returns the arguments as Hydra needs them. A sweep over `data_dir` has it in the names of its runs."""
    is_sweep = any(argument in ("-m", "--multirun") for argument in arguments)
    prepared = [split_paths(argument) if is_sweep else None for argument in arguments]
    result = [sweep or prepare_argument(argument, conf) for argument, sweep in zip(arguments, prepared, strict=True)]
    sweeps_data = any(a.startswith("data_dir=") and is_choice(b) for a, b in zip(arguments, result, strict=True))
    has_name = any(argument.startswith("hydra.sweep.subdir=") for argument in arguments)
    names = ["hydra.sweep.subdir='${run_name:data_dir}'"]
    return result + names if is_sweep and sweeps_data and not has_name else result


def is_choice(override: str) -> bool:
    """Returns whether Hydra reads the value of an override as several values of a sweep."""
    try:
        return isinstance(OverridesParser.create().parse_override(override).value(), ChoiceSweep)
    except HydraException:  # Hydra says later what is wrong
        return False


def split_paths(argument: str) -> str | None:
    """Returns a path option with several values as Hydra reads a sweep, each value in quotes; None for one value.

    A path that exists is one path, also with commas in its name. Of the other path options than `data_dir`, each of
    the values must exist, since names of runs have commas.
    """
    key, _, text = argument.partition("=")
    values = text.split(",")
    if key in ("job_dir", "resume") or not options.is_path_option(argument) or len(values) < 2 or not all(values):
        return None
    if text[0] in "'\"[{" or Path(text).exists() or not (key == "data_dir" or all(map(os.path.exists, values))):
        return None
    return f"{key}={','.join(quote_override(f'{key}={value}').partition('=')[2] for value in values)}"


def prepare_argument(argument: str, conf: Path) -> str:
    """Returns an argument as Hydra needs it.

    Paths are quoted. Launchers and sweepers are replaced by odcheap's own files for them: `hydra/launcher=joblib`
    becomes `hydra/launcher=joblib_sweep`, a file that changes some defaults of the plugin's `joblib`.
    """
    if options.is_path_option(argument):
        return quote_override(argument)
    has_own_file = argument.startswith("hydra/") and (conf / f"{argument.replace('=', '/')}_sweep.yaml").is_file()
    return f"{argument}_sweep" if has_own_file else argument


def run_job(cfg: DictConfig) -> float | None:
    """Carries out one run, alone or in a sweep. Returns the selected student's held-out accuracy, for sweepers."""
    hide_library_warnings()
    config = RunConfig(cfg, resolvers.chosen_parts(), resolvers.given_overrides())
    # A process that joblib or torchrun started would otherwise go on for hours after its parent has died.
    in_worker = current_process().name != "MainProcess" or launch.is_torchrun()
    with SignalListener() as listener, stop_with_parent(find_parent()) if in_worker else nullcontext():
        if resolvers.is_sweep():
            outcome = run_in_sweep(lambda: train(config, listener))
        else:
            outcome = run_alone(lambda: train(config, listener))
    return ((outcome.summary or {}).get("selected") or {}).get("val_top1")


def run_alone(job: Callable[[], Outcome]) -> Outcome:
    """Runs the job. An error that can be explained ends the process with one line and exit status 1."""
    try:
        return job()
    except EXPLAINED_ERRORS as error:
        sys.exit(print_error(describe_error(error)))
    except Exception as error:
        line = describe_external_failure(error)
        if line is None:
            raise
        sys.exit(print_error(line, every_rank=True))


def run_in_sweep(job: Callable[[], Outcome]) -> Outcome:
    """Runs the job and returns its outcome.

    An error is printed and written to the run's `status.json`; the sweep goes on with a failed outcome.
    """
    job_dir = Path(resolvers.default_job_dir())
    try:
        return job()
    except EXPLAINED_ERRORS as error:
        line = describe_error(error)
        print_error(line)
    except Exception as error:
        line = describe_external_failure(error) or f"{type(error).__name__}: {first_line(error)}"
        traceback.print_exc() if describe_external_failure(error) is None else None
    outcome = Outcome(str(job_dir), f"failed: {line}", None)
    try:
        check_usable(job_dir)
        make_folder(job_dir)
        with status.lock_folder(job_dir):
            status.write_status(job_dir, "failed", line)
    # The failure may be that the folder cannot be written, or that another process trains in it.
    except (OptionError, OSError):
        for sweep in started_sweeps:
            sweep.unwritten.append(outcome)
    return outcome


def train(config: RunConfig, listener: SignalListener) -> Outcome:
    """Checks the options, decides whether the run continues an older one, and carries it out."""
    in_sweep = resolvers.is_sweep()
    config_dirs = resolvers.given_config_dirs()

    def compose(overrides: Sequence[str]) -> RunConfig:
        composed = options.compose(overrides)
        options.check_options(composed, config_dirs, BUILDERS)
        return composed

    options.check_options(config, config_dirs, BUILDERS)
    launch.check_trainer(config.cfg, config.parts["trainer"], in_sweep)
    launch.limit_threads()
    default_resume = "auto" if in_sweep or slurm.is_restarted() else None
    start = plan_start(config, compose, default_resume, slurm.is_restarted())
    if start.is_finished:
        check_finished(start)
        say(f"{start.job_dir} holds this run, which is finished: nothing to do")
        return Outcome(str(start.job_dir), "was finished", read_summary(start.job_dir))
    if start.cfg.test_only:
        return carry_out(start, listener)
    with report_stop(start.job_dir, listener, may_requeue=not start.cfg.overwrite):
        return carry_out(start, listener)


def carry_out(start: Start, listener: SignalListener) -> Outcome:
    """Builds the run and carries it out, in this process or in several new ones."""
    options.check_complete(start.cfg)
    experiment = Experiment.build(start, listener)
    if launch.needs_launch(start.cfg):
        experiment.build_trainer()  # an error of Lightning is printed once here, and not by each new process
        make_folder(start.job_dir)
        if not start.cfg.test_only:
            with status.lock_folder(start.job_dir):  # the first of the new processes takes it then
                claim_folder(start)
        launch.launch_processes(start, resolvers.given_config_dirs(), listener)
        result = start.job_dir / (TEST if start.cfg.test_only else SUMMARY)
        return Outcome(str(start.job_dir), "finished", read_json(result, "job_dir"))
    summary = experiment.run_test_only() if start.cfg.test_only else experiment.run()
    return Outcome(str(start.job_dir), "finished", summary)
