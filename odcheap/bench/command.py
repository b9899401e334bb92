"""`python -m odcheap.bench`: how fast training and inference are on this machine, and what bounds them."""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from odcheap.bench import goals, probes, roofline
from odcheap.bench.race import Turn, made, race
from odcheap.cli import explained, hush, hydra_line
from odcheap.report.costs import CONF
from odcheap.training.summary import machine, versions
from odcheap.utils.console import console, print_error
from odcheap.utils.errors import Failure
from odcheap.utils.files import write_text

BEGAN = time.perf_counter()
BLOCK_TYPES = ("DW", "Shift", "Group")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m odcheap.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="within two minutes on two cores: one block type")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder for bench.json and bench.png")
    parser.add_argument("overrides", nargs="*", help="such as block_type=Shift num_stu=2 data.batch_size=64")
    given = parser.parse_args(arguments)
    hush()
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            for result in measured(given.overrides, given.quick):  # each part is kept, whatever befalls the next
                given.out.mkdir(parents=True, exist_ok=True)
                write_text(given.out / "bench.json", json.dumps(result, indent=2) + "\n")
    except (Failure, InstantiationException, MisconfigurationException) as error:
        return print_error(explained(error))
    except (HydraException, OmegaConfBaseException) as error:
        return print_error(hydra_line(error, CONF))
    goals.plot(result, given.out / "bench.png")
    goals.show(result, console())
    console().print(f"written: {given.out / 'bench.json'}, {given.out / 'bench.png'}")
    return 0


def measured(overrides: list[str], quick: bool) -> Iterator[dict[str, Any]]:
    """The result as it grows, part by part."""
    cfg = composed(overrides)
    on_gpu = cfg.trainer.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    steps, rounds = (20, 5) if on_gpu else (1, 3) if quick else (2, 5)
    result: dict[str, Any] = {"machine": machine(device), "versions": versions(), "overrides": overrides, "races": []}
    turns: dict[str, Turn] = {}
    for block_type, precision in chosen(overrides, quick):
        this = composed([*overrides, f"block_type={block_type}", f"trainer.precision={precision}"])
        tell(f"{block_type}, {precision}: {rounds} rounds of {steps + 1} steps")
        again = turns["a"] if quick and turns else None
        turns = race(this, device, steps, rounds, tell, again)
        found = {"block_type": block_type, "precision": precision, **figures(this, device, precision, turns)}
        if again is not None:  # no rounds in common
            rates = found["images_per_second"]
            found |= {"a": "of the race before", "c_over_a": rates["c"] / rates["a"]}
        result["races"].append(found)
        tell("images a second: " + ", ".join(f"{name} {n:.0f}" for name, n in found["images_per_second"].items()))
        if this.block_type == cfg.block_type and precision == cfg.trainer.precision:
            of_recipe = found["images_per_second"]["c"]
        yield result
    tell("inference in ONNX Runtime")
    conv = [hydra.utils.instantiate(cfg.block_type)] if quick else [probes.Shift(), probes.DW(), probes.Group()]
    result["inference"] = probes.inference(cfg, conv, 0.5 if quick else 3.0)
    tell("start of a CIFAR-10 run")
    result["start_seconds"] = probes.start(cfg.data_dir)
    if on_gpu:
        tell("1, 4 and 8 students; the recipe")
        result["students"] = {n: probes.rate(composed([*overrides, f"num_stu={n}"]), device, steps) for n in (1, 4, 8)}
        result["recipe_seconds"] = probes.recipe(cfg, device, of_recipe)
        yield result
    if not quick:
        tell("pairs and shifts")
        result["pairs"], result["shifts"] = probes.pairs(device, 15), probes.shifts(device, 15)
        tell("forms of exported files")
        result["forms"] = probes.export_forms(0.5)
        tell("ways to run the students (compiling takes a while)")
        result["ways"] = probes.ways(cfg, device, steps)
    result["goals"] = goals.rows(result)
    yield result


def chosen(overrides: list[str], quick: bool) -> Iterator[tuple[str, str]]:
    """The block types and precisions to race: those that the overrides name, or all."""
    named = dict(override.partition("=")[::2] for override in overrides)
    for block_type in [named["block_type"]] if "block_type" in named else BLOCK_TYPES[: 1 if quick else None]:
        for precision in [named["trainer.precision"]] if "trainer.precision" in named else probes.PRECISIONS:
            yield block_type, precision


def tell(text: str) -> None:
    print(f"  {time.perf_counter() - BEGAN:4.0f} s  {text}", flush=True)


def composed(overrides: list[str]) -> DictConfig:
    """A run's config: the data are random, and no figure is chosen."""
    return hydra.compose("config", [*overrides, "select=last", "data.val_size=0", "job_dir=unused"])


def figures(cfg: DictConfig, device: torch.device, precision: str, turns: dict[str, Turn]) -> dict[str, Any]:
    """What a race says: medians, ratios, and how near it comes to what the machine could do."""
    batch = cfg.data.batch_size
    rates = {name: batch / statistics.median(turn.seconds) for name, turn in turns.items()}
    dtype = probes.PRECISIONS[precision]
    network = made(cfg).students.members[0]
    limits = roofline.measure(device, dtype)
    work = roofline.work_of(network, (3, network.made_for, network.made_for))
    least = limits.seconds(work, cfg.num_stu * batch, dtype.itemsize)
    return {
        "num_stu": cfg.num_stu,
        "batch_size": batch,
        "seconds": {name: turn.seconds for name, turn in turns.items()},
        "images_per_second": rates,
        "peak_bytes": {name: turn.peak for name, turn in turns.items()},
        "c_over_a": ratio(turns["a"], turns["c"]),
        "b_over_c": ratio(turns["c"], turns["b"]),
        "bandwidth": limits.bandwidth,
        "rate": limits.rate,
        "of_roofline": least * rates["c"] / batch,
    }


def ratio(slow: Turn, fast: Turn) -> float:
    """How often faster, round by round, so that what slows a whole round down falls out; the median."""
    return statistics.median(a / b for a, b in zip(slow.seconds, fast.seconds, strict=True))


if __name__ == "__main__":
    raise SystemExit(main())
