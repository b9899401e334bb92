"""Hydra's callback at the beginning of a sweep."""

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from odcheap.runs.sweep import SweepFolder
from odcheap.utils.console import say

# The sweep that this process has started; empty without one. Hydra builds the callback itself and returns nothing.
started_sweeps: list[SweepFolder] = []


class SweepStart(Callback):
    """Notes the sweep's folder as it is before the first run, and says where it lies."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        folder = config.hydra.sweep.dir
        started_sweeps.append(SweepFolder(Path(folder)))
        say(f"sweep in {folder}; its progress: odcheap report --status {folder}")
