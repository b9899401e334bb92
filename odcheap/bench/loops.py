"""The three training loops that the benchmark compares; they run alternately in one process, on random images.

The baseline is a loop in the style of 2019, which is used for nothing else. It runs in eager mode, in float32, with
contiguous (channels-first) tensors, one student after the other. Pillow augments the images one by one on the CPU. Loss
and accuracies are read after every step, so that every step waits for the GPU.
"""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from odcheap.bench.measurement import WARM_UP_CALLS, PeakMemory, count_page_faults, report_progress, time_calls
from odcheap.data.base import Batch, Process
from odcheap.data.in_memory import Images, InMemoryData
from odcheap.distributed.signals import SignalListener
from odcheap.layers import kernels
from odcheap.methods.base import Method
from odcheap.methods.students import RUNS, RunStudents, Students, run_auto
from odcheap.models.backbone import RGB, Backbone
from odcheap.runs.resume import Start
from odcheap.runs.settings import RunConfig
from odcheap.training.experiment import Experiment
from odcheap.training.optim import build_optimization
from odcheap.training.train_step import WARM_UP, CudaGraphs, EagerStep, GraphStep
from odcheap.utils.errors import Failure, OptionError

LOOPS = {"loop_2019": "2019-style loop", "bare_loop": "bare loop", "trainer": "Trainer"}
PRECISIONS = ("32-true", "bf16-mixed")
NUM_CLASSES = 10
LOADER_WORKERS = {"cuda": 4, "cpu": 0}  # processes that augment the baseline's images; on a CPU all cores train
LR = 1e-3  # low, because the labels are random; the speed does not depend on it

Step = Callable[[], object]
BuildMethod = Callable[[DictConfig, RunStudents], Method]
CreateLoop = Callable[[DictConfig, Method, Images, torch.device], Step]


@dataclass
class LoopTiming:
    """The timing of a training loop.

    Attributes:
        seconds: The seconds of a training step, one value for each round.
        page_faults: The page faults of a training step, one value for each round.
        peak_bytes: The largest memory that the first steps needed, in bytes; None if it cannot be measured here.
    """

    seconds: list[float] = field(default_factory=list)
    page_faults: list[float] = field(default_factory=list)
    peak_bytes: int | None = None


def compare_loops(
    cfg: DictConfig,
    device: torch.device,
    steps: int,
    rounds: int,
    build: BuildMethod | None = None,
    others: dict[str, CreateLoop] | None = None,
) -> dict[str, LoopTiming]:
    """Times odcheap's training loop and others alternately.

    Args:
        cfg: The config of a run, which says what is trained.
        device: The device on which it is trained.
        steps: The number of steps of each loop that are timed in a round, after a warm-up.
        rounds: The number of rounds; in each round one loop after the other takes its steps.
        build: A function that builds the method for each loop; None for the method of the config.
        others: Functions that create the other loops, by name; None for `create_loop_2019` and `create_bare_loop`.

    Returns:
        A dict from the name of each loop to its timing; the name of odcheap's loop is "trainer".
    """
    build = build or build_method
    others = others or {"loop_2019": create_loop_2019, "bare_loop": create_bare_loop}
    autocast(cfg, device)  # refuses other precisions before anything is built
    kernels.use(cfg.kernels)
    first_steps = WARM_UP + 2 if device.type == "cuda" else 2  # a CUDA graph is recorded within them
    images = random_images(cfg, (first_steps + rounds * (steps + WARM_UP_CALLS) + 3) * cfg.data.batch_size)
    running: dict[str, Step] = {}
    timings: dict[str, LoopTiming] = {}

    def run_other_loops() -> None:
        for name, create in others.items():
            if name not in running:
                memory = PeakMemory(device)
                memory.start()
                running[name] = create(cfg, build(cfg, run_auto), images, device)
                for _ in range(first_steps):
                    running[name]()
                timings[name] = LoopTiming(peak_bytes=memory.stop())
        for name, step in running.items():
            faults = count_page_faults()
            timings[name].seconds.append(time_calls(step, steps))
            timings[name].page_faults.append((count_page_faults() - faults) / (steps + WARM_UP_CALLS))
        report_progress(f"round {max(len(timing.seconds) for timing in timings.values())} of {rounds}")

    # The training of odcheap cannot be interrupted from outside: its callback runs the other loops.
    timer = StepTimer(first_steps, steps, rounds, run_other_loops, device)
    run_trainer(cfg, build(cfg, RUNS[cfg.together]), images, timer)
    return timings | {"trainer": timer.timing}


