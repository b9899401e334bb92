"""What TensorBoard, W&B and MLflow get besides the metrics of each epoch.

At the start these are the hyperparameters and the config as text, in each n-th step the loss and the learning rate, and
at the end the final figures and the confusion matrix as a picture. Other loggers get the hyperparameters and all
numbers. `logger.log_metrics` of `Record` writes the metrics of each epoch.
"""

import io
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from odcheap.runs.settings import flatten
from odcheap.utils.confusion_plot import plot_confusion, render_png
from odcheap.utils.console import say
from odcheap.utils.errors import first_line

LOSS_EVERY = 50  # steps between two losses
CONFIG, CONFUSION = "config", "selected/confusion"  # names of the text and of the picture
FINAL_FIGURES = ("val_top1", "test_top1", "test_top5", "test_balanced_accuracy")


class StepLosses(pl.Callback):
    """Logs the training loss and the learning rate of each 50th step, and ten times in a short epoch.

    Not every step is read, since to read a loss from a GPU takes as long as a step. With several processes the loss is
    that of process 0's part of the batch.

    Args:
        read_lr: A function that returns the learning rate of the current step.
    """

    def __init__(self, read_lr: Callable[[], float]):
        self.read_lr = read_lr

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = max(1, min(LOSS_EVERY, int(trainer.num_training_batches) // 10))
        if not trainer.loggers or not trainer.is_global_zero or trainer.global_step % every:
            return
        result = outputs["result"]
        if result.taken:
            values = {"train/loss_step": float(result.terms["loss"]), "lr": self.read_lr()}
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)


def log_start(
    loggers: Mapping[str, Logger], settings: Mapping[str, Any], text: str, continued: Collection[str] = ()
) -> None:
    """Logs the hyperparameters and the config.

    Args:
        loggers: The loggers by name.
        settings: The config of the run, as nested dicts.
        text: The config as YAML.
        continued: Names of loggers that continue a recorded run, which has them already.
    """
    for name, logger in loggers.items():
        if name not in continued:
            attempt(name, lambda logger=logger: logger.log_hyperparams(flatten(dict(settings))))
            attempt(name, lambda logger=logger: log_text(logger, text))


def log_result(
    loggers: Mapping[str, Logger],
    summary: Mapping[str, Any],
    confusion: Sequence[Sequence[int]],
    classes: Sequence[str],
    step: int,
) -> None:
    """Logs the final figures and the confusion matrix.

    Args:
        loggers: The loggers by name.
        summary: The content of `summary.json`.
        confusion: The confusion matrix of the selected student on the test images, (K, K).
        classes: The names of the classes.
        step: The number of optimizer steps of the run.
    """
    figures = {f"selected/{name}": summary["selected"].get(name) for name in FINAL_FIGURES}
    for member in ("teacher", "ensemble"):
        figures[f"selected/{member}_test_top1"] = (summary.get(member) or {}).get("test_top1")
    figures = {name: value for name, value in figures.items() if value is not None}
    picture = Image.open(io.BytesIO(render_png(plot_confusion(confusion, classes))))
    for name, logger in loggers.items():
        attempt(name, lambda logger=logger: logger.log_metrics(figures, step=step))
        attempt(name, lambda logger=logger: log_picture(logger, picture.convert("RGB"), step))
        if isinstance(logger, TensorBoardLogger):  # the figure by which its tab of hyperparameters compares runs
            own = {"hp_metric": figures["selected/test_top1"]}
            attempt(name, lambda logger=logger, own=own: logger.log_metrics(own, step=step))
            attempt(name, logger.experiment.flush)


def attempt(name: str, log: Callable[[], object]) -> None:
    """Calls a function that logs; an error becomes a printed warning, so that it does not end the training.

    Args:
        name: The name of the logger in `conf/logger`, for the warning.
        log: The function.
    """
    try:
        log()
    except Exception as error:  # the libraries of the trackers raise errors of any kind
        say(f"warning: logger={name}: something could not be logged ({first_line(error)})")


def log_text(logger: Any, text: str) -> None:
    """Logs the config as text, if the logger is that of TensorBoard, W&B or MLflow.

    Args:
        logger: The logger.
        text: The config as YAML.
    """
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text(CONFIG, f"```yaml\n{text}\n```")
    elif isinstance(logger, WandbLogger):
        logger.log_text(CONFIG, columns=["config.yaml"], data=[[text]])
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_text(logger.run_id, text, "config.yaml")


def log_picture(logger: Any, picture: Image.Image, step: int) -> None:
    """Logs the confusion matrix as a picture, if the logger is that of TensorBoard, W&B or MLflow.

    Args:
        logger: The logger.
        picture: The picture, RGB.
        step: The number of optimizer steps of the run, which only TensorBoard gets.
    """
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(CONFUSION, np.asarray(picture), step, dataformats="HWC")
    elif isinstance(logger, WandbLogger):
        logger.log_image(CONFUSION, [picture])
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_image(logger.run_id, picture, artifact_file="confusion.png")
