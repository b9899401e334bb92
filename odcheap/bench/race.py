"""The three loops that the benchmark holds against each other, in turns in one process."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from torch import nn

from odcheap.bench import baseline
from odcheap.bench.memory import Memory, with_peak
from odcheap.bench.roofline import synchroniser
from odcheap.data.cifar import Images
from odcheap.data.in_memory import Batch, BatchOrder, InMemoryData, TrainBatches
from odcheap.distributed.signals import Listener
from odcheap.methods import parallel
from odcheap.methods.students import Students
from odcheap.runs.resume import Start
from odcheap.training.experiment import Run
from odcheap.training.optim import build_optimization
from odcheap.training.train_step import WARM_UP, CapturedStep, CudaGraphs, take
from odcheap.utils.errors import Failure, OptionError

CLASSES = 10
LOADERS = {"cuda": 4, "cpu": 0}  # processes that augment the baseline's pictures: a CPU has none to spare
SLOW = 1e-3  # the learning rate: on random labels 0.1 would go astray, and the speed is the same


class Turn(NamedTuple):
    """One loop's result: seconds a step, one a round, and bytes needed at its first steps (None: not known here)."""

    seconds: list[float]
    peak: int | None


def race(
    cfg: DictConfig, device: torch.device, steps: int, rounds: int, tell: Callable[[str], None], a: Turn | None = None
) -> dict[str, Turn]:
    """`a`: the 2019-style loop; `b`: a bare loop with our settings; `c`: our Trainer with all its callbacks.

    The composed `cfg` says what is trained, on random images. Within a round each takes one step, to find the memory
    that the others have left, and then `steps` steps that count. Where `a`'s result is given it does not run again.
    """
    autocast(cfg, device)  # refuses other precisions before anything is built
    warm_up = WARM_UP + 2 if device.type == "cuda" else 2
    images = random_images(cfg, (warm_up + rounds * (steps + 1) + 3) * cfg.data.batch_size)
    others: dict[str, Callable[[], object]] = {}
    turns = {} if a is None else {"a": a}

    def between() -> None:
        for name, begin in (("a", before), ("b", bare)):
            if name not in turns:
                others[name], peak = with_peak(device, lambda make=begin: warm(make(cfg, images, device), warm_up))
                turns[name] = Turn([], peak)
        for name, step in others.items():
            turns[name].seconds.append(timed(warm(step, 1), steps, device))
        tell(f"round {len(turns['b'].seconds)} of {rounds}")

    pace = Pace(warm_up, steps, rounds, between, device)
    shell(cfg, images, pace)
    turns["c"] = Turn(pace.seconds, pace.peak)
    return turns


def random_images(cfg: DictConfig, count: int) -> Images:
    side = made(cfg).students.members[0].made_for
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=random)
    target = torch.arange(count) % CLASSES
    return Images(images, target, images[:CLASSES], target[:CLASSES], [str(k) for k in range(CLASSES)])


def made(cfg: DictConfig, run: Callable[..., parallel.Maps] = parallel.auto) -> nn.Module:
    build, conv = instantiate(cfg.backbone), instantiate(cfg.block_type)
    students = Students(lambda: build(conv=conv, num_classes=CLASSES), cfg.num_stu, cfg.seed, run)
    return instantiate(cfg.method)(students=students)


def before(cfg: DictConfig, images: Images, device: torch.device) -> Callable[[], object]:
    pictures = baseline.Pictures(images.train, images.train_target, tuple(cfg.data.mean), tuple(cfg.data.std))
    method = made(cfg, parallel.sequential).to(device)
    loop = baseline.steps(method, pictures, cfg.data.batch_size, SLOW, device, LOADERS[device.type])
    return lambda: next(loop)


