"""A run's folder: what it is called, whether it may be used, and which run a `resume` continues."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from odcheap.runs import trust
from odcheap.runs.checkpoint_io import all_paths, epoch_path, newest_usable, read_run
from odcheap.runs.overrides import STORAGE_OPTIONS, find_override, override_key
from odcheap.utils.errors import OptionError
from odcheap.utils.files import write_atomic
from odcheap.utils.text import escape_control_chars

# What may differ between a run and its continuation: where and on what it runs, not what it computes.
FREE = ("trainer", "data_dir", "job_dir", "logger", "resume", "overwrite", "test_only", "checkpoint_every")
FREE += ("checkpoint_keep", "on_nonfinite", "max_skipped", "data.load.data_dir", "experiment", "backbone.pretrained")
FREE += ("data.workers", "data.max_broken", "together", "capture", "method.teacher_weights")
OUTPUTS = ("config.yaml", "metrics.csv", "summary.json", "test.json", "confusion.csv", "split.csv")
OUTPUTS += ("student.safetensors",)
NOWHERE = object()
THREE_WAYS = "resume=auto continues it, overwrite=true starts anew, another job_dir leaves it"


@dataclass(frozen=True)
class Start:
    """How a run begins: its config and folder, the checkpoint it continues from and its content.

    `at_home`: the checkpoint lies in this very folder. `finished`: there is nothing left to do.
    """

    cfg: DictConfig
    overrides: list[str]
    job_dir: Path
    checkpoint: Path | None = None
    content: dict[str, Any] | None = None
    at_home: bool = False
    finished: bool = False


def options_of(config: Path) -> dict[str, Any]:
    """What a run's `config.yaml` says of what it computed: no paths of its own, and nothing twice."""
    options = flatten(OmegaConf.to_container(OmegaConf.load(config)))
    own = {
        key: value
        for key, value in options.items()
        if key not in STORAGE_OPTIONS and options["job_dir"] not in str(value)
    }
    return {key: v for key, v in own.items() if "." not in key or own.get(key.rpartition(".")[2], NOWHERE) != v}


def plan(
    cfg: DictConfig,
    overrides: list[str],
    compose: Callable[[list[str]], DictConfig],
    say: Callable[[str], None],
    by_default: str | None = None,
    restarted: bool = False,
) -> Start:
    """Which run this is to be. `compose` makes a config from overrides; `by_default` stands in for no `resume`.

    `restarted`: this very command has been started before, so that what it left in `job_dir` goes first.

    With `resume` the overrides the run was started with are applied again; one given anew that would change the
    experiment raises `OptionError`, as do a missing checkpoint and a folder that holds another run.
    """
    resume = cfg.resume or (None if cfg.overwrite else by_default)
    if restarted and not cfg.overwrite and all_paths(Path(cfg.job_dir)):
        resume = "auto"
    if cfg.test_only and not (cfg.resume or cfg.weights):
        raise OptionError("test_only", True, "needs resume=JOB_DIR, resume=CHECKPOINT or weights=FILE")
    if not resume or (cfg.test_only and not cfg.resume):
        return start_anew(cfg, overrides)
    found = locate(cfg, resume, say)
    if found is None:
        return start_anew(cfg, overrides)
    own, checkpoint, content = found
    given = resume != "auto" and any(override_key(o) == "job_dir" for o in overrides)
    job_dir = Path(cfg.job_dir) if given else own
    if job_dir is None:
        raise OptionError("resume", resume, "lies in no run's checkpoints folder: say where to go on with job_dir=")
    at_home = own is not None and job_dir.resolve() == own.resolve()
    again, merged = reapply(content["odcheap"], overrides, job_dir, compose)
    trust.refuse_foreign(again, cfg, "resume", resume)
    done = at_home and content["epoch"] + 1 >= again.trainer.max_epochs and summary_of(job_dir) is not None
    if not cfg.test_only and not at_home:
        refuse_occupied(job_dir, cfg.overwrite)
    if not cfg.test_only and at_home and Path(resume).is_file():
        refuse_later(checkpoint, cfg.overwrite)
    return Start(again, merged, job_dir, checkpoint, content, at_home, done and not cfg.test_only)


def locate(cfg: DictConfig, resume: str, say: Callable[[str], None]) -> tuple[Path | None, Path, dict[str, Any]] | None:
    """The run's own folder (None for a checkpoint that lies in none), the checkpoint and its content.

    None where `resume=auto` finds nothing to continue.
    """
    if resume != "auto" and not Path(resume).is_dir():
        content, checkpoint = read_run(resume), Path(resume).resolve()
        inside = checkpoint.parent
        return (inside.parent if inside.name == "checkpoints" else None), checkpoint, content
    job_dir = Path(cfg.job_dir) if resume == "auto" else Path(resume)
    found = selected_checkpoint(job_dir, say) if cfg.test_only else newest_usable(job_dir, say)
    if found is None and (resume != "auto" or cfg.test_only):
        raise OptionError("resume", resume, f"{job_dir} holds no usable checkpoint in checkpoints/")
    return found and (job_dir, *found)


