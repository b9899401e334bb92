"""What the benchmark measures beside the race: parts of a step, ways to run the students, inference, the start."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from odcheap.bench import alternatives
from odcheap.bench.race import CLASSES, autocast, bare, made, random_images, timed, warm
from odcheap.bench.roofline import median_seconds, synchroniser
from odcheap.export import latency, onnx
from odcheap.layers import fuse
from odcheap.layers.cheap_conv import DW, Group, Shift, Shift2d, Standard
from odcheap.methods import parallel
from odcheap.models.cifar import Conv
from odcheap.predict import time_alternately
from odcheap.utils.errors import Failure, first_line

WIDTHS = ((16, 32), (32, 16), (64, 8))  # channels and side of the maps in the stages of a CIFAR ResNet
PRECISIONS = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}
TRAINED, HELD_OUT, EPOCHS = 45_000, 5_000, 300  # of the paper's recipe on CIFAR-10
TRAIN = Path(__file__).parents[2] / "train.py"


TELLING = """
import runpy, sys
from odcheap.module import DistillationModule
DistillationModule.on_train_batch_start = lambda *_: print("the first step", flush=True)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def milliseconds(work: Callable[[Tensor], Tensor], x: Tensor, precision: str, repeats: int) -> float:
    """Forward and backward."""
    device, gradient = x.device, None

    def once() -> None:
        nonlocal gradient
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            y = work(x)
        gradient = torch.ones_like(y) if gradient is None else gradient
        y.backward(gradient)

    return 1000 * median_seconds(once, repeats, synchroniser(device))


