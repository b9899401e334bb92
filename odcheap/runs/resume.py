"""Decides whether a run is resumed, from which checkpoint, and with which options.

Beside Lightning's own state, a checkpoint contains the state of three objects. The loader (`ResumableBatches`) saves
the position within the epoch. The `DistillationModule` saves the metrics of the current epoch. The callback `Record`,
which writes the checkpoints, saves the metrics of earlier epochs and which student and epoch are selected so far.

A checkpoint may come from a stranger. Only options in a fixed list are therefore taken from it, and only plain values.
Options that say where to write, where to connect, or what else to run are taken from the command line and `conf/` only.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig

from odcheap.runs.folder import (
    CHECKPOINT_NAME,
    check_unoccupied,
    check_usable,
    epoch_path,
    find_newest_usable,
    is_run_folder,
    list_checkpoints,
    read_checkpoint,
    read_summary,
    read_versions,
    remove_outputs,
    remove_partial_files,
)
from odcheap.runs.settings import STORAGE_OPTIONS, RunConfig, find_override, flatten, override_key, to_dict
from odcheap.runs.status import write_status
from odcheap.utils.console import say
from odcheap.utils.errors import OptionError
from odcheap.utils.files import write_atomic
from odcheap.utils.parts import PART_NAME
from odcheap.utils.text import escape_control_chars

# Options and groups that define the experiment. Everything else in a checkpoint's overrides is left out.
EXPERIMENT_OPTIONS = ("num_stu", "students", "seed", "select", "on_nonfinite", "max_skipped", "experiment")
EXPERIMENT_OPTIONS += ("trainer.max_epochs", "trainer.precision", "trainer.accumulate_grad_batches")
EXPERIMENT_OPTIONS += ("trainer.gradient_clip_val", "trainer.gradient_clip_algorithm", "trainer.limit_train_batches")
EXPERIMENT_GROUPS = ("block_type", "backbone", "method", "data", "augment", "optimizer", "scheduler")
# Options of these groups that say on which machine a run computes, or that let a loader write files.
MACHINE_OPTIONS = ("data.workers", "data.load.download", "data.load.read_only")
DATA_FOLDERS = ("data_dir", "data.load.data_dir")
READ_ONLY = "data.load.read_only=true"
# These are paths. They are taken only if something exists there already.
PATH_OPTIONS = (*DATA_FOLDERS, "backbone.pretrained", "method.teacher_weights")
# Options that belong to one command and are left out without a message.
SILENT_OPTIONS = ("job_dir", "resume", "overwrite", "test_only", "weights", "weights_head", "data.load.read_only")
OPTION_NAME = re.compile(r"[A-Za-z]\w*")
PLAIN_TEXT = re.compile(r"[\w.+*?\[\]@ -]*")
LIBRARY_NETWORK = re.compile(r"(torchvision|timm)/[\w.+-]+")
MAX_DEPTH = 4  # of nested lists
# Options that may differ when a run is resumed: they determine where it runs, but not its results.
CHANGEABLE_OPTIONS = (*STORAGE_OPTIONS, *PATH_OPTIONS, "trainer", "experiment", "on_nonfinite", "max_skipped")
CHANGEABLE_OPTIONS += ("data.load.read_only", "data.workers", "data.max_broken", "together", "capture", "kernels")
FIXED_OPTIONS = ("trainer.limit_train_batches",)  # an exception: a checkpoint may be from the middle of an epoch


@dataclass(frozen=True)
class Start:
    """How a run begins: anew or from a checkpoint, in which folder, and with which options. `plan_start` returns it.

    Attributes:
        config: The run's config. If the run is resumed, this includes the overrides with which it was started.
        job_dir: The run's folder.
        checkpoint: The checkpoint from which the run continues; None for a new run.
        content: The content of the checkpoint; None for a new run.
        in_own_folder: Whether the checkpoint is in `job_dir`.
        is_finished: Whether all epochs are done and the results are written.
        versions: The run's files in `job_dir` at the time of the decision, as `read_versions` returns them. They show
            later whether another process has written there.
    """

    config: RunConfig
    job_dir: Path
    checkpoint: Path | None = None
    content: dict[str, Any] | None = None
    in_own_folder: bool = False
    is_finished: bool = False
    versions: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def cfg(self) -> DictConfig:
        """The options of the run: `config.cfg`."""
        return self.config.cfg

    @property
    def saved_epochs(self) -> Any:
        """The value of the option `trainer.max_epochs` when the checkpoint was written; None for a new run."""
        return flatten(self.content["odcheap"]["config"]).get("trainer.max_epochs") if self.content else None

    @property
    def selected_candidate(self) -> int | None:
        """The number of the best network so far, or None. The students come first, then their moving averages."""
        if self.content is None or not self.content["callbacks"]["Record"]["history"]:
            return None
        return self.content["callbacks"]["Record"]["selected"]["candidate"]


def plan_start(
    config: RunConfig,
    compose: Callable[[Sequence[str]], RunConfig],
    default_resume: str | None = None,
    is_restarted: bool = False,
) -> Start:
    """Decides whether a new run starts or an earlier run continues, and from which checkpoint. Nothing is written.

    If a run continues, `compose` is called with the overrides with which it was started, followed by those that are on
    the command line now. An override of now wins, but it may only change an option that does not change the experiment,
    such as an option of the trainer or a path.

    Args:
        config: The config that was composed from the options on the command line.
        compose: A function that composes a config from overrides and checks it.
        default_resume: The value to use for the option `resume` if the user has not given it.
        is_restarted: True if a cluster has interrupted this command and has started it again. If there is a checkpoint
            in `job_dir`, the run then continues from the newest one, even if `resume` names another checkpoint.

    Raises:
        OptionError: An override would change the experiment that is resumed, a checkpoint is missing or damaged, or
            `job_dir` contains a run that must not be replaced.
    """
    # Find the checkpoint. Without one a new run starts.
    cfg = config.cfg
    resume = cfg.resume or (None if cfg.overwrite else default_resume)
    if is_restarted and not cfg.overwrite and list_checkpoints(Path(cfg.job_dir)):
        resume = "auto"
    if cfg.test_only and not (cfg.resume or cfg.weights):
        raise OptionError("test_only", True, "needs resume=JOB_DIR, resume=CHECKPOINT or weights=FILE")
    job_dir, own_dir = Path(cfg.job_dir), None
    versions = read_versions(job_dir)  # read before anything is decided by the files
    located = None
    if resume and (cfg.resume or not cfg.test_only):
        own_dir = find_own_folder(cfg, resume)
        versions = read_versions(own_dir) if own_dir is not None else versions
        located = locate_checkpoint(cfg, resume)
    if located is None:
        check_usable(job_dir)
        if not cfg.test_only:
            check_unoccupied(job_dir, cfg.overwrite)
        return Start(config, job_dir, versions=versions)

    # The run continues in its own folder, unless another one was given.
    checkpoint, content = located
    is_given = resume != "auto" and any(override_key(override) == "job_dir" for override in config.overrides)
    job_dir = Path(cfg.job_dir) if is_given else own_dir
    if job_dir is None:
        raise OptionError("resume", resume, "is in no run's folder: give the folder of the continued run with job_dir=")
    in_own_folder = own_dir is not None and job_dir.resolve() == own_dir.resolve()
    if not in_own_folder:
        versions = read_versions(job_dir)
    check_usable(job_dir)

    # Apply the old overrides and the new ones. Refuse to overwrite newer checkpoints or another run.
    merged = reapply_overrides(content["odcheap"], config.overrides, job_dir, compose)
    if cfg.test_only:
        return Start(merged, job_dir, checkpoint, content, in_own_folder, versions=versions)
    if not in_own_folder:
        check_unoccupied(job_dir, cfg.overwrite)
    elif Path(str(resume)).is_file():
        check_newest(checkpoint, cfg.overwrite)
    all_epochs_done = content["epoch"] + 1 >= merged.cfg.trainer.max_epochs
    is_finished = in_own_folder and all_epochs_done and read_summary(job_dir) is not None
    return Start(merged, job_dir, checkpoint, content, in_own_folder, is_finished, versions)


def find_own_folder(cfg: DictConfig, resume: str) -> Path | None:
    """Returns the folder of the run that the value of `resume` names; None if it names something outside such a folder.

    Args:
        cfg: The config of the new command, which has the folder for "auto".
        resume: The value of the option: "auto", the folder of a run, or the path of a checkpoint.
    """
    if resume == "auto":
        return Path(cfg.job_dir)
    if Path(resume).is_dir():
        folder = Path(resume)
    else:
        checkpoint = Path(resume).resolve()
        if checkpoint.parent.name != "checkpoints" or not CHECKPOINT_NAME.fullmatch(checkpoint.name):
            return None
        folder = checkpoint.parent.parent
    return folder if is_run_folder(folder) else None


def locate_checkpoint(cfg: DictConfig, resume: str) -> tuple[Path, dict[str, Any]] | None:
    """Reads the checkpoint from which the option `resume` says to continue.

    If the option names the folder of a run, the newest checkpoint that can be read is used. With `test_only`, it is the
    checkpoint of the epoch that the run has selected.

    Args:
        cfg: The config.
        resume: The value of the option: "auto" for the folder `job_dir`, the folder of a run, or the path of a
            checkpoint.

    Returns:
        The path of the checkpoint and its content; None if `resume` is "auto" and there is no checkpoint.

    Raises:
        OptionError: There is no checkpoint that can be read.
    """
    if resume != "auto" and not Path(resume).is_dir():
        return Path(resume).resolve(), read_checkpoint(resume)
    job_dir = Path(cfg.job_dir) if resume == "auto" else Path(resume)
    usable = find_selected_checkpoint(job_dir) if cfg.test_only else find_newest_usable(job_dir)
    if usable is None:
        if resume == "auto" and not cfg.test_only:
            return None
        raise OptionError("resume", resume, f"{job_dir} holds no usable checkpoint in checkpoints/")
    return usable


def find_selected_checkpoint(job_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """Reads the checkpoint of the epoch that a run has selected; returns its path and content, or None without one."""
    newest = find_newest_usable(job_dir)
    if newest is None:
        return None
    path = epoch_path(job_dir, newest[1]["callbacks"]["Record"]["selected"]["epoch"])
    return newest if path == newest[0] else (path, read_checkpoint(path))


def check_newest(checkpoint: Path, overwrite: bool) -> None:
    """Raises `OptionError` if a checkpoint's folder has newer ones, which would be lost, unless `overwrite` is true."""
    if not overwrite and checkpoint.name != list_checkpoints(checkpoint.parent.parent)[-1].name:
        ways = "overwrite=true removes the newer ones, another job_dir keeps them"
        raise OptionError("resume", checkpoint, f"is not its run's newest checkpoint; {ways}")


