"""The command `odcheap train`: carries out one run, which may be one of a sweep."""

import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from multiprocessing import current_process
from pathlib import Path
from typing import Any

from torch import nn

from odcheap.config import compose, options
from odcheap.config.messages import (
    describe_error,
    explained_errors,
    hide_library_warnings,
)
from odcheap.distributed import cluster, launch
from odcheap.distributed.signals import SignalListener, Stopped, report_stop
from odcheap.models.build import build_network, check_state_dict
from odcheap.models.exportable import find_export_problem
from odcheap.runs import status
from odcheap.runs.folder import SUMMARY, TEST, check_usable, make_folder, read_summary
from odcheap.runs.resume import Start, claim_folder, plan_start
from odcheap.runs.settings import RunConfig, override_key, select_student_settings
from odcheap.runs.sweep import Outcome, name_position, started_sweeps
from odcheap.training.experiment import Experiment
from odcheap.training.student_networks import check_finished
from odcheap.training.summary import PARTS
from odcheap.utils.console import name_command, prefix_lines, print_error, say
from odcheap.utils.errors import OptionError, describe_external_failure, first_line
from odcheap.utils.files import read_json
from odcheap.utils.parts import is_own_part, use_config_dirs
from odcheap.utils.performance import keep_freed_memory
from odcheap.utils.signals import find_parent, stop_with_parent

stopped_runs: list[Stopped] = []  # the run that a signal has stopped, if this is a process of joblib


def run_job(config: RunConfig) -> float | Stopped | None:
    """Carries out one run, which may be one of a sweep; this is the function that Hydra calls.

    Returns:
        The top-1 accuracy of the selected student on the held-out images, which sweepers such as Optuna maximize. None
        if the run has no such accuracy. If a signal has stopped a run in a process of joblib, the exception `Stopped`
        is returned and not raised.
    """
    hide_library_warnings()
    keep_freed_memory()
    if not compose.is_sweep():
        return carry_out_run(config)
    name, position = name_position(*compose.sweep_position())
    if current_process().name == "MainProcess":
        say(f"{position}: {name}")
        return carry_out_run(config)
    if stopped_runs:  # joblib gives each process one run after another
        return stopped_runs[0]
    with prefix_lines(f"[{name}] "):
        say(position)
        try:
            return carry_out_run(config)
        except Stopped as stop:
            stopped_runs.append(stop.with_traceback(None))  # whose frames would keep the networks in memory
            return stop


def carry_out_run(config: RunConfig) -> float | None:
    """Carries out one run, alone or in a sweep, and handles signals while it runs.

    Returns:
        The top-1 accuracy of the selected student on the held-out images; None if the run has no such accuracy.
    """
    # A process that joblib or torchrun started would otherwise go on for hours after its parent has died.
    in_worker = current_process().name != "MainProcess" or cluster.is_torchrun()
    with SignalListener() as listener, stop_with_parent(find_parent()) if in_worker else nullcontext():
        if compose.is_sweep():
            outcome = run_in_sweep(lambda: train(config, listener))
        else:
            outcome = run_alone(lambda: train(config, listener))
            if outcome.text == "finished" and not config.cfg.test_only and not cluster.is_torchrun():
                for line in describe_next_steps(outcome.job_dir, compose.given_config_dirs()):
                    say(line)
    return ((outcome.summary or {}).get("selected") or {}).get("val_top1")


def describe_next_steps(job_dir: str, config_dirs: Sequence[Path] = ()) -> list[str]:
    """Returns lines of text with the commands that a user may want after a training.

    Args:
        job_dir: The run's folder.
        config_dirs: The user's own `conf` directories.
    """
    folder, export = shlex.quote(job_dir), shlex.quote(str(Path(job_dir) / "export"))
    own = "".join(f" --config-dir {shlex.quote(str(path))}" for path in config_dirs)
    measure = {"measure it on other images": f"{name_command('evaluate')} {folder} FOLDER{own}"}
    compare = {"compare runs": f"{name_command('report')} {folder} OTHER...{own}"}
    if (Path(job_dir) / "export").exists():  # written before the run had finished, or by the run that it overwrites
        opening = [f"{job_dir}/export was written before this training ended", "next:"]
        lines = {"replace that export": f"{name_command('export')} {folder} --overwrite{own}", **measure, **compare}
    else:
        opening = ["next:"]
        lines = {
            "export the student": f"{name_command('export')} {folder}{own}",
            "classify images with it": f"{name_command('predict')} {export} IMAGE...",
            **measure,
            **compare,
        }
    return [*opening, *(f"  {what + ':':28}{command}" for what, command in lines.items())]


def run_alone(job: Callable[[], Outcome]) -> Outcome:
    """Calls `job`, which carries out one run, and returns the outcome of the run.

    If an error can be explained in one line, such as a wrong option or a full disk, this line is printed and the
    process ends with exit status 1. Any other error is raised.
    """
    try:
        return job()
    except explained_errors() as error:
        sys.exit(print_error(describe_error(error)))
    except Exception as error:
        line = describe_external_failure(error)
        if line is None:
            raise
        sys.exit(print_error(line, every_rank=True))


