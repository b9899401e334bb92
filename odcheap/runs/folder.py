"""A run's folder: whether a run may use it, the removal of an older run's files, and the results in it."""

import os
import re
from pathlib import Path
from typing import Any

from odcheap.runs import status
from odcheap.runs.checkpoint_io import CHECKPOINT_NAME, checkpoint_order, list_checkpoints
from odcheap.runs.overrides import STORAGE_OPTIONS
from odcheap.runs.schemas import Config, Summary, Test, validate
from odcheap.runs.settings import flatten
from odcheap.utils.documents import read_json, read_yaml
from odcheap.utils.errors import OptionError

CONFIG, SUMMARY, TEST, STUDENT = "config.yaml", "summary.json", "test.json", "student.safetensors"
OUTPUTS = (CONFIG, SUMMARY, TEST, STUDENT, "metrics.csv", "confusion.csv", "split.csv")
FOLDERS = ("checkpoints", "tensorboard", "wandb")  # folders that a run makes
THREE_WAYS = "resume=auto continues it, overwrite=true replaces it, another job_dir keeps it"
EVENTS = "events.out.tfevents.*"
TEMPORARY = re.compile(r"\.(?P<name>.+)\.\d+(-[0-9a-f]{8})?\.part", re.ASCII)  # as `write_atomic` names them


def make_folder(job_dir: Path) -> None:
    """Makes the folder. Raises `OptionError` if it cannot be written."""
    try:
        job_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError("job_dir", job_dir, f"cannot be written ({error.strerror})") from error
    if not os.access(job_dir, os.W_OK):
        raise OptionError("job_dir", job_dir, "cannot be written")


def is_run_folder(folder: Path) -> bool:
    """Returns whether a run of odcheap has written into the folder.

    The mark is its `status.json`, or its `test.json` after `test_only=true`. A file of the same name from another
    program does not fit the schema.
    """
    try:
        if status.read_status(folder).get("pid") is not None:
            return True
        path = folder / TEST
        if not path.is_file():
            return False
        tested = validate(Test, read_json(path, "job_dir"), path, "job_dir")
        return None not in (tested.selected, tested.split, tested.versions)
    except (OptionError, OSError):
        return False


def check_usable(job_dir: Path) -> None:
    """Checks that a run may write into the folder: it is new, it is empty, or an earlier run has written it.

    Files whose names begin with a dot do not count.

    Raises:
        OptionError: The folder holds files that no run has written, or a link in it leads elsewhere.
    """
    if not job_dir.is_dir():  # new, or `make_folder` says what is wrong
        return
    try:
        names = sorted(name for name in os.listdir(job_dir) if not name.startswith("."))
    except OSError as error:
        raise OptionError("job_dir", job_dir, f"cannot be read ({error.strerror})") from error
    if names and not is_run_folder(job_dir):
        allowed = f"holds files that no run of odcheap has written ({names[0]}): name a new or an empty folder"
        raise OptionError("job_dir", job_dir, allowed)
    for name in FOLDERS:
        folder = job_dir / name
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise OptionError("job_dir", job_dir, f"its {name} must be a folder, not a link or a file")
    # TensorBoard's logger opens its files by itself, and would write through a link.
    if (job_dir / "tensorboard").is_dir() and any(map(Path.is_symlink, (job_dir / "tensorboard").iterdir())):
        raise OptionError("job_dir", job_dir, "its tensorboard holds a link, through which a run does not write")


def check_unoccupied(job_dir: Path, overwrite: bool) -> None:
    """Raises `OptionError` if the folder holds a run, unless `overwrite` allows to replace it."""
    if overwrite:
        return
    if read_summary(job_dir) is not None:
        raise OptionError("job_dir", job_dir, f"holds a finished run; {THREE_WAYS}")
    if list_checkpoints(job_dir):
        raise OptionError("job_dir", job_dir, f"holds an unfinished run; {THREE_WAYS}")


