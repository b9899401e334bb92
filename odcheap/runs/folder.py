"""The folder of a run (`job_dir`): which files it contains, its checkpoints, and whether a run may use it."""

import os
import re
from pathlib import Path
from typing import Any

from odcheap.runs import status
from odcheap.runs.schemas import Checkpoint, Config, Summary, Test, validate
from odcheap.runs.settings import STORAGE_OPTIONS, complete_settings, flatten
from odcheap.utils.console import say
from odcheap.utils.errors import OptionError
from odcheap.utils.files import read_json, read_torch, read_yaml, verify_checksum

CONFIG, SUMMARY, TEST, STUDENT = "config.yaml", "summary.json", "test.json", "student.safetensors"
TRAINING_IMAGES = "training_images.json"
OUTPUTS = (CONFIG, SUMMARY, TEST, STUDENT, "metrics.csv", "confusion.csv", "split.csv", TRAINING_IMAGES)
FOLDERS = ("checkpoints", "tensorboard", "wandb")  # folders that a run makes
TWO_WAYS = "overwrite=true replaces it, another job_dir keeps it"
MORE_EPOCHS = "resume=auto with a larger trainer.max_epochs trains it longer"
EVENTS = "events.out.tfevents.*"
TEMPORARY = re.compile(r"\.(?P<name>.+)\.\d+(-[0-9a-f]{8})?\.part", re.ASCII)  # as `write_atomic` names them
CHECKPOINT_NAME = re.compile(r"epoch-(\d{4,})(?:-step-(\d{7,}))?\.ckpt", re.ASCII)


def read_checkpoint(path: str | Path, option: str = "resume") -> dict[str, Any]:
    """Reads a checkpoint of a run, and checks its checksum and the types of its main entries.

    Args:
        path: The file.
        option: The name of the option that gave the file, for messages.

    Returns:
        The content of the checkpoint as Lightning has saved it. It has at least the entries of `schemas.Checkpoint`.

    Raises:
        OptionError: The file is damaged, or it is not a checkpoint of an odcheap run.
    """
    verify_checksum(path, option)
    content = read_torch(path, option)
    try:  # a file from an untrusted source may have a correct checksum
        validate(Checkpoint, content, path, option)
    except OptionError as error:
        raise OptionError(option, path, f"not a checkpoint of an odcheap run ({error.allowed})") from error
    return content


def epoch_path(job_dir: Path, epoch: int) -> Path:
    """Returns the path of the checkpoint that is written at the end of an epoch; `epoch` is counted from 0."""
    return job_dir / "checkpoints" / f"epoch-{epoch:04d}.ckpt"


def step_path(job_dir: Path, epoch: int, step: int) -> Path:
    """Returns the path of a checkpoint in the middle of an epoch (from 0), after `step` of its batches."""
    return job_dir / "checkpoints" / f"epoch-{epoch:04d}-step-{step:07d}.ckpt"


def checkpoint_order(path: Path) -> tuple[int, float]:
    """Returns the epoch and the step in the name of a checkpoint, by which checkpoints are sorted.

    If the name has no step, the checkpoint is from the end of an epoch, and the step is infinity.

    Example:
        >>> checkpoint_order(Path("epoch-9999.ckpt")) < checkpoint_order(Path("epoch-10000-step-0000007.ckpt"))
        True
    """
    match = CHECKPOINT_NAME.fullmatch(path.name)
    assert match is not None, path
    epoch, step = match.groups()
    return int(epoch), float("inf") if step is None else int(step)