def reapply_overrides(
    saved: Mapping[str, Any], overrides: Sequence[str], job_dir: Path, compose: Callable[[Sequence[str]], RunConfig]
) -> RunConfig:
    """Composes the config of a resumed run from the overrides in its checkpoint and the overrides of the new command.

    If an option is in both, the new command decides. The checkpoint may come from a stranger: only overrides that
    define the experiment are taken from it. If only the checkpoint says in which folder the images are, nothing is
    downloaded, unpacked or cached there.

    Args:
        saved: The entry `odcheap` of the checkpoint; see `SavedRun`.
        overrides: The overrides of the new command.
        job_dir: The folder in which the run continues.
        compose: A function that composes a config from overrides and checks it.

    Raises:
        OptionError: An option that must not change differs from the saved one; a saved override has a value that is not
            plain, such as an interpolation; or the folder of the images does not exist.
    """
    # The new overrides come last, so that they replace saved ones.
    kept, left_out = select_saved_overrides(saved["overrides"], overrides)
    is_given = any(override_key(override) in DATA_FOLDERS for override in overrides)
    missing = [] if is_given else find_values(left_out, DATA_FOLDERS)
    if missing and list_image_folders(saved["config"].get("data")):
        raise describe_missing_images(missing[0])
    if left_out:
        names = escape_control_chars(", ".join(left_out))
        say(f"not taken from the checkpoint: {names} (give them again to have them)")
    new = [override for override in overrides if override_key(override) != "job_dir"]
    composed = [*kept, *new, f"job_dir={os.path.join('.', job_dir)}"]
    merged = compose(composed)
    if any(override_key(o) in DATA_FOLDERS for o in kept) and "read_only" in (merged.cfg.data.get("load") or {}):
        merged = compose([*composed, READ_ONLY])
    # The run may have been started with the default folder, which is relative to the working directory.
    data = to_dict(merged.cfg.data)
    may_download = flatten(data).get("load.download")
    missing = [folder for folder in list_image_folders(data) if not is_file_or_folder(folder)]
    if missing and not is_given and not may_download:
        raise describe_missing_images(missing[0])

    # Root options are compared first, since options in groups may repeat them.
    before, now = flatten(saved["config"]), flatten(merged.to_settings())
    for name in sorted(before.keys() | now.keys(), key=lambda name: (name.count("."), name)):
        may_change = any(name == option or name.startswith(f"{option}.") for option in CHANGEABLE_OPTIONS)
        may_change = may_change and name not in FIXED_OPTIONS
        # An earlier version did not have the option: its default is what that version did.
        may_change = may_change or (name not in before and find_override(overrides, name) is None)
        if not may_change and before.get(name) != now.get(name):
            own_name = name.removesuffix(".part")
            had = f"it has {own_name}={before[name]}" if name in before else f"its version did not have {own_name}"
            allowed = f"would change the experiment that is resumed; {had}"
            option, value = find_override(overrides, name) or (own_name, now.get(name))
            raise OptionError(option, value, allowed)
    return merged