def list_outputs(job_dir: Path) -> list[Path]:
    """Returns the files of a run that are there, without its status: results, checkpoints, events of TensorBoard."""
    paths = list_checkpoints(job_dir) + sorted((job_dir / "tensorboard").glob(EVENTS))
    paths += [job_dir / name for name in OUTPUTS]
    return [path for path in paths if os.path.lexists(path)]


def read_versions(job_dir: Path) -> dict[str, tuple[int, int]]:
    """Returns the names of a run's files, with values that change when a file is written again."""
    versions = {}
    for path in list_outputs(job_dir):
        entry = path.lstat()
        versions[str(path.relative_to(job_dir))] = entry.st_ino, entry.st_mtime_ns
    return versions


def remove_partial_files(job_dir: Path) -> None:
    """Removes temporary files of runs that were killed while they wrote; another program's `.*.part` files stay."""
    for folder in (job_dir, job_dir / "checkpoints"):
        for path in folder.glob(".*.part"):
            match = TEMPORARY.fullmatch(path.name)
            is_own = match is not None and (
                match["name"] in (*OUTPUTS, status.FILE_NAME)
                if folder == job_dir
                else CHECKPOINT_NAME.fullmatch(match["name"])
            )
            if is_own and path.is_file() and not path.is_symlink():
                path.unlink(missing_ok=True)


def remove_outputs(job_dir: Path, keep_until: Path | None = None) -> None:
    """Removes the files of an older run.

    Args:
        job_dir: The folder.
        keep_until: A checkpoint of the folder. It, the earlier ones and the files of TensorBoard are kept.
    """
    for path in list_outputs(job_dir):
        if keep_until is not None and path.parent != job_dir:
            is_newer = path.suffix == ".ckpt" and checkpoint_order(path) > checkpoint_order(keep_until)
            if not is_newer:
                continue
        if path.is_file() or path.is_symlink():
            path.unlink(missing_ok=True)


def read_summary(job_dir: Path) -> dict[str, Any] | None:
    """Returns the content of a finished run's `summary.json`, or None if the run is not finished.

    Raises:
        OptionError: The file is not one that odcheap writes.
    """
    path = job_dir / SUMMARY
    if not os.path.lexists(path):
        return None
    try:
        content = read_json(path, "job_dir")
        return content if validate(Summary, content, path, "job_dir").finished else None
    except OptionError as error:
        reason = str(error).partition(f"{SUMMARY}: ")[2].removeprefix("cannot be read ")
        raise OptionError("job_dir", job_dir, f"its {SUMMARY} cannot be read: {reason}") from error


def read_config(path: Path, option: str) -> dict[str, Any]:
    """Returns the content of a run's `config.yaml`; interpolations in it stay text.

    Raises:
        OptionError: The file is not one that odcheap writes.
    """
    content = read_yaml(path, option)
    if not isinstance(content, dict):
        raise OptionError(option, path, "is not the config of a run")
    try:
        validate(Config, content, path, option)
    except OptionError as error:
        reason = str(error).partition(f"{path}: ")[2]
        raise OptionError(option, path, f"is not the config of a run ({reason})") from error
    return content


def read_options(config: Path, option: str = "job_dir") -> dict[str, Any]:
    """Returns the options in a run's `config.yaml` that determine its results, by dotted names.

    Options about where the run is stored are left out, and so are options that repeat a root option (`data.seed`).
    """
    options = flatten(read_config(config, option))
    job_dir = options.get("job_dir")
    own = {key: value for key, value in options.items() if key not in STORAGE_OPTIONS}
    own = {key: value for key, value in own.items() if job_dir is None or job_dir not in str(value)}

    def is_repeated(key: str, value: Any) -> bool:
        name = key.rpartition(".")[2]
        return "." in key and name in own and own[name] == value

    return {key: value for key, value in own.items() if not is_repeated(key, value)}
