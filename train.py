"""Trains cheap students and their online teacher: `python train.py block_type=DW num_stu=4` (see README.md)."""

import sys
from contextlib import nullcontext
from multiprocessing import current_process
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig

from odcheap import cli
from odcheap.config import options
from odcheap.data.in_memory import check_batches
from odcheap.distributed import launch, signals, slurm
from odcheap.distributed.signals import Listener, ending_with, leaving
from odcheap.layers.cheap_conv import Standard
from odcheap.methods import parallel
from odcheap.methods.students import Students
from odcheap.models.wrappers import check_image_size
from odcheap.runs import resume
from odcheap.training import experiment, sweep
from odcheap.training.optim import build_optimization
from odcheap.utils.console import say
from odcheap.utils.seeds import temporary_seed

CONF = Path(__file__).parent / "conf"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(cfg: DictConfig) -> float | None:
    """One run; in a sweep, one of its runs. Returns the chosen student's held-out accuracy."""
    in_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    overrides = cli.overrides()
    led = current_process().name != "MainProcess"  # joblib's: they would go on for hours where their leader is gone
    with Listener() as listener, ending_with(signals.STARTER) if led else nullcontext():
        return cli.guarded(lambda: train(cfg, overrides, in_sweep, listener), in_sweep)


def train(cfg: DictConfig, overrides: list[str], in_sweep: bool, listener: Listener) -> sweep.Outcome:
    choices = HydraConfig.get().runtime.choices
    options.check_paths(cfg)
    options.check_types(cfg, overrides)
    launch.check(cfg, choices.trainer, in_sweep)
    launch.share_cores()
    again = in_sweep or slurm.restarted()
    by_default = "auto" if again else None
    start = resume.plan(cfg, overrides, options.checked, say, by_default, slurm.restarted())
    if start.finished:
        say(f"{start.job_dir} holds this run, finished: nothing to do")
        return sweep.Outcome(str(start.job_dir), "was finished", resume.summary_of(start.job_dir))
    if cfg.test_only:
        return carry_out(start, choices, listener)
    with leaving(start.job_dir, listener, again=not cfg.overwrite):
        return carry_out(start, choices, listener)


def carry_out(start: resume.Start, choices: DictConfig, listener: Listener) -> sweep.Outcome:
    cfg = start.cfg
    options.check_values(cfg)
    data = instantiate(cfg.data)
    data.read()
    check_batches(data, launch.processes(cfg))
    # A checkpoint holds the weights that a pretrained file began with, which may be gone by now.
    begun = {"pretrained": None} if start.content is not None and "pretrained" in cfg.backbone else {}
    backbone = instantiate(cfg.backbone, **begun)
    students = Students(
        lambda: backbone(conv=instantiate(cfg.block_type), num_classes=len(data.classes)),
        cfg.num_stu,
        cfg.seed,
        parallel.WAYS[cfg.together],
    )
    with temporary_seed(cfg.seed, "method"):
        method = instantiate(cfg.method)(students=students)
    optimizer, scheduler = instantiate(cfg.optimizer), instantiate(cfg.scheduler)
    build_optimization(
        method, optimizer, scheduler, 1000
    )  # refuses what does not go together, before there is a folder
    method.check_precision(str(cfg.trainer.precision))
    check_image_size(students.members[0], data.image_size, choices.backbone)
    experiment.start_weights(start, method, data)
    with temporary_seed(cfg.seed, "standard"):
        standard = backbone(conv=Standard(), num_classes=len(data.classes))
    trial = experiment.Run(start, data, method, optimizer, scheduler, listener)
    if launch.needs_processes(cfg):
        trial.trainer(loggers=False)  # what Lightning refuses is one line here, and one of each process there
        resume.make_folder(start.job_dir)
        launch.start_processes(Path(__file__), start, listener)
        return sweep.Outcome(str(start.job_dir), "finished", resume.result_of(start))
    summary = trial.test_only() if cfg.test_only else trial.fit_and_test(standard)
    return sweep.Outcome(str(start.job_dir), "finished", summary)


if __name__ == "__main__":
    sys.exit(cli.start(main, CONF))