def run_in_sweep(job: Callable[[], Outcome]) -> Outcome:
    """Calls `job`, which carries out one run of a sweep, and returns the outcome of the run.

    No error is raised, so that the sweep continues with its next run. The error is printed and written to the run's
    `status.json`, and the outcome says that the run failed.
    """
    job_dir = Path(compose.default_job_dir())
    try:
        return job()
    except explained_errors() as error:
        line = describe_error(error)
        print_error(line)
    except Exception as error:
        line = describe_external_failure(error)
        if line is None:
            line = f"{type(error).__name__}: {first_line(error)}"
            traceback.print_exc()
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
    """Checks the options of a run, decides whether it is new or continues from a checkpoint, and carries it out.

    Args:
        config: The config of the run.
        listener: The listener that receives signals.

    Returns:
        The outcome: the run's folder, how the run ended, and the content of its `summary.json`.
    """
    in_sweep, config_dirs = compose.is_sweep(), compose.given_config_dirs()

    def compose_checked(overrides: Sequence[str]) -> RunConfig:
        composed = compose.compose_run(overrides)
        options.check_options(composed, config_dirs)
        return composed

    with use_config_dirs(config_dirs):  # a teacher may have parts of the user too
        # The checks come first: an error must not leave a folder behind.
        options.check_added_options(config)
        options.check_options(config, config_dirs)
        launch.check_trainer(config.cfg, config.parts["trainer"], in_sweep)
        launch.limit_threads()
        default_resume = "auto" if in_sweep or cluster.is_restarted() else None
        start = plan_start(config, compose_checked, default_resume, cluster.is_restarted())
        if start.is_finished:
            check_finished(start)
            say(f"{start.job_dir} holds this run, which is finished: nothing to do")
            return Outcome(str(start.job_dir), "was finished", read_summary(start.job_dir))
        if start.cfg.test_only:
            return carry_out(start, listener)
        loggers = [o for o in start.config.overrides if override_key(o).split(".")[0] == "logger"]
        with report_stop(start.job_dir, listener, not start.cfg.overwrite, repeated=loggers):
            return carry_out(start, listener)


def report_own_parts(experiment: Experiment) -> None:
    """Prints warnings about parts of the config, such as `block_type/mine.yaml` in the user's own `conf` directory.

    There is a warning if a student that is built from such a file cannot be exported. There is another if the file is
    not used because odcheap has a file of the same name.
    """
    start, config_dirs = experiment.start, compose.given_config_dirs()
    parts = start.config.parts
    for folder in config_dirs:
        for group, name in parts.items():
            if (folder / group / f"{name}.yaml").is_file() and not is_own_part(group, name):
                say(f"warning: {folder / group / name}.yaml is not used: odcheap has a {group} of this name")
    tried = []
    for number, student in enumerate(experiment.method.students.members):
        settings = select_student_settings(experiment.module.about, number)
        network = {group: settings[group] for group in PARTS}
        names = {group: network[group]["part"] for group in PARTS if is_own_part(group, network[group]["part"])}
        if names and network not in tried:
            tried.append(network)
            problem = find_problem(experiment, student, settings, list(names))
            shown = ", ".join(f"{group}={part}" for group, part in names.items())
            if problem is not None:
                say(f"warning: {shown}: this network can be trained but not exported ({problem})")


def find_problem(
    experiment: Experiment, student: nn.Module, settings: dict[str, Any], own: Sequence[str]
) -> str | None:
    """Returns why a student with a backbone or block type of the user cannot be exported; None if it can be exported.

    Args:
        experiment: The run.
        student: The student.
        settings: The settings from which the student is built, a dict with the keys of `StudentSettings`.
        own: What the user has defined: "backbone", "block_type" (the kind of cheap convolution) or both.
    """
    part = settings[own[0]]["part"]
    try:
        same = build_network(settings, own[0], part)
        check_state_dict(student.state_dict(), same.state_dict(), part, "built again, it differs", own[0])
        return find_export_problem(student, experiment.data.image_size, whole="backbone" in own)
    except OptionError as error:
        return str(error)


def carry_out(start: Start, listener: SignalListener) -> Outcome:
    """Builds a run and carries it out, in this process or in several new processes.

    Args:
        start: The run's config and folder, and the checkpoint from which it continues, if there is one.
        listener: The listener that receives signals.

    Returns:
        The outcome: the run's folder, how the run ended, and the content of its `summary.json` or `test.json`.
    """
    # The experiment is built here in any case, so that errors are printed once.
    options.check_complete(start.cfg)
    experiment = Experiment.build(start, listener)
    if not start.cfg.test_only and start.checkpoint is None and not cluster.is_torchrun():
        report_own_parts(experiment)
    if launch.needs_launch(start.cfg):
        experiment.build_trainer()  # an error of Lightning is printed once here, and not by each new process
        make_folder(start.job_dir)
        if not start.cfg.test_only:
            with status.lock_folder(start.job_dir):  # the first of the new processes takes it then
                claim_folder(start)
        launch.launch_processes(start, compose.given_config_dirs(), listener)
        result = start.job_dir / (TEST if start.cfg.test_only else SUMMARY)
        return Outcome(str(start.job_dir), "finished", read_json(result, "job_dir"))
    summary = experiment.run_test_only() if start.cfg.test_only else experiment.run()
    return Outcome(str(start.job_dir), "finished", summary)
