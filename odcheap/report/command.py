"""`python -m odcheap.report DIR...`: runs and sweeps as tables and figures; `--status`; `--costs` of networks."""

import argparse
import csv
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich.table import Table
from rich.text import Text

from odcheap.config.messages import describe_hydra_error
from odcheap.export.model_card import code
from odcheap.report import costs, latency, load_runs, plots, statistics
from odcheap.report.latency import Times
from odcheap.report.load_runs import Found
from odcheap.report.statistics import Row, Spread, cost_of, mean_student, selected_student
from odcheap.utils.console import console, print_error
from odcheap.utils.errors import Failure
from odcheap.utils.files import write_text
from odcheap.utils.text import escape_control_chars

KINDS = ("head", "gated", "mean", "ema", "frozen")
READING = """Top-1 in per cent, mean ± sample deviation over n seeds (none with one). *Mean student*: of all
students after the last epoch, nothing picked; *selected*: the one that was best on held-out images, so for `alone` the
best of independent students. Gains over `{over}` are paired by seed, in percentage points; one smaller than two
standard errors is *not resolved*. Options that most runs share are not named. A PMAC is 10^15 multiply-accumulates.
Milliseconds are of one picture in ONNX Runtime here, the student's and the standard network's. Teachers of different
kinds are not comparable."""
SMOKE = "**digits is a smoke test**: it shows that everything works, and nothing about methods."


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser("python -m odcheap.report", description=__doc__)
    parser.add_argument("dirs", nargs="*", metavar="DIR", help="runs' folders or folders of such; options with --costs")
    parser.add_argument("--out", type=Path, help="where the report goes (default: report/ in the first DIR)")
    parser.add_argument("--status", action="store_true", help="only say which runs are finished, running, failed")
    parser.add_argument("--no-latency", action="store_true", help="do not time the students in ONNX Runtime")
    parser.add_argument(
        "--val", action="store_true", help="figures of the held-out images: to decide by, not to publish"
    )
    parser.add_argument("--against", metavar="ROW", help="gains are over this row, such as od, and not over alone")
    parser.add_argument("--costs", action="store_true", help="what every network of conf/ costs with every block type")
    given = parser.parse_args(arguments)
    try:
        if given.costs:
            return costs.show(given.dirs)
        if not given.dirs:
            parser.error("name a DIR, or --costs")
        found = load_runs.read(given.dirs)
        if given.status:
            return status(found)
        return write(found, given.out or Path(given.dirs[0]) / "report", not given.no_latency, given.val, given.against)
    except (HydraException, OmegaConfBaseException) as error:
        return print_error(describe_hydra_error(error))
    except Failure as error:
        return print_error(str(error))


def status(found: list[Found]) -> int:
    """A line a run; 1 where one has failed."""
    made = Table()
    for column in ("run", "state", "what is known"):
        made.add_column(column, overflow="fold")
    for entry in found:
        made.add_row(
            Text(escape_control_chars(entry.folder.name)), entry.state, Text(escape_control_chars(entry.reason))
        )
    console().print(made)
    counts = {state: sum(entry.state == state for entry in found) for state in dict.fromkeys(e.state for e in found)}
    console().print(", ".join(f"{count} {state}" for state, count in counts.items()))
    return int("failed" in counts)


def write(found: list[Found], out: Path, timed: bool, val: bool, against: str | None) -> int:
    if val:
        found = [
            e._replace(run=e.run._replace(summary=statistics.held_out(e.run.summary))) if e.run else e for e in found
        ]
    finished = [entry for entry in found if entry.run is not None]
    if not finished:
        raise Failure(f"no finished run among {len(found)}; --status says more")
    rows = statistics.rows(entry.run for entry in finished)
    rows = rows if against is None else statistics.against(rows, against)
    times = latency.measured(finished) if timed else {}
    out.mkdir(parents=True, exist_ok=True)
    drawn = draw(rows, times, out)
    write_text(out / "report.md", markdown(found, rows, times, drawn, "Held-out images" if val else "Test images"))
    write_text(out / "report.csv", as_csv(rows, times))
    console().print(
        f"{len(finished)} finished runs of {len(found)}; written: {escape_control_chars(out)}/report.md", soft_wrap=True
    )
    return 0


def draw(rows: list[Row], times: dict[str, Times], out: Path) -> list[str]:
    """Names of the figures that there was something to draw for. A $ in somebody's options begins no formula."""
    with matplotlib.rc_context({"text.parse_math": False}):
        return drawn_plainly(rows, times, out)


def drawn_plainly(rows: list[Row], times: dict[str, Times], out: Path) -> list[str]:
    by_macs = points(rows, lambda row: scaled(row.of(cost_of("macs")), 1e-6))
    by_time = points(rows, lambda row: times[row.name].student if row.name in times else None)
    stage = "val" if any("val/student_0/top1" in record for row in rows for record in records_of(row)) else "train"
    made = {
        "accuracy_macs": plots.trade_off(by_macs, "multiply-accumulates of one picture, millions") if by_macs else None,
        "accuracy_latency": plots.trade_off(by_time, "ms for one picture in ONNX Runtime, CPU") if by_time else None,
        "gains": plots.gains(rows) if any(row.gain(mean_student) for row in rows) else None,
        "curves": plots.curves(rows, stage) if any(records_of(row) for row in rows) else None,
    }
    drawn = {name: figure for name, figure in made.items() if figure is not None}
    for name, figure in drawn.items():
        plots.save(figure, out, name)
    return list(drawn)


