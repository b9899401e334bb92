"""A run's folder: whether a run may use it, the removal of an older run's files, and the results in it."""

import json
import os
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from odcheap.runs.checkpoint_io import list_checkpoints
from odcheap.runs.overrides import STORAGE_OPTIONS
from odcheap.runs.settings import flatten
from odcheap.utils.errors import OptionError

CONFIG, SUMMARY, TEST, STUDENT = "config.yaml", "summary.json", "test.json", "student.safetensors"
OUTPUTS = (CONFIG, SUMMARY, TEST, STUDENT, "metrics.csv", "confusion.csv", "split.csv")
THREE_WAYS = "resume=auto continues it, overwrite=true replaces it, another job_dir keeps it"


def make_folder(job_dir: Path) -> None:
    """Makes the folder. Raises `OptionError` if it cannot be written."""
    try:
        job_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError("job_dir", job_dir, f"cannot be written ({error.strerror})") from error
    if not os.access(job_dir, os.W_OK):
        raise OptionError("job_dir", job_dir, "cannot be written")


def check_unoccupied(job_dir: Path, overwrite: bool) -> None:
    """Raises `OptionError` if the folder holds a run, unless `overwrite` allows to replace it."""
    if overwrite:
        return
    if read_summary(job_dir) is not None:
        raise OptionError("job_dir", job_dir, f"holds a finished run; {THREE_WAYS}")
    if list_checkpoints(job_dir):
        raise OptionError("job_dir", job_dir, f"holds an unfinished run; {THREE_WAYS}")


def remove_partial_files(job_dir: Path) -> None:
    """Removes temporary files of processes that were killed while they wrote."""
    for folder in (job_dir, job_dir / "checkpoints"):
        for path in filter(Path.is_file, folder.glob(".*.part")):
            path.unlink(missing_ok=True)


def remove_outputs(job_dir: Path, keep_until: Path | None = None) -> None:
    """Removes the files of an older run.

    Args:
        job_dir: The folder.
        keep_until: A checkpoint of the folder. It, the earlier ones and the files of TensorBoard are kept.
    """
    checkpoints = list_checkpoints(job_dir)
    if keep_until is None:
        old = checkpoints + list((job_dir / "tensorboard").rglob("events.out.tfevents.*"))
    else:
        old = [path for path in checkpoints if path.name > keep_until.name]
    for path in old + [job_dir / name for name in OUTPUTS]:
        path.unlink(missing_ok=True)


def read_summary(job_dir: Path) -> dict[str, Any] | None:
    """Returns the content of a finished run's `summary.json`, or None if the run is not finished."""
    try:
        summary = json.loads((job_dir / SUMMARY).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise OptionError("job_dir", job_dir, f"its summary.json cannot be read ({error})") from error
    return summary if isinstance(summary, dict) and summary.get("finished") else None


def read_options(config: Path) -> dict[str, Any]:
    """Returns the options in a run's `config.yaml` that determine its results, by dotted names.

    Options about where the run is stored are left out, and so are options that repeat a root option (`data.seed`).
    """
    options = flatten(OmegaConf.to_container(OmegaConf.load(config), resolve=False))
    job_dir = options["job_dir"]
    own = {key: value for key, value in options.items() if key not in STORAGE_OPTIONS and job_dir not in str(value)}

    def is_repeated(key: str, value: Any) -> bool:
        name = key.rpartition(".")[2]
        return "." in key and name in own and own[name] == value

    return {key: value for key, value in own.items() if not is_repeated(key, value)}
