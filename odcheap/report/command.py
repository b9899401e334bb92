"""Compares finished runs and sweeps in a table and in figures.

The report is written to DIR/report: report.md, report.csv, and figures as PNG, SVG and PDF. Runs that differ in the
seed only become one row; gains over method=alone are paired by seed.

  odcheap report runs/sweep                 the report of all runs below runs/sweep
  odcheap report --status runs/sweep        which runs are finished, running or failed
  odcheap report --costs                    parameters and MACs of every backbone with every block type
  odcheap report --costs backbone=resnet56  the same of one backbone
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from odcheap.config.messages import describe_error
from odcheap.report.load_runs import RunFolder, list_planned_runs, load_runs
from odcheap.report.tables import build_console_table, shorten_names
from odcheap.utils.console import console, print_error
from odcheap.utils.errors import Failure


def main(arguments: Sequence[str] | None = None, prog: str = "odcheap report") -> int:
    """Runs `odcheap report`.

    Args:
        arguments: The command-line arguments; None for those of this process.
        prog: The name of the command in its help.

    Returns:
        The exit status: 0, or 1 after an error, or if `--status` lists a failed run.
    """
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("dirs", nargs="*", metavar="DIR", help="folders of runs or sweeps; with --costs: OPTION=VALUE")
    add("--out", type=Path, help="folder of the report (default: report/ in the first DIR)")
    add("--status", action="store_true", help="only list the runs with their states")
    add("--no-latency", action="store_true", help="do not time the students in ONNX Runtime")
    add("--val", action="store_true", help="figures of the held-out images: to make decisions, not to publish")
    add(
        "--against",
        metavar="METHOD",
        help="gains are over this method, or over this row (default: alone)",
    )
    add("--costs", action="store_true", help="parameters and MACs of networks, without any run")
    more = "folder with configuration files of your own, for networks that odcheap does not have; may be repeated"
    add("--config-dir", type=Path, action="append", default=[], metavar="DIR", help=more)
    options = parser.parse_args(arguments)
    try:
        # The modules that import PyTorch, ONNX Runtime and Matplotlib are imported here: `--status` needs none of them.
        if options.costs:
            from odcheap.report import costs

            return costs.show_costs(options.dirs, options.config_dir)
        if not options.dirs:
            parser.error("name a DIR, or --costs")
        folders = load_runs(options.dirs)
        if options.status:
            return show_status([*folders, *list_planned_runs(options.dirs, folders)])
        from odcheap.report.report_files import write_report

        return write_report(folders, options)
    except (HydraException, OmegaConfBaseException) as error:
        return print_error(describe_error(error))
    except Failure as error:
        return print_error(str(error))


def show_status(folders: list[RunFolder]) -> int:
    """Prints a line with the state of each run, and returns the exit status, 1 if a run has failed, otherwise 0."""
    names, shared = shorten_names([entry.folder for entry in folders])
    rows = [
        {"run": name, "state": entry.state, "details": describe_process(entry)}
        for name, entry in zip(names, folders, strict=True)
    ]
    if shared:
        console().print(f"all runs have {shared}", soft_wrap=True)
    console().print(build_console_table(rows, left=("run", "state", "details")))
    counts = Counter(entry.state for entry in folders)
    console().print(", ".join(f"{count} {state}" for state, count in counts.items()))
    return int("failed" in counts)


def describe_process(entry: RunFolder) -> str:
    """Returns a text that says why a run is in its state, and, if it is running, in which process and where."""
    if entry.state != "running":
        return entry.reason
    return f"{entry.reason}; process {entry.process} on {entry.host}"
