"""A run's folder: what it is called, whether it may be used, and which run a `resume` continues."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from odcheap.checkpoint import all_paths, epoch_path, newest_usable, read_run
from odcheap.errors import OptionError
from odcheap.files import write_atomic

# What may differ between a run and its continuation: where and on what it runs, not what it computes.
FREE = ("trainer", "data_dir", "job_dir", "logger", "resume", "overwrite", "test_only", "checkpoint_every", "weights")
FREE += ("checkpoint_keep", "on_nonfinite", "weights_head", "max_skipped", "data.load.data_dir", "experiment")
UNNAMED = ("job_dir", "data_dir", "resume", "overwrite", "test_only", "checkpoint_every", "checkpoint_keep", "logger")
OUTPUTS = ("config.yaml", "metrics.csv", "summary.json", "test.json", "confusion.csv", "student.safetensors")
THREE_WAYS = "resume=auto continues it, overwrite=true starts anew, another job_dir leaves it"


@dataclass(frozen=True)
class Start:
    """How a run begins: its config and folder, the checkpoint it continues from, and whether it is already done."""

    cfg: DictConfig
    overrides: list[str]
    job_dir: Path
    checkpoint: Path | None = None
    content: dict[str, Any] | None = None
    finished: bool = False


def key_of(override: str) -> str:
    return override.split("=")[0].lstrip("+~")


def run_name(overrides: list[str]) -> str:
    """A folder name from the overrides that say what is computed, sorted; "default" without any."""
    named = sorted(o for o in overrides if key_of(o) not in UNNAMED and not key_of(o).startswith("hydra"))
    name = re.sub(r"[^\w=,.+\[\]@-]", "-", ",".join(named)) or "default"
    if len(name) <= 200:
        return name
    return f"{name[:180]}-{hashlib.blake2b(name.encode(), digest_size=6).hexdigest()}"


def plan(
    cfg: DictConfig,
    overrides: list[str],
    compose: Callable[[list[str]], DictConfig],
    say: Callable[[str], None],
    by_default: str | None = None,
) -> Start:
    """Which run this is to be. `compose` makes a config from overrides; `by_default` stands in for no `resume`.

    With `resume` the overrides the run was started with are applied again; one given anew that would change the
    experiment raises `OptionError`, as do a missing checkpoint and a folder that holds another run.
    """
    resume = cfg.resume or by_default
    if cfg.test_only and not (cfg.resume or cfg.weights):
        raise OptionError("test_only", "true", "needs resume=JOB_DIR, resume=CHECKPOINT or weights=FILE")
    if not resume or (cfg.test_only and not cfg.resume):
        return start_anew(cfg, overrides)
    job_dir = Path(cfg.job_dir) if resume == "auto" else Path(resume)
    if job_dir.is_dir() or resume == "auto":
        found = selected_checkpoint(job_dir) if cfg.test_only else newest_usable(job_dir, say)
        if found is None and resume == "auto" and not cfg.test_only:
            return start_anew(cfg, overrides)
        if found is None:
            raise OptionError("resume", resume, f"{job_dir} holds no usable checkpoint in checkpoints/")
        checkpoint, content = found
    else:
        checkpoint, content = job_dir, read_run(job_dir)
        job_dir = checkpoint.resolve().parent.parent
    again, merged = reapply(content["odcheap"], overrides, compose)
    elsewhere = resume != "auto" and any(key_of(o) == "job_dir" for o in overrides)
    if elsewhere and Path(cfg.job_dir).resolve() != job_dir.resolve() and not cfg.test_only:
        refuse_occupied(Path(cfg.job_dir), cfg.overwrite)
    job_dir = Path(cfg.job_dir) if elsewhere else job_dir
    done = not cfg.test_only and content["epoch"] + 1 >= again.trainer.max_epochs and summary_of(job_dir) is not None
    return Start(again, merged, job_dir, checkpoint, content, done)


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
    about: dict[str, Any], overrides: list[str], compose: Callable[[list[str]], DictConfig]
) -> tuple[DictConfig, list[str]]:
    given = {key_of(o) for o in overrides} | {"job_dir", "resume", "overwrite", "test_only"}
    kept = [o for o in about["overrides"] if key_of(o) not in given]
    merged = kept + overrides
    cfg = compose(merged)
    before, now = flat(about["config"]), flat(OmegaConf.to_container(cfg, resolve=True))
    for name in sorted(before.keys() | now.keys(), key=lambda name: (name.count("."), name)):
        free = any(name == option or name.startswith(f"{option}.") for option in FREE)
        if not free and before.get(name) != now.get(name):
            allowed = f"would change the experiment that is resumed; it has {name}={before.get(name)}"
            option, value = as_given(name, overrides) or (name, now.get(name))
            raise OptionError(option, value, allowed)
    return cfg, merged


def as_given(name: str, overrides: list[str]) -> tuple[str, str] | None:
    """The override that set this entry of the config: `block_type=Shift` sets block_type._target_."""
    for override in overrides:
        key = key_of(override)
        if name == key or name.startswith(f"{key}."):
            return key, override.partition("=")[2]
    return None


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {name: v for key, branch in tree.items() for name, v in flat(branch, f"{prefix}.{key}".strip(".")).items()}


def selected_checkpoint(job_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint whose student the run chose."""
    paths = all_paths(job_dir)
    if not paths:
        return None
    content = read_run(paths[-1])
    epoch = content["callbacks"]["Record"]["selected"]["epoch"]
    chosen = [path for path in paths if path.name == f"epoch-{epoch:04d}.ckpt"]
    return (chosen[0], read_run(chosen[0])) if chosen else None


def summary_of(job_dir: Path) -> dict[str, Any] | None:
    """The finished run's summary; None where there is none."""
    try:
        summary = json.loads((job_dir / "summary.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise OptionError("job_dir", job_dir, f"its summary.json cannot be read ({error})") from error
    return summary if isinstance(summary, dict) and summary.get("finished") else None


def prepare(start: Start) -> None:
    """Makes the folder and, where a run starts anew, clears it of an older run's files. Raises `OptionError`."""
    try:
        (start.job_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError("job_dir", start.job_dir, f"cannot be written ({error.strerror})") from error
    if not os.access(start.job_dir, os.W_OK):
        raise OptionError("job_dir", start.job_dir, "cannot be written")
    bring_selected(start)
    if start.checkpoint is None and start.cfg.overwrite:
        old = [start.job_dir / name for name in OUTPUTS] + all_paths(start.job_dir)
        for path in old + list((start.job_dir / "tensorboard").rglob("events.out.tfevents.*")):
            path.unlink(missing_ok=True)


def bring_selected(start: Start) -> None:
    """A run that goes on in another folder takes the checkpoint along that it may have to come back to."""
    path, home = start.checkpoint, start.job_dir.resolve()
    if path is None or start.cfg.test_only or path.resolve().is_relative_to(home):
        return
    record = start.content["callbacks"]["Record"]
    if not record["history"]:
        return
    source = path.with_name(epoch_path(start.job_dir, record["selected"]["epoch"]).name)
    if not source.is_file():
        raise OptionError("resume", path, f"the selected epoch's {source.name} must lie beside it")
    content = source.read_bytes()
    write_atomic(epoch_path(start.job_dir, record["selected"]["epoch"]), lambda file: file.write(content))