def list_image_folders(data: Any) -> list[Any]:
    """Returns the folders that a data set's options give as `data_dir`.

    Args:
        data: The entry `data` of a run's config, as nested dicts.
    """
    return [value for name, value in flatten(data).items() if name.split(".")[-1] == "data_dir"]


def describe_missing_images(folder: Any) -> OptionError:
    """Returns, without raising it, the error that the folder with the images of a resumed run does not exist."""
    relative = "" if Path(str(folder)).is_absolute() else " (relative to where the run was started)"
    allowed = f"the run's images were in this folder{relative}, which is not there now"
    return OptionError("data_dir", folder, f"{allowed}; data_dir=FOLDER says where they are")


def claim_folder(start: Start) -> None:
    """Marks the run's folder as used by this process: its `status.json` says from now on that the run is running.

    The caller must hold the lock of the folder (see `lock_folder`).

    Raises:
        OptionError: Files in the folder have changed since `plan_start` read them.
    """
    check_usable(start.job_dir)
    if read_versions(start.job_dir) != start.versions:
        allowed = "another process has written here since this one was started; start the same command again"
        raise OptionError("job_dir", start.job_dir, allowed)
    write_status(start.job_dir, "running")


def prepare_folder(start: Start) -> None:
    """Makes the run's folder ready for training, and marks it as used.

    Files that were only partly written are removed, and with `overwrite=true` the files of the earlier run,
    except its export and its evaluation.

    If a run continues in another folder, the checkpoint of the selected epoch is copied. The caller must hold the lock
    of the folder (see `lock_folder`).

    Raises:
        OptionError: Files in the folder have changed since `plan_start` read them, or the checkpoint to copy is
            missing.
    """
    claim_folder(start)
    (start.job_dir / "checkpoints").mkdir(exist_ok=True)
    remove_partial_files(start.job_dir)
    if start.cfg.overwrite:
        for name in ("export", "evaluation"):
            if (start.job_dir / name).exists():
                say(f"warning: {start.job_dir}/{name} remains from the run that is overwritten")
        remove_outputs(start.job_dir, keep_until=start.checkpoint if start.in_own_folder else None)
    copy_selected_checkpoint(start)