def list_checkpoints(job_dir: Path) -> list[Path]:
    """Returns the paths of a run's checkpoints, sorted from the oldest to the newest; other files are ignored."""
    folder = job_dir / "checkpoints"
    paths = [path for path in folder.glob("epoch-*.ckpt") if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(paths, key=checkpoint_order)


def prune_checkpoints(job_dir: Path, keep: int, selected: Path | None) -> None:
    """Removes the older checkpoints of a run, and keeps the newest ones.

    Args:
        job_dir: The run's folder.
        keep: The number of checkpoints to keep.
        selected: A checkpoint that is kept even if it is older than these; None if there is none.
    """
    for path in list_checkpoints(job_dir)[:-keep]:
        if path != selected:
            path.unlink(missing_ok=True)


def find_newest_usable(job_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """Returns the path and the content of a run's newest checkpoint that can be read; None if there is none.

    If a newer checkpoint is damaged, it is skipped, and a line that says why is printed.
    """
    for path in reversed(list_checkpoints(job_dir)):
        try:
            return path, read_checkpoint(path)
        except OptionError as error:
            say(f"skipped: {error}")
    return None


def make_folder(folder: Path, option: str = "job_dir") -> None:
    """Makes a folder, and the folders above it, if they do not exist.

    Args:
        folder: The folder.
        option: The name of the option that gave the folder, for messages.

    Raises:
        OptionError: The folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(option, folder, f"cannot be written ({error.strerror})") from error
    if not os.access(folder, os.W_OK):
        raise OptionError(option, folder, "cannot be written")


def is_run_folder(folder: Path) -> bool:
    """Returns whether a run of odcheap has written into the folder.

    Every run writes `status.json`, except an evaluation with `test_only=true`, which writes `test.json`. The content of
    these files is checked, since another program may use the same file names. No exception is raised.
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
    """Checks that a run may write into a folder.

    It may if the folder does not exist, if the folder is empty (files whose names begin with a dot do not count), or if
    a run has written into it before.

    Raises:
        OptionError: The folder contains files but no run has written into it, or it contains a symbolic link that would
            let a run write elsewhere.
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

    # A run writes below these folders, and must not write through a link.
    for name in FOLDERS:
        folder = job_dir / name
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise OptionError("job_dir", job_dir, f"its {name} must be a folder, not a link or a file")
    # TensorBoard's logger opens its files by itself, and would write through a link.
    if (job_dir / "tensorboard").is_dir() and any(map(Path.is_symlink, (job_dir / "tensorboard").iterdir())):
        raise OptionError("job_dir", job_dir, "its tensorboard holds a link, through which a run does not write")


def check_unoccupied(job_dir: Path, overwrite: bool) -> None:
    """Raises `OptionError` if the folder contains a run, finished or not, and `overwrite` is false."""
    if overwrite:
        return
    if read_summary(job_dir) is not None:
        raise OptionError("job_dir", job_dir, f"holds a finished run; {TWO_WAYS}, {MORE_EPOCHS}")
    if list_checkpoints(job_dir):
        raise OptionError("job_dir", job_dir, f"holds an unfinished run; resume=auto continues it, {TWO_WAYS}")


def list_outputs(job_dir: Path) -> list[Path]:
    """Returns the paths of the files that a run has written: results, checkpoints and events, but not its status."""
    paths = list_checkpoints(job_dir) + sorted((job_dir / "tensorboard").glob(EVENTS))
    paths += [job_dir / name for name in OUTPUTS]
    return [path for path in paths if os.path.lexists(path)]


def read_versions(job_dir: Path) -> dict[str, tuple[int, int]]:
    """Returns the inode and modification time (ns) of each existing file of a run, by its path relative to `job_dir`.

    They change if the file is written again.
    """
    versions = {}
    for path in list_outputs(job_dir):
        entry = path.lstat()
        versions[str(path.relative_to(job_dir))] = entry.st_ino, entry.st_mtime_ns
    return versions


def remove_partial_files(job_dir: Path) -> None:
    """Removes the temporary files of runs that were killed while writing; other files `.*.part` are kept."""
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
    """Removes the files of an earlier run from its folder.

    Args:
        job_dir: The folder of the run.
        keep_until: A checkpoint to continue from: it, earlier checkpoints and TensorBoard's files are kept. None to
            keep nothing.
    """
    for path in list_outputs(job_dir):
        if keep_until is not None and path.parent != job_dir:
            is_newer = path.suffix == ".ckpt" and checkpoint_order(path) > checkpoint_order(keep_until)
            if not is_newer:
                continue
        if path.is_file() or path.is_symlink():
            path.unlink(missing_ok=True)


def read_summary(job_dir: Path) -> dict[str, Any] | None:
    """Returns the content of `summary.json`; None if there is no such file, or if it says that the run is not finished.

    Raises:
        OptionError: The file is damaged, or another program has written it.
    """
    path = job_dir / SUMMARY
    if not os.path.lexists(path):
        return None
    try:
        content = read_json(path, "job_dir")
        return content if validate(Summary, content, path, "job_dir").finished else None
    except OptionError as error:
        reason = error.allowed.removeprefix("cannot be read ")
        raise OptionError("job_dir", job_dir, f"its {SUMMARY} cannot be read: {reason}") from error


def read_config(path: Path, option: str) -> dict[str, Any]:
    """Reads the `config.yaml` of a run, and returns its options as nested dicts.

    Interpolations such as `${seed}` are returned as text; they are not replaced by their values.

    Args:
        path: The path of the `config.yaml`.
        option: The name of the option that gave the file, for messages.

    Raises:
        OptionError: The file is damaged, or another program has written it.
    """
    content = read_yaml(path, option)
    if not isinstance(content, dict):
        raise OptionError(option, path, "is not the config of a run")
    try:
        validate(Config, content, path, option)
    except OptionError as error:
        raise OptionError(option, path, f"is not the config of a run ({error.allowed})") from error
    return content


def read_options(config: Path, option: str = "job_dir") -> dict[str, Any]:
    """Reads a run's `config.yaml`, and returns those options that determine the results of the run.

    Options that only say where or how the run is stored are left out. An option in a group is also left out if it only
    repeats an option of the same name without a group: `data.seed` always equals `seed`.

    Args:
        config: The path of the `config.yaml`.
        option: The name of the option that gave the file, for messages.

    Returns:
        A dict from the dotted names of options, such as `data.name`, to their values.
    """
    # Options whose values contain the run's folder say where something is stored, too.
    options = flatten(complete_settings(read_config(config, option)))
    job_dir = options.get("job_dir")
    own = {key: value for key, value in options.items() if key not in STORAGE_OPTIONS}
    own = {key: value for key, value in own.items() if job_dir is None or job_dir not in str(value)}

    def is_repeated(key: str, value: Any) -> bool:
        name = key.rpartition(".")[2]
        return "." in key and name in own and own[name] == value

    return {key: value for key, value in own.items() if not is_repeated(key, value)}
