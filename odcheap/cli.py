"""The command line around Hydra: one line for what the user can mend, one table for a sweep."""

import contextlib
import difflib
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from odcheap.config import options
from odcheap.distributed import launch
from odcheap.runs import resume, status
from odcheap.runs.trust import CONF
from odcheap.training import sweep
from odcheap.training.sweep import Outcome
from odcheap.utils.console import console, print_error
from odcheap.utils.errors import Failure, OptionError, describe_external_failure, first_line

EXPLAINED = (Failure, HydraException, MisconfigurationException, OmegaConfBaseException)


def start(main: Callable[[], None], conf: Path) -> int:
    """Runs Hydra's main, whose config lies in `conf`, and returns the exit status."""
    sys.argv[1:] = [ready(launch.quoted(a) if a.partition("=")[0] in options.PATHS else a, conf) for a in sys.argv[1:]]
    sweep.ended.clear()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors, and they come out below as one line
    try:
        options.check_choices(sys.argv[1:], conf)
        main()
    except OptionError as error:
        return print_error(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        sweep.gather()
        return print_error(hydra_line(error, conf))
    except Exception as error:  # of a launcher or sweeper: what the runs themselves raise is dealt with in `guarded`
        if not sweep.gather():
            raise
        print_error(f"the sweep ended before its time, the same command continues it: {type(error).__name__}: {error}")
        sweep.show(console(), sweep.ended)
        return 1
    if sweep.ended:
        sweep.show(console(), sweep.ended)
    return int(any(outcome.summary is None for outcome in sweep.ended))


def ready(argument: str, conf: Path) -> str:
    """`hydra/launcher=joblib` means our file that builds on this plugin: one of the same name would hide it."""
    ours = argument.startswith("hydra/") and (conf / f"{argument.replace('=', '/')}_sweep.yaml").is_file()
    return f"{argument}_sweep" if ours else argument


def hush() -> None:
    """Keeps back what Lightning 2.6 says of torch 2.15, a teacher in eval mode, srun: nothing a user could act on."""
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
    warnings.filterwarnings("ignore", message=r"The `srun` command is available on your system but is not used")


def hydra_line(error: Exception, conf: Path) -> str:
    """What Hydra could not make of the options, in one line with what is known."""
    if isinstance(error, MissingConfigException):
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        if (conf / group / f"{name}_sweep.yaml").is_file():
            return f"{group}={name}: needs the extra sweep: uv sync --extra sweep, or pip install 'odcheap[sweep]'"
        return f"{group}={name}: unknown; must be one of {', '.join(error.options or [])}"
    if "Could not override" in str(error) and any(arg.startswith("resume=") for arg in sys.argv):
        ways = "such as data=imagefolder or logger=tensorboard"
        return f"{first_line(error)}; beside resume name the choice that has this option too, {ways}"
    return f"{first_line(error)}{nearest(error, conf)} (python train.py --help shows every option)"


def nearest(error: Exception, conf: Path) -> str:
    """The known options most like the unknown one that the error speaks of."""
    unknown = re.search(r"Could not override '([\w./]+)'", str(error))
    if unknown is None:
        return ""
    with hydra.initialize_config_dir(str(conf), version_base="1.3"):
        known = resume.flat(OmegaConf.to_container(hydra.compose("config"), resolve=False))
    names = {".".join(name.split(".")[:depth]) for name in known for depth in (1, 2)}
    close = difflib.get_close_matches(unknown[1], sorted(names), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def guarded(job: Callable[[], Outcome], in_sweep: bool) -> float | None:
    """Runs the job. A failure ends a single run with one line, and in a sweep lets the others go on."""
    hush()  # here, where also a launcher's processes come by
    if in_sweep:  # for the time being
        sweep.leave_word(Outcome(job_dir(), "failed: ended without a word (killed, or out of memory?)", None))
    try:
        outcome = job()
    except EXPLAINED as error:
        line = explained(error)
        if not in_sweep:
            sys.exit(print_error(line))
        print_error(line)
        outcome = failure(line)
    except Exception as error:
        line = describe_external_failure(error)
        if not in_sweep:
            if line is None:
                raise
            sys.exit(print_error(line, every_rank=True))
        if line is None:
            traceback.print_exc()
        outcome = failure(line or f"{type(error).__name__}: {first_line(error)}")
    if in_sweep:
        sweep.leave_word(outcome)
    return ((outcome.summary or {}).get("selected") or {}).get("val_top1")


def failure(line: str) -> Outcome:
    """Of a run of a sweep; its folder keeps the reason for `python -m odcheap.report --status`."""
    where = Path(job_dir())
    with contextlib.suppress(OSError):  # a folder that cannot be written may be the failure
        where.mkdir(parents=True, exist_ok=True)
        status.mark(where, "failed", line)
    return Outcome(str(where), f"failed: {line}", None)


def explained(error: BaseException) -> str:
    """The line of the failure that lies under what Hydra wraps around it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, Failure):
            return str(cause)
        cause = cause.__cause__
    if isinstance(error, InstantiationException):
        where = str(error).rpartition("full_key: ")[2].strip() or "config"
        return f"{where}: {first_line(error.__cause__ or error)}"
    if isinstance(error, HydraException | OmegaConfBaseException):
        return hydra_line(error, CONF)
    return f"trainer: {first_line(error)}"


def job_dir() -> str:
    """`job_dir`'s default: a folder of the data's, or of the sweep's, named by the overrides."""
    config = HydraConfig.get()
    if config.mode == RunMode.MULTIRUN:
        return str(Path(config.sweep.dir) / config.sweep.subdir)
    return str(Path("runs") / config.runtime.choices.data / run_name())


def run_name() -> str:
    return resume.run_name(overrides())


def overrides() -> list[str]:
    """The options as they were given, with what stands for another's value still in them."""
    return OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)


def precision(accelerator: str) -> str:
    """`trainer.precision`'s default: bfloat16 on a GPU that computes in it."""
    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


OmegaConf.register_new_resolver("precision", precision, replace=True)
OmegaConf.register_new_resolver("job_dir", job_dir, replace=True)
OmegaConf.register_new_resolver("run_name", run_name, replace=True)
OmegaConf.register_new_resolver("nodes", launch.nodes, replace=True)
OmegaConf.register_new_resolver("devices", launch.devices, replace=True)