def random_images(cfg: DictConfig, count: int) -> Images:
    """Returns random images and labels with ten classes.

    Args:
        cfg: The config of a run; the images have the size for which its backbone was designed.
        count: The number of training images; there are ten test images.
    """
    side = cast(Backbone, build_method(cfg).students.members[0]).native_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (NUM_CLASSES + count, 3, side, side), dtype=torch.uint8, generator=generator)
    target, test_target = torch.arange(count) % NUM_CLASSES, torch.arange(NUM_CLASSES)
    test, train = images[:NUM_CLASSES], images[NUM_CLASSES:]
    return Images(train, target, test, test_target, [str(k) for k in range(NUM_CLASSES)])


def build_method(cfg: DictConfig, run: RunStudents = run_auto) -> Method:
    """Builds the method that a config describes, with its students.

    Args:
        cfg: The config of a run.
        run: The function that runs all students on a batch.
    """
    if (channels := cfg.data.get("channels")) not in (None, RGB):
        raise OptionError("data.channels", channels, "must be 3: the benchmark's images are RGB")
    backbone, conv = instantiate(cfg.backbone), instantiate(cfg.block_type)
    students = Students(lambda: backbone(conv=conv, num_classes=NUM_CLASSES), cfg.num_stu, cfg.seed, run)
    return instantiate(cfg.method)(students=students)


class PillowImages(Dataset):
    """A map-style data set of images that are padded by 4 pixels, cropped, flipped and normalized one by one.

    Args:
        images: (N, 3, H, W), uint8.
        target: Labels (N,).
        mean: The mean of each channel of images in [0, 1].
        std: The standard deviation of each channel, for the same images.
    """

    def __init__(self, images: Tensor, target: Tensor, mean: tuple[float, ...], std: tuple[float, ...]):
        self.images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        self.target = target
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(images.shape[-1], padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), int(self.target[index])


def train_steps(
    method: Method, images: PillowImages, batch_size: int, lr: float, device: torch.device, workers: int
) -> Iterator[float]:
    """Trains without an end, and yields the loss of each training step.

    Args:
        method: The networks to train and their loss, a `Method`.
        images: The training images.
        batch_size: The number of images in a batch.
        lr: The learning rate.
        device: The device on which the method is.
        workers: The number of processes that load and augment images; 0 for none.
    """
    loader = DataLoader(images, batch_size, shuffle=True, num_workers=workers, drop_last=True)
    optimizer = torch.optim.SGD(method.parameters(), lr, momentum=0.9, weight_decay=2e-4)
    while True:
        for batch, target in loader:
            batch, target = batch.to(device), target.to(device)
            optimizer.zero_grad()
            outputs = method(batch)
            loss = method.loss(outputs, target)["loss"]
            loss.backward()
            optimizer.step()
            # The 2019 reference code printed accuracies during the training; reading them waits for the GPU.
            for logits in [*outputs["student_logits"], outputs["teacher_logits"]]:
                if logits is not None:
                    (logits.argmax(1) == target).float().mean().item()
            yield loss.item()


def make_dataset(cfg: DictConfig, images: Images) -> PillowImages:
    """Returns the training images as a data set that augments them one by one."""
    return PillowImages(images.train, images.train_target, tuple(cfg.data.mean), tuple(cfg.data.std))


def create_loop_2019(cfg: DictConfig, method: Method, images: Images, device: torch.device) -> Step:
    """Returns a function that takes one training step of a loop in the style of 2019 (float32, eager mode).

    Args:
        cfg: The config of a run, of which the options of `data` are used.
        method: The networks to train and their loss, a `Method`.
        images: The images; only the training images are used.
        device: The device on which it is trained.
    """
    dataset = make_dataset(cfg, images)
    steps = train_steps(method.to(device), dataset, cfg.data.batch_size, LR, device, LOADER_WORKERS[device.type])
    return lambda: next(steps)


