"""The command line: `odcheap train | evaluate | export | predict | demo | push | report | bench`."""

import importlib
import sys
from collections.abc import Sequence

from odcheap.utils.performance import shorten_waiting
from odcheap.utils.signals import exit_on_signals

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
    "train": "odcheap.train_command",
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
    """Runs a command of odcheap, such as `odcheap train`.

    Args:
        arguments: The name of the command and its arguments; None to take `sys.argv[1:]`.

    Returns:
        The exit status: 0 after success, 1 after an error, or 128 + the number of a signal that stopped the command.
    """
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(HELP, end="")
        return 0
    shorten_waiting()
    if name not in COMMANDS:
        print(f"error: {name!r}: unknown command; must be one of {', '.join(COMMANDS)}", file=sys.stderr)
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