def refuse_later(checkpoint: Path, overwrite: bool) -> None:
    if not overwrite and checkpoint.name != all_paths(checkpoint.parent.parent)[-1].name:
        ways = "overwrite=true throws the later ones away, another job_dir keeps them"
        raise OptionError("resume", checkpoint, f"is not its run's newest checkpoint; {ways}")


def start_anew(cfg: DictConfig, overrides: list[str]) -> Start:
    job_dir = Path(cfg.job_dir)
    if not cfg.test_only:
        refuse_occupied(job_dir, cfg.overwrite)
    return Start(cfg, overrides, job_dir)


def refuse_occupied(job_dir: Path, overwrite: bool) -> None:
    if overwrite:
        return
    if summary_of(job_dir) is not None:
        raise OptionError("job_dir", job_dir, f"holds a finished run; {THREE_WAYS}")
    if all_paths(job_dir):
        raise OptionError("job_dir", job_dir, f"holds an unfinished run; {THREE_WAYS}")


def reapply(
    about: dict[str, Any], overrides: list[str], job_dir: Path, compose: Callable[[list[str]], DictConfig]
) -> tuple[DictConfig, list[str]]:
    given = {override_key(o) for o in overrides} | {"job_dir", "resume", "overwrite", "test_only"}
    kept = [o for o in trust.kept(about["overrides"]) if override_key(o) not in given]
    merged = [*kept, *(o for o in overrides if override_key(o) != "job_dir"), f"job_dir={os.path.join('.', job_dir)}"]
    cfg = compose(merged)
    before, now = flatten(about["config"]), flatten(OmegaConf.to_container(cfg, resolve=True))
    for name in sorted(before.keys() | now.keys(), key=lambda name: (name.count("."), name)):
        free = any(name == option or name.startswith(f"{option}.") for option in FREE)
        if not free and before.get(name) != now.get(name):
            allowed = f"would change the experiment that is resumed; it has {name}={before.get(name)}"
            option, value = find_override(overrides, name) or (name, now.get(name))
            raise OptionError(option, value, allowed)
    return cfg, merged


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: v for key, branch in tree.items() for name, v in flatten(branch, f"{prefix}.{key}".strip(".")).items()
    }


def selected_checkpoint(job_dir: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint whose student the run chose."""
    newest = newest_usable(job_dir, say)
    if newest is None:
        return None
    path = epoch_path(job_dir, newest[1]["callbacks"]["Record"]["selected"]["epoch"])
    return newest if path == newest[0] else (path, read_run(path))


def summary_of(job_dir: Path) -> dict[str, Any] | None:
    """The finished run's summary; None where there is none."""
    try:
        summary = json.loads((job_dir / "summary.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise OptionError("job_dir", job_dir, f"its summary.json cannot be read ({error})") from error
    return summary if isinstance(summary, dict) and summary.get("finished") else None


def result_of(start: Start) -> dict[str, Any] | None:
    """What another process wrote at the end of this run or test."""
    if not start.cfg.test_only:
        return summary_of(start.job_dir)
    return json.loads((start.job_dir / "test.json").read_text())


def make_folder(job_dir: Path) -> None:
    try:
        job_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError("job_dir", job_dir, f"cannot be written ({error.strerror})") from error
    if not os.access(job_dir, os.W_OK):
        raise OptionError("job_dir", job_dir, "cannot be written")


def prepare(start: Start) -> None:
    """Makes the folder of a training run; with `overwrite` clears what an older run, or a later part of it, left."""
    make_folder(start.job_dir)
    (start.job_dir / "checkpoints").mkdir(exist_ok=True)
    for folder in (start.job_dir, start.job_dir / "checkpoints"):
        for left in filter(Path.is_file, folder.glob(".*.part")):  # by a process that was killed while it wrote
            left.unlink(missing_ok=True)
    if start.cfg.overwrite:
        if (start.job_dir / "export").exists():
            print(
                f"warning: {escape_control_chars(start.job_dir)}/export is left from the run that is overwritten",
                flush=True,
            )
        old = all_paths(start.job_dir) + list((start.job_dir / "tensorboard").rglob("events.out.tfevents.*"))
        if start.at_home:
            old = [path for path in all_paths(start.job_dir) if path.name > start.checkpoint.name]
        for path in old + [start.job_dir / name for name in OUTPUTS]:
            path.unlink(missing_ok=True)
    bring_selected(start)


def bring_selected(start: Start) -> None:
    """A run that goes on in another folder takes the checkpoint along that it may have to come back to."""
    path = start.checkpoint
    if path is None or start.at_home:
        return
    record = start.content["callbacks"]["Record"]
    if not record["history"]:
        return
    source = path.with_name(epoch_path(start.job_dir, record["selected"]["epoch"]).name)
    if not source.is_file():
        raise OptionError("resume", path, f"the selected epoch's {source.name} must lie beside it")
    content = source.read_bytes()
    write_atomic(epoch_path(start.job_dir, record["selected"]["epoch"]), lambda file: file.write(content))