def copy_selected_checkpoint(start: Start) -> None:
    """Copies the checkpoint of the best epoch so far, if the run continues in another folder; otherwise does nothing.

    Raises:
        OptionError: This checkpoint is not beside the one from which the run continues.
    """
    # If no later epoch is better, the run needs this checkpoint in the end.
    if start.checkpoint is None or start.content is None or start.in_own_folder:
        return
    record = start.content["callbacks"]["Record"]
    if not record["history"]:
        return
    target = epoch_path(start.job_dir, record["selected"]["epoch"])
    source = start.checkpoint.with_name(target.name)
    if not source.is_file():
        raise OptionError("resume", start.checkpoint, f"the selected epoch's {source.name} must be in the same folder")
    content = source.read_bytes()
    write_atomic(target, lambda file: file.write(content))


def select_saved_overrides(saved: Sequence[str], given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Selects from the overrides in a checkpoint those that define the experiment, such as `num_stu=2`.

    Args:
        saved: The overrides in the checkpoint.
        given: The overrides of the current command. If both set the same option, the saved override is in neither of
            the results.

    Returns:
        Two lists: the selected overrides, written anew from their parsed values, and the overrides that were left out
        and of which the user should be told.

    Raises:
        OptionError: The value of a selected option is not plain. It is, for example, an interpolation.

    Example:
        >>> select_saved_overrides(["num_stu=2", "logger=mlflow", "job_dir=runs/a"], ["num_stu=2"])
        ([], ['logger=mlflow'])
    """
    given_keys = {override_key(override) for override in given}
    selected, left_out = [], []
    for text in saved:
        if override_key(text) in SILENT_OPTIONS:  # not parsed, since the path in it need not follow Hydra's grammar
            continue
        override = parse_override(text)
        key = override.key_or_group
        if key in given_keys:
            continue
        if override.type is not OverrideType.CHANGE or not is_experiment_option(key):
            left_out.append(text)
            continue
        value = check_plain(key, override.value())
        paths = value if isinstance(value, list) else [value]
        if key in PATH_OPTIONS and value is not None and not all(map(is_file_or_folder, paths)):
            left_out.append(text)
        else:
            selected.append(f"{key}={to_grammar(value)}")
    return selected, left_out


def parse_override(text: str) -> Override:
    """Parses an override from a checkpoint, such as `num_stu=2`.

    Raises:
        OptionError: The override cannot be parsed, has several values (for a sweep), or sets a package (`key@package`).
    """
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise OptionError("resume", text, "this override in the checkpoint cannot be read") from error
    if override.is_sweep_override() or override.package is not None:
        raise OptionError("resume", text, "this override in the checkpoint must be a single value")
    return override


def find_values(overrides: Sequence[str], keys: Sequence[str]) -> list[Any]:
    """Returns the values of those overrides in a checkpoint that set one of the options `keys`.

    Example:
        >>> find_values(["seed=1", "data_dir='my photos'"], ["data_dir"])
        ['my photos']
    """
    return [parse_override(text).value() for text in overrides if override_key(text) in keys]


def is_experiment_option(key: str) -> bool:
    """Returns whether the option with this dotted name, such as `optimizer.lr`, may be taken from a checkpoint."""
    if key in MACHINE_OPTIONS:
        return False
    return key in (*EXPERIMENT_OPTIONS, *PATH_OPTIONS) or key.split(".")[0] in EXPERIMENT_GROUPS


def check_plain(key: str, value: Any, depth: int = MAX_DEPTH) -> Any:
    """Returns the value of an option from a checkpoint, or raises an error if the value is not plain.

    Plain values are None, bools, numbers, texts that `is_plain_text` allows, and nested lists and dicts of these.

    Args:
        key: The dotted name of the option.
        value: Its value, or an entry of its value.
        depth: How many more levels of nested lists and dicts are allowed.

    Raises:
        OptionError: The value is not plain.
    """
    if isinstance(value, list) and depth:
        return [check_plain(key, entry, depth - 1) for entry in value]
    if isinstance(value, dict) and depth and all(OPTION_NAME.fullmatch(str(name)) for name in value):
        return {str(name): check_plain(key, entry, depth - 1) for name, entry in value.items()}
    if value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and is_plain_text(key, value)):
        return value
    allowed = "a checkpoint may give plain names and numbers only; give this option on the command line if it is yours"
    raise OptionError(key, value, allowed)


def is_plain_text(key: str, value: str) -> bool:
    """Returns whether a text from a checkpoint is allowed as the value of an option.

    A path must not contain `$`; a config group must have the name of a file in `conf/`; any other text must not contain
    special characters.

    Args:
        key: The dotted name of the option.
        value: The text.
    """
    if key in PATH_OPTIONS:
        return "$" not in value and "\0" not in value
    if key == "method.teacher_network":
        return LIBRARY_NETWORK.fullmatch(value) is not None
    if key in (*EXPERIMENT_GROUPS, "experiment"):
        return PART_NAME.fullmatch(value) is not None
    return PLAIN_TEXT.fullmatch(value) is not None


def is_file_or_folder(path: Any) -> bool:
    """Returns whether `path` is the path of a regular file or a folder; False for a pipe or a device, and if it is no
    text.
    """
    return isinstance(path, str) and (Path(path).is_file() or Path(path).is_dir())


def to_grammar(value: Any) -> str:
    """Writes a plain value as text in Hydra's override grammar, so that Hydra reads the same value from it."""
    if isinstance(value, list):
        return f"[{','.join(map(to_grammar, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{to_grammar(entry)}" for name, entry in value.items()) + "}"
    if isinstance(value, str):
        return QuotedString(value, Quote.double).with_quotes()
    return "null" if value is None else str(value).lower()
