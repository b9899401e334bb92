"""Composes the config of a run with Hydra, and defines the resolvers that compute values in it.

They are used in `conf/` as `${job_dir:}`, `${run_name:}` and `${precision:...}`.
"""

import argparse
import importlib.util
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from odcheap.runs.settings import RunConfig, name_run, override_key, quote_override, replace_resolver, to_dict
from odcheap.utils.errors import OptionError
from odcheap.utils.parts import OWN_PACKAGE, find_conf_dir, list_parts


def compose_config(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> DictConfig:
    """Composes the config of a run from `conf/` and overrides, outside of a Hydra application; `job_dir` is not usable.

    Args:
        overrides: Options such as `backbone=resnet56`.
        config_dirs: Further `conf` directories, with files that odcheap's own directory does not have.

    Raises:
        HydraException: An option is unknown. `describe_error` explains the exception in one line.
    """
    # The default of `job_dir` needs a running Hydra application, so a value is given.
    search = [f"file://{folder.resolve()}" for folder in config_dirs]
    if search:
        overrides = [*overrides, f"hydra.searchpath=[{','.join(search)}]"]
    with hydra.initialize_config_dir(str(find_conf_dir()), version_base="1.3"):
        return hydra.compose("config", [*overrides, "job_dir=unused"])


def compose_run(overrides: Sequence[str]) -> RunConfig:
    """Composes the config of a run from overrides such as `num_stu=4`, while Hydra is running or initialized."""
    # Of the running command only `--config-dir` applies to this config too; the search path is given again.
    given = HydraConfig.get().overrides.hydra if HydraConfig.initialized() else []
    search = [override for override in given if override_key(override) == "hydra.searchpath"]
    quoted = [quote_override(override) for override in overrides]
    cfg = hydra.compose("config", overrides=[*search, *quoted], return_hydra_config=True)
    parts = to_dict(cfg.hydra.runtime.choices)
    with open_dict(cfg):
        del cfg["hydra"]
    return RunConfig(cfg, parts, overrides)


def list_groups(config_dirs: Sequence[Path] = ()) -> dict[str, list[str]]:
    """Returns the config groups, such as `method`, each with the names that can be chosen in it.

    Args:
        config_dirs: Further `conf` directories, which are listed together with odcheap's own.
    """
    folders = [folder.relative_to(conf) for conf in (find_conf_dir(), *config_dirs) for folder in conf.rglob("*/")]
    groups = sorted({str(folder) for folder in folders if folder.parts and folder.parts[0] != "hydra"})
    return {group: list_parts(group, config_dirs) for group in groups}


def find_config_dirs(arguments: Sequence[str]) -> list[Path]:
    """Returns the user's own `conf` directories, read from the arguments `--config-dir` and `hydra.searchpath`.

    Entries of the search path that are Python packages (`pkg://NAME`) are left out.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config-dir", "-cd", type=Path)
    folder = parser.parse_known_args(list(arguments))[0].config_dir
    search = [argument for argument in arguments if argument.startswith("hydra.searchpath=")]
    entries = OverridesParser.create().parse_override(search[0]).value() if search else []
    paths = [str(entry) for entry in entries] if isinstance(entries, list) else []
    files = [Path(path.removeprefix("file://")) for path in paths if path.startswith("file://")]
    return [folder, *files] if folder else files


def given_overrides() -> list[str]:
    """Returns the overrides of the current run, such as `num_stu=4`, as the user has written them."""
    return cast(list[str], OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False))


def chosen_parts() -> dict[str, Any]:
    """Returns the name that the current run has chosen in each config group, such as `{"method": "od"}`."""
    return dict(HydraConfig.get().runtime.choices)


def given_config_dirs() -> list[Path]:
    """Returns the user's own `conf` directories, including those of packages, in a running Hydra application."""
    sources = HydraConfig.get().runtime.config_sources
    given = [s for s in sources if s.provider == "command-line" or s.provider.startswith("hydra.searchpath")]
    return [find_source(source.schema, source.path) for source in given]


def find_source(schema: str, path: str) -> Path:
    """Returns the directory of one entry of Hydra's search path.

    Args:
        schema: "file" for a directory, "pkg" for a Python package that contains YAML files.
        path: The path of the directory, or the dotted name of the package.

    Raises:
        OptionError: `schema` is something else, or there is no such package.
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
    """Returns whether the current run is one of the runs of a sweep, which is started with `-m`."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def sweep_position() -> tuple[Path, int, list[str]]:
    """Returns the folder of the sweep, the number of the current run in it (from 0), and the run's overrides.

    It may only be called in a run of a sweep.
    """
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


def unread_precision() -> AbstractContextManager[None]:
    """A context manager in which the default precision is "32-true": asking for the GPU would import PyTorch."""
    return replace_resolver("precision", lambda accelerator: "32-true", default_precision)


OmegaConf.register_new_resolver("precision", default_precision, replace=True)
OmegaConf.register_new_resolver("job_dir", default_job_dir, replace=True)
OmegaConf.register_new_resolver("run_name", lambda *also: name_run(given_overrides(), also), replace=True)