def create_bare_loop(cfg: DictConfig, method: Method, images: Images, device: torch.device) -> Step:
    """Returns a function that takes one training step of a hand-written loop with odcheap's settings.

    The settings are channels-last tensors, autocast, and CUDA graphs on a GPU.

    Args:
        cfg: The config of a run.
        method: The networks to train and their loss, a `Method`.
        images: The images; only the training images are used.
        device: The device on which it is trained.
    """
    method = method.to(device).to(memory_format=torch.channels_last)
    optimizer, schedule = build_optimization(
        method, instantiate(cfg.optimizer, lr=LR), instantiate(cfg.scheduler), 1_000_000
    )
    # `reasons` gets the reason if the step cannot be recorded: the loops could then not be compared.
    batches = endless_batches(create_data(cfg, images), device)
    reasons: list[str] = []
    train_step = EagerStep(method, optimizer)
    if device.type == "cuda":
        train_step = GraphStep(train_step, CudaGraphs(), reasons.append)

    def step() -> None:
        batch = next(batches)
        with autocast(cfg, device):
            train_step(batch)
        schedule.step()
        if reasons:
            raise Failure(f"the step could not be recorded as a CUDA graph: {reasons[0]}")

    return step


def create_data(cfg: DictConfig, images: Images) -> InMemoryData:
    """Builds the data set that a config describes, with these images in place of its own."""
    build = instantiate(cfg.data, _partial_=True)
    if build.func is not InMemoryData:
        raise OptionError("data", cfg.data.name, "the benchmark needs data that fit in memory, such as cifar10")
    data = build(load=lambda: images, policy=instantiate(cfg.augment))
    data.read()
    return data


def endless_batches(data: InMemoryData, device: torch.device) -> Iterator[Batch]:
    """Yields augmented training batches without an end."""
    batches = data.train_loader(Process(device))
    while True:
        yield from batches


def autocast(cfg: DictConfig, device: torch.device) -> contextlib.AbstractContextManager:
    """Returns the autocast context of the config's `trainer.precision`.

    Raises:
        OptionError: The precision is neither "32-true" nor "bf16-mixed".
    """
    if cfg.trainer.precision not in PRECISIONS:
        raise OptionError("trainer.precision", cfg.trainer.precision, f"must be {' or '.join(PRECISIONS)} here")
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.trainer.precision == "bf16-mixed")


class StepTimer(pl.Callback):
    """A Lightning callback that times rounds of training steps, and runs the other loops before each round.

    Args:
        first_steps: The number of steps before the first round; their peak memory is measured.
        steps: The number of steps that are timed in a round.
        rounds: The number of rounds; the training ends after the last one.
        run_others: A function that runs the other loops.
        device: The device of the training.

    Attributes:
        timing: What was measured.
    """

    def __init__(self, first_steps: int, steps: int, rounds: int, run_others: Step, device: torch.device):
        self.first_steps, self.steps, self.rounds, self.run_others = first_steps, steps, rounds, run_others
        self.device, self.memory = device, PeakMemory(device)
        self.timing = LoopTiming()
        self.start_time, self.faults_at_start = 0.0, 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.memory.start()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.first_steps:
            self.timing.peak_bytes = self.memory.stop()
        if batch_idx >= self.first_steps and (batch_idx - self.first_steps) % (self.steps + 1) == 0:
            self.run_others()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # The first step of a round warms up. The time starts at its end, so that the work between two steps counts too.
        place = (batch_idx - self.first_steps) % (self.steps + 1)
        if batch_idx < self.first_steps or place not in (0, self.steps):
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if place == 0:
            self.start_time, self.faults_at_start = time.perf_counter(), count_page_faults()
        else:
            self.timing.seconds.append((time.perf_counter() - self.start_time) / self.steps)
            self.timing.page_faults.append((count_page_faults() - self.faults_at_start) / self.steps)
            trainer.should_stop = len(self.timing.seconds) == self.rounds


def run_trainer(cfg: DictConfig, method: Method, images: Images, timer: StepTimer) -> None:
    """Trains with all callbacks of `odcheap train`, in a temporary folder, until the timer ends the training.

    Args:
        cfg: The config of a run.
        method: The networks to train and their loss, a `Method`.
        images: The training images.
        timer: The callback that times the training steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        job_dir = Path(folder) / "run"
        job_dir.mkdir()
        optimizer, scheduler = instantiate(cfg.optimizer, lr=LR), instantiate(cfg.scheduler)
        parts = dict.fromkeys(("block_type", "backbone"), "benchmark")  # the names that checkpoints would have
        experiment = Experiment(
            Start(RunConfig(cfg, parts, []), job_dir),
            create_data(cfg, images),
            method,
            optimizer,
            scheduler,
            SignalListener(),
            callbacks=[timer],
            console=Console(quiet=True),
        )
        experiment.fit(experiment.build_trainer())