def maps(channels: int, side: int, device: torch.device, precision: str, images: int = 128) -> Tensor:
    x = torch.randn(images, channels, side, side, device=device, dtype=PRECISIONS[precision])
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def pairs(device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """A spatial operator with its 1 x 1 convolution, and the same composed into one dense convolution: ms of each."""
    rows = []
    for block_type in (DW(), Shift(), Group()):
        for channels, side in WIDTHS:
            for precision in PRECISIONS:
                pair = block_type(channels, channels).to(device, memory_format=torch.channels_last)
                x = maps(channels, side, device, precision)
                row = {"block_type": type(block_type).__name__, "channels": channels, "precision": precision}
                row["pair_ms"] = milliseconds(pair, x, precision, repeats)
                row["composed_ms"] = milliseconds(lambda x, p=pair: alternatives.composed(p, x), x, precision, repeats)
                rows.append(row)
    return rows


def shifts(device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """The shift as a one-hot depth-wise convolution (ours), by slices, by one gather: ms of each."""
    ways = {
        "one_hot_ms": Shift2d(),
        "slices_ms": alternatives.shift_by_slices,
        "gather_ms": alternatives.shift_by_gather,
    }
    rows = []
    for channels, side in WIDTHS:
        for precision in PRECISIONS:
            x = maps(channels, side, device, precision)
            times = {name: milliseconds(way, x, precision, repeats) for name, way in ways.items()}
            rows.append({"channels": channels, "precision": precision, **times})
    return rows


def ways(cfg: DictConfig, device: torch.device, steps: int) -> dict[str, float | str]:
    """Images a second of a bare loop for each way to run the students, with and without CUDA graphs on a GPU."""
    images = random_images(cfg, 4 * cfg.data.batch_size)
    tried: dict[str, dict[str, Any]] = {
        "sequential": {"run": parallel.sequential, "capture": False},
        "vmap": {"run": parallel.vmap, "capture": False},
        "sequential, compiled blocks": {
            "run": parallel.sequential,
            "capture": False,
            "prepare": alternatives.compile_blocks,
        },
    }
    if device.type == "cuda":
        tried["streams"] = {"run": parallel.streams, "capture": False}
        for name in ("sequential", "streams", "vmap"):
            tried[f"{name}, captured"] = {"run": getattr(parallel, name)}
        tried["streams, compiled blocks, captured"] = {
            "run": parallel.streams,
            "prepare": alternatives.compile_blocks,
        }
    found: dict[str, float | str] = {}
    for name, how in tried.items():
        try:
            step = warm(bare(cfg, images, device, **how), 6 if device.type == "cuda" else 2)
            found[name] = cfg.data.batch_size / timed(step, steps, device)
        except (RuntimeError, Failure) as error:  # no compiler on this machine, a step that cannot be recorded
            found[name] = f"not measured: {first_line(error)}"
    return found


def rate(cfg: DictConfig, device: torch.device, steps: int) -> float:
    """Images a second of the bare loop."""
    step = warm(bare(cfg, random_images(cfg, 4 * cfg.data.batch_size), device), 6)
    return cfg.data.batch_size / timed(step, steps, device)


def recipe(cfg: DictConfig, device: torch.device, images_per_second: float) -> float:
    """Seconds of the paper's recipe, projected: its training images at this rate, and a measured evaluation."""
    method = made(cfg).to(device, memory_format=torch.channels_last).eval()
    side = method.students.members[0].made_for
    held = torch.randn(HELD_OUT, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)

    def evaluate() -> None:
        with torch.inference_mode(), autocast(cfg, device):
            for batch in held.split(cfg.data.eval_batch_size):
                method(batch)

    return EPOCHS * (TRAINED / images_per_second + median_seconds(evaluate, 3, synchroniser(device)))


def inference(cfg: DictConfig, conv: list[Conv], seconds: float) -> list[dict[str, Any]]:
    """Milliseconds of a picture and of 64 in ONNX Runtime, block types and standard network side by side."""
    networks = {type(c).__name__: network_of(cfg, c) for c in [*conv, Standard()]}
    size = (3, networks["Standard"].made_for, networks["Standard"].made_for)
    return in_turns({name: onnx.fastest_onnx(network, size) for name, network in networks.items()}, size, seconds)


def export_forms(seconds: float) -> list[dict[str, Any]]:
    """The same of eight Shift pairs in a row in the forms that their file could have, and of standard convolutions."""
    rows = []
    for channels, side in WIDTHS:
        shift = nn.Sequential(*(Shift()(channels, channels) for _ in range(8)))
        made = {
            "one-hot": shift,
            "slices": fuse.with_pairs(shift, alternatives.SlicedPair),
            "dense": fuse.dense_form(shift),
            "Standard": nn.Sequential(*(Standard()(channels, channels) for _ in range(8))),
        }
        size = (channels, side, side)
        files = {name: onnx.to_onnx(onnx.program(network, size)) for name, network in made.items()}
        rows += [{"channels": channels, **row} for row in in_turns(files, size, seconds)]
    return rows


def network_of(cfg: DictConfig, conv: Conv) -> nn.Module:
    return instantiate(cfg.backbone)(conv=conv, num_classes=CLASSES)


def in_turns(files: dict[str, bytes], size: tuple[int, int, int], seconds: float) -> list[dict[str, Any]]:
    """Each at the number of threads that takes least; `times_n` is how often faster than "Standard"."""
    found = time_alternately(latency.in_onnxruntime(files, size, (1, 64)), seconds)
    ms = {(name, n): 1000 * latency.fastest(found, name, latency.ORT, n).p50 for name in files for n in (1, 64)}
    rows = []
    for name in files:
        times = {f"times_{n}": ms["Standard", n] / ms[name, n] for n in (1, 64)}
        rows.append({"block_type": name, **{f"ms_{n}": ms[name, n] for n in (1, 64)}, **times})
    return rows


def start(data_dir: str) -> float | str:
    """Seconds from the command to the first training step of a default run, its second time, on the CPU."""
    if not (Path(data_dir) / "cifar10").is_dir() and not (Path(data_dir) / "cifar-10-batches-py").is_dir():
        return f"not measured: no CIFAR-10 in data_dir={data_dir}"
    folder = Path(data_dir)
    known = (folder / ".cifar10.safetensors").is_file() or not (folder / "cifar10").is_dir()
    for _ in range(1 if known else 2):  # the first decodes the pictures
        seconds = until_first_step(data_dir)
    return "not measured: the run ended before its first step" if seconds is None else seconds


def until_first_step(data_dir: str) -> float | None:
    """Seconds until `train.py` has its first batch; it is ended then."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        command = [
            sys.executable,
            "-c",
            TELLING,
            str(TRAIN),
            f"data_dir={data_dir}",
            f"job_dir={folder}/run",
            "trainer=cpu",
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
            line = next((line for line in run.stdout if line == "the first step\n"), None)
            seconds = time.perf_counter() - began
            run.kill()
    return None if line is None else seconds
