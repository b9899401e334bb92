"""The command line: `odcheap train | export | predict | report | bench`."""

import importlib
import sys
from collections.abc import Sequence

from odcheap.utils.signals import exit_on_signals

HELP = """usage: odcheap COMMAND [ARGUMENTS]

commands (odcheap COMMAND --help shows the arguments):
  train    train students and teacher, or a sweep with -m: odcheap train block_type=DW num_stu=4
  export   write a run's student as files for a device: odcheap export JOB_DIR
  predict  classify images with an export: odcheap predict EXPORT IMAGE...
  report   compare runs, in a table and figures: odcheap report DIR...
  bench    measure the speed of training and inference on this machine
"""
COMMANDS = {
    "export": "odcheap.export.command",
    "predict": "odcheap.predict",
    "report": "odcheap.report.command",
    "bench": "odcheap.bench.command",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: The command's name and its arguments; None means those of this process.

    Returns:
        The exit status.
    """
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if name == "train":
        return train(rest)
    if name not in COMMANDS:
        known = ", ".join(["train", *COMMANDS])
        print(f"error: {name!r}: unknown command; must be one of {known}", file=sys.stderr)
        return 1
    try:
        with exit_on_signals():  # imported here, so that each command starts without the packages of the others
            command = importlib.import_module(COMMANDS[name])
        return command.main(rest)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130


def train(arguments: Sequence[str]) -> int:
    """Runs `odcheap train` and returns the exit status."""
    with exit_on_signals():
        from odcheap.runs.sweep import Outcome
        from odcheap.training import command
        from odcheap.utils.console import console, keep_going_without_output

        def show(outcomes: list[Outcome]) -> None:
            from odcheap.report.console_tables import show_sweep

            show_sweep(console(), outcomes)

        with keep_going_without_output():
            return command.main(arguments, show)
