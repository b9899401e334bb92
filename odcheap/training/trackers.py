"""Starts loggers (TensorBoard, W&B, MLflow), and logs everything except the metrics of each epoch.

These are the hyperparameters and the config as text at the start, the loss and the learning rate in each n-th step, and
the final metrics and the confusion matrix as a picture at the end. Other loggers get the hyperparameters and all
numbers. The callback `Record` logs the metrics of each epoch.
"""

import io
import re
import sys
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytorch_lightning as pl
from hydra.utils import instantiate
from PIL import Image
from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from odcheap.runs.resume import Start
from odcheap.runs.settings import flatten
from odcheap.training.summary import FINAL_FIGURES
from odcheap.utils.confusion_plot import plot_confusion, render_png
from odcheap.utils.console import say
from odcheap.utils.errors import OptionError, first_line

LOSS_EVERY = 50  # steps between two losses
CONFIG, CONFUSION = "config", "selected/confusion"  # names of the text and of the picture
RUN_ID_OPTIONS = {"mlflow": "run_id", "wandb": "id"}  # the option of a logger that names the run to continue
RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)


class StepLosses(pl.Callback):
    """Logs the training loss and the learning rate of each 50th step, or about ten times in a short epoch.

    Other steps are not logged, because the training has to wait for the GPU to read a loss. If there are several
    processes, only the loss of process 0's part of the batch is logged.

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


class LoggerRuns(pl.Callback):
    """Saves in each checkpoint the run ids of the loggers, so that a resumed run continues under the same ids.

    Attributes:
        ids: The run ids by the names of the loggers in `conf/logger`, such as "wandb". The caller sets the ids of the
            loggers that it has started.
    """

    def __init__(self) -> None:
        self.ids: dict[str, str] = {}

    def state_dict(self) -> dict[str, str]:
        return self.ids

    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        self.ids = state_dict | self.ids  # those of the checkpoint include loggers that are not used now


def saved_logger_run(start: Start, name: str) -> dict[str, str]:
    """Returns the keyword argument with which a logger continues its earlier run when a training is resumed.

    Args:
        start: The run's config and folder, and the checkpoint from which it continues, if there is one.
        name: The name of the logger in `conf/logger`.

    Returns:
        A dict with one entry, such as `{"id": "3kq8z1"}`. It is empty for a new run, for a run that continues in
        another folder, if the user has given an id, and for loggers without run ids.
    """
    # A checkpoint may come from a stranger: only an id that looks like one is used.
    if start.content is None or not start.in_own_folder or name not in RUN_ID_OPTIONS:
        return {}
    saved = start.content["callbacks"].get(LoggerRuns.__name__) or {}
    own = RUN_ID_OPTIONS[name]
    is_given = start.cfg.logger[name].get(own) is not None
    return {own: saved[name]} if name in saved and RUN_ID.fullmatch(saved[name]) and not is_given else {}


def build_loggers(start: Start) -> dict[str, Any]:
    """Builds the loggers of a run, by their names in `conf/logger`; a resumed run continues its earlier logger runs."""
    chosen = {name: part for name, part in start.cfg.logger.items() if part}
    return {name: instantiate(part, **saved_logger_run(start, name)) for name, part in chosen.items()}


def start_loggers(start: Start, loggers: Mapping[str, Any], settings: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Starts loggers, and sends the hyperparameters and the config to those that begin a new run.

    If a logger should continue an earlier run that does not exist any more, it begins a new run, and a line is printed.

    Args:
        start: The run's config and folder, and the checkpoint from which it continues, if there is one.
        loggers: Lightning's logger objects, which have not begun to write, by their names in `conf/logger`.
        settings: The config of the run as nested dicts, which the loggers get as hyperparameters.
        text: The same config as YAML, which the loggers get as a text.

    Returns:
        The logger objects that now write, by the same names. They are those of `loggers`, or new objects for those
        that begin a new run.

    Raises:
        OptionError: A logger cannot be started.
    """
    # The libraries of loggers raise errors of many classes, most of them because of an option.
    started = {}
    for name, logger in loggers.items():
        is_continued = bool(saved_logger_run(start, name))
        try:
            try:
                _ = logger.experiment
            except Exception as error:
                if not is_continued:
                    raise
                say(f"logger={name}: starts a new run, since the earlier one is not there ({first_line(error)})")
                logger, is_continued = instantiate(start.cfg.logger[name]), False
                _ = logger.experiment
        except Exception as error:
            raise OptionError("logger", name, f"cannot be started: {first_line(error)}") from error
        started[name] = logger
        if not is_continued:
            attempt(name, logger.log_hyperparams, flatten(dict(settings)))
            attempt(name, log_text, logger, text)
    return started


@contextmanager
def finish_loggers(loggers: Collection[str]) -> Generator[None]:
    """A context manager that closes the run of W&B at its end, if W&B is one of the loggers.

    Otherwise the next training in this process, such as the next run of a sweep, would be logged to the same W&B run.

    Args:
        loggers: The names of the loggers in `conf/logger`.
    """
    try:
        yield
    finally:
        if "wandb" in loggers and "wandb" in sys.modules:
            sys.modules["wandb"].finish()


def log_result(
    loggers: Mapping[str, Logger],
    summary: Mapping[str, Any],
    confusion: Sequence[Sequence[int]],
    classes: Sequence[str],
    step: int,
) -> None:
    """Logs the final metrics of a run and its confusion matrix.

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
        attempt(name, logger.log_metrics, figures, step)
        attempt(name, log_picture, logger, picture.convert("RGB"), step)
        if isinstance(logger, TensorBoardLogger):  # the figure by which its tab of hyperparameters compares runs
            attempt(name, logger.log_metrics, {"hp_metric": figures["selected/test_top1"]}, step)
            attempt(name, logger.experiment.flush)


def attempt(name: str, log: Callable[..., object], *arguments: Any) -> None:
    """Calls a function that logs something. If it raises an error, a warning is printed and the training goes on.

    Args:
        name: The name of the logger in `conf/logger`, for the warning.
        log: The function.
        *arguments: Its arguments.
    """
    try:
        log(*arguments)
    except Exception as error:  # the libraries of the trackers raise errors of any kind
        say(f"warning: logger={name}: something could not be logged ({first_line(error)})")


def log_text(logger: Any, text: str) -> None:
    """Logs the config, given as YAML, as text if the logger is that of TensorBoard, W&B or MLflow."""
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
