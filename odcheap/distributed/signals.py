"""Signals: a run that is told to end saves first, on all its processes, wherever the signal arrived."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from pytorch_lightning.utilities.rank_zero import rank_zero_only

from odcheap.distributed import slurm
from odcheap.distributed.torchrun import ENDING
from odcheap.runs import status
from odcheap.runs.checkpoint_io import list_checkpoints

SUBMITIT = signal.SIGUSR2  # by which submitit asks for a checkpoint; its handler puts the job back into the queue

STARTER = os.getppid()  # asked before it can be gone


class Stopped(SystemExit):
    """A signal has ended the run; the exit status is 128 + its number."""

    def __init__(self, signum: int):
        super().__init__(signum)  # what unpickling gives back to it, where a launcher sends it home
        self.code, self.signum, self.name = 128 + signum, signum, signal.Signals(signum).name


class Listener:
    """Hears signals. A first one ends the process where it is, or while it is `waiting` is only noted for the step's
    end, or is passed on to the process that does the work; a second one ends the process at once. The same one within
    a second is no second one: a process may get it from its starter and with all of its group.
    """

    def __init__(self) -> None:
        self.heard, self.waiting, self.when = 0, False, 0.0
        self.worker: subprocess.Popen | None = None
        self.led = False  # whether another process has done the work
        self.owner = os.getpid()
        self.requeue_by_submitit = False
        self.before = {signum: signal.getsignal(signum) for signum in (*ENDING, SUBMITIT)}

    def __enter__(self) -> "Listener":
        self.install()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if not self.heard:  # one that ends has still to hear a second one
            self.take(self.before)
        elif kind is None:  # it came after the last look, or another failure came first
            raise Stopped(self.heard)

    def install(self) -> None:
        """Takes the signals, also back from whoever has taken them since."""
        self.take(dict.fromkeys(ENDING, self.hear))
        if callable(self.before[SUBMITIT]):
            self.take({SUBMITIT: self.hear_submitit})

    def take(self, handlers: dict[int, Any]) -> None:
        if threading.current_thread() is threading.main_thread():
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

    def submitit(self) -> None:
        """Its own handler: puts the job back into the queue, and ends the process where it is the first."""
        self.before[SUBMITIT](SUBMITIT, None)

    def hear(self, signum: int, _: FrameType | None) -> None:
        if os.getpid() != self.owner:  # a loader's process: the one that owns it decides
            return
        if signum == self.heard and time.monotonic() < self.when + 1:
            return
        if self.worker is not None:
            self.worker.send_signal(signal.SIGTERM)  # torchrun passes this one on, whatever its settings
        elif self.heard:
            os._exit(128 + signum)
        self.heard, self.when = signum, time.monotonic()
        if not self.waiting and self.worker is None:
            raise Stopped(signum)

    def hear_submitit(self, signum: int, _: FrameType | None) -> None:
        """Comes alone, or after a SIGTERM that announces the same."""
        if os.getpid() != self.owner:
            return
        self.requeue_by_submitit = True
        self.heard = self.heard or signum
        if self.worker is not None:
            self.worker.send_signal(signal.SIGTERM)
        elif not self.waiting:
            raise Stopped(self.heard)

    @contextmanager
    def passing_on(self, worker: subprocess.Popen) -> Iterator[None]:
        """While `worker` runs signals are its; afterwards `Stopped` where one came."""
        self.worker, self.led = worker, True
        try:
            yield
        finally:
            self.worker = None
        if self.heard:
            raise Stopped(self.heard)


@contextmanager
def ending_with(leader: int) -> Iterator[None]:
    """Meanwhile, where the process that has started this one is gone, it is as if a SIGTERM had come."""
    done = threading.Event()

    def watch() -> None:
        while os.getppid() == leader:
            if done.wait(1):
                return
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


@contextmanager
def leaving(job_dir: Path, listener: Listener, again: bool) -> Iterator[None]:
    """Where a signal ends what is done within, the first process says how it goes on, and in a cluster sees to it.

    `again`: the same command, started anew by the cluster, would continue.
    """
    try:
        yield
    except Stopped as stop:
        if rank_zero_only.rank in (0, None):
            leave(stop, job_dir, listener, again)
        raise


def leave(stop: Stopped, job_dir: Path, listener: Listener, again: bool) -> None:
    by_worker = listener.led and status.read_status(job_dir).get("state") == "stopped"
    if not by_worker:
        if job_dir.is_dir():  # it is made late, so that what is refused leaves none
            status.write_status(job_dir, "stopped", stop.name)
        way = f"saved; resume={job_dir} continues" if list_checkpoints(job_dir) else "nothing was saved yet"
        by_cluster = stop.signum != signal.SIGINT and not listener.requeue_by_submitit and again
        print(f"{stop.name}: {way}{slurm.requeue() if by_cluster else ''}", flush=True)
    if listener.requeue_by_submitit:
        listener.submitit()
