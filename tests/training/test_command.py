"""The command that carries out a run."""

import signal
import weakref
from pathlib import Path
from types import SimpleNamespace

from odcheap.distributed.signals import Stopped
from odcheap.training import command


def test_stopped_run_in_a_process_of_joblib_lets_its_networks_go(monkeypatch):
    """The exception is kept for later runs of this process; its traceback would keep everything that the run built."""

    class Networks:
        pass

    built = []

    def stop_in_the_middle(_):
        networks = Networks()
        built.append(weakref.ref(networks))
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(command, "carry_out_run", stop_in_the_middle)
    monkeypatch.setattr(command, "stopped_runs", [])
    monkeypatch.setattr(command, "current_process", lambda: SimpleNamespace(name="LokyProcess-1"))
    monkeypatch.setattr(command.compose, "is_sweep", lambda: True)
    monkeypatch.setattr(command.compose, "sweep_position", lambda: (Path("sweep"), 0, ["num_stu=2"]))
    monkeypatch.setattr(command, "name_position", lambda *_: ("num_stu=2", "run 1 of 1"))
    stop = command.run_job(None)
    assert isinstance(stop, Stopped)
    assert command.run_job(None) is stop
    assert built[0]() is None