def records_of(row: Row) -> list[dict[str, float]]:
    return [record for run in row.by_seed.values() for record in run.history]


def scaled(value: Spread | None, factor: float) -> float | None:
    return None if value is None else factor * value.mean


def points(rows: list[Row], cost: Any) -> list[plots.Point]:
    found = ((row, cost(row), row.of(selected_student)) for row in rows)
    return [plots.Point(r.method, r.setting, x, y) for r, x, y in found if x is not None and y is not None]


def columns(rows: list[Row], times: dict[str, Times]) -> dict[str, list[Any]]:
    """The report's table, column by column: text, whole numbers, floats and spreads; None is a gap."""
    made: dict[str, list[Any]] = {
        "setting": [row.setting for row in rows],
        "method": [row.method for row in rows],
        "n": [len(row.by_seed) for row in rows],
        "mean student": [row.of(mean_student) for row in rows],
        "gain": [row.gain(mean_student) for row in rows],
        "selected": [row.of(selected_student) for row in rows],
        "selected gain": [row.gain(selected_student) for row in rows],
        "ensemble": [row.of(statistics.ensemble) for row in rows],
    }
    made |= {f"teacher ({kind})": [row.of(statistics.teacher_of(kind)) for row in rows] for kind in KINDS}
    for name, figure in (("params", cost_of("params")), ("macs", cost_of("macs")), ("epochs", statistics.epochs)):
        made[name] = [None if (value := row.of(figure)) is None else round(value.mean) for row in rows]
    made["training PMACs"] = [scaled(row.of(statistics.training_macs), 1e-15) for row in rows]
    made["hours"] = [scaled(row.of(statistics.hours), 1) for row in rows]
    for column, part in (("latency ms", "student"), ("standard ms", "standard")):
        made[column] = [getattr(times[row.name], part) if row.name in times else None for row in rows]
    return {name: values for name, values in made.items() if any(v is not None and v != "" for v in values)}


def markdown(found: list[Found], rows: list[Row], times: dict[str, Times], drawn: list[str], images: str) -> str:
    lines = ["# Report", "", *about(found), ""]
    table = columns(rows, times)
    lines += ["| " + " | ".join(table) + " |", "|" + "---|" * len(table)]
    lines += [
        "| " + " | ".join(cell(name, values[k]) for name, values in table.items()) + " |" for k in range(len(rows))
    ]
    lines += ["", f"{images}. {READING.format(over=in_cell(rows[0].over))}"]
    for name in drawn:
        lines += ["", f"![{name.replace('_', ' against ')}]({name}.png)"]
    lines += ["", *differences(rows), *others(found, rows)]
    return "\n".join(lines) + "\n"


def about(found: list[Found]) -> list[str]:
    runs = [entry.run for entry in found if entry.run is not None]
    data = sorted({str(run.summary.get("data", "unknown data")) for run in runs})
    epochs = sorted({str(run.summary.get("epochs", "?")) for run in runs})
    versions = {f"torch {v.get('torch', '?')}" for run in runs if (v := run.summary.get("versions") or {})}
    text = f"{len(runs)} finished runs on {in_cell(', '.join(data))}, {in_cell(', '.join(epochs))} epochs"
    lines = [text + (f" ({in_cell(', '.join(sorted(versions)))})." if versions else ".")]
    return [*lines, "", SMOKE] if "digits" in data else lines


def cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Spread):
        gain = "gain" in name
        text = f"{100 * value.mean:{'+' if gain else ''}.2f}"
        text += "" if value.deviation is None else f" ± {100 * value.deviation:.2f}"
        return f"{text} (not resolved)" if gain and not value.resolved else text
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else in_cell(value)


def in_cell(text: str) -> str:
    """Somebody's names and options in a Markdown table: no markup, no further cells."""
    return re.sub(r"([\\`\[<|])", r"\\\1", escape_control_chars(text))


def differences(rows: list[Row]) -> Iterator[str]:
    """Each seed's own gain, so that nothing hides in a mean."""
    found = {row.name: row.differences(mean_student) for row in rows if row.baseline}
    seeds = sorted({seed for values in found.values() for seed in values}, key=str)
    if seeds:
        yield "Gain of the mean student by seed, percentage points:"
        yield ""
        yield "| | " + " | ".join(f"seed {seed}" for seed in seeds) + " |"
        yield "|" + "---|" * (1 + len(seeds))
        for name, values in found.items():
            gains = [f"{100 * values[s]:+.2f}" if s in values else "" for s in seeds]
            yield f"| {' | '.join([in_cell(name), *gains])} |"
        yield ""


def others(found: list[Found], rows: list[Row]) -> Iterator[str]:
    twice = sum(entry.run is not None for entry in found) - sum(len(row.by_seed) for row in rows)
    if twice:
        yield f"{twice} finished runs have the options and the seed of another one and are left out."
        yield ""
    unfinished = [entry for entry in found if entry.run is None]
    if unfinished:
        yield "Not in the table:"
        yield ""
        yield from (f"- {code(entry.folder.name)}: {entry.state}; {code(entry.reason)}" for entry in unfinished)


def as_csv(rows: list[Row], times: dict[str, Times]) -> str:
    """The same table, with unrounded fractions: a spread is three columns."""
    text = io.StringIO()
    table = {}
    for name, values in columns(rows, times).items():
        if any(isinstance(value, Spread) for value in values):
            for part in Spread._fields:
                table[f"{name} {part}"] = [value and getattr(value, part) for value in values]
        else:
            table[name] = values
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table)
    writer.writerows(zip(*table.values(), strict=True))
    return text.getvalue()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