def bare(
    cfg: DictConfig,
    images: Images,
    device: torch.device,
    run: Callable[..., parallel.Maps] = parallel.auto,
    capture: bool = True,
    prepare: Callable[[nn.Module], None] = lambda method: None,
) -> Callable[[], object]:
    """A step of a hand-written loop with our settings; on a CPU there is nothing to capture."""
    method = made(cfg, run).to(device, memory_format=torch.channels_last)
    prepare(method)
    optimizer, schedule = build_optimization(
        method, instantiate(cfg.optimizer, lr=SLOW), instantiate(cfg.scheduler), 1_000_000
    )
    batches = endless(data(cfg, images), device)
    refusals: list[str] = []
    step = take
    if capture and device.type == "cuda":
        captured = CapturedStep(method, optimizer, CudaGraphs(), refusals.append)
        step = lambda method, optimizer, images, target: captured(images, target)  # noqa: E731

    def once() -> None:
        batch = next(batches)
        with autocast(cfg, device):
            step(method, optimizer, batch.images, batch.target)
        schedule.step()
        if refusals:
            raise Failure(f"the step could not be captured: {refusals[0]}")

    return once


def data(cfg: DictConfig, images: Images) -> InMemoryData:
    part = instantiate(cfg.data, _partial_=True)
    if part.func is not InMemoryData:
        raise OptionError("data", cfg.data.name, "the benchmark is for sets that fit in memory, such as cifar10")
    made = part(load=lambda: images)
    made.read()
    return made


def endless(data: InMemoryData, device: torch.device) -> Iterator[Batch]:
    images, order = data.images, BatchOrder(len(data.images.train), data.batch_size, data.seed)
    batches = TrainBatches(images.train.to(device), images.train_target.to(device), order, data.augment, data.norm)
    while True:
        yield from batches


def autocast(cfg: DictConfig, device: torch.device) -> contextlib.AbstractContextManager:
    if cfg.trainer.precision not in ("32-true", "bf16-mixed"):
        raise Failure(f"trainer.precision={cfg.trainer.precision}: the benchmark knows 32-true and bf16-mixed")
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.trainer.precision == "bf16-mixed")


class Pace(pl.Callback):
    """Times rounds of steps within a `Trainer`'s fit, and lets others run before each."""

    def __init__(self, warm_up: int, steps: int, rounds: int, between: Callable[[], None], device: torch.device):
        self.warm_up, self.steps, self.rounds, self.between, self.device = warm_up, steps, rounds, between, device
        self.seconds: list[float] = []
        self.memory, self.peak, self.began = Memory(device), None, 0.0

    def on_fit_start(self, *_: Any) -> None:
        self.memory.start()

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.warm_up:
            self.peak = self.memory.peak()
        if batch_idx >= self.warm_up and (batch_idx - self.warm_up) % (self.steps + 1) == 0:
            self.between()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        place = (batch_idx - self.warm_up) % (self.steps + 1)
        if batch_idx < self.warm_up or place not in (0, self.steps):
            return
        synchroniser(self.device)()
        if place == 0:  # from here, so that what lies between two batches counts as well
            self.began = time.perf_counter()
        else:
            self.seconds.append((time.perf_counter() - self.began) / self.steps)
            trainer.should_stop = len(self.seconds) == self.rounds


def shell(cfg: DictConfig, images: Images, pace: Pace) -> None:
    """Our own run with its own callbacks, in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        job_dir = Path(folder) / "run"
        job_dir.mkdir()
        method = made(cfg, instantiate(cfg.together))
        run = Run(
            Start(cfg, [], job_dir),
            data(cfg, images),
            method,
            instantiate(cfg.optimizer, lr=SLOW),
            instantiate(cfg.scheduler),
            Listener(),
        )
        run.console = Console(quiet=True)
        trainer = run.trainer(loggers=False)
        trainer.callbacks.append(pace)
        trainer.fit(run.module, datamodule=run.data)


def warm(step: Callable[[], object], times: int) -> Callable[[], object]:
    for _ in range(times):
        step()
    return step


def timed(step: Callable[[], object], steps: int, device: torch.device) -> float:
    """Seconds a step, over so many steps."""
    synchronise = synchroniser(device)
    synchronise()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    synchronise()
    return (time.perf_counter() - began) / steps
