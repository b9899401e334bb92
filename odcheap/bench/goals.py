"""What the benchmark is to reach, and its result as tables and as a picture."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# Images a second of c over a, on two CPU cores and on a GPU of the H100 class.
ON_CPU = {("DW", "32-true"): 2.0, ("DW", "bf16-mixed"): 2.7, ("Shift", "bf16-mixed"): 3.0, ("Group", "bf16-mixed"): 2.3}
ON_GPU = 5.0
SHELL, FOUR_STUDENTS, RECIPE, START = 1.05, 2.0, 600.0, 10.0
INFERENCE = {1: 2.8, 64: 3.3}  # how often faster than the standard network, by pictures
MEMORY = 1.01  # no more than a; peaks on a CPU are sampled, to about a hundredth
LOOPS = {"a": "2019 style", "b": "bare loop", "c": "our Trainer"}

Goal = dict[str, Any]


def goal(text: str, value: float | str | None, least: float | None = None, most: float | None = None) -> Goal:
    """`met` is None where the value was not measured or no goal is set."""
    met = None
    if isinstance(value, float):
        met = None if least is most is None else (least is None or value >= least) and (most is None or value <= most)
    bound = f">= {least:g}" if least is not None else f"<= {most:g}" if most is not None else ""
    return {"what": text, "goal": bound, "measured": value, "met": met}


def rows(result: dict[str, Any]) -> list[Goal]:
    """The goals' rows from the benchmark's own measurements."""
    on_gpu, found = result["machine"]["device"] == "cuda", []
    for race in result["races"]:
        name = f"{race['block_type']}, {race['precision']}"
        least = ON_GPU if on_gpu else ON_CPU.get((race["block_type"], race["precision"]))
        which = f", a {race['a']}" if "a" in race else ""
        found.append(goal(f"training, {name}: c/a{which}", race["c_over_a"], least=least))
        found.append(goal(f"cost of the shell, {name}: b/c", race["b_over_c"], most=SHELL))
        peak = race["peak_bytes"]
        if peak["a"] and peak["c"]:
            most = MEMORY if race["precision"] == "32-true" else None  # a has no bfloat16 to compare with
            found.append(goal(f"memory, {name}: c/a", peak["c"] / peak["a"], most=most))
        found.append(goal(f"part of the roofline, {name}: c", race["of_roofline"]))
    for row in result["inference"]:
        if row["block_type"] in ("DW", "Shift"):
            for n, least in INFERENCE.items():
                what = f"ONNX Runtime, CPU, {n} pictures: {row['block_type']} over Standard"
                found.append(goal(what, row[f"times_{n}"], least=least))
    students = result.get("students")
    cost = students[1] / students[4] if students else "not measured: no GPU"
    found.append(goal("time of 4 students over that of 1, GPU", cost, most=FOUR_STUDENTS))
    recipe = result.get("recipe_seconds", "not measured: no GPU")
    found.append(goal("300 epochs with evaluation, GPU, projected, s", recipe, most=RECIPE))
    found.append(goal("second start of a CIFAR-10 run to its first step, s", result["start_seconds"], most=START))
    return found


def show(result: dict[str, Any], console: Console) -> None:
    machine, inference = result["machine"], result["inference"]
    console.print(f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads")
    console.print(table("images a second", [{**head(race), **race["images_per_second"]} for race in result["races"]]))
    peaks = [{**head(race), **in_gib(race["peak_bytes"])} for race in result["races"]]
    console.print(table("peak memory, GiB", peaks))
    console.print(f"a: {LOOPS['a']} (always float32); b: {LOOPS['b']}; c: {LOOPS['c']}")
    console.print(table("inference, ONNX Runtime, CPU", inference))
    if "ways" in result:
        console.print(table("a pair, and composed into one dense convolution", result["pairs"]))
        console.print(table("ways to shift", result["shifts"]))
        console.print(table("forms of exported files, ONNX Runtime, CPU", result["forms"]))
        ways = [{"way": name, "images a second": rate} for name, rate in result["ways"].items()]
        console.print(table("ways to run the students", ways))
    marks = {True: "met", False: "missed", None: ""}
    console.print(table("goals", [{**row, "met": marks[row["met"]]} for row in result["goals"]]))


def head(race: dict[str, Any]) -> dict[str, Any]:
    return {"block_type": race["block_type"], "precision": race["precision"]}


def in_gib(peaks: dict[str, int | None]) -> dict[str, float | None]:
    return {name: None if peak is None else peak / 2**30 for name, peak in peaks.items()}


def table(title: str, found: list[dict[str, Any]]) -> Table:
    made = Table(title=title, title_justify="left")
    for column in found[0]:
        made.add_column(column, justify="left" if isinstance(found[0][column], str) else "right")
    for row in found:
        made.add_row(*(format_value(value) for value in row.values()))
    return made


def format_value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of images a second for each race, and of inference."""
    from matplotlib.figure import Figure

    races, inference = result["races"], result["inference"]
    figure = Figure(figsize=(max(6, 2 + 1.3 * len(races)) + 3, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[max(2, len(races)), 2])
    for k, (loop, name) in enumerate(LOOPS.items()):
        places = [place + 0.27 * (k - 1) for place in range(len(races))]
        bars = left.bar(places, [race["images_per_second"][loop] for race in races], 0.25, label=name)
        left.bar_label(bars, fmt="%.0f", fontsize=8)
    left.set_xticks(range(len(races)), [f"{race['block_type']}\n{race['precision']}" for race in races])
    left.set_ylabel("images a second")
    left.set_title(f"training {races[0]['num_stu']} students, batch {races[0]['batch_size']}")
    left.legend(fontsize=8)
    right.set_title("inference, ms an image")
    for k, n in enumerate((1, 64)):
        places = [place + 0.4 * (k - 0.5) for place in range(len(inference))]
        bars = right.bar(places, [row[f"ms_{n}"] / n for row in inference], 0.38, label=f"batch {n}")
        right.bar_label(bars, fmt="%.2f", fontsize=8)
    right.set_xticks(range(len(inference)), [row["block_type"] for row in inference])
    right.legend(fontsize=8)
    figure.suptitle(result["machine"]["gpu"] or result["machine"]["cpu"])
    figure.savefig(path, dpi=120)
