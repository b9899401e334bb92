"""Functions that compute default values in the config: `${job_dir:}`, `${run_name:}` and `${precision:...}`."""

import importlib.util
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from odcheap.runs.overrides import name_run
from odcheap.utils.errors import OptionError
from odcheap.utils.parts import OWN_PACKAGE


def given_overrides() -> list[str]:
    """Returns the overrides of the current run as the user has given them; interpolations are not resolved."""
    return cast(list[str], OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False))


def chosen_parts() -> dict[str, Any]:
    """Returns the name that was chosen in each config group, such as `{"method": "od"}`."""
    return dict(HydraConfig.get().runtime.choices)


def given_config_dirs() -> list[Path]:
    """Returns the directories that the user has given with `--config-dir` or `hydra.searchpath`."""
    sources = HydraConfig.get().runtime.config_sources
    given = [s for s in sources if s.provider == "command-line" or s.provider.startswith("hydra.searchpath")]
    return [find_source(source.schema, source.path) for source in given]


def find_source(schema: str, path: str) -> Path:
    """Returns the directory of an entry of Hydra's search path.

    Args:
        schema: "file", or "pkg" for a Python package that contains the YAML files.
        path: The directory, or the dotted name of the package.

    Raises:
        OptionError: The entry is of another kind, or there is no such package.
    """
    if schema == "file":
        return Path(path)
    option = "hydra.searchpath"
    if schema != "pkg":
        raise OptionError(option, f"{schema}://{path}", "must be file://DIRECTORY or pkg://PACKAGE")
    try:
        spec = importlib.util.find_spec(path.replace("/", "."))
    except ImportError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise OptionError(option, f"pkg://{path}", f"there is no such package{OWN_PACKAGE}")
    return Path(next(iter(spec.submodule_search_locations)))


def is_sweep() -> bool:
    """Returns whether the current run is part of a sweep."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def sweep_position() -> tuple[Path, int, list[str]]:
    """Returns the folder of the sweep, the number of the current run in it (from 0), and the run's overrides."""
    config = HydraConfig.get()
    return Path(config.sweep.dir), int(config.job.num), given_overrides()


def default_job_dir() -> str:
    """Returns the default of `job_dir`: `runs/<data>/<overrides>`, or `<hydra.sweep.dir>/<overrides>` in a sweep."""
    config = HydraConfig.get()
    if is_sweep():
        return str(Path(config.sweep.dir) / config.sweep.subdir)
    return str(Path("runs") / chosen_parts()["data"] / name_run(given_overrides()))


def default_precision(accelerator: str) -> str:
    """Returns the default precision: `bf16-mixed` on a GPU that supports bfloat16, otherwise `32-true`.

    Args:
        accelerator: The value of the option `trainer.accelerator`, such as "auto" or "cpu".
    """
    import torch  # imported here, since it takes seconds; see `unread_precision`

    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


@contextmanager
def unread_precision() -> Generator[None]:
    """A context in which the default precision is 32-true: to ask the device for it, PyTorch would be imported."""
    OmegaConf.register_new_resolver("precision", lambda accelerator: "32-true", replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("precision", default_precision, replace=True)


OmegaConf.register_new_resolver("precision", default_precision, replace=True)
OmegaConf.register_new_resolver("job_dir", default_job_dir, replace=True)
OmegaConf.register_new_resolver("run_name", lambda *also: name_run(given_overrides(), also), replace=True)
