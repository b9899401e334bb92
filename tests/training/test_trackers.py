"""What the trackers of experiments show of a run."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import TINY
from omegaconf import OmegaConf
from PIL import Image
from pytorch_lightning.loggers import WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from odcheap.runs.resume import Start
from odcheap.runs.settings import RunConfig
from odcheap.training import trackers

FINAL = {"selected/val_top1", "selected/test_top1", "selected/test_top5", "selected/ensemble_test_top1"}
LOSSES = {"train/loss_step", "train/loss", "val/loss", "lr"}


@pytest.mark.filterwarnings("ignore")  # of MLflow and its database
def test_tensorboard_and_mlflow_get_everything(command, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    # MLflow keeps databases open by their names, so a relative name would be the database of an earlier test's folder.
    database = f"sqlite:///{tmp_path}/mlflow.db"
    loggers = ["logger=[tensorboard,mlflow]", "trainer.max_epochs=2", f"job_dir={tmp_path}/run"]
    result = command(*TINY[:-1], *loggers, f"logger.mlflow.tracking_uri={database}")
    assert result.status == 0, result.err
    assert "warning" not in result.out

    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"images": 0, "tensors": 0}).Reload()
    tags = board.Tags()
    assert FINAL | LOSSES | {"hp_metric"} <= set(tags["scalars"])
    assert len(board.Scalars("train/loss_step")) > len(board.Scalars("train/loss")) == 2
    assert board.Scalars("hp_metric")[-1].value == board.Scalars("selected/test_top1")[0].value
    assert tags["images"] == ["selected/confusion"]
    assert "config/text_summary" in tags["tensors"]
    assert b"max_epochs: 2" in board.Tensors("config/text_summary")[0].tensor_proto.string_val[0]

    client = mlflow.MlflowClient(database)
    (run,) = client.search_runs([client.get_experiment_by_name("odcheap").experiment_id])
    assert run.data.metrics.keys() >= FINAL | LOSSES
    assert run.data.params["trainer.max_epochs"] == "2"
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {"config.yaml", "confusion.png"}

    # A continued run has its hyperparameters already, and MLflow refuses to change them.
    result = command(
        f"resume={tmp_path}/run", "trainer.max_epochs=3", "logger=mlflow", f"logger.mlflow.tracking_uri={database}"
    )
    assert result.status == 0, result.err
    assert "warning" not in result.out


@pytest.fixture
def wandb_logger():
    """A logger of W&B that only lists what it gets."""

    class Recorder(WandbLogger):
        def __init__(self):
            self.got = SimpleNamespace(metrics={}, text=None, images=None, params=None)

        experiment = None

        def log_metrics(self, metrics, step=None):
            self.got.metrics |= metrics

        def log_hyperparams(self, params):
            self.got.params = params

        def log_text(self, key, columns=None, data=None, dataframe=None, step=None):
            self.got.text = (key, columns, data)

        def log_image(self, key, images, step=None, **kwargs):
            self.got.images = (key, images)

    return Recorder()


SUMMARY = {"selected": {"val_top1": 0.5, "test_top1": 0.25, "test_top5": None}, "teacher": None}


def test_wandb_gets_text_picture_and_figures(wandb_logger):
    settings = {"trainer": {"max_epochs": 2}, "seed": 0}
    start = Start(RunConfig(OmegaConf.create(), {}, []), Path("run"))
    assert trackers.start_loggers(start, {"wandb": wandb_logger}, settings, "seed: 0\n") == {"wandb": wandb_logger}
    assert wandb_logger.got.params == {"trainer.max_epochs": 2, "seed": 0}
    assert wandb_logger.got.text == ("config", ["config.yaml"], [["seed: 0\n"]])
    trackers.log_result({"wandb": wandb_logger}, SUMMARY, [[3, 1], [0, 4]], ["cat", "dog"], step=7)
    assert wandb_logger.got.metrics == {"selected/val_top1": 0.5, "selected/test_top1": 0.25}
    name, (picture,) = wandb_logger.got.images
    assert name == "selected/confusion"
    assert isinstance(picture, Image.Image)


def test_a_tracker_that_cannot_be_reached_does_not_end_a_run(wandb_logger, monkeypatch, capsys):
    def fails(*given, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(type(wandb_logger), "log_metrics", fails)
    trackers.log_result({"wandb": wandb_logger}, SUMMARY, [[3, 1], [0, 4]], ["cat", "dog"], step=7)
    assert capsys.readouterr().out == "warning: logger=wandb: something could not be logged (no network)\n"
    assert wandb_logger.got.images is not None
