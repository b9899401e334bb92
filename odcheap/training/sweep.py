"""Sweeps: each run leaves word of how it ended, wherever it ran, and the tables at the end are made of that."""

import json
import os
import shutil
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table
from rich.text import Text

from odcheap.report import statistics
from odcheap.report.statistics import Spread, mean_student, selected_student
from odcheap.runs import resume, status
from odcheap.utils.files import write_text
from odcheap.utils.text import (
    escape_control_chars,
    format_accuracy,
    format_count,
    format_mean_deviation,
    format_millions,
)

WORDS = "ODCHEAP_SWEEP_WORDS"  # names the folder of this sweep's words to its runs in other processes


@dataclass(frozen=True)
class Outcome:
    """How a run ended; `summary` where it has one."""

    job_dir: str
    text: str
    summary: dict[str, Any] | None


ended: list[Outcome] = []  # of the sweep that this process has led, in the order of its runs


class Gather(Callback):
    """Hydra's hook around a sweep, in the process that leads it, whatever launches the runs."""

    def on_multirun_start(self, config: DictConfig, config_name: str | None = None) -> None:
        ended.clear()
        sweep = Path(config.hydra.sweep.dir)
        clear_words_of_the_dead(sweep)
        words = sweep / f".words-{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
        words.mkdir(parents=True)
        os.environ[WORDS] = str(words.absolute())
        where = config.hydra.sweep.dir
        print(
            f"sweep in {escape_control_chars(where)}; how it goes: python -m odcheap.report --status {escape_control_chars(where)}",
            flush=True,
        )

    def on_multirun_end(self, config: DictConfig, config_name: str | None = None) -> None:
        gather()


def clear_words_of_the_dead(sweep: Path) -> None:
    for words in sweep.glob(".words-*"):
        host, pid, _ = words.name.removeprefix(".words-").rsplit("-", 2)
        if not status.alive({"host": host, "pid": pid}):
            shutil.rmtree(words, ignore_errors=True)


def gather() -> bool:
    """Takes in what the runs have left, once; whether this process leads a sweep."""
    if WORDS not in os.environ:
        return False
    words = Path(os.environ.pop(WORDS))
    ended.extend(Outcome(**json.loads(path.read_text())) for path in sorted(words.glob("*.json")))
    shutil.rmtree(words, ignore_errors=True)
    return True


def leave_word(outcome: Outcome) -> None:
    """In the first process of a run of a sweep: tells the process that leads it, where that is there still."""
    words = Path(os.environ.get(WORDS, "nowhere"))
    if rank_zero_only.rank in (0, None) and words.is_dir():
        write_text(words / f"{HydraConfig.get().job.num:06d}.json", json.dumps(asdict(outcome)))


def show(console: Console, outcomes: list[Outcome]) -> None:
    """What became of the runs, and what their methods bring."""
    console.print(table(outcomes))
    compared = statistics.rows(finished_runs(outcomes))
    if any(len(row.by_seed) > 1 for row in compared) or len({row.method for row in compared}) > 1:
        console.print(methods_table(compared))


def finished_runs(outcomes: list[Outcome]) -> list[statistics.Finished]:
    """The runs that have a summary of their training, with their options as they were."""
    found = [(o.summary, Path(o.job_dir) / "config.yaml") for o in outcomes if o.summary and "last" in o.summary]
    return [statistics.Finished(resume.options_of(path), summary) for summary, path in found if path.is_file()]


def short_names(names: list[str]) -> list[str]:
    """Without the overrides that all runs share."""
    parts = [name.split(",") for name in names]
    shared = set.intersection(*map(set, parts)) if len(parts) > 1 else set()
    return [
        ",".join(part for part in mine if part not in shared) or name for mine, name in zip(parts, names, strict=True)
    ]


def table(outcomes: list[Outcome]) -> Table:
    """A row a run: its name, how it ended, its summary where it has one."""
    made = Table(title="sweep", title_justify="left")
    for column in ("run", "outcome", "val top-1", "test top-1", "teacher test", "parameters", "MACs"):
        made.add_column(column, justify="left" if column in ("run", "outcome") else "right", overflow="fold")
    for name, outcome in zip(short_names([Path(o.job_dir).name for o in outcomes]), outcomes, strict=True):
        summary = outcome.summary
        if summary is None:
            made.add_row(Text(escape_control_chars(name)), Text(escape_control_chars(outcome.text)), *["-"] * 5)
            continue
        teacher = (summary["teacher"] or {}).get("test_top1")
        figures = [format_accuracy(summary["selected"][f]) for f in ("val_top1", "test_top1")]
        spent = summary.get("cost")  # a test alone has none
        price = [format_count(spent["params"]), format_millions(spent["macs"])] if spent else ["-", "-"]
        made.add_row(
            Text(escape_control_chars(name)),
            Text(escape_control_chars(outcome.text)),
            *figures,
            format_accuracy(teacher),
            *price,
        )
    return made


def methods_table(compared: list[statistics.Row]) -> Table:
    """Each method's test top-1 and its gain over `alone`, paired by seed: means and sample deviations."""
    title = (
        "test top-1, mean ± deviation over seeds; gain over alone, seed by seed\n"
        "mean student: of all students after the last epoch, nothing picked; selected: the one that each run chose"
    )
    made = Table(title=title, title_justify="left", title_style="")
    words = ["setting"] * any(row.setting for row in compared) + ["method"]
    for column in (*words, "seeds", "mean student", "gain", "selected", "gain"):
        made.add_column(column, justify="left" if column in words else "right", overflow="fold")
    for row in compared:
        found = ((row.of(f), row.gain(f)) for f in (mean_student, selected_student))
        figures = [text for value, gain in found for text in (format_spread(value), format_spread(gain, "+"))]
        made.add_row(*(Text(getattr(row, word)) for word in words), str(len(row.by_seed)), *figures)
    return made


def format_spread(spread: Spread | None, sign: str = "") -> str:
    return "-" if spread is None else format_mean_deviation(spread.mean, spread.deviation, sign)
